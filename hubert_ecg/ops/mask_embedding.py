"""The epilogue of the feature projection: its bias, or the mask embedding where a token is masked."""

from __future__ import annotations

import torch

from hubert_ecg.ops import mask_embedding_reference as reference
from hubert_ecg.ops._op import Array, Op, check_device, describe, takes_arrays

_mask_embedding = Op(
    "mask_embedding(Tensor x, Tensor bias, Tensor embedding, Tensor masked) -> Tensor", reference.mask_embedding
)
_backward = Op(
    "mask_embedding_backward(Tensor grad, Tensor masked) -> (Tensor, Tensor, Tensor)",
    reference.mask_embedding_backward,
)


@takes_arrays("x", "bias", "embedding", "masked")
def mask_embedding(x: Array, bias: Array, embedding: Array, masked: Array) -> Array:
    """``embedding`` where a token is masked, ``x + bias`` elsewhere, in one pass.

    >>> mask_embedding(torch.zeros(2, 1), torch.tensor([1.0]), torch.tensor([7.0]), torch.tensor([True, False]))
    tensor([[7.],
            [1.]])

    Args:
        x: [..., D], any floating dtype: a product without its bias. What it holds for masked tokens does not matter.
        bias: [D].
        embedding: [D], what replaces a masked token.
        masked: [...] bool.

    Returns:
        [..., D] of the dtype of ``x``.

    Raises:
        ValueError: a wrong shape or dtype, named with what was given.
    """
    if not x.is_floating_point() or x.ndim < 1:
        raise ValueError(f"mask_embedding: x must be floating point [..., D], got {describe(x)}")
    for name, vector in (("bias", bias), ("embedding", embedding)):
        if vector.shape != x.shape[-1:] or not vector.is_floating_point():
            want = f"floating point [{x.shape[-1]}]"
            raise ValueError(f"mask_embedding: {name} must be {want}, got {describe(vector)}")
    if masked.shape != x.shape[:-1] or masked.dtype != torch.bool:
        raise ValueError(f"mask_embedding: masked must be bool {list(x.shape[:-1])}, got {describe(masked)}")
    check_device("mask_embedding", x, bias=bias, embedding=embedding, masked=masked)
    return _mask_embedding.call(x, bias, embedding, masked)


@_mask_embedding.fake
def _(x, bias, embedding, masked):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_backward.fake
def _(grad, masked):
    sums = (grad.new_empty(grad.shape[-1:], dtype=torch.promote_types(grad.dtype, torch.float32)) for _ in range(2))
    return torch.empty_like(grad, memory_format=torch.contiguous_format), *sums


@_mask_embedding.triton
def _(kernels, x, bias, embedding, masked):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        kernels.mask_embedding(*(t.contiguous() for t in (x, bias, embedding, masked)), y)
    return y


@_backward.triton
def _(kernels, grad, masked):
    to_x = torch.empty_like(grad, memory_format=torch.contiguous_format)
    if not grad.numel():
        zeros = grad.new_zeros(2, grad.shape[-1], dtype=torch.promote_types(grad.dtype, torch.float32))
        return to_x, *zeros.clone().unbind()
    sums = kernels.mask_embedding_backward(grad.contiguous(), masked.contiguous(), to_x)
    return to_x, sums[0].clone(), sums[1].clone()


def _setup_context(ctx, inputs, output):
    _, bias, embedding, masked = inputs
    ctx.save_for_backward(masked)
    ctx.dtypes = bias.dtype, embedding.dtype


def _differentiate(ctx, grad):
    (masked,) = ctx.saved_tensors
    to_x, to_bias, to_embedding = _backward.call(grad, masked)
    return to_x, to_bias.to(ctx.dtypes[0]), to_embedding.to(ctx.dtypes[1]), None


_mask_embedding.autograd(_differentiate, _setup_context)
