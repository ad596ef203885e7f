"""What tests/ops/test_every_op.py does not ask of linear: processors with products of half precision and without."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hubert_ecg.ops import OPS, linear, use_backend

HALVES = [torch.bfloat16, torch.float16]
BACKENDS = list(OPS["linear"].backends["cpu"])


@pytest.fixture(params=[*BACKENDS, "products of torch"])
def way(request, set_products):
    """How half precision is multiplied: by a backend, on a processor without products of it, or by torch."""
    by_torch = request.param not in BACKENDS
    set_products(HALVES if by_torch else ())
    with use_backend(request.param):
        yield request.param


def tensors(*shape, dtype=torch.float32, width=65):
    random = torch.Generator().manual_seed(0)
    sizes = ((*shape, width), (7, width), (7,))
    return [torch.randn(size, generator=random).to(dtype).requires_grad_() for size in sizes]


@pytest.mark.parametrize("width", [65, 768])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_is_as_near_as_half_precision(way, dtype, autocast, width):
    x, weight, bias = given = tensors(2, 61, width=width, dtype=torch.float32 if autocast else dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        y = linear(x, weight, bias)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        found = torch.autograd.grad(y, given, grad)
    assert y.dtype == dtype
    # Without such products, the weight is not rounded to half precision first.
    rounded = [x.to(dtype), *(part.to(dtype) if way == "products of torch" else part for part in (weight, bias))]
    exact = [part.detach().double().requires_grad_() for part in rounded]
    expected = F.linear(*exact)
    # Half of eps is the most that rounding takes of one number.
    bound = torch.finfo(dtype).eps / 2
    assert (y - expected).norm() < bound * expected.norm()
    for mine, other, part in zip(found, torch.autograd.grad(expected, exact, grad.double()), given, strict=True):
        assert mine.dtype == part.dtype
        assert (mine - other).norm() < bound * other.norm()
        if way != "products of torch" and mine.dtype == torch.float32 and part is not x:
            assert (mine - other).norm() < 2e-4 * other.norm(), "a gradient in float32 was rounded to half precision"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_is_torchs_in_other_dtypes(way, dtype):
    x, weight, bias = tensors(4, dtype=dtype)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == F.linear(x, weight).dtype


@pytest.mark.parametrize("shape", [(), (0,), (1, 0, 2)], ids=str)
def test_any_shape(way, shape):
    x, weight, bias = tensors(*shape, dtype=torch.bfloat16)
    y = linear(x, weight, bias)
    assert y.shape == (*shape, 7)
    to_x, to_weight, _ = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert (to_x.shape, to_weight.shape) == (x.shape, weight.shape)


def test_what_is_not_finite_stays_so(way):
    x, weight, _ = tensors(2, dtype=torch.bfloat16)
    with torch.no_grad():
        x[0, 0], x[1, 0] = torch.nan, torch.inf
    y = linear(x, weight)
    assert y[0].isnan().all()
    assert not y[1].isfinite().any()


def test_a_large_number_takes_digits_from_those_beside_it_alone(emulated):
    x, weight = torch.ones(1, 1024), torch.rand(5, 1024, generator=torch.Generator().manual_seed(0))
    x[0, 3], weight[:, 3] = 3e3, 1e-3
    y, exact = linear(x.bfloat16(), weight.bfloat16()), x.bfloat16().double() @ weight.bfloat16().double().T
    torch.testing.assert_close(y.double(), exact, rtol=2e-2, atol=0)


@pytest.mark.parametrize(("of_x", "of_weight"), [(1e35, 1e-3), (1e-30, 1e30), (1e32, 1e-32)])
def test_products_overflow_and_vanish_where_they_must(emulated, of_x, of_weight):
    x, weight = torch.full((1, 768), of_x).bfloat16(), torch.full((2, 768), of_weight).bfloat16()
    exact = x.double() @ weight.double().T
    torch.testing.assert_close(linear(x, weight).double(), exact, rtol=1e-2, atol=0)


def test_does_not_depend_on_the_default_dtype(emulated):
    x, weight, bias = tensors(3, dtype=torch.bfloat16)
    expected = linear(x, weight), linear(x, weight, bias)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(linear(x, weight), expected[0])
        assert torch.equal(linear(x, weight, bias), expected[1])
    finally:
        torch.set_default_dtype(torch.float32)


def test_frozen_parts_get_no_gradient(emulated):
    for frozen in range(3):
        given = tensors(3, dtype=torch.bfloat16)
        given[frozen].requires_grad_(False)
        linear(*given).sum().backward()
        assert [part.grad is None for part in given] == [i == frozen for i in range(3)]


def test_the_backward_is_the_derivative():
    with use_backend("reference"):
        assert torch.autograd.gradcheck(OPS["linear"].call, tuple(tensors(3, dtype=torch.float64, width=5)))


def test_compiles_in_one_graph(way):
    x, weight, bias = tensors(3)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return linear(x, weight, bias)

    with torch.autocast("cpu", torch.bfloat16):
        expected = linear(x, weight, bias)
    assert torch.equal(run(x), expected)
