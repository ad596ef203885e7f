"""Statistics of the frames of 1,000 records: ours, and the reference in plain torch."""

from __future__ import annotations

import pytest
import torch

from hubert_ecg import ops
from hubert_ecg.ops import OPS
from hubert_ecg.testing import assert_close

NUM_RECORDS, NUM_TOKENS = 1000, 93


@pytest.mark.benchmark(group="time_freq")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("num_samples", [64, 32, 322], ids=lambda s: f"S{s}")
def test_time_freq(race, num_samples, dtype):
    random = torch.Generator().manual_seed(0)
    frames = torch.randn(NUM_RECORDS * NUM_TOKENS, num_samples, generator=random).to(dtype)
    reference = OPS["time_freq"].reference
    rtol, atol = OPS["time_freq"].tolerance[dtype]
    assert_close(ops.time_freq(frames[:500]), reference(frames[:500].double()), rtol=rtol, atol=atol, name="ours")
    race(
        lambda: ops.time_freq(frames),
        {"torch, reference": lambda: reference(frames)},
        "records",
        NUM_RECORDS,
        rounds=5 if num_samples <= 64 else 3,
    )
