"""What the first convolution with its norm and GELU computes, and its gradient, in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def conv_norm_gelu(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    stride: int,
    valid: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    normed, _, _ = _normed(x.double(), weight.double(), stride, valid, eps)
    return F.gelu(normed * norm_weight.double() + norm_bias.double()).to(x.dtype)


def conv_norm_gelu_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    stride: int,
    valid: Tensor | None = None,
    eps: float = 1e-5,
    with_input: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # In float32 the norm would lose a small signal on a high level.
    wide, taps, gain = x.double(), weight.double(), norm_weight.double()
    normed, rstd, kept = _normed(wide, taps, stride, valid, eps)
    n = normed * gain + norm_bias.double()
    density = torch.exp(-n.square() / 2) / math.sqrt(2 * math.pi)
    g = grad * (0.5 * torch.special.erfc(-n / math.sqrt(2)) + n * density)
    total, with_normed = g.sum(1, keepdim=True), (g * normed).sum(1, keepdim=True)
    # A frame that is not valid has no part in the statistics.
    through_statistics = torch.where(kept, total + normed * with_normed, 0) / kept.sum(1, keepdim=True).clamp_min(1)
    z = gain * rstd * (g - through_statistics)
    windows = wide.unfold(1, taps.shape[1], stride)
    grad_weight = z.flatten(0, 1).T @ windows.flatten(0, 1)
    grad_x = wide.new_zeros(0)
    if with_input:
        grad_x = torch.ops.aten.unfold_backward(z @ taps, wide.shape, 1, taps.shape[1], stride)
    return (
        grad_x.to(x.dtype),
        grad_weight.to(weight.dtype),
        with_normed.sum((0, 1)).to(norm_weight.dtype),
        total.sum((0, 1)).to(norm_bias.dtype),
    )


def _normed(x: Tensor, weight: Tensor, stride: int, valid: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised convolution [B, F, C], the deviations' inverse [B, 1, C], frames that count [B, F, 1] bool."""
    z = x.unfold(1, weight.shape[1], stride) @ weight.T
    kept = z.new_ones(z.shape[:2], dtype=torch.bool)[..., None] if valid is None else valid[..., None]
    count = kept.sum(1, keepdim=True).clamp_min(1)
    centred = z - torch.where(kept, z, 0).sum(1, keepdim=True) / count
    rstd = torch.rsqrt(torch.where(kept, centred, 0).square().sum(1, keepdim=True) / count + eps)
    return centred * rstd, rstd, kept


def conv_norm_gelu_samples(device: str) -> Iterator[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(0)
    # Records, samples, channels, kernel, stride.
    sizes = [(2, 45, 3, 10, 4), (0, 20, 5, 3, 2), (1, 1, 1, 1, 1), (3, 301, 65, 10, 4), (2, 77, 130, 4, 5)]
    for i, (b, s, c, k, stride) in enumerate([*sizes, (5, 64, 33, 7, 1)]):
        x = torch.randn(b, s, generator=random)
        weight, gain, shift = (torch.randn(*size, generator=random) for size in ((c, k), (c,), (c,)))
        frames = (s - k) // stride + 1
        valid = (torch.rand(b, frames, generator=random) < 0.6) if i % 2 else None
        given = [x, weight, gain, shift, stride, None if valid is None else valid.to(device), 1e-5]
        yield tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in given)
    weight, gain, shift = torch.randn(9, 6, generator=random), torch.ones(9), torch.zeros(9)
    for x in (
        # A level that is far above the signal, silence, and records of hardly any signal.
        1000 + torch.randn(2, 200, generator=random),
        torch.zeros(2, 50),
        torch.full((1, 50), -3.0),
        1e-6 * torch.randn(2, 81, generator=random),
        1e3 * torch.randn(2, 81, generator=random),
    ):
        frames = (x.shape[1] - 6) // 3 + 1
        valid = torch.arange(frames)[None].expand(len(x), -1) < frames - 3
        # Where the deviation is that of eps alone, a gain of 1 would make gradients hundreds of times those elsewhere.
        own = gain * (0.02 if x.std() < 1e-3 else 1.0)
        yield x.to(device), weight.to(device), own.to(device), shift.to(device), 3, valid.to(device), 1e-5
    # A record in which no frame counts.
    x, valid = torch.randn(2, 60, generator=random), (torch.arange(19) < 10) & torch.tensor([[False], [True]])
    yield x.to(device), weight.to(device), gain.to(device), shift.to(device), 3, valid.to(device), 1e-5


def conv_norm_gelu_backward_samples(device: str) -> Iterator[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(1)
    for i, args in enumerate(conv_norm_gelu_samples("cpu")):
        x, weight, _, _, stride = args[:5]
        # Gradients through rounding alone, and those that a NaN makes NaN, agree with nothing.
        if not x.isfinite().all() or (x.numel() > 1 and (x.abs().min() > 100 or x.std() < 1e-3)):
            continue
        frames = (x.shape[1] - weight.shape[1]) // stride + 1
        grad = torch.randn(len(x), frames, len(weight), generator=random)
        given = (grad, *args, i % 3 != 1)
        yield tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in given)


conv_norm_gelu_tolerance = {
    torch.float32: (1e-5, 5e-5),
    torch.float64: (1e-9, 1e-9),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1e-2, 1e-2),
}
conv_norm_gelu_backward_tolerance = {
    torch.float32: (1e-4, 5e-4),
    torch.float64: (1e-9, 1e-9),
    torch.float16: (1e-2, 5e-2),
    torch.bfloat16: (5e-2, 2e-1),
}


def conv_norm_gelu_errors() -> Iterator[tuple[tuple[Any, ...], str]]:
    x, weight, norm = torch.zeros(2, 20), torch.zeros(3, 5), torch.zeros(3)
    op = "conv_norm_gelu"
    yield (x[0], weight, norm, norm, 2), rf"{op}: x must be floating point \[B, S\], got float32\[20\]"
    yield (x.long(), weight, norm, norm, 2), rf"{op}: x must be floating point \[B, S\], got int64\[2, 20\]"
    yield ([[0.0]], weight, norm, norm, 2), rf"{op}: x must be a NumPy, CuPy or torch array, got list"
    yield (x, weight[0], norm, norm, 2), rf"{op}: weight must be floating point \[C, k\] or \[C, 1, k\].*float32\[5\]"
    yield (x, weight[:, :0], norm, norm, 2), rf"{op}: weight must be .*, got float32\[3, 0\]"
    yield (x, weight[:, None].repeat(1, 2, 1), norm, norm, 2), rf"{op}: weight must be .*, got float32\[3, 2, 5\]"
    yield (x, weight.to("meta"), norm, norm, 2), rf"{op}: weight must be on the device of x \(.*\), got meta"
    yield (x[:, :4], weight, norm, norm, 2), rf"{op}: x must be at least 5 samples long, got float32\[2, 4\]"
    yield (x, weight, norm[:2], norm, 2), rf"{op}: norm_weight must be floating point \[3\], got float32\[2\]"
    yield (x, weight, norm, norm[:1], 2), rf"{op}: norm_bias must be floating point \[3\], got float32\[1\]"
    yield (x, weight, norm, norm, 0), rf"{op}: stride must be at least 1, got 0"
    yield (x, weight, norm, norm, 1.5), rf"{op}: stride must be a whole number, got 1\.5"
    yield (x, weight, norm, norm, 2, None, "a"), rf"{op}: eps must be a number, got 'a'"
    yield (x, weight, norm, norm, 2, x > 0), rf"{op}: valid must be bool \[2, 8\], got bool\[2, 20\]"
    yield (x, weight, norm, norm, 2, x[:, :8]), rf"{op}: valid must be bool \[2, 8\], got float32\[2, 8\]"
    yield (x, weight, norm, norm, 2, None, -1.0), rf"{op}: eps must be at least 0, got -1.0"
