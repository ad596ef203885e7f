"""What a convolution over time is, channels last, and its gradient, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def strided_conv(x: Tensor, weight: Tensor, stride: int, bias: Tensor | None = None) -> Tensor:
    z = torch.einsum("bfck,nck->bfn", x.unfold(1, weight.shape[2], stride), weight)
    return z if bias is None else z + bias


def strided_conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, with_input: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = weight.shape[2]
    grad_weight = torch.einsum("bfn,bfck->nck", grad, x.unfold(1, kernel, stride))
    grad_x = x.new_zeros(0)
    if with_input:
        windows = torch.einsum("bfn,nck->bfck", grad, weight)
        grad_x = torch.ops.aten.unfold_backward(windows, x.shape, 1, kernel, stride)
    return grad_x, grad_weight, grad.sum((0, 1))


def strided_conv_samples(device: str) -> Iterator[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(0)
    # Records, samples, channels, channels of the result, kernel, stride.
    for i, (b, t, c, n, k, stride) in enumerate(
        [
            (2, 15, 3, 5, 3, 2),
            (0, 9, 4, 2, 2, 2),
            (1, 1, 1, 1, 1, 1),
            (3, 16, 7, 9, 2, 2),
            (2, 33, 5, 3, 10, 4),
            (2, 20, 6, 4, 3, 5),
            (4, 12, 3, 8, 5, 1),
            (2, 7, 33, 17, 7, 3),
        ]
    ):
        given = (torch.randn(b, t, c, generator=random), torch.randn(n, c, k, generator=random), stride)
        bias = torch.randn(n, generator=random) if i % 2 else None
        yield tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in (*given, bias))


def strided_conv_backward_samples(device: str) -> Iterator[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(1)
    for i, (x, weight, stride, _) in enumerate(strided_conv_samples(device)):
        frames = (x.shape[1] - weight.shape[2]) // stride + 1
        grad = torch.randn(len(x), frames, len(weight), generator=random).to(device)
        yield grad, x, weight, stride, i % 4 != 2


strided_conv_tolerance = {
    torch.float32: (1e-5, 2e-5),
    torch.float64: (1e-12, 1e-12),
    torch.float16: (2e-3, 2e-2),
    torch.bfloat16: (2e-2, 1e-1),
}
strided_conv_backward_tolerance = strided_conv_tolerance


def strided_conv_errors() -> Iterator[tuple[tuple[Any, ...], str]]:
    x, weight, op = torch.zeros(2, 20, 3), torch.zeros(4, 3, 5), "strided_conv"
    yield (x[0], weight, 2), rf"{op}: x must be floating point \[B, T, C\], got float32\[20, 3\]"
    yield (x.long(), weight, 2), rf"{op}: x must be floating point \[B, T, C\], got int64\[2, 20, 3\]"
    yield ([[0.0]], weight, 2), rf"{op}: x must be a NumPy, CuPy or torch array, got list"
    yield (x, weight[0], 2), rf"{op}: weight must be floating point \[N, 3, k\], got float32\[3, 5\]"
    yield (x, weight[:, :2], 2), rf"{op}: weight must be floating point \[N, 3, k\], got float32\[4, 2, 5\]"
    yield (x, weight.double(), 2), rf"{op}: weight must be of the dtype of x \(torch.float32\), got float64\[4, 3, 5\]"
    yield (x, weight.to("meta"), 2), rf"{op}: weight must be on the device of x \(.*\), got meta"
    yield (x[:, :4], weight, 2), rf"{op}: x must be at least 5 samples long, got float32\[2, 4, 3\]"
    yield (x, weight, 0), rf"{op}: stride must be at least 1, got 0"
    yield (x, weight, 2.0), rf"{op}: stride must be a whole number, got 2\.0"
    yield (x, weight, 2, x[0, 0]), rf"{op}: bias must be float32 \[4\], got float32\[3\]"
