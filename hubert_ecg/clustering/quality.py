"""How good clusters are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hubert_ecg import ops
from hubert_ecg.clustering.lloyd import assess
from hubert_ecg.clustering.points import ArrayLike, BlockSource, Points, as_tensor
from hubert_ecg.clustering.ranks import Ranks
from hubert_ecg.clustering.starts import draw_rows


def scores(
    x: ArrayLike | BlockSource,
    labels: ArrayLike | None,
    centers: ArrayLike,
    *,
    max_points: int = 20_000,
    seed: int = 0,
    normalize: bool = False,
    distributed: Any = False,
) -> dict[str, float]:
    """How good clusters are.

    Args:
        x: The points as they were clustered (``KMeans.normalized``), ``[N, D]``; all that ``KMeans.fit`` takes.
        labels: ``[N]``, cluster of each point. None: the nearest centre, found block by block.
        centers: ``[K, D]``.
        max_points: Davies-Bouldin and Calinski-Harabasz look at this many points at most, drawn by ``seed``.
        seed: Seed of that draw.
        normalize: Scale the points to length 1 first.
        distributed: As in ``KMeans.fit``; the scores are those of the points of all ranks.

    Returns:
        ``inertia`` (sum of squared distances to the own centre), ``davies_bouldin`` (lower is better),
        ``calinski_harabasz`` (higher is better), both NaN where fewer than two clusters are used;
        ``cluster_use_entropy`` (entropy of the cluster frequencies over its maximum ln K: 1 is even use),
        ``cluster_use_perplexity`` (clusters in even use that would have that entropy) and ``num_empty``.

    Raises:
        ValueError: Shapes do not fit, a label is not in ``0 .. K - 1``, or a point is not finite.
    """
    points = Points("scores", x, normalize=normalize, ranks=Ranks("scores", distributed))
    means = as_tensor("scores: centers", centers).to(points.device, points.dtype)
    if means.ndim != 2 or means.shape[1] != points.width or not len(means) or not points.total:
        want = "[N, D] with N > 0 and centers [K, D]"
        raise ValueError(f"scores: x must be {want}, got {[points.total, points.width]} and {list(means.shape)}")
    with points.ranks.together():
        cluster = None if labels is None else _labels(labels, points.num_rows, len(means)).to(points.device)

    inertia, totals, _ = assess(points, means, labels=cluster)
    counts = totals.cpu().numpy()
    share = counts[counts > 0] / counts.sum()
    entropy = float(-(share * np.log(share)).sum()) + 0.0

    rows = np.arange(points.total)
    if points.total > max_points:
        rows = draw_rows(points, max_points, np.random.default_rng(seed))
    sample, _ = points.take_of_all(rows)
    if cluster is None:
        of_sample = ops.kmeans_assign(sample, means)
    else:
        here = rows[(rows >= points.first) & (rows < points.first + points.num_rows)] - points.first
        of_sample = torch.cat(points.ranks.gather(cluster[torch.from_numpy(here).to(points.device)]))
    davies_bouldin = calinski_harabasz = math.nan
    if 1 < len(of_sample.unique()) < len(sample):
        from sklearn import metrics

        davies_bouldin = float(metrics.davies_bouldin_score(sample.cpu().numpy(), of_sample.cpu().numpy()))
        calinski_harabasz = float(metrics.calinski_harabasz_score(sample.cpu().numpy(), of_sample.cpu().numpy()))
    return {
        "inertia": inertia,
        "davies_bouldin": davies_bouldin,
        "calinski_harabasz": calinski_harabasz,
        "cluster_use_entropy": entropy / math.log(len(means)) if len(means) > 1 else 1.0,
        "cluster_use_perplexity": math.exp(entropy),
        "num_empty": float((counts == 0).sum()),
    }


def _labels(labels: ArrayLike, num_rows: int, k: int) -> Tensor:
    cluster = as_tensor("scores: labels", labels)
    whole = not cluster.is_floating_point() and not cluster.is_complex()
    if cluster.shape != (num_rows,) or not whole or (num_rows and not 0 <= cluster.min() <= cluster.max() < k):
        raise ValueError(f"scores: labels must be [{num_rows}] in 0 .. {k - 1}, got shape {list(cluster.shape)}")
    return cluster.long()
