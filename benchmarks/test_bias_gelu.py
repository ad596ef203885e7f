"""Bias, GELU and dropout between the products of one layer of the base model, forward and backward: ours and eager."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hubert_ecg import ops
from hubert_ecg.ops import OPS
from hubert_ecg.testing import assert_close

TOKENS, WIDTH = 93, 3072
BATCH = {"cpu": 16, "cuda": 448}


def eager(x, bias, p):
    return F.dropout(F.gelu(x + bias.to(x.dtype)), p)


@pytest.mark.benchmark(group="bias_gelu")
@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["whole", "dropout"])
def test_bias_gelu(race, device, dropout_p):
    batch = BATCH[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    random = torch.Generator(device).manual_seed(0)
    x, grad = (torch.randn(batch, TOKENS, WIDTH, generator=random, device=device).to(dtype) for _ in range(2))
    given = [t.requires_grad_() for t in (x, torch.randn(WIDTH, generator=random, device=device))]

    def with_gradients(function):
        def run(p=dropout_p):
            y = function(*given, p)
            return y, *torch.autograd.grad(y, given, grad)

        return run

    ours, theirs = with_gradients(ops.bias_gelu), with_gradients(eager)
    peers = {"eager PyTorch": theirs}
    if device.type == "cuda":
        peers["torch.compile"] = with_gradients(torch.compile(eager))
    rtol, atol = OPS["bias_gelu_backward"].tolerance[dtype]
    for actual, expected in zip(ours(0.0), theirs(0.0), strict=True):
        scale = max(1.0, float(expected.detach().abs().max()))
        assert_close(actual, expected, rtol=rtol, atol=atol * scale, name="bias_gelu")
    # Forward: x read, the result written; backward: x and the gradient read, one gradient written.
    race(ours, peers, "records", batch, moved=5 * x.nbytes)
