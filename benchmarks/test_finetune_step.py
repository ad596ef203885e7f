"""One step of fine-tuning the base model for 71 labels: ours, and transformers' HubertModel with a linear head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hubert_ecg.models import HubertECGConfig, HubertECGForClassification
from hubert_ecg.train.throughput import training_flops

from .published import Classification, peers_of, step

BATCH = {"cpu": 16, "cuda": 64}
NUM_LABELS = 71


@pytest.mark.benchmark(group="fine-tuning step")
def test_finetune_step(race, device):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    batch = BATCH[device.type]
    config = HubertECGConfig.preset("base", layerdrop=0.0)
    ours = HubertECGForClassification(config, label_names=map(str, range(NUM_LABELS))).to(device)
    theirs = Classification(ours).to(device)
    ecg = torch.randn(batch, 12, 500).to(device)
    targets = (torch.rand(batch, NUM_LABELS) < 0.05).float().to(device)

    def our_loss():
        return ours(ecg, targets=targets).loss

    def their_loss(model):
        return F.binary_cross_entropy_with_logits(model(ecg).float(), targets)

    with torch.no_grad():
        expected = float((theirs.eval(), their_loss(theirs))[1])
        assert abs(float((ours.eval(), our_loss())[1]) - expected) < 1e-4 * expected
    ours.train()
    theirs.train()
    operations = batch * training_flops(ours, ecg[0].numel())
    race(
        step(ours, our_loss, torch.bfloat16, fused=True),
        peers_of(ours, our_loss, theirs, their_loss),
        "records",
        batch,
        rounds=2,
        operations=operations,
        dtype=torch.bfloat16,
    )
