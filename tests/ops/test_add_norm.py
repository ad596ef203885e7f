"""What tests/ops/test_every_op.py does not ask of add_norm: a sum in half precision onto a residual that is not."""

from __future__ import annotations

import pytest
import torch

from hubert_ecg.ops import OPS, add_norm, use_backend


@pytest.mark.parametrize("backend", OPS["add_norm"].backends["cpu"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("of_x", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("of_residual", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes_may_differ(backend, of_residual, of_x, dropout_p):
    random = torch.Generator().manual_seed(0)
    x, residual, grad = (torch.randn(37, 65, generator=random).to(t) for t in (of_x, of_residual, of_residual))
    weight, bias = 1 + torch.randn(2, 65, generator=random)
    given = [part.requires_grad_() for part in (x, residual, weight, bias)]
    exact = [part.detach().double().requires_grad_() for part in given]
    expected = OPS["add_norm"].reference(*exact, 1e-5, dropout_p, torch.tensor(3))[0]
    with use_backend(backend):
        y = add_norm(*given, 1e-5, dropout_p, 3)
        found = torch.autograd.grad(y, given, grad)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    for mine, other, dtype in zip(
        (y, *found), (expected, *wanted), (of_residual, *(t.dtype for t in given)), strict=True
    ):
        assert mine.dtype == dtype
        # Half of eps is the most that rounding takes of one number.
        bound = max(torch.finfo(dtype).eps / 2, 1e-6)
        assert (mine - other).norm() < bound * other.norm()
