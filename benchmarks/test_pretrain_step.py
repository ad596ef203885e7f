"""One step of pretraining: ours, and transformers' HubertModel with the published configuration, masking and head."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hubert_ecg import ops
from hubert_ecg.models import HubertECGConfig, HubertECGForPretraining

BATCH, TOKENS = 16, 93


class Published(nn.Module):
    """Logits of all tokens by a cosine over [B, N, K, D]; those that are masked are picked afterwards."""

    def __init__(self, ours: HubertECGForPretraining, transformers):
        super().__init__()
        self.encoder = transformers.HubertModel(transformers.HubertConfig(**ours.config.to_dict()))
        state = ours.state_dict()
        heads = ("final_proj.", "label_embedding.")
        self.encoder.load_state_dict({name: value for name, value in state.items() if not name.startswith(heads)})
        self.project = nn.Linear(ours.config.hidden_size, ours.config.classifier_proj_size)
        self.project.load_state_dict(ours.final_proj[0].state_dict())
        self.codebook = nn.Parameter(state["label_embedding.0.weight"].clone())

    def forward(self, ecg, labels, masked):
        x = self.encoder(ecg.flatten(1), mask_time_indices=masked).last_hidden_state
        logits = F.cosine_similarity(self.project(x)[:, :, None], self.codebook[None, None], dim=-1) / 0.1
        return F.cross_entropy(logits[masked], labels[masked])


def precisions():
    yield "float32"
    # Elsewhere a CPU computes bfloat16 as float32, and slower.
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        yield "bfloat16"


@pytest.mark.benchmark(group="pretraining step")
@pytest.mark.parametrize("num_clusters", [100, 500, 1000], ids=lambda clusters: f"K{clusters}")
def test_pretrain_step(race, num_clusters):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    # All layers in each step, so that no two steps differ.
    config = HubertECGConfig.preset("base", vocab_sizes=[num_clusters], layerdrop=0.0)
    ours = HubertECGForPretraining(config)
    theirs = Published(ours, transformers)
    ecg, labels = torch.randn(BATCH, 12, 500), torch.randint(0, num_clusters, (BATCH, TOKENS))
    mask = ops.span_mask(BATCH, TOKENS, 0.33, seed=2)
    masked = torch.zeros(BATCH, TOKENS, dtype=torch.bool).scatter(1, mask, True)

    def our_loss():
        return ours(ecg, labels=labels, mask_indices=mask).loss

    def their_loss():
        return theirs(ecg, labels, masked)

    def step(model, loss, precision):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        half = torch.autocast("cpu", torch.bfloat16) if precision == "bfloat16" else contextlib.nullcontext()

        def run():
            optimizer.zero_grad()
            with half:
                value = loss()
            value.backward()
            optimizer.step()

        return run

    with torch.no_grad():
        # Without dropout the losses are equal: weights, mask and data are the same.
        expected = float((theirs.eval(), their_loss())[1])
        assert abs(float((ours.eval(), our_loss())[1]) - expected) < 1e-3 * expected
        if "bfloat16" in precisions():
            with torch.autocast("cpu", torch.bfloat16):
                assert abs(float(our_loss()) - expected) < 2e-2 * expected
    ours.train()
    theirs.train()
    best = list(precisions())[-1]
    peers = {f"transformers, {precision}": step(theirs, their_loss, precision) for precision in precisions()}
    if best != "float32":
        peers["ours, float32"] = step(ours, our_loss, "float32")
    race(step(ours, our_loss, best), peers, "records", BATCH, rounds=2)
