"""One step of pretraining: ours, and transformers' HubertModel with the published configuration, masking and head."""

from __future__ import annotations

import copy

import pytest
import torch

from hubert_ecg import ops
from hubert_ecg.models import HubertECGConfig, HubertECGForPretraining
from hubert_ecg.train.machine import autocast
from hubert_ecg.train.throughput import training_flops

from .ceilings import precisions
from .published import TOKENS, Pretraining, peers_of, step

BATCH = {"cpu": 16, "cuda": 448}
# Size and clusters of the three published iterations, and of the other sizes where a step does not take minutes.
CASES = {"cpu": [("base", 100), ("base", 500), ("base", 1000)]}
CASES["cuda"] = [*CASES["cpu"], ("small", 100), ("large", 100)]


def pytest_generate_tests(metafunc):
    cases = CASES[metafunc.config.getoption("device")]
    ids = [f"{'' if size == 'base' else f'{size}-'}K{clusters}" for size, clusters in cases]
    metafunc.parametrize(("size", "num_clusters"), cases, ids=ids)


@pytest.mark.benchmark(group="pretraining step")
def test_pretrain_step(race, device, size, num_clusters):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    batch = BATCH[device.type]
    # All layers in each step, so that no two steps differ.
    ours = HubertECGForPretraining(HubertECGConfig.preset(size, vocab_sizes=[num_clusters], layerdrop=0.0)).to(device)
    theirs = Pretraining(ours).to(device)
    ecg = torch.randn(batch, 12, 500).to(device)
    labels = torch.randint(0, num_clusters, (batch, TOKENS)).to(device)
    mask = ops.span_mask(batch, TOKENS, 0.33, seed=2, device=device)
    masked = torch.zeros(batch, TOKENS, dtype=torch.bool, device=device).scatter(1, mask, True)

    def our_loss(model=ours, records=batch):
        return model(ecg[:records], labels=labels[:records], mask_indices=mask[:records]).loss

    def their_loss(model, records=batch):
        return model(ecg[:records], labels[:records], masked[:records])

    # What torch emulates takes minutes: it is tried on the iteration whose base model was published.
    all_precisions = device.type == "cpu" and (size, num_clusters) == ("base", 500)
    with torch.no_grad():
        # Without dropout the losses are equal: weights, mask and data are the same.
        expected = float(their_loss(theirs.eval(), 8))
        assert abs(float(our_loss(ours.eval(), 8)) - expected) < 1e-3 * expected
        with autocast(device, torch.bfloat16):
            assert abs(float(our_loss(records=8)) - expected) < 2e-2 * expected
        if all_precisions:
            expected = float(their_loss(theirs, 1))
            with autocast(device, torch.bfloat16):
                assert abs(float(their_loss(theirs, 1)) - expected) < 2e-2 * expected
    ours.train()
    theirs.train()
    # Compiling takes longer than everything else; it is tried on the published first iteration.
    with_compiler = (size, num_clusters) == ("base", 100)
    peers = peers_of(ours, our_loss, theirs, their_loss, with_compiler, all_precisions)
    if device.type == "cuda" and with_compiler:
        compiled = copy.deepcopy(ours)
        compiled.compile_layers()
        peers["ours, layers compiled"] = step(compiled, lambda: our_loss(compiled), torch.bfloat16, fused=True)
    operations = batch * training_flops(ours, ecg[0].numel())
    ours_in_half = step(ours, our_loss, torch.bfloat16, fused=True)
    floor = {"operations": operations, "dtype": torch.bfloat16}
    emulated = torch.bfloat16 not in precisions(device)
    race(ours_in_half, peers, "records", batch, rounds=2, once=["transformers, bfloat16"] * emulated, **floor)
