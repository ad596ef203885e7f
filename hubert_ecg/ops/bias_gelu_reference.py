"""Bias, GELU and dropout in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hubert_ecg.ops._dropout import dropout


def bias_gelu(x: Tensor, bias: Tensor, dropout_p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    at = x.to(wide) + bias.to(wide)
    return dropout(at * 0.5 * (1 + torch.erf(at * math.sqrt(0.5))), dropout_p, seed).to(x.dtype).contiguous()


def bias_gelu_backward(
    grad: Tensor, x: Tensor, bias: Tensor, dropout_p: float = 0.0, seed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    at = x.to(wide) + bias.to(wide)
    slope = 0.5 * (1 + torch.erf(at * math.sqrt(0.5))) + at * torch.exp(-at * at / 2) / math.sqrt(2 * math.pi)
    to_x = dropout(grad.to(wide), dropout_p, seed) * slope
    return to_x.to(x.dtype).contiguous(), to_x.sum(tuple(range(x.ndim - 1))).to(bias.dtype)


def bias_gelu_samples(device: str) -> Iterator[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device)

    seed = torch.tensor(7, device=device)
    for shape, dropout_p in [((3, 5, 8), 0.25), ((70, 33), 0.0), ((0, 12), 0.5), ((2, 9, 65), 0.1), ((4, 1), 1.0)]:
        yield 3 * some(*shape), some(shape[-1]), dropout_p, seed if dropout_p else None
    # Where the exponential ends, and beyond.
    wide = torch.linspace(-40, 40, 1601).to(device)
    yield wide[None], torch.zeros(1601, device=device), 0.0, None
    yield torch.tensor([[1e4, -1e4, -1e30, torch.nan, 0.0]], device=device), some(5), 0.0, None


bias_gelu_tolerance = {
    torch.float32: (2e-6, 1e-6),
    torch.float64: (1e-12, 1e-12),
    torch.float16: (1e-3, 1e-3),
    torch.bfloat16: (1e-2, 1e-2),
}


def bias_gelu_errors() -> Iterator[tuple[tuple[Any, ...], str]]:
    x, b = torch.zeros(2, 8), torch.ones(8)
    yield (x.long(), b), r"bias_gelu: x must be floating point \[\.\.\., D\], got int64\[2, 8\]"
    yield (x, b[:3]), r"bias_gelu: bias must be floating point \[8\], got float32\[3\]"
    yield (x, b.long()), r"bias_gelu: bias must be floating point \[8\], got int64\[8\]"
    yield (x, b, -0.1), r"bias_gelu: dropout_p must be from 0 to 1, got -0\.1"
    yield (x, b, 0.5, torch.ones(2)), r"bias_gelu: seed must be int64 \[\], .*, got float32\[2\]"


def bias_gelu_backward_samples(device: str) -> Iterator[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(1)
    for x, *rest in bias_gelu_samples(device):
        yield torch.randn(x.shape, generator=random).to(x), x, *rest


bias_gelu_backward_tolerance = {
    torch.float32: (2e-5, 2e-5),
    torch.float64: (1e-11, 1e-11),
    torch.float16: (2e-3, 2e-2),
    torch.bfloat16: (2e-2, 2e-1),
}
