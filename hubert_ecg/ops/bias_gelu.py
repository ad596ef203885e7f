"""Between the two products of a feed-forward layer: bias, GELU and dropout in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from hubert_ecg.ops import _dropout
from hubert_ecg.ops import bias_gelu_reference as reference
from hubert_ecg.ops._op import Array, Op, check_device, describe, takes_arrays
from hubert_ecg.ops._rows import as_rows, wide

_bias_gelu = Op("bias_gelu(Tensor x, Tensor bias, float dropout_p, Tensor? seed) -> Tensor", reference.bias_gelu)
_backward = Op(
    "bias_gelu_backward(Tensor grad, Tensor x, Tensor bias, float dropout_p, Tensor? seed) -> (Tensor, Tensor)",
    reference.bias_gelu_backward,
)


@takes_arrays("x", "bias")
def bias_gelu(x: Array, bias: Array, dropout_p: float = 0.0, seed: Tensor | int | None = None) -> Array:
    """``dropout(gelu(x + bias))``, gelu(a) being ``a (1 + erf(a / sqrt(2))) / 2`` (Hendrycks and Gimpel, 2016).

    The epilogue of a product without bias: of what it computes, nothing is kept for the backward but ``x``.

    >>> bias_gelu(torch.tensor([[0.0, 1.0]]), torch.tensor([0.0, 1.0]))
    tensor([[0.0000, 1.9545]])

    Args:
        x: [..., D], any floating dtype; computed in float32 at least.
        bias: [D].
        dropout_p: chance of an element to be dropped; the others are scaled by ``1 / (1 - dropout_p)``.
        seed: decides which ones, the same on every backend and device: a whole number or an int64 [] tensor; None
            draws one from torch's generator.

    Returns:
        [..., D] of the dtype of ``x``.

    Raises:
        ValueError: a wrong shape, dtype or range, named with what was given.
    """
    if not x.is_floating_point() or x.ndim < 1:
        raise ValueError(f"bias_gelu: x must be floating point [..., D], got {describe(x)}")
    if bias.shape != x.shape[-1:] or not bias.is_floating_point():
        raise ValueError(f"bias_gelu: bias must be floating point [{x.shape[-1]}], got {describe(bias)}")
    check_device("bias_gelu", x, bias=bias)
    return _bias_gelu.call(x, bias, dropout_p, _dropout.check("bias_gelu", dropout_p, seed, x.device))


@_bias_gelu.fake
def _(x, bias, dropout_p, seed):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_backward.fake
def _(grad, x, bias, dropout_p, seed):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(bias)


@_bias_gelu.native
def _(kernel, x, bias, dropout_p, seed):
    rows = as_rows(x, x.dtype)
    y = torch.empty_like(rows)
    kernel(rows, bias.to(wide(x)).contiguous(), dropout_p, _dropout.stored(seed, x), y)
    return y.view(x.shape)


@_backward.native
def _(kernel, grad, x, bias, dropout_p, seed):
    rows, offset = as_rows(x, x.dtype), bias.to(wide(x)).contiguous()
    to_x, to_bias = torch.empty_like(rows), torch.empty_like(offset)
    kernel(as_rows(grad, x.dtype), rows, offset, dropout_p, _dropout.stored(seed, x), to_x, to_bias)
    return to_x.view(x.shape), to_bias.to(bias.dtype)


@_bias_gelu.triton
def _(kernels, x, bias, dropout_p, seed):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        kernels.bias_gelu(x.contiguous(), bias.contiguous(), dropout_p, seed, y)
    return y


@_backward.triton
def _(kernels, grad, x, bias, dropout_p, seed):
    to_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not x.numel():
        return to_x, torch.zeros_like(bias)
    sums = kernels.bias_gelu_backward(grad.contiguous(), x.contiguous(), bias.contiguous(), dropout_p, seed, to_x)
    return to_x, sums.to(bias.dtype)


def _setup_context(ctx, inputs, output):
    x, bias, dropout_p, seed = inputs
    ctx.save_for_backward(x, bias, seed)
    ctx.dropout_p = dropout_p


def _differentiate(ctx, grad):
    x, bias, seed = ctx.saved_tensors
    return *_backward.call(grad, x, bias, ctx.dropout_p, seed), None, None


_bias_gelu.autograd(_differentiate, _setup_context)
