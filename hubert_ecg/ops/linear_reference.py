"""A linear layer and its gradient in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # Autocast reaches into ops, and would round what is wide.
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        y = x.to(wide) @ weight.to(wide).T
        return (y if bias is None else y + bias.to(wide)).to(x.dtype).contiguous()


def linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, with_x: bool = True, with_weight: bool = True, with_bias: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    wide, count = torch.promote_types(x.dtype, torch.float32), x.shape[:-1].numel()
    with torch.autocast(x.device.type, enabled=False):
        rows, own = x.to(wide).reshape(count, x.shape[-1]), grad.to(wide).reshape(count, len(weight))
        to_x = (own @ weight.to(wide)).view(x.shape).to(x.dtype) if with_x else x.new_zeros(0)
        to_weight = (own.T @ rows).to(weight.dtype) if with_weight else weight.new_zeros(0)
        return to_x, to_weight, own.sum(0) if with_bias else own.new_zeros(0)


def linear_samples(device: str) -> Iterator[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device)

    for shape, width, biased in [
        ((2, 3, 5), 7, True),
        ((0, 9), 4, True),
        ((4, 1), 1, False),
        ((7, 33), 17, True),
        ((2, 171, 65), 259, False),
        ((61, 769), 33, True),
        ((31, 1600), 40, False),
    ]:
        yield some(*shape) / shape[-1] ** 0.5, some(width, shape[-1]), some(width) if biased else None
    # Rows, and parts of rows, of very different lengths; zeros; what is not a number.
    x, weight = some(20, 800) / 800**0.5, some(19, 800)
    x *= torch.logspace(-6, 0, 20, device=device)[:, None]
    weight[:, 780:] *= 1e-3
    x[3], weight[5], x[8, 770:] = 0, 0, 0
    yield x, weight, None
    x = some(3, 12)
    x[1, 4] = torch.nan
    yield x, some(2, 12), some(2)


linear_tolerance = {
    torch.float32: (1e-5, 5e-5),
    torch.float64: (1e-12, 1e-12),
    torch.float16: (2e-3, 3e-2),
    torch.bfloat16: (1e-2, 3e-2),
}


def linear_errors() -> Iterator[tuple[tuple[Any, ...], str]]:
    x, weight = torch.zeros(2, 8), torch.ones(3, 8)
    yield (x.long(), weight), r"linear: x must be floating point \[\.\.\., D\], got int64\[2, 8\]"
    yield (x[0, 0], weight), r"linear: x must be floating point \[\.\.\., D\], got float32\[\]"
    yield (x, weight[:, :5]), r"linear: weight must be floating point \[N, 8\], got float32\[3, 5\]"
    yield (x, weight.double()), r"linear: weight must be of the dtype of x \(torch.float32\), got float64\[3, 8\]"
    yield (x, weight.long()), r"linear: weight must be floating point \[N, 8\], got int64\[3, 8\]"
    yield (x, weight, torch.ones(2)), r"linear: bias must be floating point \[3\], got float32\[2\]"
    yield (x, weight, torch.ones(3).long()), r"linear: bias must be floating point \[3\], got int64\[3\]"


def linear_backward_samples(device: str) -> Iterator[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(1)
    for i, (x, weight, _) in enumerate(linear_samples(device)):
        grad = torch.randn((*x.shape[:-1], len(weight)), generator=random).to(x)
        yield grad, x, weight, i % 4 != 2, i % 4 != 3, i % 4 != 1


linear_backward_tolerance = {
    torch.float32: (1e-5, 2e-4),
    torch.float64: (1e-12, 1e-11),
    torch.float16: (2e-3, 3e-2),
    torch.bfloat16: (1e-2, 2e-1),
}
