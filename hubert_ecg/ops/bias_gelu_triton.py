"""Bias, GELU and dropout in Triton: one pass forward, one backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hubert_ecg.ops._dropout_triton import dropout_options, kept

# A tile, and how many of them a program of the backward sums.
_ROWS, _COLUMNS, _TILES = 4, 256, 16


@triton.jit
def _tile(D, rows, first_row, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = first_row.to(tl.int64) + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row * D + column, (row < rows) & (column < D), column


@triton.jit
def _bias_gelu_forward_kernel(
    x_ptr, bias_ptr, seed_ptr, y_ptr, rows, D,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    at, inside, column = _tile(D, rows, tl.program_id(0) * ROWS, ROWS, COLUMNS)
    a = tl.load(x_ptr + at, mask=inside, other=0.0).to(WIDE)
    a += tl.load(bias_ptr + column, mask=column < D, other=0.0).to(WIDE)
    y = a * 0.5 * (1 + tl.erf(a * 0.7071067811865476))
    tl.store(y_ptr + at, kept(y, at, seed_ptr, THRESHOLD, SCALE), mask=inside)


@triton.jit
def _bias_gelu_backward_kernel(
    grad_ptr, x_ptr, bias_ptr, seed_ptr, to_x_ptr, sums_ptr, rows, D, tiles,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    bias = tl.load(bias_ptr + column, mask=column < D, other=0.0).to(WIDE)[None, :]
    to_bias = tl.zeros([COLUMNS], WIDE)
    for i in range(tiles):
        at, inside, _ = _tile(D, rows, (tl.program_id(0) * tiles + i) * ROWS, ROWS, COLUMNS)
        a = tl.load(x_ptr + at, mask=inside, other=0.0).to(WIDE) + bias
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(WIDE)
        grad = kept(grad, at, seed_ptr, THRESHOLD, SCALE)
        slope = 0.5 * (1 + tl.erf(a * 0.7071067811865476)) + a * tl.exp(-0.5 * a * a) * 0.3989422804014327
        to_x = grad * slope
        tl.store(to_x_ptr + at, to_x, mask=inside)
        to_bias += tl.sum(tl.where(inside, to_x, 0.0), 0)
    tl.store(sums_ptr + tl.program_id(0) * D + column, to_bias, mask=column < D)


def _options(x: Tensor, dropout_p: float) -> dict[str, object]:
    return {
        "WIDE": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "ROWS": _ROWS,
        "COLUMNS": _COLUMNS,
        **dropout_options(dropout_p),
    }


def bias_gelu(x: Tensor, bias: Tensor, dropout_p: float, seed: Tensor | None, y: Tensor) -> None:
    D = x.shape[-1]
    rows = x.numel() // D
    grid = triton.cdiv(rows, _ROWS), triton.cdiv(D, _COLUMNS)
    _bias_gelu_forward_kernel[grid](x, bias, seed, y, rows, D, **_options(x, dropout_p))


def bias_gelu_backward(
    grad: Tensor, x: Tensor, bias: Tensor, dropout_p: float, seed: Tensor | None, to_x: Tensor
) -> Tensor:
    """Writes the gradient of x, returns that of the bias: sums of row blocks, added in a fixed order."""
    D = x.shape[-1]
    rows = x.numel() // D
    blocks = triton.cdiv(rows, _TILES * _ROWS)
    sums = x.new_empty(blocks, D, dtype=torch.promote_types(x.dtype, torch.float32))
    _bias_gelu_backward_kernel[blocks, triton.cdiv(D, _COLUMNS)](
        grad, x, bias, seed, to_x, sums, rows, D, tiles=_TILES, **_options(x, dropout_p)
    )
    return sums.sum(0)
