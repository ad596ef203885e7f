"""First centres: k-means++, k-means||, random rows.

What is drawn is decided by the seed and the place of each row among those of all ranks, not by the shards or blocks.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from hubert_ecg import ops
from hubert_ecg.clustering.points import Points, ordered_sum, squared_distances

METHODS = ("k-means++", "k-means||", "random")

# Rounds of k-means||, each of which draws about K candidates.
_ROUNDS = 5
# Rows whose random numbers are drawn at a time.
_DRAWN = 1 << 18
# k-means++ looks at a sample of at most this many bytes, but at 16 rows a cluster at least.
_SAMPLE_BYTES = 256 << 20


def draw_start(points: Points, k: int, method: str, random: np.random.Generator) -> Tensor:
    """Centres ``[K, D]``, the same on every rank. There must be K rows."""
    if method == "random":
        return points.take_of_all(draw_rows(points, k, random))[0]
    if method == "k-means||":
        return _k_means_parallel(points, k, random)
    by_bytes = _SAMPLE_BYTES // (points.width * points.dtype.itemsize)
    most = max(16 * k, min(max(256 * k, 1 << 16), by_bytes))
    rows = np.arange(points.total) if points.total <= most else draw_rows(points, most, random, by_weight=False)
    return _plus_plus_on_one_rank(points, *points.take_of_all(rows), k, random)


def draw_rows(points: Points, how_many: int, random: np.random.Generator, by_weight: bool = True) -> np.ndarray:
    """Places of different rows among those of all ranks, ascending ``[how_many] int64``.

    Chances are the weights (Efraimidis and Spirakis 2006: the smallest ``-ln(u) / w`` win), or equal for all rows that
    have one; rows without weight come last.
    """
    seed = _seed(random)
    keys, places = np.empty(0), np.empty(0, np.int64)

    def smallest(keys: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        order = np.lexsort((places, keys))[:how_many]
        return keys[order], places[order]

    for first in range(0, points.num_rows, _DRAWN):
        count = min(_DRAWN, points.num_rows - first)
        new = -np.log1p(-row_uniforms(seed, points.first + first, count))
        weight = points.weights(first, count)
        if weight is not None:
            with np.errstate(divide="ignore"):
                new = np.where(weight > 0, new / (weight if by_weight else 1.0), np.inf)
        near = np.flatnonzero(new <= keys[-1]) if len(keys) == how_many else np.arange(count)
        keys, places = smallest(
            np.concatenate([keys, new[near]]), np.concatenate([places, points.first + first + near])
        )
    keys = torch.cat(points.ranks.gather(torch.from_numpy(keys))).numpy()
    places = torch.cat(points.ranks.gather(torch.from_numpy(places))).numpy()
    return np.sort(smallest(keys, places)[1])


def row_uniforms(seed: int, first: int, count: int) -> np.ndarray:
    """The random numbers in [0, 1) of the rows ``first .. first + count - 1`` under a seed."""
    # A step of Philox gives four of them.
    bits = np.random.Philox(key=seed)
    bits.advance(first // 4)
    return np.random.Generator(bits).random(first % 4 + count)[first % 4 :]


def shuffled(seed: int, n: int, first: int, last: int) -> np.ndarray:
    """The places ``first .. last - 1`` of a random permutation of ``0 .. n - 1``, without the rest of it.

    A Feistel network permutes the numbers of 2 h bits; those from n on are sent through it again, until they are below.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = np.random.SeedSequence(seed).generate_state(6, np.uint64)
    found = np.arange(first, last, dtype=np.uint64)
    outside = np.ones(len(found), bool)
    while outside.any():
        left, right = found[outside] >> np.uint64(half), found[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right + key) & mask)
        found[outside] = left << np.uint64(half) | right
        outside = found >= n
    return found.astype(np.int64)


def plus_plus(points: Tensor, weight: Tensor | None, k: int, random: np.random.Generator) -> Tensor:
    """Centres by greedy k-means++ (Arthur and Vassilvitskii 2007, section 5): each is the best of a few candidates.

    Candidates are drawn with chances in proportion to the squared distance to the nearest centre so far.
    """
    n, device = len(points), points.device
    w = torch.ones(n, dtype=torch.float64, device=device) if weight is None else weight
    # Distances by products lose the least around the mean.
    centered = points - points.double().mean(0).to(points.dtype)
    squares = centered.square().sum(1)

    def distances(rows: Tensor) -> Tensor:
        products = centered @ centered[rows].T
        found = (squares[:, None] + squares[rows] - 2 * products).clamp_min_(0).double()
        found[rows, torch.arange(len(rows), device=device)] = 0
        return found * w[:, None]

    def draw(chances: Tensor, how_many: int) -> Tensor:
        ends = chances.cumsum(0)
        where = torch.from_numpy(random.uniform(size=how_many)).to(device) * ends[-1]
        return torch.searchsorted(ends, where, right=True).clamp_max(n - 1)

    trials = 2 + int(math.log(k))
    picked = draw(w, 1)
    nearest = distances(picked)[:, 0]
    for _ in range(1, k):
        if not float(nearest.sum()) > 0:
            # Fewer different points than clusters: what is left are points that are centres already.
            rest = np.setdiff1d(np.arange(n), picked.cpu().numpy())[: k - len(picked)]
            picked = torch.cat([picked, torch.from_numpy(rest).to(picked)])
            break
        candidates = draw(nearest, trials)
        found = torch.minimum(nearest[:, None], distances(candidates))
        best = int(found.sum(0).argmin())
        picked, nearest = torch.cat([picked, candidates[best : best + 1]]), found[:, best].contiguous()
    return points[picked].contiguous()


def _k_means_parallel(points: Points, k: int, random: np.random.Generator) -> Tensor:
    """k-means|| (Bahmani et al. 2012): rounds that each draw many rows at once, weighed and reduced by k-means++."""
    candidates, _ = points.take_of_all(draw_rows(points, 1, random))
    for _ in range(_ROUNDS):
        drawn = _oversample(points, candidates, k, _seed(random))
        if not len(drawn):
            break
        candidates = torch.cat([candidates, drawn])
    weight = torch.zeros(len(candidates), dtype=torch.float64, device=points.device)
    with points.ranks.together():
        for block in points.blocks():
            labels = ops.kmeans_assign(block.x, candidates)
            weight += torch.bincount(labels, block.weight, minlength=len(candidates))
    points.ranks.sum(weight)
    if len(candidates) < k:
        more, _ = points.take_of_all(draw_rows(points, k - len(candidates), random))
        return torch.cat([candidates, more])
    return _plus_plus_on_one_rank(points, candidates, weight, k, random)


def _oversample(points: Points, candidates: Tensor, k: int, seed: int) -> Tensor:
    """Rows drawn each with chance ``min(1, K w d^2 / cost)``, d the distance to the nearest candidate, in one pass.

    A row is drawn where its ``u / (w d^2)``, u uniform, is below ``K / cost``. Until the cost is known, the part of it
    that has been seen keeps too many rows and never too few.
    """
    cost = 0.0
    keys = torch.zeros(0, dtype=torch.float64, device=points.device)
    rows = candidates[:0]
    with points.ranks.together():
        for block in points.blocks():
            distances = squared_distances(block.x, candidates, ops.kmeans_assign(block.x, candidates))
            if block.weight is not None:
                distances = distances * block.weight
            cost += float(ordered_sum(distances))
            if not cost > 0:
                continue
            u = torch.from_numpy(row_uniforms(seed, points.first + block.first, len(block.x))).to(points.device)
            new = u / distances
            chosen = (new < k / cost).nonzero()[:, 0]
            still = keys < k / cost
            keys, rows = torch.cat([keys[still], new[chosen]]), torch.cat([rows[still], block.x[chosen]])
    whole = torch.tensor([cost], dtype=torch.float64)
    points.ranks.sum(whole)
    if not float(whole) > 0:
        return candidates[:0]
    return torch.cat(points.ranks.gather(rows[keys < k / float(whole)]))


def _plus_plus_on_one_rank(
    points: Points, x: Tensor, weight: Tensor | None, k: int, random: np.random.Generator
) -> Tensor:
    """:func:`plus_plus` on rank 0: processors that round differently must not start from different centres."""
    random = np.random.default_rng(_seed(random))
    centers = x.new_empty(k, points.width)
    with points.ranks.together():
        if points.ranks.rank == 0:
            centers = plus_plus(x, weight, k, random)
    return points.ranks.first(centers)


def _seed(random: np.random.Generator) -> int:
    return int(random.integers(1 << 63))


def _mixed(x: np.ndarray) -> np.ndarray:
    """Each bit of the result depends on each bit of the 64 (Stafford's constants for MurmurHash3)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
