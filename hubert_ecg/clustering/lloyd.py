"""Iterations from given centres, on all points or on mini-batches, and clusters that run empty."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from hubert_ecg import ops
from hubert_ecg.clustering.points import Block, Points, ahead, chunks, ordered_sum, squared_distances
from hubert_ecg.clustering.ranks import Ranks
from hubert_ecg.clustering.starts import shuffled

#: Told the number of an iteration and the inertia at its beginning.
Told = Callable[[int, float], None]


@dataclasses.dataclass
class Run:
    """What one start ended with: centres ``[K, D]``, weight ``[K] float64`` of the points that each is the mean of, and
    of those nearest to it in the end, inertia, iterations, how often a cluster was empty, and the labels ``[N] int64``
    of this rank's rows where they are in memory."""

    centers: Tensor
    weights: Tensor
    sizes: Tensor
    inertia: float
    iterations: int
    empty: int
    labels: Tensor | None


def mean_variance(points: Points) -> float:
    """Mean over the features of their variances among the rows of all ranks, weights aside."""
    # Number of rows, mean and squared distances to it of each feature.
    seen = torch.zeros(3, points.width, dtype=torch.float64, device=points.device)
    with points.ranks.together():
        for block in points.blocks():
            for part in chunks(block.x):
                x = block.x[part].double()
                mean = x.mean(0)
                squares = (x - mean).square_().sum(0)
                seen = _both(seen, torch.stack([torch.full_like(mean, len(x)), mean, squares]))
    rows, _, squares = functools.reduce(_both, points.ranks.gather(seen[None]), torch.zeros_like(seen)[None])[0]
    return float((squares / rows.clamp_min(1)).mean())


def lloyd(points: Points, centers: Tensor, *, tol: float, max_iter: int, told: Told | None) -> Run:
    """Moves centres to the means of their points until they move no further.

    Args:
        points: The rows.
        centers: ``[K, D]``.
        tol: Stop when the squared ways of the centres add up to no more than this.
        max_iter: Iterations at most.
        told: What to call after each iteration.
    """
    empty = iteration = 0
    while iteration < max_iter:
        iteration += 1
        sums, totals, inertia = _sweep(points.blocks(), points.ranks, centers)
        if told is not None:
            told(iteration, inertia)
        empty += _move_empty_clusters(points.blocks, points, centers, sums, totals)
        centers, old = _means(sums, totals, centers), centers
        if float((centers.double() - old.double()).square().sum()) <= tol:
            break
    # The centres may have moved after the last assignment.
    inertia, sizes, labels = assess(points, centers, keep_labels=not points.streamed)
    return Run(centers, sizes, sizes, inertia, iteration, empty, labels)


def mini_batches(
    points: Points,
    centers: Tensor,
    *,
    batch_size: int,
    tol: float,
    max_iter: int,
    random: np.random.Generator,
    told: Told | None,
) -> Run:
    """As :func:`lloyd`, after each mini-batch; each centre is the mean of all points it was ever given.

    Batches are drawn from the rows of all ranks; an iteration gives each row once.
    """
    weights = torch.zeros(len(centers), dtype=torch.float64, device=points.device)
    empty = iteration = 0
    while iteration < max_iter:
        iteration += 1
        before, inertia = centers, 0.0
        batches = iter(_batches(points, batch_size, int(random.integers(1 << 63))))
        while (batch := _next(batches, points.ranks)) is not None:
            centers, weights, batch_inertia, found_empty = batch_step(batch, points, centers, weights)
            inertia, empty = inertia + batch_inertia, empty + found_empty
        if told is not None:
            told(iteration, inertia)
        if float((centers.double() - before.double()).square().sum()) <= tol:
            break
    inertia, sizes, labels = assess(points, centers, keep_labels=not points.streamed)
    return Run(centers, weights, sizes, inertia, iteration, empty, labels)


def batch_step(batch: Block, points: Points, centers: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, float, int]:
    """The centres after a mini-batch of the points, the weight that each stands for, the inertia of the batch before,
    and how many clusters were empty."""
    sums, totals, inertia = _sweep([batch], points.ranks, centers)
    sums += centers.double() * weights[:, None]
    totals += weights
    empty = _move_empty_clusters(lambda: [batch], points, centers, sums, totals)
    return _means(sums, totals, centers), totals, inertia, empty


def assess(
    points: Points, centers: Tensor, *, labels: Tensor | None = None, keep_labels: bool = False
) -> tuple[float, Tensor, Tensor | None]:
    """The exact inertia of all ranks, the weight of each cluster, and the labels of this rank if they are to be kept.

    ``labels`` are of this rank; None stands for the nearest centres.
    """
    inertia = torch.zeros(1, dtype=torch.float64, device=points.device)
    totals = torch.zeros(len(centers), dtype=torch.float64, device=points.device)
    kept = torch.empty(points.num_rows, dtype=torch.int64, device=points.device) if keep_labels else None
    with points.ranks.together():
        for block in points.blocks():
            if labels is None and block.weight is None:
                own, _, sizes, squares = ops.kmeans_step(block.x, centers, with_inertia=True)
            else:
                own = ops.kmeans_assign(block.x, centers) if labels is None else labels[block.rows]
                distances = squared_distances(block.x, centers, own)
                squares = ordered_sum(distances if block.weight is None else distances * block.weight)
                sizes = torch.bincount(own, block.weight, minlength=len(centers))
            inertia += squares
            totals += sizes
            if kept is not None:
                kept[block.rows] = own
    points.ranks.sum(inertia, totals)
    return float(inertia), totals, kept


def _step(block: Block, centers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the rows nearest to each centre add up to ``[K, D]``, their weight ``[K]``, and their inertia, float64."""
    if block.weight is None:
        _, sums, counts, inertia = ops.kmeans_step(block.x, centers, with_inertia=True)
        return sums, counts, inertia
    labels = ops.kmeans_assign(block.x, centers)
    sums = torch.zeros(centers.shape, dtype=torch.float64, device=centers.device)
    for part in chunks(block.x):
        x = block.x[part].double() * block.weight[part, None]
        sums += ops.kmeans_accumulate(x, labels[part], len(centers))[0]
    totals = torch.bincount(labels, block.weight, minlength=len(centers))
    return sums, totals, ordered_sum(squared_distances(block.x, centers, labels) * block.weight)


def _sweep(blocks: Iterable[Block], ranks: Ranks, centers: Tensor) -> tuple[Tensor, Tensor, float]:
    """:func:`_step` over all blocks of all ranks."""
    sums = torch.zeros(centers.shape, dtype=torch.float64, device=centers.device)
    # Exact as long as there are fewer than 2^53 points.
    totals = torch.zeros(len(centers), dtype=torch.float64, device=centers.device)
    inertia = torch.zeros(1, dtype=torch.float64, device=centers.device)
    with ranks.together():
        for block in blocks:
            block_sums, block_totals, block_inertia = _step(block, centers)
            sums += block_sums
            totals += block_totals
            inertia += block_inertia
    ranks.sum(sums, totals, inertia)
    return sums, totals, float(inertia)


def _batches(points: Points, batch_size: int, seed: int) -> Iterator[Block]:
    """This rank's share of each mini-batch of a pass."""
    if not points.has_random_rows:
        if points.ranks.size > 1:
            want = "an array, a memory map or a source with take(indices), where batch_size and distributed are given"
            raise ValueError(f"{points.op}: x must be {want}, got a source of blocks in order")
        return points.batches_in_order(batch_size)
    batches = (_batch(points, seed, first, batch_size) for first in range(0, points.total, batch_size))
    return ahead(batches) if points.streamed else batches


def _next(batches: Iterator[Block], ranks: Ranks) -> Block | None:
    with ranks.together():
        return next(batches, None)


def _batch(points: Points, seed: int, first: int, batch_size: int) -> Block:
    places = np.sort(shuffled(seed, points.total, first, min(first + batch_size, points.total))) - points.first
    return points.take(places[(places >= 0) & (places < points.num_rows)])


def _means(sums: Tensor, totals: Tensor, old: Tensor) -> Tensor:
    """Centres of the clusters that have points; the others stay."""
    return torch.where((totals > 0)[:, None], (sums / totals.where(totals > 0, 1)[:, None]).to(old.dtype), old)


def _move_empty_clusters(
    blocks: Callable[[], Iterable[Block]], points: Points, centers: Tensor, sums: Tensor, totals: Tensor
) -> int:
    """Gives each empty cluster one of the points farthest from their centres, out of the sums of its cluster.

    Changes ``sums`` and ``totals``, and says how many clusters were empty.
    """
    empty = (totals <= 0).nonzero()[:, 0]
    if not len(empty):
        return 0
    farthest = _farthest(blocks(), points.ranks, centers, len(empty))
    # A mean of N equal points misses them by the rounding of its sum and of its result: such a point is on its centre.
    relative = 2 * torch.finfo(centers.dtype).eps + points.total * torch.finfo(torch.float64).eps
    for cluster, (distance, own, weight, *row) in zip(empty.tolist(), farthest.tolist(), strict=False):
        own, point = int(own), sums.new_tensor(row)
        # A cluster keeps its last point, and a point on its centre makes no new cluster.
        if distance > float((relative * point).square().sum()) and totals[own] > weight:
            sums[cluster] = point * weight
            sums[own] -= sums[cluster]
            totals[cluster] = weight
            totals[own] -= weight
    return len(empty)


def _farthest(blocks: Iterable[Block], ranks: Ranks, centers: Tensor, how_many: int) -> Tensor:
    """The points of all ranks farthest from their centres, the first of equals first: squared distance, label, weight
    and coordinates of each, ``[how_many, 3 + D] float64``."""
    found = torch.zeros(0, 3 + centers.shape[1], dtype=torch.float64, device=centers.device)

    def farthest(candidates: Tensor) -> Tensor:
        return candidates[candidates[:, 0].sort(descending=True, stable=True).indices[:how_many]]

    with ranks.together():
        for block in blocks:
            labels = ops.kmeans_assign(block.x, centers)
            distances = squared_distances(block.x, centers, labels)
            weight = torch.ones_like(distances) if block.weight is None else block.weight
            distances[weight <= 0] = 0
            new = distances.sort(descending=True, stable=True).indices[:how_many]
            columns = torch.stack([distances[new], labels[new].double(), weight[new]], 1)
            found = farthest(torch.cat([found, torch.cat([columns, block.x[new].double()], 1)]))
    return farthest(torch.cat(ranks.gather(found)))


def _both(one: Tensor, other: Tensor) -> Tensor:
    """Numbers of rows, means and squared distances to them ``[..., 3, D]``, of two sets of rows taken together."""
    (n, mean, squares), (m, other_mean, other_squares) = one.unbind(-2), other.unbind(-2)
    share, way = m / (n + m).clamp_min(1), other_mean - mean
    return torch.stack([n + m, mean + way * share, squares + other_squares + way.square() * n * share], -2)
