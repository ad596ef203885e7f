"""What padding costs: a batch that says it has none, beside one that says nothing, and one that has some."""

from __future__ import annotations

import pytest
import torch

from hubert_ecg.models import HubertECG, HubertECGConfig


@pytest.mark.benchmark(group="padding")
def test_no_padding_costs_nothing(race):
    torch.manual_seed(0)
    model = HubertECG(HubertECGConfig.preset("small")).eval()
    ecg, full = torch.randn(8, 12, 500), torch.full((8,), 500)

    def encode(lengths):
        def run():
            with torch.no_grad():
                return model(ecg, lengths=lengths).last_hidden_state

        return run

    assert torch.equal(encode(full)(), encode(None)())
    peers = {"no lengths": encode(None), "half of the batch padded": encode(torch.tensor([500, 300] * 4))}
    race(encode(full), peers, "records", 8)
