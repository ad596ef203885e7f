"""A linear layer, in half precision too where the processor has no products of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hubert_ecg.ops import linear_reference as reference
from hubert_ecg.ops._op import Array, Op, check_device, describe, takes_arrays

_linear = Op("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", reference.linear)
_backward = Op(
    "linear_backward(Tensor grad, Tensor x, Tensor weight, bool with_x=True, bool with_weight=True) "
    "-> (Tensor, Tensor, Tensor)",
    reference.linear_backward,
)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of products: that of x, but float32 where a CPU would only emulate it."""
    if x.device.type != "cpu" or x.dtype in (torch.float32, torch.float64):
        return x.dtype
    half = x.dtype == torch.float16
    supported = torch.ops.mkldnn._is_mkldnn_fp16_supported if half else torch.ops.mkldnn._is_mkldnn_bf16_supported
    return x.dtype if torch.backends.mkldnn.is_available() and supported() else torch.float32


@takes_arrays("x", "weight", "bias")
def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """``x weight^T + bias``, under autocast in its dtype.

    A CPU that only emulates products of half precision takes many times as long for them as for those of float32.
    There this takes 16 bits for each number, with one unit for some hundred numbers of a row, exact sums of them, and
    rounds once: no further from the truth than half precision is, and faster than float32.

    >>> linear(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([0.5]))
    tensor([[11.5000]])

    Args:
        x: [..., D] floating point.
        weight: [N, D].
        bias: [N]; default: none.

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
    if x.device.type != "cpu":
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype("cpu"))
    return _linear.call(x, weight, bias)


@_linear.fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], len(weight))


@_backward.fake
def _(grad, x, weight, with_x=True, with_weight=True):
    to_x, to_weight = x.new_empty(x.shape if with_x else 0), weight.new_empty(weight.shape if with_weight else 0)
    return to_x, to_weight, weight.new_empty(len(weight))


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


@_linear.composed
def _(x, weight, bias):
    dtype = product_dtype(x)
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype).contiguous()


@_backward.composed
def _(grad, x, weight, with_x=True, with_weight=True):
    dtype = product_dtype(x)
    own = _rows(grad.to(dtype))
    to_x = (own @ weight.to(dtype)).view(x.shape).to(x.dtype) if with_x else x.new_zeros(0)
    to_weight = (own.T @ _rows(x.to(dtype))).to(weight.dtype) if with_weight else weight.new_zeros(0)
    return to_x, to_weight, own.sum(0).to(weight.dtype)


@_linear.native
def _(kernel, x, weight, bias):
    if product_dtype(x) == x.dtype:
        return _linear.backends["cpu"]["composed"](x, weight, bias)
    y = x.new_empty(*x.shape[:-1], len(weight))
    shift = torch.empty(0) if bias is None else bias.float().contiguous()
    kernel(_rows(x).contiguous(), weight.contiguous(), shift, _rows(y))
    return y


@_backward.native
def _(kernel, grad, x, weight, with_x=True, with_weight=True):
    if product_dtype(x) == x.dtype:
        return _backward.backends["cpu"]["composed"](grad, x, weight, with_x, with_weight)
    own = _rows(grad).contiguous()
    to_x, to_weight = x.new_empty(x.shape if with_x else 0), weight.new_empty(weight.shape if with_weight else 0)
    outputs = _rows(to_x) if with_x else to_x.view(0, 0), to_weight if with_weight else to_weight.view(0, 0)
    kernel(own, _rows(x).contiguous(), weight.contiguous(), *outputs)
    return to_x, to_weight, own.sum(0, dtype=torch.float32).to(weight.dtype)


def _setup_context(ctx, inputs, output):
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.biased = bias is not None


def _differentiate(ctx, grad):
    x, weight = ctx.saved_tensors
    with_x, with_weight, _ = ctx.needs_input_grad
    to_x, to_weight, to_bias = _backward.call(grad, x, weight, with_x, with_weight)
    return to_x if with_x else None, to_weight if with_weight else None, to_bias if ctx.biased else None


_linear.autograd(_differentiate, _setup_context)
