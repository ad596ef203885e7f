"""The first convolution with its norm and GELU in Triton: the convolution's result is never written, nor read again.

The sums of the backward are written by each program for itself and added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Frames whose sums one program of the backward adds, and how many it holds at a time.
_CHUNK, _FRAMES = 256, 32


@triton.jit
def _windows(x_ptr, frame, tap, inside, K, stride):
    at = frame[:, None] * stride + tap[None, :]
    return tl.load(x_ptr + at, mask=inside[:, None] & (tap < K)[None, :], other=0.0)


@triton.jit
def _moments_kernel(
    x_ptr, valid_ptr, mean_ptr, covariance_ptr, count_ptr, S, F, K, stride,
    MASKED: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row ``program_id(1)`` of the covariance of a record's windows, about a mean that a pass before it finds."""
    record, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x_ptr += record * S
    tap = tl.arange(0, TAPS)
    mean, count = tl.zeros([TAPS], tl.float64), tl.zeros([BLOCK], tl.float64)
    for begin in range(0, F, BLOCK):
        frame = begin + tl.arange(0, BLOCK)
        inside = frame < F
        if MASKED:
            inside = inside & (tl.load(valid_ptr + record * F + frame, mask=inside, other=0) != 0)
        mean += tl.sum(_windows(x_ptr, frame, tap, inside, K, stride).to(tl.float64), 0)
        count += inside.to(tl.float64)
    number = tl.maximum(tl.sum(count, 0), 1.0)
    mean = mean / number
    own_mean = tl.sum(tl.where(tap == row, mean, 0.0), 0)
    covariance = tl.zeros([TAPS], tl.float64)
    for begin in range(0, F, BLOCK):
        frame = begin + tl.arange(0, BLOCK)
        inside = frame < F
        if MASKED:
            inside = inside & (tl.load(valid_ptr + record * F + frame, mask=inside, other=0) != 0)
        centred = _windows(x_ptr, frame, tap, inside, K, stride).to(tl.float64) - mean[None, :]
        own = tl.load(x_ptr + frame * stride + row, mask=inside, other=0.0).to(tl.float64) - own_mean
        covariance += tl.sum(tl.where(inside[:, None], own[:, None] * centred, 0.0), 0)
    tl.store(covariance_ptr + (record * K + row) * K + tap, covariance / number, mask=tap < K)
    if row == 0:
        tl.store(mean_ptr + record * K + tap, mean, mask=tap < K)
        tl.store(count_ptr + record, number)


@triton.jit
def _normal(n):
    """The normal distribution at n, and its density."""
    below = 0.5 * (1.0 + tl.erf(n * 0.7071067811865476))
    return below, tl.exp(n * n * -0.5) * 0.3989422804014327


@triton.jit
def _conv_norm_gelu_forward_kernel(
    x_ptr, taps_ptr, offset_ptr, y_ptr, S, F, C, K, stride, FRAMES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    record = tl.program_id(2).to(tl.int64)
    frame = tl.program_id(0) * FRAMES + tl.arange(0, FRAMES)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    offset = tl.load(offset_ptr + record * C + channel, mask=channel < C, other=0.0)
    n = tl.zeros([FRAMES, CHANNELS], offset.dtype) + offset[None, :]
    for j in range(K):
        sample = tl.load(x_ptr + record * S + frame * stride + j, mask=frame < F, other=0.0)
        tap = tl.load(taps_ptr + (record * K + j) * C + channel, mask=channel < C, other=0.0)
        n += sample[:, None] * tap[None, :]
    below, _ = _normal(n)
    at = (record * F + frame[:, None]) * C + channel[None, :]
    tl.store(y_ptr + at, n * below, mask=(frame < F)[:, None] & (channel < C)[None, :])


@triton.jit
def _conv_norm_gelu_backward_kernel(
    grad_ptr, x_ptr, taps_ptr, offset_ptr, sums_ptr, windows_ptr, S, F, C, K, stride, chunks, records,
    WITH_INPUT: tl.constexpr, TAPS: tl.constexpr, CHUNK: tl.constexpr, FRAMES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    chunk, block, record = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel, tap = block * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, TAPS)
    exists = channel < C
    offset = tl.load(offset_ptr + record * C + channel, mask=exists, other=0.0)
    table = (tap < K)[:, None] & exists[None, :]
    taps = tl.load(taps_ptr + (record * K + tap[:, None]) * C + channel[None, :], mask=table, other=0.0)
    products, total = tl.zeros([TAPS, CHANNELS], offset.dtype), tl.zeros([CHANNELS], offset.dtype)
    for begin in range(0, CHUNK, FRAMES):
        frame = chunk * CHUNK + begin + tl.arange(0, FRAMES)
        inside = frame < F
        u = _windows(x_ptr + record * S, frame, tap, inside, K, stride)
        n = tl.dot(u, taps, input_precision="ieee", out_dtype=offset.dtype) + offset[None, :]
        below, density = _normal(n)
        at = (record * F + frame[:, None]) * C + channel[None, :]
        grad = tl.load(grad_ptr + at, mask=inside[:, None] & exists[None, :], other=0.0).to(offset.dtype)
        g = grad * (below + n * density)
        total += tl.sum(g, 0)
        products += tl.dot(tl.trans(u), g, input_precision="ieee", out_dtype=offset.dtype)
        if WITH_INPUT:
            through = tl.dot(g, tl.trans(taps), input_precision="ieee", out_dtype=offset.dtype)
            to = ((block * records + record) * F + frame[:, None]) * K + tap[None, :]
            tl.store(windows_ptr + to, through, mask=inside[:, None] & (tap < K)[None, :])
    sums_ptr += (record * chunks + chunk) * (K + 1) * C
    tl.store(sums_ptr + tap[:, None] * C + channel[None, :], products, mask=table)
    tl.store(sums_ptr + K * C + channel, total, mask=exists)


def moments(x: Tensor, kernel: int, stride: int, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean ``[B, k]`` and covariance ``[B, k, k]`` of a record's windows in float64, and their number ``[B]``."""
    batch, samples = x.shape
    mean, covariance, count = (
        x.new_empty(batch, *size, dtype=torch.float64) for size in ((kernel,), (kernel, kernel), ())
    )
    if batch:
        _moments_kernel[(batch, kernel)](
            x.contiguous(), None if valid is None else valid.contiguous().view(torch.uint8), mean, covariance, count,
            samples, (samples - kernel) // stride + 1, kernel, stride,
            MASKED=valid is not None, TAPS=triton.next_power_of_2(kernel), BLOCK=128,
        )  # fmt: skip
    return mean, covariance, count


def conv_norm_gelu(x: Tensor, taps: Tensor, offset: Tensor, y: Tensor, stride: int) -> None:
    batch, frames, channels = y.shape
    if y.numel():
        tile = {"FRAMES": _FRAMES, "CHANNELS": min(128, triton.next_power_of_2(channels))}
        grid = (triton.cdiv(frames, tile["FRAMES"]), triton.cdiv(channels, tile["CHANNELS"]), batch)
        _conv_norm_gelu_forward_kernel[grid](
            x, taps, offset, y, x.shape[1], frames, channels, taps.shape[1], stride, **tile
        )  # fmt: skip


def conv_norm_gelu_backward(
    grad: Tensor, x: Tensor, taps: Tensor, offset: Tensor, stride: int, with_input: bool
) -> tuple[Tensor, Tensor | None]:
    """Sums over frames of g times each sample of its window, then of g; and over channels, of g times the taps.

    Returns:
        ``[B, k + 1, C]`` float64, and where it is asked for ``[B, F, k]``.
    """
    batch, frames, channels = grad.shape
    kernel = taps.shape[1]
    block = min(64, max(16, triton.next_power_of_2(channels)))
    chunk = min(_CHUNK, triton.cdiv(frames, _FRAMES) * _FRAMES)
    chunks, blocks = triton.cdiv(frames, chunk), triton.cdiv(channels, block)
    sums = taps.new_empty(batch, chunks, kernel + 1, channels)
    windows = taps.new_empty(blocks if with_input else 0, batch, frames, kernel)
    if batch:
        _conv_norm_gelu_backward_kernel[(chunks, blocks, batch)](
            grad.contiguous(), x, taps, offset, sums, windows, x.shape[1], frames, channels, kernel, stride, chunks,
            batch, WITH_INPUT=with_input, TAPS=max(16, triton.next_power_of_2(kernel)), CHUNK=chunk, FRAMES=_FRAMES,
            CHANNELS=block,
        )  # fmt: skip
    return sums.sum(1, dtype=torch.float64), windows.sum(0) if with_input else None
