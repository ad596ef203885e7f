"""The bias of the feature projection and the mask embedding in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def mask_embedding(x: Tensor, bias: Tensor, embedding: Tensor, masked: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.where(masked[..., None], embedding.to(wide), x.to(wide) + bias.to(wide)).to(x.dtype).contiguous()


def mask_embedding_backward(grad: Tensor, masked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(grad.dtype, torch.float32)
    replaced, rows = masked[..., None], tuple(range(masked.ndim))
    to_x = torch.where(replaced, 0, grad.to(wide))
    return to_x.to(grad.dtype).contiguous(), to_x.sum(rows), torch.where(replaced, grad.to(wide), 0).sum(rows)


def mask_embedding_samples(device: str) -> Iterator[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device)

    for *rows, width in [(3, 5, 8), (70, 33), (0, 12), (2, 9, 257), (4, 1)]:
        yield some(*rows, width), some(width), some(width), torch.rand(rows, generator=random).to(device) < 0.4
    x = some(4, 6)
    # What is replaced may be anything.
    x[1] = torch.nan
    yield x, some(6), some(6), torch.tensor([False, True, True, False], device=device)


mask_embedding_tolerance = {
    torch.float32: (1e-6, 1e-6),
    torch.float64: (1e-12, 1e-12),
    torch.float16: (1e-3, 1e-3),
    torch.bfloat16: (1e-2, 1e-2),
}


def mask_embedding_errors() -> Iterator[tuple[tuple[Any, ...], str]]:
    x, b, masked = torch.zeros(2, 8), torch.ones(8), torch.ones(2, dtype=torch.bool)
    yield (x.long(), b, b, masked), r"mask_embedding: x must be floating point \[\.\.\., D\], got int64\[2, 8\]"
    yield (x, b[:3], b, masked), r"mask_embedding: bias must be floating point \[8\], got float32\[3\]"
    yield (x, b, x, masked), r"mask_embedding: embedding must be floating point \[8\], got float32\[2, 8\]"
    yield (x, b, b, masked.long()), r"mask_embedding: masked must be bool \[2\], got int64\[2\]"
    yield (x, b, b, masked[:1]), r"mask_embedding: masked must be bool \[2\], got bool\[1\]"


def mask_embedding_backward_samples(device: str) -> Iterator[tuple[Any, ...]]:
    for x, _, _, masked in mask_embedding_samples(device):
        yield x.nan_to_num(1.0), masked


mask_embedding_backward_tolerance = {
    torch.float32: (1e-5, 1e-5),
    torch.float64: (1e-11, 1e-11),
    torch.float16: (2e-3, 2e-2),
    torch.bfloat16: (2e-2, 1e-1),
}
