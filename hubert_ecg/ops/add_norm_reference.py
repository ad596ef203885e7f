"""Dropout, residual and layer norm in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hubert_ecg.ops._dropout import dropout


def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(residual.dtype, torch.float32)
    total = residual.to(wide) + dropout(x.to(wide), dropout_p, seed)
    mean = total.mean(-1, keepdim=True)
    centred = total - mean
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (
        (centred * rstd * weight + bias).to(residual.dtype).contiguous(),
        mean.squeeze(-1).contiguous(),
        rstd.squeeze(-1).contiguous(),
    )


def add_norm_backward(
    grad: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(residual.dtype, torch.float32)
    normed = (residual.to(wide) + dropout(x.to(wide), dropout_p, seed) - mean[..., None]) * rstd[..., None]
    grad = grad.to(wide)
    rows = grad * weight
    along = (rows * normed).mean(-1, keepdim=True) * normed
    to_total = (rows - rows.mean(-1, keepdim=True) - along) * rstd[..., None]
    summed = tuple(range(grad.ndim - 1))
    to_weight, to_bias = (grad * normed).sum(summed), grad.sum(summed)
    to_x = dropout(to_total, dropout_p, seed)
    to_x, to_total = to_x.to(x.dtype).contiguous(), to_total.to(residual.dtype).contiguous()
    return to_x, to_total, to_weight.to(weight.dtype), to_bias.to(weight.dtype)


def add_norm_samples(device: str) -> Iterator[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device)

    seed = torch.tensor(5, device=device)
    for shape, dropout_p in [((3, 5, 8), 0.25), ((7, 33), 0.0), ((0, 12), 0.5), ((2, 9, 65), 0.1), ((4, 1), 0.5)]:
        width = shape[-1]
        rest = (1e-5, dropout_p, seed if dropout_p else None)
        yield some(*shape), some(*shape), 1 + some(width), some(width), *rest
    # An offset that swallows the variance of a sum of squares; a row without variance; everything dropped.
    yield some(4, 300) + 300, some(4, 300), some(300), some(300), 1e-5, 0.1, torch.tensor(-(2**62) - 9, device=device)
    yield torch.zeros(3, 16, device=device), torch.ones(3, 16, device=device), some(16), some(16), 1e-3, 0.0, None
    yield some(3, 16), some(3, 16), some(16), some(16), 1e-5, 1.0, seed


add_norm_tolerance = {
    torch.float32: (2e-5, 1e-4),
    torch.float64: (1e-9, 1e-9),
    torch.float16: (2e-3, 1e-2),
    torch.bfloat16: (2e-2, 5e-2),
}


def add_norm_errors() -> Iterator[tuple[tuple[Any, ...], str]]:
    x, w = torch.zeros(2, 8), torch.ones(8)
    yield (x.long(), x, w, w), r"add_norm: x must be floating point \[\.\.\., D\], got int64\[2, 8\]"
    yield (x, x[:1], w, w), r"add_norm: residual must be floating point \[2, 8\], got float32\[1, 8\]"
    yield (x, x.long(), w, w), r"add_norm: residual must be floating point \[2, 8\], got int64\[2, 8\]"
    yield (x, x, w[:3], w), r"add_norm: weight must be floating point \[8\], got float32\[3\]"
    yield (x, x, w, x), r"add_norm: bias must be floating point \[8\], got float32\[2, 8\]"
    yield (x, x, w, w, -1.0), r"add_norm: eps must be at least 0, got -1\.0"
    yield (x, x, w, w, "a"), r"add_norm: eps must be a number, got 'a'"
    yield (x, x, w, w, 1e-5, 1.5), r"add_norm: dropout_p must be from 0 to 1, got 1\.5"
    yield (x, x, w, w, 1e-5, 0.5, 0.5), r"add_norm: seed must be int64 \[\], a whole number or None, got 0\.5"
    yield ([1.0], x, w, w), r"add_norm: x must be a NumPy, CuPy or torch array, got list"


def add_norm_backward_samples(device: str) -> Iterator[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(1)
    for x, residual, weight, bias, eps, dropout_p, seed in add_norm_samples(device):
        _, mean, rstd = add_norm(x, residual, weight, bias, eps, dropout_p, seed)
        yield torch.randn(x.shape, generator=random).to(x), x, residual, weight, mean, rstd, dropout_p, seed


add_norm_backward_tolerance = {
    torch.float32: (5e-5, 3e-4),
    torch.float64: (1e-8, 1e-8),
    torch.float16: (5e-3, 3e-2),
    torch.bfloat16: (4e-2, 3e-1),
}
