"""Scores of records by a fine-tuned base model: ours, and transformers' HubertModel with a linear head."""

from __future__ import annotations

import pytest
import torch

from hubert_ecg.models import HubertECGConfig, HubertECGForClassification
from hubert_ecg.testing import assert_close
from hubert_ecg.train.machine import autocast
from hubert_ecg.train.throughput import forward_flops

from .published import Classification, of_the_cpu

BATCHES = {"cpu": [1, 16], "cuda": [1, 448]}


def pytest_generate_tests(metafunc):
    metafunc.parametrize("batch", BATCHES[metafunc.config.getoption("device")])


@pytest.mark.benchmark(group="inference")
def test_inference(race, device, batch):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    ours = HubertECGForClassification(HubertECGConfig.preset("base"), label_names=["a", "b"]).eval().to(device)
    theirs = Classification(ours).eval().to(device)
    ecg = torch.randn(batch, 12, 500).to(device)

    def scores(model, dtype=torch.bfloat16):
        def run():
            with torch.inference_mode(), autocast(device, dtype):
                return model(ecg)

        return run

    exact = scores(theirs, torch.float32)()
    assert_close(scores(ours, torch.float32)().logits, exact, rtol=0, atol=1e-4, name="logits")
    assert_close(scores(ours)().logits, exact, rtol=0, atol=3e-2, name="logits")
    if device.type == "cuda":
        peers = {"transformers": scores(theirs), "transformers, compiled": scores(torch.compile(theirs))}
    else:
        peers = {"ours, float32": scores(ours, torch.float32)}
        peers |= {f"transformers, {name}": scores(theirs, dtype) for name, dtype in of_the_cpu(device).items()}
    parts = forward_flops(ours.config, ecg[0].numel())
    operations = batch * (sum(parts.values()) - parts["attention"])  # which is a part of the layers
    race(scores(ours), peers, "records", batch, operations=operations, dtype=torch.bfloat16)
