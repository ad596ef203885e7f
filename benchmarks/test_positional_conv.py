"""The positional convolution of the base model with GELU and residual, forward and backward: ours and eager PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hubert_ecg.ops import positional_conv
from hubert_ecg.testing import assert_close

TOKENS, WIDTH, GROUPS, TAPS = 93, 768, 16, 128


def eager(x, weight, bias):
    y = F.conv1d(x.transpose(1, 2), weight, bias, padding=TAPS // 2, groups=GROUPS)[..., :TOKENS]
    return x + F.gelu(y).transpose(1, 2)


@pytest.mark.parametrize("batch", [1, 16])
def test_positional_conv(batch, race):
    random = torch.Generator().manual_seed(0)
    x, weight, bias, grad = (
        torch.randn(*shape, generator=random)
        for shape in ((batch, TOKENS, WIDTH), (WIDTH, WIDTH // GROUPS, TAPS), (WIDTH,), (batch, TOKENS, WIDTH))
    )
    weight *= 0.02
    given = [t.requires_grad_() for t in (x, weight, bias)]

    def step(function, *more):
        y = function(*given, *more)
        return y.detach(), *torch.autograd.grad(y, given, grad)

    results = zip(["y", "x", "weight", "bias"], step(positional_conv, GROUPS), step(eager), strict=True)
    for name, actual, expected in results:
        assert_close(actual, expected, rtol=1e-4, atol=2e-4 * float(expected.abs().max()), name=name)
    race(lambda: step(positional_conv, GROUPS), {"eager PyTorch": lambda: step(eager)}, "records", batch)
