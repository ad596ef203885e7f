"""A product of the feed-forward layers of the base model in half precision, forward and backward: ours and torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hubert_ecg import ops

TOKENS, WIDTH, INNER = 93, 768, 3072
BATCH = 16


@pytest.mark.benchmark(group="linear")
def test_linear(race, device):
    if device.type == "cuda":
        pytest.skip("a GPU has products of half precision")
    random = torch.Generator(device).manual_seed(0)
    rows = BATCH * TOKENS
    x, weight, grad = (
        torch.randn(size, generator=random, device=device) for size in ((rows, WIDTH), (INNER, WIDTH), (rows, INNER))
    )

    def products(function, dtype):
        given = [t.to(dtype).requires_grad_() for t in (x, weight)]
        own = grad.to(dtype)

        def run():
            y = function(*given)
            return y, *torch.autograd.grad(y, given, own)

        return run

    ours, exact = products(ops.linear, torch.bfloat16), products(F.linear, torch.float32)
    for actual, expected in zip(ours(), exact(), strict=True):
        assert (actual - expected).norm() < 5e-3 * expected.norm()
    peers = {"torch, float32": exact, "torch, bfloat16": products(F.linear, torch.bfloat16)}
    race(ours, peers, "rows", rows, operations=6 * rows * WIDTH * INNER, dtype=torch.bfloat16)
