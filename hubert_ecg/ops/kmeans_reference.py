"""What the ops of k-means compute, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Elements of the [points, K, D] differences that are held at a time.
_CHUNK = 1 << 22


def kmeans_assign(x: Tensor, centroids: Tensor) -> Tensor:
    exact = centroids.double()
    step = max(1, _CHUNK // max(1, exact.numel()))
    labels = x.new_empty(x.shape[0], dtype=torch.int64)
    for first in range(0, x.shape[0], step):
        distances = (x[first : first + step, None].double() - exact).square().sum(-1)
        labels[first : first + step] = distances.nan_to_num(nan=torch.inf, posinf=torch.inf).argmin(1)
    return labels


def kmeans_accumulate(x: Tensor, labels: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    inside = (labels >= 0) & (labels < num_clusters)
    labels = labels[inside]
    sums = x.new_zeros(num_clusters, x.shape[1], dtype=torch.float64)
    sums.index_add_(0, labels, x[inside].double())
    return sums, torch.bincount(labels, minlength=num_clusters)


def kmeans_step(x: Tensor, centroids: Tensor, with_inertia: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    labels = kmeans_assign(x, centroids)
    sums, counts = kmeans_accumulate(x, labels, len(centroids))
    return labels, sums, counts, inertia(x, centroids, labels) if with_inertia else sums.new_zeros(())


def inertia(x: Tensor, centroids: Tensor, labels: Tensor) -> Tensor:
    total = x.new_zeros((), dtype=torch.float64)
    step = max(1, _CHUNK // max(1, x.shape[1]))
    for rows, own in zip(x.split(step), labels.split(step), strict=True):
        total += (rows.double() - centroids[own].double()).square().sum()
    return total


def kmeans_assign_samples(device: str) -> Iterator[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(0)
    for n, k, d in [(1, 1, 1), (0, 3, 5), (93, 100, 39), (1000, 7, 16), (257, 33, 13), (65, 13, 768), (40, 5, 0)]:
        yield torch.randn(n, d, generator=random).to(device), torch.randn(k, d, generator=random).to(device)
    # Ties: small whole numbers, every centroid twice.
    x = torch.randint(-2, 3, (500, 3), generator=random).float()
    centroids = torch.randint(-2, 3, (20, 3), generator=random).float().repeat(2, 1)
    yield x.to(device), centroids.to(device)
    # Far from the origin, where |c|^2 - 2 x.c cancels, and points that lie next to a border between two clusters.
    x = torch.randn(300, 5, generator=random)
    yield (x + 1000).to(device), (torch.randn(30, 5, generator=random) + 1000).to(device)
    centroids = torch.randn(10, 7, generator=random)
    x = (centroids[torch.arange(400) % 10] + centroids[torch.arange(400) % 9]) / 2
    yield (x + 1e-7 * torch.randn(400, 7, generator=random)).to(device), centroids.to(device)
    # Squares that overflow or vanish in float32, and values that are no numbers.
    yield (1e25 * torch.randn(50, 4, generator=random)).to(device), (1e25 * torch.eye(4)).to(device)
    yield (1e-25 * torch.randn(50, 4, generator=random)).to(device), (1e-25 * torch.eye(4)).to(device)
    x, centroids = torch.randn(50, 4, generator=random), torch.randn(6, 4, generator=random)
    x[3, 1], x[4], x[5, 0], x[6, 2], centroids[2, 3] = torch.nan, torch.nan, torch.inf, -torch.inf, torch.nan
    yield x.to(device), centroids.to(device)


def kmeans_accumulate_samples(device: str) -> Iterator[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(0)
    for n, k, d in [(1, 1, 1), (0, 3, 5), (93, 100, 39), (1000, 7, 16), (70_000, 5, 3), (65, 13, 300), (40, 5, 0)]:
        labels = torch.randint(0, k, (n,), generator=random)
        yield torch.randn(n, d, generator=random).to(device), labels.to(device), k
    labels = torch.randint(-3, 12, (200,), generator=random)  # some of them out of range
    yield (1e4 + torch.randn(200, 9, generator=random)).to(device), labels.to(device), 8


def kmeans_step_samples(device: str) -> Iterator[tuple[Any, ...]]:
    for i, (x, centroids) in enumerate(kmeans_assign_samples(device)):
        yield x, centroids, i % 4 != 0
    random = torch.Generator().manual_seed(1)
    # Large enough to be cut into chunks, and with sums so large that threads share them.
    for n, k, d in [(10_000, 5, 3), (300, 150, 600)]:
        yield torch.randn(n, d, generator=random).to(device), torch.randn(k, d, generator=random).to(device), True


# Labels are equal, never close; sums are kept in float64 whatever the input, and only their order differs.
kmeans_assign_tolerance = {torch.float32: (0.0, 0.0), torch.float64: (0.0, 0.0)}
kmeans_accumulate_tolerance = {torch.float32: (1e-12, 1e-9), torch.float64: (1e-12, 1e-9)}
kmeans_step_tolerance = kmeans_accumulate_tolerance


def kmeans_assign_errors() -> Iterator[tuple[tuple[Any, ...], str]]:
    yield from _nearest_errors("kmeans_assign")


def kmeans_step_errors() -> Iterator[tuple[tuple[Any, ...], str]]:
    yield from _nearest_errors("kmeans_step")
    x = torch.zeros(4, 3)
    yield (x, x, None), r"kmeans_step: with_inertia must be True or False, got None"


def _nearest_errors(op: str) -> Iterator[tuple[tuple[Any, ...], str]]:
    x = torch.zeros(4, 3)
    yield (x[0], x), rf"{op}: x must be .*\[N, D\], got float32\[3\]"
    yield (x.long(), x), rf"{op}: x must be .*float32 or float64.*, got int64\[4, 3\]"
    yield (x.to(torch.complex64), x), rf"{op}: x must be .*float32 or float64.*, got complex64\[4, 3\]"
    yield (None, x), rf"{op}: x must be a NumPy, CuPy or torch array, got None"
    yield (x, None), rf"{op}: centroids must be a NumPy, CuPy or torch array, got None"
    yield ([[0.0]], x), rf"{op}: x must be a NumPy, CuPy or torch array, got list"
    yield (x, x[0]), rf"{op}: centroids must be .*\[K, 3\].*, got float32\[3\]"
    yield (x, x[:, :2]), rf"{op}: centroids must be .*, got float32\[4, 2\]"
    yield (x, x[:0]), rf"{op}: centroids must be .*K > 0.*, got float32\[0, 3\]"
    yield (x, x.double()), rf"{op}: centroids must be .*dtype of x.*, got float64\[4, 3\]"
    yield (x, x.to("meta")), rf"{op}: centroids must be on the device of x \(\S+\), got meta"


def kmeans_accumulate_errors() -> Iterator[tuple[tuple[Any, ...], str]]:
    x, labels = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    yield (x[0], labels, 2), r"kmeans_accumulate: x must be .*\[N, D\], got float32\[3\]"
    yield (x.long(), labels, 2), r"kmeans_accumulate: x must be .*float32 or float64.*, got int64\[4, 3\]"
    yield (x, labels[:3], 2), r"kmeans_accumulate: labels must be .*int64 \[4\], got int64\[3\]"
    yield (x, labels[:, None], 2), r"kmeans_accumulate: labels must be .*int64 \[4\], got int64\[4, 1\]"
    yield (x, labels.int(), 2), r"kmeans_accumulate: labels must be .*int64 \[4\], got int32\[4\]"
    yield (x, labels.to("meta"), 2), r"kmeans_accumulate: labels must be on the device of x \(\S+\), got meta"
    yield (None, labels, 2), r"kmeans_accumulate: x must be a NumPy, CuPy or torch array, got None"
    yield (x, None, 2), r"kmeans_accumulate: labels must be a NumPy, CuPy or torch array, got None"
    yield (x, labels, 2.0), r"kmeans_accumulate: num_clusters must be a whole number, got 2\.0"
    yield (x, labels, True), r"kmeans_accumulate: num_clusters must be a whole number, got True"
    yield (x, labels, 0), r"kmeans_accumulate: num_clusters must be at least 1, got 0"
    yield (x, labels, -3), r"kmeans_accumulate: num_clusters must be at least 1, got -3"
