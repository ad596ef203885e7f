"""The cross entropy of cosines in Triton: logits live in one tile at a time, and are computed again in the backward.

Entries come as vectors of length 1, rows with the temperature in their length, so that a logit is a plain product. No
sum is left to the order in which programs end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hubert_ecg.ops.codebook_loss_reference import IGNORED

_ROWS, _ENTRIES, _INNER, _OUTER = 64, 64, 32, 128
# Floats of the partial gradients of the codebook.
_PARTIAL = 1 << 24


@triton.jit
def _logits(u_ptr, c_ptr, rows, entries, R, K, P, WIDE: tl.constexpr, TF32: tl.constexpr, INNER: tl.constexpr):
    """[rows, entries]; 0 outside of the matrices."""
    logits = tl.zeros([rows.shape[0], entries.shape[0]], WIDE)
    u_row, c_row = u_ptr + rows.to(tl.int64)[:, None] * P, c_ptr + entries.to(tl.int64)[None] * P
    for first in range(0, P, INNER):
        column = first + tl.arange(0, INNER)
        u = tl.load(u_row + column[None], mask=(rows < R)[:, None] & (column < P)[None], other=0.0)
        c = tl.load(c_row + column[:, None], mask=(entries < K)[None] & (column < P)[:, None], other=0.0)
        logits = tl.dot(u, c, logits, input_precision=TF32, out_dtype=WIDE)
    return logits


@triton.jit
def _codebook_cross_entropy_forward_kernel(
    u_ptr, c_ptr, labels_ptr, loss_ptr, logsumexp_ptr, predicted_ptr, R, K, P,
    IGNORED: tl.constexpr, WIDE: tl.constexpr, TF32: tl.constexpr,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    labels = tl.load(labels_ptr + rows, mask=rows < R, other=IGNORED)
    top = tl.full([ROWS], float("-inf"), WIDE)
    total, own, best = tl.zeros([ROWS], WIDE), tl.zeros([ROWS], WIDE), tl.zeros([ROWS], tl.int32)
    for first in range(0, K, ENTRIES):
        entries = first + tl.arange(0, ENTRIES)
        logits = _logits(u_ptr, c_ptr, rows, entries, R, K, P, WIDE, TF32, INNER)
        own += tl.sum(tl.where(entries[None] == labels[:, None], logits, 0.0), 1)
        logits = tl.where((entries < K)[None], logits, float("-inf"))
        here, where = tl.max(logits, 1, return_indices=True)
        best = tl.where(here > top, first + where, best)
        higher = tl.maximum(top, here)
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        top = higher
    logsumexp = top + tl.log(total)
    known = (labels >= 0) & (labels < K)
    loss = tl.where(known, logsumexp - own, tl.where(labels == IGNORED, 0.0, float("nan")))
    tl.store(loss_ptr + rows, loss, mask=rows < R)
    tl.store(logsumexp_ptr + rows, logsumexp, mask=rows < R)
    tl.store(predicted_ptr + rows, best.to(tl.int64), mask=rows < R)


@triton.jit
def _slope(
    u_ptr, c_ptr, labels_ptr, logsumexp_ptr, grad_loss_ptr, grad_all_ptr, rows, entries, R, K, P,
    WIDE: tl.constexpr, TF32: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Derivatives by the logits, [rows, entries]; 0 outside of the matrix."""
    logits = _logits(u_ptr, c_ptr, rows, entries, R, K, P, WIDE, TF32, INNER)
    logsumexp = tl.load(logsumexp_ptr + rows, mask=rows < R, other=0.0)
    grad_all = tl.load(grad_all_ptr + rows, mask=rows < R, other=0.0)
    grad_loss = tl.load(grad_loss_ptr + rows, mask=rows < R, other=0.0)
    labels = tl.load(labels_ptr + rows, mask=rows < R, other=-1)
    slope = tl.exp(logits - logsumexp[:, None]) * grad_all[:, None]
    slope -= tl.where(entries[None] == labels[:, None], grad_loss[:, None], 0.0)
    return tl.where((rows < R)[:, None] & (entries < K)[None], slope, 0.0)


@triton.jit
def _codebook_cross_entropy_backward_rows_kernel(
    u_ptr, c_ptr, labels_ptr, logsumexp_ptr, grad_loss_ptr, grad_all_ptr, grad_u_ptr, R, K, P,
    WIDE: tl.constexpr, TF32: tl.constexpr,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * OUTER + tl.arange(0, OUTER)
    total = tl.zeros([ROWS, OUTER], WIDE)
    for first in range(0, K, ENTRIES):
        entries = first + tl.arange(0, ENTRIES)
        slope = _slope(
            u_ptr, c_ptr, labels_ptr, logsumexp_ptr, grad_loss_ptr, grad_all_ptr, rows, entries, R, K, P,
            WIDE, TF32, INNER,
        )  # fmt: skip
        c_at = c_ptr + entries.to(tl.int64)[:, None] * P + column[None]
        c = tl.load(c_at, mask=(entries < K)[:, None] & (column < P)[None], other=0.0)
        total = tl.dot(slope, c, total, input_precision=TF32, out_dtype=WIDE)
    at = grad_u_ptr + rows.to(tl.int64)[:, None] * P + column[None]
    tl.store(at, total, mask=(rows < R)[:, None] & (column < P)[None])


@triton.jit
def _codebook_cross_entropy_backward_entries_kernel(
    u_ptr, c_ptr, labels_ptr, logsumexp_ptr, grad_loss_ptr, grad_all_ptr, partial_ptr, R, K, P, per_part,
    WIDE: tl.constexpr, TF32: tl.constexpr,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr, INNER: tl.constexpr, OUTER: tl.constexpr,
):  # fmt: skip
    entries = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    column = tl.program_id(1) * OUTER + tl.arange(0, OUTER)
    part = tl.program_id(2)
    total = tl.zeros([ENTRIES, OUTER], WIDE)
    for first in range(part * per_part, tl.minimum(R, (part + 1) * per_part), ROWS):
        rows = first + tl.arange(0, ROWS)
        slope = _slope(
            u_ptr, c_ptr, labels_ptr, logsumexp_ptr, grad_loss_ptr, grad_all_ptr, rows, entries, R, K, P,
            WIDE, TF32, INNER,
        )  # fmt: skip
        u_at = u_ptr + rows.to(tl.int64)[:, None] * P + column[None]
        u = tl.load(u_at, mask=(rows < R)[:, None] & (column < P)[None], other=0.0)
        total = tl.dot(tl.trans(slope), u, total, input_precision=TF32, out_dtype=WIDE)
    at = partial_ptr + (part.to(tl.int64) * K + entries)[:, None] * P + column[None]
    tl.store(at, total, mask=(entries < K)[:, None] & (column < P)[None])


def _options(u: Tensor) -> dict[str, object]:
    return {
        "WIDE": tl.float64 if u.dtype == torch.float64 else tl.float32,
        # As torch multiplies matrices of float32.
        "TF32": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        "ROWS": _ROWS,
        "ENTRIES": _ENTRIES,
        "INNER": _INNER,
        # On sm_90 four warps spill registers by the kilobyte in the backward, and eight next to none.
        "num_warps": 8,
        "num_stages": 2,
    }


def codebook_cross_entropy(
    u: Tensor, c: Tensor, labels: Tensor, loss: Tensor, logsumexp: Tensor, predicted: Tensor
) -> None:
    (R, P), K = u.shape, len(c)
    _codebook_cross_entropy_forward_kernel[(triton.cdiv(R, _ROWS),)](
        u, c, labels, loss, logsumexp, predicted, R, K, P, IGNORED=IGNORED, **_options(u)
    )


def codebook_cross_entropy_backward(
    grad_loss: Tensor, grad_all: Tensor, u: Tensor, c: Tensor, labels: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor]:
    (R, P), K = u.shape, len(c)
    given = u, c, labels, logsumexp, grad_loss, grad_all
    grad_u = torch.empty_like(u)
    blocks = triton.cdiv(P, _OUTER)
    _codebook_cross_entropy_backward_rows_kernel[(triton.cdiv(R, _ROWS), blocks)](
        *given, grad_u, R, K, P, OUTER=_OUTER, **_options(u)
    )
    # A codebook fills few programs: the rows are shared among more of them, and what they found is added in order.
    programs = triton.cdiv(K, _ENTRIES) * blocks
    wanted = 2 * torch.cuda.get_device_properties(u.device).multi_processor_count if u.is_cuda else 5
    parts = max(1, min(triton.cdiv(wanted, programs), triton.cdiv(R, _ROWS), _PARTIAL // (K * P)))
    per_part = triton.cdiv(triton.cdiv(R, parts), _ROWS) * _ROWS
    parts = triton.cdiv(R, per_part)
    partial = c.new_empty(parts, K, P)
    _codebook_cross_entropy_backward_entries_kernel[(programs // blocks, blocks, parts)](
        *given, partial, R, K, P, per_part, OUTER=_OUTER, **_options(u)
    )
    return grad_u, partial.sum(0)
