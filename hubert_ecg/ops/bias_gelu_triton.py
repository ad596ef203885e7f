"""Bias, GELU and dropout in Triton: one pass forward, one backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hubert_ecg.ops import _dropout
from hubert_ecg.ops._dropout_triton import bits, keys

_COLUMNS = 256
_ROWS = 64


@triton.jit
def _tile(D, rows, first_row, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = first_row.to(tl.int64) + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row * D + column, (row < rows) & (column < D), column


@triton.jit
def _kept(x, at, seed_ptr, threshold, scale, DROPOUT: tl.constexpr):
    if DROPOUT:
        k0, k1 = keys(seed_ptr)
        x = tl.where(bits(k0, k1, at) >= threshold.to(tl.uint32), x * scale, 0.0)
    return x


@triton.jit
def _bias_gelu_forward_kernel(
    x_ptr, bias_ptr, seed_ptr, y_ptr, rows, D, threshold, scale,
    DROPOUT: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    at, inside, column = _tile(D, rows, tl.program_id(0) * ROWS, ROWS, COLUMNS)
    a = tl.load(x_ptr + at, mask=inside, other=0.0).to(WIDE)
    a += tl.load(bias_ptr + column, mask=column < D, other=0.0).to(WIDE)
    y = a * 0.5 * (1 + tl.erf(a * 0.7071067811865476))
    tl.store(y_ptr + at, _kept(y, at, seed_ptr, threshold, scale, DROPOUT), mask=inside)


@triton.jit
def _bias_gelu_backward_kernel(
    grad_ptr, x_ptr, bias_ptr, seed_ptr, to_x_ptr, sums_ptr, rows, D, threshold, scale, tiles,
    DROPOUT: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    bias = tl.load(bias_ptr + column, mask=column < D, other=0.0).to(WIDE)[None, :]
    to_bias = tl.zeros([COLUMNS], WIDE)
    for i in range(tiles):
        at, inside, _ = _tile(D, rows, (tl.program_id(0) * tiles + i) * ROWS, ROWS, COLUMNS)
        a = tl.load(x_ptr + at, mask=inside, other=0.0).to(WIDE) + bias
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(WIDE)
        grad = _kept(grad, at, seed_ptr, threshold, scale, DROPOUT)
        slope = 0.5 * (1 + tl.erf(a * 0.7071067811865476)) + a * tl.exp(-0.5 * a * a) * 0.3989422804014327
        to_x = grad * slope
        tl.store(to_x_ptr + at, to_x, mask=inside)
        to_bias += tl.sum(tl.where(inside, to_x, 0.0), 0)
    tl.store(sums_ptr + tl.program_id(0) * D + column, to_bias, mask=column < D)


def _options(x: Tensor, dropout_p: float, rows_in_tile: int) -> dict[str, object]:
    return {
        "threshold": _dropout.threshold(dropout_p),
        "scale": 1 / (1 - dropout_p) if dropout_p < 1 else 0.0,
        "DROPOUT": dropout_p > 0,
        "WIDE": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "ROWS": rows_in_tile,
        "COLUMNS": _COLUMNS,
    }


def bias_gelu(x: Tensor, bias: Tensor, dropout_p: float, seed: Tensor | None, y: Tensor) -> None:
    D = x.shape[-1]
    rows = x.numel() // D
    grid = triton.cdiv(rows, 4), triton.cdiv(D, _COLUMNS)
    _bias_gelu_forward_kernel[grid](x, bias, seed, y, rows, D, **_options(x, dropout_p, 4))


def bias_gelu_backward(
    grad: Tensor, x: Tensor, bias: Tensor, dropout_p: float, seed: Tensor | None, to_x: Tensor
) -> Tensor:
    """Writes the gradient of x, returns that of the bias: sums of row blocks, added in a fixed order."""
    D = x.shape[-1]
    rows = x.numel() // D
    blocks = triton.cdiv(rows, _ROWS)
    sums = x.new_empty(blocks, D, dtype=torch.promote_types(x.dtype, torch.float32))
    _bias_gelu_backward_kernel[blocks, triton.cdiv(D, _COLUMNS)](
        grad, x, bias, seed, to_x, sums, rows, D, tiles=_ROWS // 4, **_options(x, dropout_p, 4)
    )
    return sums.sum(0)
