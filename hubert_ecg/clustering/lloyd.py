"""Iterations from given centres, on all points or on mini-batches, and clusters that run empty."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from hubert_ecg import ops
from hubert_ecg.clustering.points import Block, Points, ahead, chunks, squared_distances
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


@dataclasses.dataclass(frozen=True)
class Spread:
    """Weight, mean ``[D]`` and squared distances ``[D]`` to the mean, added up over rows, float64."""

    weight: Tensor
    mean: Tensor
    squares: Tensor

    def __add__(self, other: Spread) -> Spread:
        weight = self.weight + other.weight
        share = other.weight / weight.clamp_min(1e-300)
        step = other.mean - self.mean
        return Spread(
            weight, self.mean + step * share, self.squares + other.squares + step.square() * (self.weight * share)
        )

    @staticmethod
    def zero(points: Points) -> Spread:
        zeros = torch.zeros(points.width + 1, dtype=torch.float64, device=points.device)
        return Spread(zeros[:1], zeros[1:], zeros[1:])

    @staticmethod
    def of(x: Tensor, weight: Tensor | None) -> Spread:
        if weight is None:
            mean = x.mean(0)
            return Spread(x.new_tensor([len(x)]), mean, (x - mean).square_().sum(0))
        total = weight.sum()[None]
        mean = weight @ x / total.clamp_min(1e-300)
        return Spread(total, mean, weight @ (x - mean).square_())


def spreads(points: Points) -> tuple[Spread, Spread]:
    """How the rows of all ranks spread, each row counted once, and by weight."""
    plain = weighed = Spread.zero(points)
    with points.ranks.together():
        for block in points.blocks():
            for part in chunks(block.x):
                x = block.x[part].double()
                plain += Spread.of(x, None)
                if block.weight is not None:
                    weighed += Spread.of(x, block.weight[part])
    plain = _of_all_ranks(plain, points.ranks)
    return plain, _of_all_ranks(weighed, points.ranks) if points.weighted else plain


def lloyd(points: Points, centers: Tensor, spread: Spread, *, tol: float, max_iter: int, told: Told | None) -> Run:
    """Moves centres to the means of their points until they move no further.

    Args:
        points: The rows.
        centers: ``[K, D]``.
        spread: Of the rows, by weight.
        tol: Stop when the squared ways of the centres add up to no more than this.
        max_iter: Iterations at most.
        told: What to call after each iteration.
    """
    empty = iteration = 0
    while iteration < max_iter:
        iteration += 1
        sums, totals = _sweep(points.blocks(), points.ranks, centers, points.weighted)
        if told is not None:
            told(iteration, _inertia_of_sums(spread, centers, sums, totals))
        empty += _move_empty_clusters(points.blocks, points.ranks, points.total, centers, sums, totals)
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
        for batch in _batches(points, batch_size, int(random.integers(1 << 63))):
            batch_total = torch.tensor([len(batch.x)])
            points.ranks.sum(batch_total)
            old = centers
            centers, weights, found_empty = batch_step(batch, points.ranks, int(batch_total), centers, weights)
            empty += found_empty
            if told is not None:
                inertia += _inertia(batch, old)
        if told is not None:
            whole = torch.tensor([inertia], dtype=torch.float64)
            points.ranks.sum(whole)
            told(iteration, float(whole))
        if float((centers.double() - before.double()).square().sum()) <= tol:
            break
    inertia, sizes, labels = assess(points, centers, keep_labels=not points.streamed)
    return Run(centers, weights, sizes, inertia, iteration, empty, labels)


def batch_step(
    batch: Block, ranks: Ranks, batch_total: int, centers: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, int]:
    """The centres after a mini-batch, the weight that each stands for, and how many clusters were empty."""
    sums, totals = _sweep([batch], ranks, centers, batch.weight is not None)
    sums += centers.double() * weights[:, None]
    totals += weights
    empty = _move_empty_clusters(lambda: [batch], ranks, batch_total, centers, sums, totals)
    return _means(sums, totals, centers), totals, empty


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
            own = ops.kmeans_assign(block.x, centers) if labels is None else labels[block.rows]
            distances = squared_distances(block.x, centers, own)
            inertia += (distances if block.weight is None else distances * block.weight).sum()
            totals += torch.bincount(own, block.weight, minlength=len(centers))
            if kept is not None:
                kept[block.rows] = own
    points.ranks.sum(inertia, totals)
    return float(inertia), totals, kept


def _step(x: Tensor, centers: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the rows nearest to each centre add up to, ``[K, D] float64``, and their number, int64, or weight."""
    labels = ops.kmeans_assign(x, centers)
    if weight is None:
        return ops.kmeans_accumulate(x, labels, len(centers))
    sums = torch.zeros(centers.shape, dtype=torch.float64, device=x.device)
    for part in chunks(x):
        sums += ops.kmeans_accumulate(x[part].double() * weight[part, None], labels[part], len(centers))[0]
    return sums, torch.bincount(labels, weight, minlength=len(centers))


def _sweep(blocks: Iterable[Block], ranks: Ranks, centers: Tensor, weighted: bool) -> tuple[Tensor, Tensor]:
    """:func:`_step` over all blocks of all ranks; weights as float64."""
    sums = torch.zeros(centers.shape, dtype=torch.float64, device=centers.device)
    # Numbers stay whole beyond 2^53 as int64.
    totals = torch.zeros(len(centers), dtype=torch.float64 if weighted else torch.int64, device=centers.device)
    with ranks.together():
        for block in blocks:
            block_sums, block_totals = _step(block.x, centers, block.weight)
            sums += block_sums
            totals += block_totals
    ranks.sum(sums, totals)
    return sums, totals.double()


def _inertia(block: Block, centers: Tensor) -> float:
    distances = squared_distances(block.x, centers, ops.kmeans_assign(block.x, centers))
    return float((distances if block.weight is None else distances * block.weight).sum())


def _batches(points: Points, batch_size: int, seed: int) -> Iterator[Block]:
    """This rank's share of each mini-batch of a pass."""
    if not points.has_random_rows:
        if points.ranks.size > 1:
            want = "an array, a memory map or a source with take(indices), where batch_size and distributed are given"
            raise ValueError(f"{points.op}: x must be {want}, got a source of blocks in order")
        return points.batches_in_order(batch_size)
    batches = (_batch(points, seed, first, batch_size) for first in range(0, points.total, batch_size))
    return ahead(batches) if points.streamed else batches


def _batch(points: Points, seed: int, first: int, batch_size: int) -> Block:
    places = np.sort(shuffled(seed, points.total, first, min(first + batch_size, points.total))) - points.first
    return points.take(places[(places >= 0) & (places < points.num_rows)])


def _means(sums: Tensor, totals: Tensor, old: Tensor) -> Tensor:
    """Centres of the clusters that have points; the others stay."""
    return torch.where((totals > 0)[:, None], (sums / totals.clamp_min(1e-300)[:, None]).to(old.dtype), old)


def _move_empty_clusters(
    blocks: Callable[[], Iterable[Block]], ranks: Ranks, num_points: int, centers: Tensor, sums: Tensor, totals: Tensor
) -> int:
    """Gives each empty cluster one of the points farthest from their centres, out of the sums of its cluster.

    Changes ``sums`` and ``totals``, and says how many clusters were empty.
    """
    empty = (totals <= 0).nonzero()[:, 0]
    if not len(empty):
        return 0
    farthest = _farthest(blocks(), ranks, centers, len(empty))
    # A mean of N equal points misses them by the rounding of its sum and of its result: such a point is on its centre.
    relative = 2 * torch.finfo(centers.dtype).eps + num_points * torch.finfo(torch.float64).eps
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


def _inertia_of_sums(spread: Spread, centers: Tensor, sums: Tensor, totals: Tensor) -> float:
    """The inertia that follows from the sums of the clusters, taken around the mean where little of it cancels."""
    way = centers.double() - spread.mean
    inside = totals @ way.square().sum(1) - 2 * (way * (sums - totals[:, None] * spread.mean)).sum()
    return max(float(spread.squares.sum() + inside), 0.0)


def _of_all_ranks(spread: Spread, ranks: Ranks) -> Spread:
    packed = torch.cat([spread.weight, spread.mean, spread.squares])[None]
    width = len(spread.mean)
    first, *others = (
        Spread(part[0, :1], part[0, 1 : 1 + width], part[0, 1 + width :]) for part in ranks.gather(packed)
    )
    for other in others:
        first += other
    return first
