"""Bias and mask embedding in Triton: one pass forward, one backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 256
_ROWS = 64


@triton.jit
def _mask_embedding_forward_kernel(
    x_ptr, bias_ptr, embedding_ptr, masked_ptr, y_ptr, D, WIDE: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside, at = column < D, row * D + column
    if tl.load(masked_ptr + row) != 0:
        y = tl.load(embedding_ptr + column, mask=inside, other=0.0).to(WIDE)
    else:
        y = tl.load(x_ptr + at, mask=inside, other=0.0).to(WIDE)
        y += tl.load(bias_ptr + column, mask=inside, other=0.0).to(WIDE)
    tl.store(y_ptr + at, y, mask=inside)


@triton.jit
def _mask_embedding_backward_kernel(
    grad_ptr, masked_ptr, to_x_ptr, sums_ptr, rows, D, end,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    to_bias, to_embedding = tl.zeros([COLUMNS], WIDE), tl.zeros([COLUMNS], WIDE)
    for i in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        at = row * D + column
        inside = (column < D) & (at < end)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(WIDE)
        masked = tl.load(masked_ptr + tl.minimum(row, rows - 1)) != 0
        to_x = tl.where(masked, 0.0, grad)
        to_bias += to_x
        to_embedding += tl.where(masked, grad, 0.0)
        tl.store(to_x_ptr + at, to_x, mask=inside)
    tl.store(sums_ptr + tl.program_id(0) * 2 * D + column, to_bias, mask=column < D)
    tl.store(sums_ptr + (tl.program_id(0) * 2 + 1) * D + column, to_embedding, mask=column < D)


def _wide(x: Tensor) -> object:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def mask_embedding(x: Tensor, bias: Tensor, embedding: Tensor, masked: Tensor, y: Tensor) -> None:
    grid = masked.numel(), triton.cdiv(x.shape[-1], _COLUMNS)
    _mask_embedding_forward_kernel[grid](
        x, bias, embedding, masked.view(torch.uint8), y, x.shape[-1], WIDE=_wide(x), COLUMNS=_COLUMNS
    )


def mask_embedding_backward(grad: Tensor, masked: Tensor, to_x: Tensor) -> Tensor:
    """Writes the gradient of x, returns those of bias and embedding: sums of row blocks, added in a fixed order."""
    rows, D = masked.numel(), grad.shape[-1]
    blocks = triton.cdiv(rows, _ROWS)
    sums = grad.new_empty(blocks, 2, D, dtype=torch.promote_types(grad.dtype, torch.float32))
    _mask_embedding_backward_kernel[blocks, triton.cdiv(D, _COLUMNS)](
        grad, masked.view(torch.uint8), to_x, sums, rows, D, rows * D, WIDE=_wide(grad), ROWS=_ROWS, COLUMNS=_COLUMNS
    )
    return sums.sum(0)
