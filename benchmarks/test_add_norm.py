"""Dropout, residual and layer norm of one layer of the base model, forward and backward: ours and eager PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hubert_ecg import ops
from hubert_ecg.ops import OPS
from hubert_ecg.testing import assert_close

TOKENS, WIDTH = 93, 768
BATCH = {"cpu": 16, "cuda": 448}


def eager(x, residual, weight, bias, p):
    return F.layer_norm(residual + F.dropout(x, p), (WIDTH,), weight, bias)


@pytest.mark.benchmark(group="add_norm")
@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["whole", "dropout"])
def test_add_norm(race, device, dropout_p):
    batch = BATCH[device.type]
    # As under autocast: a product's result is in half precision, what it is added to is not.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    random = torch.Generator(device).manual_seed(0)
    x, residual, grad = (torch.randn(batch, TOKENS, WIDTH, generator=random, device=device) for _ in range(3))
    weight, bias = (torch.randn(WIDTH, generator=random, device=device) for _ in range(2))
    given = [t.requires_grad_() for t in (x.to(dtype), residual, weight, bias)]

    def with_gradients(function, *more):
        def run(p=dropout_p):
            y = function(*given, *more, p)
            return y, *torch.autograd.grad(y, given, grad)

        return run

    ours, theirs = with_gradients(ops.add_norm, 1e-5), with_gradients(eager)
    peers = {"eager PyTorch": theirs}
    if device.type == "cuda":
        peers["torch.compile"] = with_gradients(torch.compile(eager))
    rtol, atol = OPS["add_norm_backward"].tolerance[dtype]
    for actual, expected in zip(ours(0.0), theirs(0.0), strict=True):
        scale = max(1.0, float(expected.detach().abs().max()))
        assert_close(actual, expected, rtol=rtol, atol=atol * scale, name="add_norm")
    # Forward: both read, the result written; backward: the gradient and both read, and the gradients of both written.
    race(ours, peers, "records", batch, moved=3 * given[0].nbytes + 5 * residual.nbytes)
