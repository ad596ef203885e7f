from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from hubert_ecg.ops import linear

# The package has the function under the module's name.
module = sys.modules["hubert_ecg.ops.linear"]
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=[False, True], ids=["emulated", "has products"])
def products(request, monkeypatch):
    """A processor without products of half precision, and one that has them."""
    of_half = (lambda x: x.dtype) if request.param else (lambda x: torch.promote_types(x.dtype, torch.float32))
    monkeypatch.setattr(module, "product_dtype", of_half)
    return request.param


def tensors(*shape, dtype=torch.float32, width=65):
    random = torch.Generator().manual_seed(0)
    sizes = ((*shape, width), (7, width), (7,))
    return [torch.randn(size, generator=random).to(dtype).requires_grad_() for size in sizes]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_is_as_near_as_half_precision(products, dtype, autocast):
    x, weight, bias = given = tensors(2, 3, dtype=torch.float32 if autocast else dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        y = linear(x, weight, bias)
    assert y.dtype == dtype
    # Without such products, the weight is not rounded to half precision first.
    rounded = [x.to(dtype), *(part.to(dtype) if products else part for part in (weight, bias))]
    exact = [part.detach().double().requires_grad_() for part in rounded]
    expected = F.linear(*exact)
    bound = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=bound, atol=5e-3)
    assert (y - expected).norm() < bound / 2 * expected.norm()
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = torch.autograd.grad(y, given, grad)
    for mine, other, part in zip(found, torch.autograd.grad(expected, exact, grad.double()), given, strict=True):
        assert mine.dtype == part.dtype
        torch.testing.assert_close(mine.double(), other, rtol=bound, atol=4 * bound)
        assert (mine - other).norm() < bound / 2 * other.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_is_torchs_in_other_dtypes(products, dtype):
    x, weight, bias = tensors(4, dtype=dtype)
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), rtol=0, atol=1e-5)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == F.linear(x, weight).dtype


@pytest.mark.parametrize("shape", [(), (0,), (1, 0, 2)], ids=str)
def test_any_shape(products, shape):
    x, weight, bias = tensors(*shape, dtype=torch.bfloat16)
    assert linear(x, weight, bias).shape == (*shape, 7)


def test_what_is_not_finite_stays_so(products):
    x, weight, _ = tensors(2, dtype=torch.bfloat16)
    with torch.no_grad():
        x[0, 0], x[1, 0] = torch.nan, torch.inf
    y = linear(x, weight)
    assert y[0].isnan().all()
    assert not y[1].isfinite().any()


def test_compiles_in_one_graph(products):
    x, weight, bias = tensors(3)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return linear(x, weight, bias)

    with torch.autocast("cpu", torch.bfloat16):
        expected = linear(x, weight, bias)
    assert torch.equal(run(x), expected)
