"""The positional convolution in each of its forms against torch's in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hubert_ecg.ops import positional_conv
from hubert_ecg.ops.positional_conv import _by_fourier, _direct, _fourier_pays

# Records, tokens, groups, channels of a group, taps.
SIZES = [(2, 93, 2, 3, 128), (1, 1, 1, 2, 1), (3, 5, 2, 2, 7), (2, 7, 1, 4, 8), (2, 300, 2, 2, 5), (1, 4, 2, 1, 2)]


def arguments(batch, tokens, groups, per_group, taps, dtype=torch.float64):
    random = torch.Generator().manual_seed(0)
    shapes = [(batch, tokens, groups * per_group), (groups * per_group, per_group, taps), (groups * per_group,)]
    return [torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def expected_of(x, weight, bias, residual=True):
    taps, groups = weight.shape[2], x.shape[2] // weight.shape[1]
    padded = F.pad(x.transpose(1, 2), (taps // 2, taps - 1 - taps // 2))
    y = F.gelu(F.conv1d(padded, weight, bias, groups=groups)).transpose(1, 2)
    return x + y if residual else y


@pytest.mark.parametrize("form", [_direct, _by_fourier])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_each_form_and_its_gradients_are_exact(form, size):
    given = arguments(*size)
    actual, expected = given[0] + F.gelu(form(*given)), expected_of(*given)
    torch.testing.assert_close(actual, expected, atol=1e-11, rtol=1e-11)
    ours, theirs = (torch.autograd.grad(y.square().sum(), given) for y in (actual, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
@pytest.mark.parametrize("batch", [0, 1, 16])
def test_float32_and_half_precision(batch, dtype, atol, residual):
    given = arguments(batch, 93, 4, 12, 128, dtype)
    with torch.no_grad():
        given[1] *= 0.05
        actual = positional_conv(*given, 4, residual)
        expected = expected_of(*(t.double() for t in given), residual)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, atol=atol, rtol=1e-2 if atol > 1e-3 else 1e-5)


def test_takes_the_form_with_fewer_operations():
    x, weight = torch.empty(16, 93, 768), torch.empty(768, 48, 128)
    assert _fourier_pays(x, weight)
    assert _fourier_pays(x[:2], weight)
    assert not _fourier_pays(x[:1], weight)
    assert not _fourier_pays(x, weight[..., :3])
    assert not _fourier_pays(x.to("meta"), weight)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("halves", [(), (torch.bfloat16,)], ids=["emulated", "has products"])
def test_autocast_keeps_transforms_and_what_a_cpu_emulates_in_float32(batch, halves, set_products):
    set_products(halves)
    given = arguments(batch, 93, 2, 6, 128, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = positional_conv(*given, 2)
    assert y.dtype == torch.float32
    in_float32 = positional_conv(*given, 2)
    torch.testing.assert_close(y, in_float32, atol=0.1, rtol=0.02)
    assert torch.equal(y, in_float32) == (batch > 1 or not halves)


def test_compiles_to_one_graph():
    given = arguments(3, 20, 2, 3, 9, torch.float32)
    compiled = torch.compile(positional_conv, backend="aot_eager", fullgraph=True)
    actual, expected = compiled(*given, 2), positional_conv(*given, 2)
    torch.testing.assert_close(actual, expected)
    for mine, other in zip(*(torch.autograd.grad(y.square().sum(), given) for y in (actual, expected)), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 6)}, r"x must be floating point \[B, T, D\], got float32\[3, 6\]"),
        ({"x": torch.zeros(1, 3, 6, dtype=torch.int64)}, r"x must be floating point .*, got int64\[1, 3, 6\]"),
        ({"groups": 4}, "groups must divide 6, got 4"),
        ({"groups": 0}, "groups must divide 6, got 0"),
        ({"weight": torch.zeros(6, 2, 5)}, r"weight must be floating point \[6, 3, k\], got float32\[6, 2, 5\]"),
        ({"weight": torch.zeros(6, 3, 0)}, r"weight must be floating point \[6, 3, k\], got float32\[6, 3, 0\]"),
        ({"bias": torch.zeros(5)}, r"bias must be floating point \[6\], got float32\[5\]"),
        ({"bias": [0.0] * 6}, "bias must be a NumPy, CuPy or torch array, got list"),
        ({"groups": 2.0}, r"groups must be a whole number, got 2\.0"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    given = {"x": torch.zeros(1, 3, 6), "weight": torch.zeros(6, 3, 5), "bias": torch.zeros(6), "groups": 2}
    with pytest.raises(ValueError, match=f"^positional_conv: {message}"):
        positional_conv(**{**given, **change})
