"""A convolution over time as matrix products, channels last."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hubert_ecg.ops import strided_conv_reference as reference
from hubert_ecg.ops._op import Array, Op, autocast_dtype, check_device, check_whole, describe, takes_arrays
from hubert_ecg.ops.linear import integer_kernels, product_dtype

_op = Op(
    "strided_conv(Tensor x, Tensor weight, int stride, Tensor? bias=None) -> Tensor",
    reference.strided_conv,
)
_backward = Op(
    "strided_conv_backward(Tensor grad, Tensor x, Tensor weight, int stride, bool with_input=True) "
    "-> (Tensor, Tensor, Tensor)",
    reference.strided_conv_backward,
)


@takes_arrays("x", "weight", "bias")
def strided_conv(x: Array, weight: Array, stride: int, bias: Array | None = None) -> Array:
    """A convolution over time, ``z[b, f, n] = bias[n] + sum_jc weight[n, c, j] x[b, stride f + j, c]``, channels last.

    Samples of x that follow each other lie in memory as one row, so ``stride`` taps at a time are a matrix product with
    rows of x where they are: ``ceil(k / stride)`` products, and no copy of x for each tap.

    Under autocast, x and weight are taken in autocast's dtype. On a CPU that only emulates products in half precision
    there is one product, that of :func:`linear`, whose rows are the windows of x, which overlap.

    >>> strided_conv(torch.tensor([[[1.0], [2.0], [3.0], [4.0]]]), torch.ones(1, 1, 2), stride=2)
    tensor([[[3.],
             [7.]]])

    Args:
        x: [B, T, C] floating point.
        weight: [N, C, k] of the dtype of x.
        stride: samples from one frame to the next.
        bias: [N]; default: none.

    Returns:
        [B, F, N] of the dtype of x, F = (T - k) // stride + 1.

    Raises:
        ValueError: a wrong shape, dtype or device, named with what was given.
    """
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"strided_conv: x must be floating point [B, T, C], got {describe(x)}")
    if (dtype := autocast_dtype(x)) is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    fits = weight.ndim == 3 and weight.shape[1] == x.shape[2] and weight.is_floating_point()
    if not fits or 0 in weight.shape:
        raise ValueError(f"strided_conv: weight must be floating point [N, {x.shape[2]}, k], got {describe(weight)}")
    if weight.dtype != x.dtype:
        raise ValueError(f"strided_conv: weight must be of the dtype of x ({x.dtype}), got {describe(weight)}")
    if x.shape[1] < weight.shape[2]:
        raise ValueError(f"strided_conv: x must be at least {weight.shape[2]} samples long, got {describe(x)}")
    check_whole("strided_conv: stride", stride)
    if stride < 1:
        raise ValueError(f"strided_conv: stride must be at least 1, got {stride}")
    if bias is not None and (bias.dtype != x.dtype or bias.shape != weight.shape[:1]):
        want = f"{str(x.dtype).removeprefix('torch.')} [{len(weight)}]"
        raise ValueError(f"strided_conv: bias must be {want}, got {describe(bias)}")
    check_device("strided_conv", x, weight=weight, bias=bias)
    return _op.call(x, weight, stride, bias)


def _windows(x: Tensor, count: int, taps: int, stride: int) -> Tensor:
    """A view ``[B, count, taps * C]`` of x, [B, T, C]: ``taps`` samples side by side, every ``stride`` samples."""
    channels = x.shape[2]
    return x.as_strided((len(x), count, taps * channels), (x.stride(0), stride * channels, 1))


def _blocks(x: Tensor, frames: int, kernel: int, stride: int) -> list[tuple[slice, Tensor]]:
    """Up to ``stride`` taps at a time: their rows of the weight, and their windows of x, which do not overlap."""
    channels, found = x.shape[2], []
    for first in range(0, kernel, stride):
        count = min(stride, kernel - first)
        rows = slice(first * channels, (first + count) * channels)
        found.append((rows, _windows(x[:, first:], frames, count, stride)))
    return found


def _rows(weight: Tensor) -> Tensor:
    """``[k * C, N]`` of a weight ``[N, C, k]``."""
    return weight.permute(2, 1, 0).reshape(-1, len(weight))


def _by_integers(kernel, x, weight, stride, bias):
    taps = weight.shape[2]
    z = x.new_empty(len(x), (x.shape[1] - taps) // stride + 1, len(weight))
    rows = weight.transpose(1, 2).flatten(1).contiguous()
    shift = x.new_empty(0, dtype=torch.float32) if bias is None else bias.float().contiguous()
    kernel(_windows(x.contiguous(), z.shape[1], taps, stride), rows, shift, z)
    return z


def _by_integers_backward(kernel, backward_kernel, grad, x, weight, stride, with_input):
    (samples, channels), (width, _, taps), frames = x.shape[1:], weight.shape, grad.shape[1]
    grad, grad_rows = grad.contiguous(), x.new_empty(width, taps * channels, dtype=torch.float32)
    grad_x = x.new_empty(x.shape if with_input else 0)
    windows = _windows(x.contiguous(), frames, taps, stride)
    # The weight is read for the gradient of the windows alone, which nobody wants.
    backward_kernel(grad, windows, grad_rows, x.new_empty(0, 0), grad_rows)
    if with_input:
        # Sample q stride + first met the taps first, first + stride, ... in the frames q, q - 1, ...: again windows, of
        # the gradient with zeros around it.
        most, no_bias = -(-taps // stride), x.new_empty(0, dtype=torch.float32)
        padded = F.pad(grad, (0, 0, most - 1, max(0, -(-samples // stride) - frames)))
        for first in range(min(stride, samples)):
            own, met = grad_x[:, first::stride], weight[:, :, first::stride].flip(2)
            rows, count = met.permute(1, 2, 0).flatten(1).contiguous(), met.shape[2]
            kernel(_windows(padded[:, most - count :], own.shape[1], count, 1), rows, no_bias, own)
    grad_weight = grad_rows.view(width, taps, channels).transpose(1, 2).to(weight.dtype).contiguous()
    return grad_x, grad_weight, grad.sum((0, 1))


@_op.fake
def _(x, weight, stride, bias=None):
    return x.new_empty(len(x), (x.shape[1] - weight.shape[2]) // stride + 1, len(weight))


@_backward.fake
def _(grad, x, weight, stride, with_input=True):
    return x.new_empty(x.shape if with_input else 0), weight.new_empty(weight.shape), grad.new_empty(len(weight))


@_op.composed
def _(x, weight, stride, bias=None):
    if kernels := integer_kernels(x):
        return _by_integers(kernels[0], x, weight, stride, bias)
    dtype, kernel = product_dtype(x.device, x.dtype), weight.shape[2]
    frames = (x.shape[1] - kernel) // stride + 1
    rows = _rows(weight).to(dtype)[None].expand(len(x), -1, -1)
    z = rows.new_empty(len(x), frames, len(weight))
    if bias is not None:
        z.copy_(bias.expand_as(z))
    for part, block in _blocks(x.to(dtype).contiguous(), frames, kernel, stride):
        z.baddbmm_(block, rows[:, part], beta=0 if part.start == 0 and bias is None else 1)
    return z.to(x.dtype)


@_backward.composed
def _(grad, x, weight, stride, with_input=True):
    if kernels := integer_kernels(x):
        return _by_integers_backward(*kernels, grad, x, weight, stride, with_input)
    dtype, kernel = product_dtype(x.device, x.dtype), weight.shape[2]
    batch, samples, channels = x.shape
    frames, wide, rows, own = grad.shape[1], x.to(dtype).contiguous(), _rows(weight).to(dtype), grad.to(dtype)
    grad_x = wide.new_zeros(wide.shape if with_input else 0)
    if with_input:
        for part, block in _blocks(grad_x, frames, kernel, stride):
            block.baddbmm_(own, rows[part].T[None].expand(batch, -1, -1))
    # The weight's gradient is a product over the frames of all records at once: those that lie across two records, or
    # across the end, get no gradient.
    steps = -(-samples // stride)
    flat = F.pad(wide, (0, 0, 0, steps * stride - samples)).view(-1, stride * channels)
    own = F.pad(own, (0, 0, 0, steps - frames)).reshape(-1, len(weight))
    grad_rows = torch.empty_like(rows)
    for index, first in enumerate(range(0, kernel * channels, stride * channels)):
        part = grad_rows[first : first + stride * channels]
        torch.mm(flat[index:, : len(part)].T, own[: len(own) - index], out=part)
    grad_weight = grad_rows.view(kernel, channels, len(weight)).permute(2, 1, 0).contiguous()
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad.sum((0, 1))


def _setup_context(ctx, inputs, output):
    x, weight, ctx.stride, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.with_bias = bias is not None


def _run_backward(ctx, grad):
    x, weight = ctx.saved_tensors
    with_input = ctx.needs_input_grad[0]
    grad_x, grad_weight, grad_bias = _backward.call(grad, x, weight, ctx.stride, with_input)
    return grad_x if with_input else None, grad_weight, None, grad_bias if ctx.with_bias else None


_op.autograd(_run_backward, _setup_context)
