"""The steps of Lloyd's k-means: which centroid is nearest, and what the points of each cluster add up to."""

from __future__ import annotations

import torch
from torch import Tensor

from hubert_ecg.ops import kmeans_reference as reference
from hubert_ecg.ops._op import Array, Op, check_device, check_flag, check_whole, takes_arrays

_assign = Op("kmeans_assign(Tensor x, Tensor centroids) -> Tensor", reference.kmeans_assign)
_accumulate = Op(
    "kmeans_accumulate(Tensor x, Tensor labels, int num_clusters) -> (Tensor, Tensor)", reference.kmeans_accumulate
)
_step = Op(
    "kmeans_step(Tensor x, Tensor centroids, bool with_inertia=False) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.kmeans_step,
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
        ValueError: a wrong shape, dtype or device, named with what was given.
    """
    _check_points("kmeans_assign", x)
    _check_centroids("kmeans_assign", x, centroids)
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
        ValueError: a wrong shape, dtype or device, named with what was given.
    """
    _check_points("kmeans_accumulate", x)
    if labels.dtype != torch.int64 or labels.shape != x.shape[:1]:
        raise ValueError(f"kmeans_accumulate: labels must be int64 [{x.shape[0]}], got {_said(labels)}")
    check_device("kmeans_accumulate", x, labels=labels)
    check_whole("kmeans_accumulate: num_clusters", num_clusters)
    if num_clusters < 1:
        raise ValueError(f"kmeans_accumulate: num_clusters must be at least 1, got {num_clusters}")
    return _accumulate.call(_as_points(x), labels.contiguous(), num_clusters)


@takes_arrays("x", "centroids")
def kmeans_step(x: Array, centroids: Array, with_inertia: bool = False) -> tuple[Array, ...]:
    """One iteration of Lloyd's k-means in one pass over the points: ``kmeans_assign``, then ``kmeans_accumulate``.

    The next centroids are ``sums / counts``. As with the two ops it stands for, the result does not depend on the
    number of threads, to the last bit.

    >>> kmeans_step(torch.tensor([[0.0], [0.5], [0.75]]), torch.tensor([[0.0], [1.0]]), with_inertia=True)
    (tensor([0, 0, 1]), tensor([[0.5000],
            [0.7500]], dtype=torch.float64), tensor([2, 1]), tensor(0.3125, dtype=torch.float64))

    Args:
        x: points, [N, D] float32 or float64 (half precision is computed in float32).
        centroids: [K, D], of the dtype and on the device of ``x``.
        with_inertia: also return the inertia.

    Returns:
        labels [N] int64, sums [K, D] float64, counts [K] int64, and where it is asked for the inertia [] float64: the
        sum of squared distances of the points to the nearest of the given centroids.

    Raises:
        ValueError: a wrong shape, dtype or device, named with what was given.
    """
    _check_points("kmeans_step", x)
    _check_centroids("kmeans_step", x, centroids)
    check_flag("kmeans_step: with_inertia", with_inertia)
    labels, sums, counts, inertia = _step.call(_as_points(x), _as_points(centroids), with_inertia)
    return (labels, sums, counts, inertia) if with_inertia else (labels, sums, counts)


def _check_points(op: str, x: Tensor) -> None:
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"{op}: x must be float32 or float64 [N, D], got {_said(x)}")


def _check_centroids(op: str, x: Tensor, centroids: Tensor) -> None:
    fits = centroids.ndim == 2 and len(centroids) > 0 and centroids.shape[1] == x.shape[1]
    if not fits or centroids.dtype != x.dtype:
        want = f"[K, {x.shape[1]}] with K > 0 and the dtype of x ({_dtype(x)})"
        raise ValueError(f"{op}: centroids must be {want}, got {_said(centroids)}")
    check_device(op, x, centroids=centroids)


def _as_points(x: Tensor) -> Tensor:
    return (x if x.dtype in (torch.float32, torch.float64) else x.float()).detach().contiguous()


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _said(x: Tensor) -> str:
    return f"{_dtype(x)}{list(x.shape)}"


@_assign.fake
def _(x, centroids):
    return _labels(x)


@_assign.native
def _(kernel, x, centroids):
    labels = _labels(x)
    kernel(x.contiguous(), centroids.contiguous(), labels)
    return labels


@_accumulate.fake
def _(x, labels, num_clusters):
    return _sums(x, num_clusters)


@_accumulate.native
def _(kernel, x, labels, num_clusters):
    sums, counts = _sums(x, num_clusters)
    kernel(x.contiguous(), labels.contiguous(), sums, counts, *_sums(x, num_clusters, _num_chunks(x, num_clusters)))
    return sums, counts


@_step.fake
def _(x, centroids, with_inertia=False):
    return _labels(x), *_sums(x, len(centroids)), x.new_empty((), dtype=torch.float64)


@_step.composed
def _(x, centroids, with_inertia=False):
    labels = _assign.call(x, centroids)
    sums, counts = _accumulate.call(x, labels, len(centroids))
    inertia = reference.inertia(x, centroids, labels) if with_inertia else sums.new_zeros(())
    return labels, sums, counts, inertia


@_step.native
def _(kernel, x, centroids, with_inertia=False):
    labels, inertia = _labels(x), x.new_empty((), dtype=torch.float64)
    sums, counts = _sums(x, len(centroids))
    partial = _sums(x, len(centroids), _num_chunks(x, len(centroids)))
    kernel(x.contiguous(), centroids.contiguous(), labels, sums, counts, inertia, *partial, with_inertia)
    return labels, sums, counts, inertia


def _labels(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.int64)


def _sums(x: Tensor, num_clusters: int, *leading: int) -> tuple[Tensor, Tensor]:
    sums = x.new_empty(*leading, num_clusters, x.shape[1], dtype=torch.float64)
    return sums, x.new_empty(*leading, num_clusters, dtype=torch.int64)


def _num_chunks(x: Tensor, num_clusters: int) -> int:
    """Chunks of the points with sums of their own: enough to share among threads, within 32 MiB of memory.

    On a CPU, 1 where there would be fewer: its kernels then share the clusters among the threads.
    """
    points, width = x.shape
    if x.is_cuda:
        most = (256 << 20) // (8 * num_clusters * (width + 1))
        return max(1, min(points // max(256, 2 * num_clusters), most, 1024))
    most = (32 << 20) // (8 * num_clusters * (width + 1))
    return min(max(1, points // max(2048, 2 * num_clusters)), most, 256) if most >= 64 else 1
