"""Attention whose keys are limited to spans of valid tokens, and whose queries may be limited to some tokens."""

from __future__ import annotations

import torch

from hubert_ecg.ops import _dropout
from hubert_ecg.ops import attention_reference as reference
from hubert_ecg.ops._op import Array, Op, check_device, check_real, describe, takes_arrays

_HOW = "Tensor? spans=None, Tensor? queries=None, float dropout_p=0.0, Tensor? seed=None, float? scale=None"
_attention = Op(
    f"masked_span_attention(Tensor q, Tensor? k=None, Tensor? v=None, {_HOW}) -> (Tensor, Tensor)",
    reference.masked_span_attention,
)
_backward = Op(
    "masked_span_attention_backward(Tensor grad, Tensor q, Tensor? k, Tensor? v, Tensor out, Tensor logsumexp, "
    f"{_HOW}) -> Tensor",
    reference.masked_span_attention_backward,
)


@takes_arrays("q", "k", "v", "spans", "queries")
def masked_span_attention(
    q: Array,
    k: Array | None = None,
    v: Array | None = None,
    spans: Array | None = None,
    queries: Array | None = None,
    dropout_p: float = 0.0,
    seed: Array | int | None = None,
    scale: float | None = None,
) -> Array:
    """Each head's softmax attention, not causal: ``dropout(softmax(scale q k^T)) v`` over the valid keys of a record.

    Keys outside of the spans get weight 0, and what stands there (NaN, too) reaches no result and no gradient. A record
    without a valid key attends to all of its tokens, because a softmax over nothing has no value.

    The gradients of q, k and v are written into one tensor [B, T, 3, H, D], always in the same order of sums: no two
    runs differ. Weights that are dropped follow from the seed and their place in [B, H, Tq, T]; the backward finds them
    again and stores none.

    >>> x = torch.tensor([0.0, 1.0, 2.0, 6.0]).view(1, 4, 1, 1)
    >>> masked_span_attention(0 * x, x, x, spans=torch.tensor([[[0, 1], [3, 4]]])).flatten()
    tensor([3., 3., 3., 3.])

    Args:
        q: queries, [B, T, H, D] of a floating dtype and any strides: parts of a packed tensor are not copied. Or
            queries, keys and values in one, [B, T, 3, H, D], and no k and v.
        k: keys, as q.
        v: values, as q.
        spans: start and end (exclusive) of the valid tokens of each record, [B, S, 2] int64. Empty spans are padding,
            tokens of several spans count once, and parts beyond 0..T are ignored. None: all tokens are valid.
        queries: tokens whose rows are computed, [B, M] int64, also repeated ones. One outside of 0..T-1 gives a row of
            zeros, and no gradient. None: all tokens, in their order.
        dropout_p: share of the weights that are dropped; the others are scaled by ``1 / (1 - dropout_p)``.
        seed: of the dropped weights, an int or an int64 tensor of no dimension. None draws one from torch's generator.
        scale: factor of the scores; None is ``1 / sqrt(D)``.

    Returns:
        [B, T, H, D], or [B, M, H, D] with queries, of the dtype of q. Half precision is summed in float32.

    Raises:
        ValueError: a wrong shape or dtype, or q, k and v that differ in it.
    """
    packed = k is None and v is None
    if not q.is_floating_point() or q.ndim != 4 + packed or (packed and q.shape[2] != 3):
        want = "floating point [B, T, H, D], or [B, T, 3, H, D] without k and v"
        raise ValueError(f"masked_span_attention: q must be {want}, got {describe(q)}")
    for name, x in (("k", k), ("v", v)):
        if not packed and (x is None or x.shape != q.shape or x.dtype != q.dtype):
            given = None if x is None else describe(x)
            raise ValueError(f"masked_span_attention: {name} must be {describe(q)} as q is, got {given}")
    B, op = q.shape[0], "masked_span_attention"
    if spans is not None and (spans.dtype != torch.int64 or spans.ndim != 3 or spans.shape[::2] != (B, 2)):
        raise ValueError(f"{op}: spans must be int64 [{B}, S, 2], got {describe(spans)}")
    if queries is not None and (queries.dtype != torch.int64 or queries.ndim != 2 or queries.shape[0] != B):
        raise ValueError(f"{op}: queries must be int64 [{B}, M], got {describe(queries)}")
    check_device("masked_span_attention", q, k=k, v=v, spans=spans, queries=queries)
    if scale is not None:
        check_real(f"{op}: scale", scale)
    seed = _dropout.check(op, dropout_p, seed, q.device)
    return _attention.call(q, k, v, spans, queries, dropout_p, seed, scale)[0]


def spans_of(valid: torch.Tensor) -> torch.Tensor:
    """The spans of a mask: ``[B, N]`` bool to ``[B, (N + 1) // 2, 2]`` int64, padded by empty ones.

    >>> spans_of(torch.tensor([[True, True, False, True]]))
    tensor([[[0, 2],
             [3, 4]]])
    """
    edge, last = torch.nn.functional.pad(valid, (1, 1)), valid.shape[1]
    token = torch.arange(last + 1, device=valid.device)
    starts, ends = ~edge[:, :-1] & edge[:, 1:], edge[:, :-1] & ~edge[:, 1:]
    bounds = [torch.where(changes, token, last).sort(1).values[:, : (last + 1) // 2] for changes in (starts, ends)]
    return torch.stack(bounds, -1)


@_attention.fake
def _(q, k=None, v=None, spans=None, queries=None, dropout_p=0.0, seed=None, scale=None):
    return _new_outputs(q, queries)


@_backward.fake
def _(grad, q, k, v, out, logsumexp, spans=None, queries=None, dropout_p=0.0, seed=None, scale=None):
    return _new_gradients(q)


def _setup_context(ctx, inputs, output):
    q, k, v, spans, queries, ctx.dropout_p, seed, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, spans, queries, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _):
    if grad is None:
        return (None,) * 8
    q, k, v, out, logsumexp, spans, queries, seed = ctx.saved_tensors
    packed = _backward.call(grad, q, k, v, out, logsumexp, spans, queries, ctx.dropout_p, seed, ctx.scale)
    return *((packed, None, None) if k is None else packed.unbind(2)), None, None, None, None, None


_attention.autograd(_differentiate, _setup_context)


def _new_outputs(q, queries):
    B, H, D = q.shape[0], q.shape[-2], q.shape[-1]
    rows = q.shape[1] if queries is None else queries.shape[1]
    logsumexp = q.new_empty((B, H, rows), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty((B, rows, H, D)), logsumexp


def _new_gradients(q):
    return q.new_empty((q.shape[0], q.shape[1], 3, *q.shape[-2:]))


def _dense(*tensors):
    """Kernels want the numbers of a head side by side; all other strides are as they are."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _listed(like, *tensors):
    """int64 tensors as kernels read them; what is not given is empty."""
    return [like.new_empty(0, dtype=torch.int64) if x is None else x.contiguous() for x in tensors]


def _contiguous(*tensors):
    return [None if x is None else x.contiguous() for x in tensors]


# Before Triton: its kernels stay the default until those of CUDA have passed on a GPU.
@_attention.native
def _(kernel, q, k=None, v=None, spans=None, queries=None, dropout_p=0.0, seed=None, scale=None):
    out, logsumexp = _new_outputs(q, queries)
    if out.numel():
        scale = reference.scale_of(scale, q.shape[-1])
        views, lists = _dense(*reference.unpack(q, k, v)), _listed(q, spans, queries, seed)
        kernel(*views, *lists, out, logsumexp, dropout_p, scale)
    return out, logsumexp


@_backward.native
def _(kernel, grad, q, k, v, out, logsumexp, spans=None, queries=None, dropout_p=0.0, seed=None, scale=None):
    gradients = _new_gradients(q)
    if not out.numel():
        return gradients.zero_()
    logsumexp = logsumexp.to(torch.promote_types(q.dtype, torch.float32)).contiguous()
    scale = reference.scale_of(scale, q.shape[-1])
    views, lists = _dense(grad, *reference.unpack(q, k, v), out), _listed(q, spans, queries, seed)
    kernel(*views, logsumexp, *lists, gradients, dropout_p, scale)
    return gradients


@_attention.triton
def _(kernels, q, k=None, v=None, spans=None, queries=None, dropout_p=0.0, seed=None, scale=None):
    if q.dtype == torch.float64:
        return reference.masked_span_attention(q, k, v, spans, queries, dropout_p, seed, scale)
    out, logsumexp = _new_outputs(q, queries)
    if out.numel():
        views, scale = _dense(*reference.unpack(q, k, v)), reference.scale_of(scale, q.shape[-1])
        if not q.shape[1]:
            return out.zero_(), logsumexp.fill_(torch.inf)
        kernels.masked_span_attention(*views, *_contiguous(spans, queries), dropout_p, seed, scale, out, logsumexp)
    return out, logsumexp


@_backward.triton
def _(kernels, grad, q, k, v, out, logsumexp, spans=None, queries=None, dropout_p=0.0, seed=None, scale=None):
    if q.dtype == torch.float64:
        return reference.masked_span_attention_backward(
            grad, q, k, v, out, logsumexp, spans, queries, dropout_p, seed, scale
        )
    gradients = _new_gradients(q)
    if not out.numel() or not gradients.numel():
        return gradients.zero_()
    views, scale = _dense(grad, *reference.unpack(q, k, v), out), reference.scale_of(scale, q.shape[-1])
    lists = logsumexp.contiguous(), *_contiguous(spans, queries)
    kernels.masked_span_attention_backward(*views, *lists, dropout_p, seed, scale, gradients)
    return gradients
