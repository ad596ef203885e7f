"""The two steps of Lloyd's k-means: which centroid is nearest, and what the points of each cluster add up to."""

from __future__ import annotations

import torch
from torch import Tensor

from hubert_ecg.ops import kmeans_reference as reference
from hubert_ecg.ops._op import Array, Op, takes_arrays

_assign = Op("kmeans_assign(Tensor x, Tensor centroids) -> Tensor", reference.kmeans_assign)
_accumulate = Op(
    "kmeans_accumulate(Tensor x, Tensor labels, int num_clusters) -> (Tensor, Tensor)", reference.kmeans_accumulate
)


@takes_arrays("x", "centroids")
def kmeans_assign(x: Array, centroids: Array) -> Array:
    """The nearest centroid of each point: ``labels[i] = argmin_k |x[i] - centroids[k]|^2``.

    Labels are those of float64 arithmetic, whatever the dtype and the processor: distances in float32 that lie within
    their rounding error of each other are computed again. The lowest ``k`` wins a tie. A distance that is NaN never
    wins, and a point without any distance (NaN in ``x``) gets label 0: look for NaN first where it may occur.

    >>> kmeans_assign(torch.tensor([[0.0], [0.4], [0.9]]), torch.tensor([[0.0], [1.0]]))
    tensor([0, 0, 1])

    Args:
        x: points, [N, D] float32 or float64 (half precision is computed in float32).
        centroids: [K, D], of the dtype and on the device of ``x``.

    Returns:
        labels, [N] int64.

    Raises:
        ValueError: a wrong shape or dtype, named with what was given.
    """
    _check_points("kmeans_assign", x)
    if centroids.ndim != 2 or not len(centroids) or centroids.shape[1] != x.shape[1] or centroids.dtype != x.dtype:
        want = f"[K, {x.shape[1]}] with K > 0 and the dtype of x ({_dtype(x)})"
        raise ValueError(f"kmeans_assign: centroids must be {want}, got {_said(centroids)}")
    return _assign.call(_as_points(x), _as_points(centroids))


@takes_arrays("x", "labels")
def kmeans_accumulate(x: Array, labels: Array, num_clusters: int) -> tuple[Array, Array]:
    """The sum and the number of the points of each cluster.

    Sums are kept in float64 and added in an order that only the shapes decide, so that they are the same for any number
    of threads. A label outside ``0 .. num_clusters - 1`` is left out: -1 marks padding.

    >>> kmeans_accumulate(torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([1, 1, 0]), 3)
    (tensor([[5.],
            [3.],
            [0.]], dtype=torch.float64), tensor([1, 2, 0]))

    Args:
        x: points, [N, D] float32 or float64 (half precision is computed in float32).
        labels: [N] int64.
        num_clusters: K.

    Returns:
        sums [K, D] float64 and counts [K] int64.

    Raises:
        ValueError: a wrong shape or dtype, named with what was given.
    """
    _check_points("kmeans_accumulate", x)
    if labels.dtype != torch.int64 or labels.shape != x.shape[:1]:
        raise ValueError(f"kmeans_accumulate: labels must be int64 [{x.shape[0]}], got {_said(labels)}")
    if num_clusters < 1:
        raise ValueError(f"kmeans_accumulate: num_clusters must be at least 1, got {num_clusters}")
    return _accumulate.call(_as_points(x), labels.contiguous(), num_clusters)


def _check_points(op: str, x: Tensor) -> None:
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"{op}: x must be float32 or float64 [N, D], got {_said(x)}")


def _as_points(x: Tensor) -> Tensor:
    return (x if x.dtype in (torch.float32, torch.float64) else x.float()).contiguous()


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _said(x: Tensor) -> str:
    return f"{_dtype(x)}{list(x.shape)}"


@_assign.fake
def _(x, centroids):
    return x.new_empty(x.shape[0], dtype=torch.int64)


@_assign.native
def _(kernel, x, centroids):
    labels = x.new_empty(x.shape[0], dtype=torch.int64)
    kernel(x.contiguous(), centroids.contiguous(), labels)
    return labels


@_accumulate.fake
def _(x, labels, num_clusters):
    sums = x.new_empty(num_clusters, x.shape[1], dtype=torch.float64)
    return sums, x.new_empty(num_clusters, dtype=torch.int64)


@_accumulate.native
def _(kernel, x, labels, num_clusters):
    chunks = _num_chunks(x, num_clusters)
    sums = x.new_empty(num_clusters, x.shape[1], dtype=torch.float64)
    counts = x.new_empty(num_clusters, dtype=torch.int64)
    partial_sums = x.new_empty(chunks, num_clusters, x.shape[1], dtype=torch.float64)
    partial_counts = x.new_empty(chunks, num_clusters, dtype=torch.int64)
    kernel(x.contiguous(), labels.contiguous(), sums, counts, partial_sums, partial_counts)
    return sums, counts


def _num_chunks(x: Tensor, num_clusters: int) -> int:
    """Chunks to sum apart: enough to share among threads, and no more scratch than points or than 256 MiB."""
    points = 256 if x.is_cuda else 8192
    most = (256 << 20) // (8 * num_clusters * (x.shape[1] + 1))
    return max(1, min(x.shape[0] // max(points, 2 * num_clusters), most, 1024 if x.is_cuda else 64))
