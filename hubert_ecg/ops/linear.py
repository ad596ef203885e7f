"""A linear layer, in half precision too where the processor has no products of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hubert_ecg import native
from hubert_ecg.ops import linear_reference as reference
from hubert_ecg.ops._op import Array, Op, autocast_dtype, check_device, check_dtype, describe, takes_arrays
from hubert_ecg.ops._rows import as_rows, wide

_linear = Op("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", reference.linear)
_backward = Op(
    "linear_backward(Tensor grad, Tensor x, Tensor weight, bool with_x=True, bool with_weight=True, "
    "bool with_bias=True) -> (Tensor, Tensor, Tensor)",
    reference.linear_backward,
)


def _products_of_this_cpu() -> frozenset[torch.dtype]:
    found = {torch.float32, torch.float64}
    if torch.backends.mkldnn.is_available():
        # On a processor with AVX-512 alone torch says yes, too, and emulates.
        instructions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        emulated = torch.cpu._is_avx512_supported() and not any(
            getattr(torch.cpu, name, lambda: True)() for name in instructions
        )
        if torch.ops.mkldnn._is_mkldnn_bf16_supported() and not emulated:
            found.add(torch.bfloat16)
        if torch.ops.mkldnn._is_mkldnn_fp16_supported():
            found.add(torch.float16)
    return frozenset(found)


# Asked once: the compiler cannot trace the question.
_PRODUCTS_OF_THIS_CPU = _products_of_this_cpu()


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype to multiply matrices of ``dtype`` in: float32 where a CPU would only emulate it."""
    return dtype if device.type != "cpu" or dtype in _PRODUCTS_OF_THIS_CPU else torch.float32


@takes_arrays("x", "weight", "bias")
def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """``x weight^T + bias`` as :func:`torch.nn.functional.linear`, under autocast too.

    A CPU that only emulates products of half precision takes many times as long for them as for those of float32.
    There the products are of float32, and on x86 of 16-bit integers, with one unit for 256 numbers of a row: from a
    hundred rows on faster than float32. A sum over 256 is off by about 1e-5 of the product of both lengths, which does
    not show beside the rounding of a result to bfloat16, unless few large numbers of a row meet zeros; and what is not
    finite makes its row NaN.

    >>> linear(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([0.5]))
    tensor([[11.5000]])

    Args:
        x: [..., D] floating point.
        weight: [N, D] of the dtype of x; under autocast, any.
        bias: [N], as the weight; default: none.

    Returns:
        [..., N] of the dtype of x, or of autocast's.

    Raises:
        ValueError: a wrong shape, dtype or device, named with what was given.
    """
    if not x.is_floating_point() or x.ndim < 1:
        raise ValueError(f"linear: x must be floating point [..., D], got {describe(x)}")
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1] or not weight.is_floating_point():
        raise ValueError(f"linear: weight must be floating point [N, {x.shape[-1]}], got {describe(weight)}")
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise ValueError(f"linear: bias must be floating point [{len(weight)}], got {describe(bias)}")
    check_device("linear", x, weight=weight, bias=bias)
    wanted = autocast_dtype(x)
    if wanted is None:
        check_dtype("linear", x, weight=weight, bias=bias)
    dtype = wanted or x.dtype
    if product_dtype(x.device, dtype) == dtype:
        return F.linear(x, weight, bias)
    return _linear.call(x.to(dtype), weight, bias)


@_linear.fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], len(weight))


@_backward.fake
def _(grad, x, weight, with_x=True, with_weight=True, with_bias=True):
    to_x, to_weight = x.new_empty(x.shape if with_x else 0), weight.new_empty(weight.shape if with_weight else 0)
    return to_x, to_weight, x.new_empty(len(weight) if with_bias else 0, dtype=wide(x))


@_linear.native
def _(kernel, x, weight, bias):
    if x.dtype in (torch.float32, torch.float64):
        return reference.linear(x, weight, bias)
    y = x.new_empty(*x.shape[:-1], len(weight))
    shift = torch.empty(0, dtype=torch.float32) if bias is None else bias.float().contiguous()
    kernel(as_rows(x, x.dtype), _at_most_float32(weight), shift, as_rows(y, y.dtype))
    return y


@_backward.native
def _(kernel, grad, x, weight, with_x=True, with_weight=True, with_bias=True):
    if x.dtype in (torch.float32, torch.float64):
        return reference.linear_backward(grad, x, weight, with_x, with_weight, with_bias)
    own, factors = as_rows(grad, grad.dtype), _at_most_float32(weight)
    to_x, to_weight = x.new_empty(x.shape if with_x else 0), factors.new_empty(weight.shape if with_weight else 0)
    outputs = as_rows(to_x, x.dtype) if with_x else to_x.view(0, 0), to_weight if with_weight else to_weight.view(0, 0)
    kernel(own, as_rows(x, x.dtype), factors, *outputs)
    to_bias = own.sum(0, dtype=torch.float32) if with_bias else torch.empty(0, dtype=torch.float32)
    return to_x, to_weight.to(weight.dtype), to_bias


def integer_kernels(x: Tensor) -> tuple[Callable[..., None], Callable[..., None]] | None:
    """The kernels of ``linear`` and of its backward: None where they are not built, or products of x not emulated.

    They take rows that lie anywhere, see csrc/linear.h.
    """
    if x.dtype not in (torch.float16, torch.bfloat16) or product_dtype(x.device, x.dtype) == x.dtype:
        return None
    forward, backward = (native.find(op.name, "cpu") for op in (_linear, _backward))
    return (forward, backward) if forward and backward else None


def _at_most_float32(weight: Tensor) -> Tensor:
    return (weight.float() if weight.dtype == torch.float64 else weight).contiguous()


def _setup_context(ctx, inputs, output):
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _differentiate(ctx, grad):
    x, weight = ctx.saved_tensors
    with_x, with_weight, with_bias = ctx.needs_input_grad
    to_x, to_weight, to_bias = _backward.call(grad, x, weight, with_x, with_weight, with_bias)
    return (
        to_x if with_x else None,
        to_weight if with_weight else None,
        to_bias.to(ctx.bias_dtype) if with_bias else None,
    )


_linear.autograd(_differentiate, _setup_context)
