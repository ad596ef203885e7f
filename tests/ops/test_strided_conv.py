"""What tests/ops/test_every_op.py does not ask of strided_conv: torch's convolution, autocast, memory."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from hubert_ecg.ops import strided_conv

WINDOWS = pytest.mark.parametrize(
    ("length", "kernel", "stride"),
    [(149, 3, 2), (148, 3, 2), (37, 2, 2), (90, 10, 4), (40, 3, 5), (15, 1, 7), (11, 11, 1), (8, 7, 3)],
)


@WINDOWS
def test_is_the_convolution_of_torch(length, kernel, stride):
    random = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, generator=random, dtype=torch.float64).requires_grad_()
        for shape in ((3, length, 6), (5, 6, kernel), (5,))
    )
    actual = strided_conv(x, weight, stride, bias)
    expected = F.conv1d(x.transpose(1, 2), weight, bias, stride).transpose(1, 2)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)
    ours, theirs = (torch.autograd.grad(y.square().sum(), (x, weight, bias)) for y in (actual, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-10, rtol=1e-10)


@pytest.fixture(params=["integers", "float32"])
def way(request, emulated, monkeypatch):
    """How half precision is multiplied on a processor without products of it: float32 where nothing is built."""
    if request.param == "float32":
        # The package has the function under the module's name.
        monkeypatch.setattr(sys.modules["hubert_ecg.ops.strided_conv"], "integer_kernels", lambda x: None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [0, 1, 3])
@WINDOWS
def test_is_as_near_as_half_precision(way, batch, length, kernel, stride, dtype):
    random = torch.Generator().manual_seed(0)
    x, weight, bias = given = [
        torch.randn(shape, generator=random).to(dtype).requires_grad_()
        for shape in ((batch, length, 33), (17, 33, kernel), (17,))
    ]
    exact = [part.detach().double().requires_grad_() for part in given]
    y = strided_conv(x, weight, stride, bias)
    expected = F.conv1d(exact[0].transpose(1, 2), *exact[1:], stride).transpose(1, 2)
    # Rows of a gradient may lie anywhere, too.
    grad = torch.randn(17, *y.shape[:2], generator=random).to(dtype).permute(1, 2, 0)
    found = torch.autograd.grad(y, given, grad, retain_graph=True)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    bound = torch.finfo(dtype).eps / 2
    for mine, other in zip((y, *found), (expected, *wanted), strict=True):
        assert mine.dtype == dtype
        assert mine.shape == other.shape
        assert (mine - other).norm() <= bound * other.norm()
    (alone,) = torch.autograd.grad(strided_conv(x.detach(), weight, stride), weight, grad)
    assert torch.equal(alone, found[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_decides_the_dtype(dtype):
    x, weight = torch.randn(2, 50, 8), torch.randn(4, 8, 3).requires_grad_()
    with torch.autocast("cpu", dtype):
        y = strided_conv(x, weight, 2)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), strided_conv(x, weight, 2), atol=0.2, rtol=2e-2)
    (grad,) = torch.autograd.grad(y.float().sum(), weight)
    assert grad.dtype == torch.float32


def test_keeps_its_arguments_alone_for_the_backward():
    x, weight = torch.randn(2, 51, 8).requires_grad_(), torch.randn(4, 8, 3).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        strided_conv(x, weight, 2)
    assert kept == [x.data_ptr(), weight.data_ptr()]
