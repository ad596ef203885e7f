"""Attention over spans of keys in Triton: up to 128 tokens, a program has all keys of a head on chip, more go by tiles.

Keys that are not valid are never loaded. Each gradient is summed by one program, in one order, without atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hubert_ecg.ops._dropout_triton import dropout_options, kept
from hubert_ecg.ops.attention_reference import scatter_rows


@triton.jit
def _valid(spans_ptr, record, num_spans, T, token, SPANS: tl.constexpr):
    """Which of the tokens are keys of the record."""
    valid = token < T
    if SPANS:
        inside = token < 0
        longest = tl.zeros([1], tl.int64)
        for i in range(num_spans):
            at = spans_ptr + (record * num_spans + i) * 2
            start, end = tl.load(at), tl.load(at + 1)
            inside = inside | ((token >= start) & (token < end))
            longest = tl.maximum(longest, tl.minimum(end, T) - tl.maximum(start, 0))
        valid = valid & (inside | (longest == 0))
    return valid


@triton.jit
def _rows(queries_ptr, record, m, M, T, QUERIES: tl.constexpr):
    """The tokens whose rows these are, and which of them exist."""
    token = m.to(tl.int64)
    if QUERIES:
        token = tl.load(queries_ptr + record * M + m, mask=m < M, other=-1)
    return token, (m < M) & (token >= 0) & (token < T)


@triton.jit
def _load(ptr, token, stride, d, D, mask):
    at = ptr + token.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(at, mask=mask[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _store(ptr, token, stride, d, D, mask, x):
    at = ptr + token.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(at, x.to(ptr.dtype.element_ty), mask=mask[:, None] & (d < D)[None, :])


@triton.jit
def _product(a, b):
    # No TF32: what is float32 is meant so.
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _dropped(x, head, m, token, M, T, seed_ptr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr):
    """What dropout makes of the weights [m, token] of a head."""
    return kept(x, (head * M + m)[:, None] * T + token[None, :], seed_ptr, THRESHOLD, SCALE)


@triton.jit
def _differentiate(
    q, k, v, grad, logsumexp, mean, valid, head, m, token, M, T, seed_ptr, scale,
    THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Of a tile: the weights as dropout leaves them, and the gradients of the scores before their scale."""
    weights = tl.exp(_product(q, tl.trans(k)) * scale - logsumexp[:, None])
    weights = tl.where(valid[None, :], weights, 0.0)
    dropped = _dropped(weights, head, m, token, M, T, seed_ptr, THRESHOLD, SCALE)
    of_weights = _product(grad, tl.trans(v))
    of_weights = _dropped(of_weights, head, m, token, M, T, seed_ptr, THRESHOLD, SCALE)
    return dropped.to(q.dtype), (weights * (of_weights - mean[:, None])).to(q.dtype)


@triton.jit
def _masked_span_attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, spans_ptr, queries_ptr, seed_ptr, out_ptr, logsumexp_ptr,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, H, T, M, D, num_spans, scale,
    SPANS: tl.constexpr, QUERIES: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    b, h = head // H, head % H
    m, d = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    row, real = _rows(queries_ptr, b, m, M, T, QUERIES)
    q = _load(q_ptr + b * q_b + h * q_h, row, q_t, d, D, real)
    high, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, T, BLOCK_N):
        token = first + tl.arange(0, BLOCK_N)
        valid = _valid(spans_ptr, b, num_spans, T, token, SPANS)
        k = _load(k_ptr + b * k_b + h * k_h, token, k_t, d, D, valid)
        v = _load(v_ptr + b * v_b + h * v_h, token, v_t, d, D, valid)
        scores = tl.where(valid[None, :], _product(q, tl.trans(k)) * scale, float("-inf"))
        higher = tl.maximum(high, tl.max(scores, 1))
        # No valid key so far: any number serves, but infinity would make NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights, shrink = tl.exp(scores - base[:, None]), tl.exp(high - base)
        total = total * shrink + tl.sum(weights, 1)
        weights = _dropped(weights, head, m, token, M, T, seed_ptr, THRESHOLD, SCALE)
        sums = sums * shrink[:, None] + _product(weights.to(v.dtype), v)
        high = higher
    out = tl.where(real[:, None], sums / total[:, None], 0.0)
    _store(out_ptr + (b * M * H + h) * D, m, H * D, d, D, m < M, out)
    logsumexp = tl.where(real, high + tl.log(total), float("inf"))
    tl.store(logsumexp_ptr + head * M + m, logsumexp, mask=m < M)


@triton.jit
def _masked_span_attention_backward_keys_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, mean_ptr, logsumexp_ptr, spans_ptr, queries_ptr, seed_ptr, of_q_ptr, gradients_ptr,
    g_b, g_t, g_h, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    H, T, M, D, num_spans, scale, of_q_b, of_q_t,
    SPANS: tl.constexpr, QUERIES: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values; where that is all of them (WHOLE), of the rows of q too."""
    head = tl.program_id(0).to(tl.int64)
    b, h = head // H, head % H
    token, d = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    valid = _valid(spans_ptr, b, num_spans, T, token, SPANS)
    k = _load(k_ptr + b * k_b + h * k_h, token, k_t, d, D, valid)
    v = _load(v_ptr + b * v_b + h * v_h, token, v_t, d, D, valid)
    of_k, of_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in range(0, M, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        row, real = _rows(queries_ptr, b, m, M, T, QUERIES)
        q = _load(q_ptr + b * q_b + h * q_h, row, q_t, d, D, real)
        grad = _load(grad_ptr + b * g_b + h * g_h, m, g_t, d, D, real)
        logsumexp = tl.load(logsumexp_ptr + head * M + m, mask=m < M, other=float("inf"))
        mean = tl.load(mean_ptr + head * M + m, mask=m < M, other=0.0)
        weights, of_scores = _differentiate(
            q, k, v, grad, logsumexp, mean, valid, head, m, token, M, T, seed_ptr, scale, THRESHOLD, SCALE
        )  # fmt: skip
        of_v += _product(tl.trans(weights), grad)
        of_k += _product(tl.trans(of_scores), q)
        if WHOLE:
            of_q = _product(of_scores, k) * scale
            _store(of_q_ptr + b * of_q_b + h * D, m, of_q_t, d, D, m < M, of_q)
    gradients_ptr += (b * T * 3 * H + h) * D
    _store(gradients_ptr + H * D, token, 3 * H * D, d, D, token < T, of_k * scale)
    _store(gradients_ptr + 2 * H * D, token, 3 * H * D, d, D, token < T, of_v)


@triton.jit
def _masked_span_attention_backward_queries_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, mean_ptr, logsumexp_ptr, spans_ptr, queries_ptr, seed_ptr, of_q_ptr,
    g_b, g_t, g_h, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    H, T, M, D, num_spans, scale, of_q_b, of_q_t,
    SPANS: tl.constexpr, QUERIES: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of rows of q."""
    head = tl.program_id(0).to(tl.int64)
    b, h = head // H, head % H
    m, d = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    row, real = _rows(queries_ptr, b, m, M, T, QUERIES)
    q = _load(q_ptr + b * q_b + h * q_h, row, q_t, d, D, real)
    grad = _load(grad_ptr + b * g_b + h * g_h, m, g_t, d, D, real)
    logsumexp = tl.load(logsumexp_ptr + head * M + m, mask=m < M, other=float("inf"))
    mean = tl.load(mean_ptr + head * M + m, mask=m < M, other=0.0)
    of_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, T, BLOCK_N):
        token = first + tl.arange(0, BLOCK_N)
        valid = _valid(spans_ptr, b, num_spans, T, token, SPANS)
        k = _load(k_ptr + b * k_b + h * k_h, token, k_t, d, D, valid)
        v = _load(v_ptr + b * v_b + h * v_h, token, v_t, d, D, valid)
        _, of_scores = _differentiate(
            q, k, v, grad, logsumexp, mean, valid, head, m, token, M, T, seed_ptr, scale, THRESHOLD, SCALE
        )  # fmt: skip
        of_q += _product(of_scores, k)
    _store(of_q_ptr + b * of_q_b + h * D, m, of_q_t, d, D, m < M, of_q * scale)


def _sizes(q: Tensor, M: int, spans: Tensor | None, scale: float) -> tuple[Any, ...]:
    num_spans = 0 if spans is None else spans.shape[1]
    return q.shape[2], q.shape[1], M, q.shape[3], num_spans, scale


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for x in tensors for stride in x.stride()[:3])


def _options(
    q: Tensor, M: int, spans: Tensor | None, queries: Tensor | None, dropout_p: float, backward: bool
) -> dict[str, Any]:
    """Tiles for which the registers suffice: of 16-bit numbers all keys of a head, of float32 and of wide heads less.

    ``.ci/triton_kernels.py`` shows what they take on each GPU.
    """
    D, longest = max(16, triton.next_power_of_2(q.shape[3])), max(q.shape[1], M)
    halves = q.element_size() == 2
    most = max(16, 4096 // (D * q.element_size() // 2))
    if halves and D <= 128:
        most = 128 if longest <= 128 else 64
    rows, tokens = (min(most, max(16, triton.next_power_of_2(n))) for n in (M, q.shape[1]))
    rows = min(rows, (32 if backward else 128) * 64 // max(D, 64))
    return {
        "SPANS": spans is not None,
        "QUERIES": queries is not None,
        "BLOCK_M": rows,
        "BLOCK_N": tokens,
        "BLOCK_D": D,
        "num_warps": 4 if halves and max(rows, tokens) < 128 else 8,
        "num_stages": 1 if tokens >= q.shape[1] else 2,
        **dropout_options(dropout_p),
    }


def masked_span_attention(
    q: Tensor, k: Tensor, v: Tensor, spans: Tensor | None, queries: Tensor | None, dropout_p: float,
    seed: Tensor | None, scale: float, out: Tensor, logsumexp: Tensor,
) -> None:  # fmt: skip
    B, M, H, _ = out.shape
    options = _options(q, M, spans, queries, dropout_p, backward=False)
    _masked_span_attention_forward_kernel[(B * H, triton.cdiv(M, options["BLOCK_M"]))](
        q, k, v, spans, queries, seed, out, logsumexp, *_strides(q, k, v), *_sizes(q, M, spans, scale),
        **options,
    )  # fmt: skip


def masked_span_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, spans: Tensor | None,
    queries: Tensor | None, dropout_p: float, seed: Tensor | None, scale: float, gradients: Tensor,
) -> None:  # fmt: skip
    B, M, H, _ = out.shape
    T = q.shape[1]
    # The mean of the gradients of each row's weights.
    mean = (grad.float() * out.float()).sum(-1).transpose(1, 2).contiguous()
    options = _options(q, M, spans, queries, dropout_p, backward=True)
    whole = options["BLOCK_N"] >= T
    # With queries, a token's gradient is the sum of its rows.
    of_q = gradients[:, :, 0] if queries is None else q.new_empty(out.shape, dtype=torch.float32)
    given = grad, q, k, v, mean, logsumexp, spans, queries, seed, of_q
    numbers = *_strides(grad, q, k, v), *_sizes(q, M, spans, scale), *of_q.stride()[:2]
    _masked_span_attention_backward_keys_kernel[(B * H, triton.cdiv(T, options["BLOCK_N"]))](
        *given, gradients, *numbers, WHOLE=whole, **options
    )
    if not whole:
        _masked_span_attention_backward_queries_kernel[(B * H, triton.cdiv(M, options["BLOCK_M"]))](
            *given, *numbers, **options
        )
    if queries is not None:
        gradients[:, :, 0] = scatter_rows(of_q, queries, T)
