"""What padding costs: a batch that says it has none, beside one that says nothing, and one that has some."""

from __future__ import annotations

import pytest
import torch

from hubert_ecg.models import HubertECG, HubertECGConfig

BATCH = {"cpu": 8, "cuda": 448}


@pytest.mark.benchmark(group="padding")
def test_no_padding_costs_nothing(race, device):
    torch.manual_seed(0)
    batch = BATCH[device.type]
    model = HubertECG(HubertECGConfig.preset("small")).eval().to(device)
    # Lengths stay on the host, where it costs nothing to see that they are all whole.
    ecg, full = torch.randn(batch, 12, 500).to(device), torch.full((batch,), 500)

    def encode(lengths):
        def run():
            with torch.no_grad():
                return model(ecg, lengths=lengths).last_hidden_state

        return run

    assert torch.equal(encode(full)(), encode(None)())
    peers = {"no lengths": encode(None), "half of the batch padded": encode(torch.tensor([500, 300] * (batch // 2)))}
    race(encode(full), peers, "records", batch)
