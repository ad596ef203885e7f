"""Differences of features along the frames of a lead, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def deltas(x: Tensor, lengths: Tensor | None = None, window: int = 5) -> Tensor:
    reach = (window - 1) // 2
    leads = [x] if lengths is None else x.split(lengths.tolist(), -2)
    slopes = [torch.zeros_like(lead, memory_format=torch.contiguous_format) for lead in leads]
    for lead, slope in zip(leads, slopes, strict=True):
        frame, last = torch.arange(lead.shape[-2], device=x.device), max(lead.shape[-2] - 1, 0)
        for k in range(1, reach + 1):
            later, earlier = (frame + k).clamp(max=last), (frame - k).clamp(min=0)
            slope += k * (lead[..., later, :] - lead[..., earlier, :])
    return torch.cat(slopes, -2) / (reach * (reach + 1) * (2 * reach + 1) / 3)


def deltas_samples(device: str) -> Iterator[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(0)
    for shape in [(93, 13), (4, 93, 13), (0, 13), (3, 0, 13), (0, 7, 13), (2, 3, 5, 1), (1, 4), (9, 0)]:
        yield (torch.randn(shape, generator=random).to(device),)
    x = torch.randn(2, 93, 13, generator=random).to(device)
    lengths = [8] * 9 + [7] * 3
    yield x, torch.tensor(lengths).to(device)
    yield x, torch.tensor([0, 1, 2, 90, 0]).to(device), 9
    yield x, torch.tensor([93]).to(device), 3
    x = 1000 + torch.randn(200, 3, generator=random)
    x[5, 1], x[100, 2] = torch.nan, torch.inf
    yield x.to(device), torch.tensor([6, 194]).to(device)


deltas_tolerance = {torch.float32: (1e-5, 2e-4), torch.float64: (1e-12, 1e-12)}


def deltas_errors() -> Iterator[tuple[tuple[Any, ...], str]]:
    x = torch.zeros(4, 13)
    yield (x[0],), r"deltas: x must be floating point \[\.\.\., F, D\], got float32\[13\]"
    yield (x.int(),), r"deltas: x must be floating point \[\.\.\., F, D\], got int32\[4, 13\]"
    yield (x, None, 4), r"deltas: window must be odd and at least 3, got 4"
    yield (x, None, 1), r"deltas: window must be odd and at least 3, got 1"
    yield (x, torch.tensor([1, 2])), r"deltas: lengths must be frames of each lead that add up to F = 4, got \[1, 2\]"
    yield (x, [2.5, 1.5]), r"deltas: lengths must be .*, got \[2\.5, 1\.5\]"
    yield (x, torch.tensor([[4]])), r"deltas: lengths must be .*, got \[\[4\]\]"
    yield (x, None, 5.0), r"deltas: window must be a whole number, got 5\.0"
    yield (x, None, None), r"deltas: window must be a whole number, got None"
    yield (None,), r"deltas: x must be a NumPy, CuPy or torch array, got None"
    yield ([[1.0]],), r"deltas: x must be a NumPy, CuPy or torch array, got list"
    yield (x, torch.tensor([5, -1])), r"deltas: lengths must be .*, got \[5, -1\]"
