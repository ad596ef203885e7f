"""Ceilings of the device: what every kernel's share is taken of."""

from __future__ import annotations

import pytest
import torch

from hubert_ecg.testing import assert_close

from . import ceilings

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.benchmark(group="ceilings")
def test_copy(race, device):
    run, moved = ceilings.copy(device)
    race(run, {}, "bytes", moved)


@pytest.mark.benchmark(group="ceilings")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_product(race, device, dtype):
    if dtype not in ceilings.precisions(device):
        pytest.skip(f"{device} has no products in {dtype}")
    a, b = (torch.randn(64, 512, device=device).to(dtype) for _ in range(2))
    exact = a.double() @ b.double().T
    assert_close((a @ b.T).double() / exact.norm(), exact / exact.norm(), rtol=0, atol=TOLERANCE[dtype], name="product")
    run, operations = ceilings.product(device, dtype)
    race(run, {}, "operations", operations)
