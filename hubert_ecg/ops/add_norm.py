"""What ends each half of a transformer layer: dropout, residual and layer norm in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from hubert_ecg.ops import _dropout
from hubert_ecg.ops import add_norm_reference as reference
from hubert_ecg.ops._op import Array, Op, check_device, check_real, describe, takes_arrays
from hubert_ecg.ops._rows import as_rows, wide

_add_norm = Op(
    "add_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, float dropout_p, Tensor? seed)"
    " -> (Tensor, Tensor, Tensor)",
    reference.add_norm,
)
_backward = Op(
    "add_norm_backward(Tensor grad, Tensor x, Tensor residual, Tensor weight, Tensor mean, Tensor rstd,"
    " float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.add_norm_backward,
)


@takes_arrays("x", "residual", "weight", "bias")
def add_norm(
    x: Array,
    residual: Array,
    weight: Array,
    bias: Array,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
) -> Array:
    """``LayerNorm(residual + dropout(x))`` over the last axis (Ba et al., "Layer Normalization", 2016).

    >>> add_norm(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 2.0]]), torch.ones(2), torch.zeros(2))
    tensor([[-1.0000,  1.0000]])

    Args:
        x: [..., D], any floating dtype; sums and statistics are kept in float32 at least.
        residual: [..., D], of the dtype of ``x`` or another one: under autocast a product is in half precision, what it
            is added to is not.
        weight: [D], gains of the norm.
        bias: [D], offsets of the norm.
        eps: added to the variance.
        dropout_p: chance of an element of ``x`` to be dropped; the others are scaled by ``1 / (1 - dropout_p)``.
        seed: decides which ones, the same on every backend and device: a whole number or an int64 [] tensor; None
            draws one from torch's generator.

    Returns:
        [..., D] of the dtype of ``residual``.

    Raises:
        ValueError: a wrong shape, dtype or range, named with what was given.
    """
    if not x.is_floating_point() or x.ndim < 1:
        raise ValueError(f"add_norm: x must be floating point [..., D], got {describe(x)}")
    if residual.shape != x.shape or not residual.is_floating_point():
        raise ValueError(f"add_norm: residual must be floating point {list(x.shape)}, got {describe(residual)}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter.shape != x.shape[-1:] or not parameter.is_floating_point():
            want = f"floating point [{x.shape[-1]}]"
            raise ValueError(f"add_norm: {name} must be {want}, got {describe(parameter)}")
    check_device("add_norm", x, residual=residual, weight=weight, bias=bias)
    check_real("add_norm: eps", eps)
    if not eps >= 0:
        raise ValueError(f"add_norm: eps must be at least 0, got {eps}")
    seed = _dropout.check("add_norm", dropout_p, seed, x.device)
    return _add_norm.call(x, residual, weight, bias, eps, dropout_p, seed)[0]


def _outputs(residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (residual.new_empty(residual.shape[:-1], dtype=wide(residual)) for _ in range(2))
    return _dense(residual), mean, rstd


def _dense(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


@_add_norm.fake
def _(x, residual, weight, bias, eps, dropout_p, seed):
    return _outputs(residual)


@_backward.fake
def _(grad, x, residual, weight, mean, rstd, dropout_p, seed):
    return _dense(x), _dense(residual), torch.empty_like(weight), torch.empty_like(weight)


@_add_norm.native
def _(kernel, x, residual, weight, bias, eps, dropout_p, seed):
    rows = as_rows(residual)
    added = _beside(rows, x)
    y, mean, rstd = torch.empty_like(rows), rows.new_empty(len(rows)), rows.new_empty(len(rows))
    parameters = (t.to(rows.dtype).contiguous() for t in (weight, bias))
    kernel(added, rows, *parameters, eps, dropout_p, _dropout.stored(seed, x), y, mean, rstd)
    return y.view(x.shape).to(residual.dtype), mean.view(x.shape[:-1]), rstd.view(x.shape[:-1])


@_backward.native
def _(kernel, grad, x, residual, weight, mean, rstd, dropout_p, seed):
    rows = as_rows(residual)
    gain, *statistics = (t.to(rows.dtype).flatten().contiguous() for t in (weight, mean, rstd))
    added = _beside(rows, x)
    to_x, to_residual, to_weight, to_bias = (torch.empty_like(t) for t in (added, rows, gain, gain))
    given = (as_rows(grad), added, rows, gain, *statistics)
    kernel(*given, dropout_p, _dropout.stored(seed, x), to_x, to_residual, to_weight, to_bias)
    to_x, to_residual = to_x.view(x.shape).to(x.dtype), to_residual.view(x.shape).to(residual.dtype)
    return to_x, to_residual, to_weight.to(weight.dtype), to_bias.to(weight.dtype)


def _beside(rows: Tensor, x: Tensor) -> Tensor:
    """Rows of x in a dtype that the kernel takes beside that of the residual's rows."""
    return as_rows(x, x.dtype if wide(x) == rows.dtype else rows.dtype)


@_add_norm.triton
def _(kernels, x, residual, weight, bias, eps, dropout_p, seed):
    outputs = _outputs(residual)
    if not x.numel():
        return reference.add_norm(x, residual, weight, bias, eps, dropout_p, seed)
    given = (t.contiguous() for t in (x, residual, weight, bias))
    kernels.add_norm(*given, eps, dropout_p, seed, *outputs)
    return outputs


@_backward.triton
def _(kernels, grad, x, residual, weight, mean, rstd, dropout_p, seed):
    if not x.numel():
        return _dense(x), _dense(residual), torch.zeros_like(weight), torch.zeros_like(weight)
    given = (t.contiguous() for t in (grad, x, residual, weight, mean, rstd))
    return kernels.add_norm_backward(*given, dropout_p, seed)


def _setup_context(ctx, inputs, output):
    x, residual, weight, _, _, dropout_p, seed = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, residual, weight, mean, rstd, seed)
    ctx.dropout_p = dropout_p


def _differentiate(ctx, grad, *_):
    x, residual, weight, mean, rstd, seed = ctx.saved_tensors
    return *_backward.call(grad, x, residual, weight, mean, rstd, ctx.dropout_p, seed), None, None, None


_add_norm.autograd(_differentiate, _setup_context)
