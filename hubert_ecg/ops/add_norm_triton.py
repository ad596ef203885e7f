"""Dropout, residual and layer norm in Triton: a row stays in registers, so each tensor is read or written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hubert_ecg.ops._dropout_triton import dropout_options, kept


@triton.jit
def _add_norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, mean_ptr, rstd_ptr, D,
    EPS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    at, inside = row.to(tl.int64) * D + column, column < D
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(WIDE)
    x = kept(x, at, seed_ptr, THRESHOLD, SCALE)
    total = x + tl.load(residual_ptr + at, mask=inside, other=0.0).to(WIDE)
    mean = tl.sum(total, 0) / D
    centred = tl.where(inside, total - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 0) / D + EPS)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(WIDE)
    bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(WIDE)
    tl.store(y_ptr + at, centred * rstd * weight + bias, mask=inside)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _add_norm_backward_kernel(
    grad_ptr, x_ptr, residual_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr, to_x_ptr, to_residual_ptr, sums_ptr,
    rows, D, end, per_program,
    WIDE: tl.constexpr, BLOCK: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    program, column = tl.program_id(0), tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(WIDE)
    to_weight, to_bias = tl.zeros([BLOCK], WIDE), tl.zeros([BLOCK], WIDE)
    for i in range(per_program):
        row = program.to(tl.int64) * per_program + i
        at = row * D + column
        inside = (column < D) & (at < end)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(WIDE)
        x = kept(x, at, seed_ptr, THRESHOLD, SCALE)
        total = x + tl.load(residual_ptr + at, mask=inside, other=0.0).to(WIDE)
        known = tl.minimum(row, rows - 1)
        mean, rstd = tl.load(mean_ptr + known), tl.load(rstd_ptr + known)
        normed = tl.where(inside, (total - mean) * rstd, 0.0)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(WIDE)
        to_weight += grad * normed
        to_bias += grad
        along = grad * weight
        to_total = (along - tl.sum(along, 0) / D - normed * (tl.sum(along * normed, 0) / D)) * rstd
        tl.store(to_residual_ptr + at, to_total, mask=inside)
        tl.store(to_x_ptr + at, kept(to_total, at, seed_ptr, THRESHOLD, SCALE), mask=inside)
    tl.store(sums_ptr + program * 2 * D + column, to_weight, mask=column < D)
    tl.store(sums_ptr + (program * 2 + 1) * D + column, to_bias, mask=column < D)


def _options(residual: Tensor, dropout_p: float) -> dict[str, object]:
    block = triton.next_power_of_2(residual.shape[-1])
    return {
        "WIDE": tl.float64 if residual.dtype == torch.float64 else tl.float32,
        "BLOCK": block,
        "num_warps": min(16, max(1, block // 256)),
        **dropout_options(dropout_p),
    }


def add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout_p: float, seed: Tensor | None,
    y: Tensor, mean: Tensor, rstd: Tensor,
) -> None:  # fmt: skip
    rows, D = mean.numel(), x.shape[-1]
    _add_norm_forward_kernel[(rows,)](
        x, residual, weight, bias, seed, y, mean, rstd, D, EPS=eps, **_options(residual, dropout_p)
    )  # fmt: skip


def add_norm_backward(
    grad: Tensor, x: Tensor, residual: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows, D = mean.numel(), x.shape[-1]
    to_x, to_residual = torch.empty_like(x), torch.empty_like(residual)
    # Each program sums the rows that it has; the sums are added in a fixed order.
    programs = min(rows, 4 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3)
    per_program = triton.cdiv(rows, programs)
    programs = triton.cdiv(rows, per_program)
    sums = residual.new_empty(programs, 2, D, dtype=torch.promote_types(residual.dtype, torch.float32))
    _add_norm_backward_kernel[(programs,)](
        grad, x, residual, weight, mean, rstd, seed, to_x, to_residual, sums, rows, D, rows * D,
        per_program=per_program, **_options(residual, dropout_p),
    )  # fmt: skip
    to_weight, to_bias = sums.sum(0).to(weight.dtype)
    return to_x, to_residual, to_weight, to_bias
