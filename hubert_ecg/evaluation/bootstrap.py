"""Bootstrap replicates of metrics, all at once.

A bootstrap sample is a vector of weights: how often each record was drawn. Every metric here is a function of such
weights, so a replicate needs no copy of the data and no sort: scores are sorted once for each label, and all replicates
walk down the same ranking. F1, accuracy and the regression metrics are made of sums over records, one matrix product.

Intervals of labels are percentile intervals: they keep to the range of the metric and need no symmetry. The macro mean
needs more. Average precision grows when positives are drawn twice, so its replicates lie too high: a little for one
label, but in a mean over many labels that shift stays while the spread averages out. For 60 labels with prevalences of
1 to 30 % in 600 records, a 95 % percentile interval held the truth in 27 % of simulated test sets, one corrected as in
BCa in 67 %, and one shifted back by twice the bias that the bootstrap shows (once for the replicates, once for the
value, which has such a bias itself) in 88 %. The interval of a macro mean is the last.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

# Replicates that are worked on together: their weights then stay in the cache.
_CHUNK = 64
_MAX_WEIGHTS = 2**25


def resample(
    num_records: int, num_replicates: int, seed: int = 0, groups: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """Bootstrap weights, some replicates at a time; the same seed gives the same replicates in any chunking.

    Args:
        num_records: Number of records N.
        num_replicates: Number of replicates R.
        seed: Seed of the draws.
        groups: [N] group of each record (its patient). Whole groups are drawn, with all their records.

    Yields:
        [N, r] float64, how often each record is in each replicate; the r of all chunks sum to R.
    """
    rng = np.random.default_rng(seed)
    if groups is None:
        num_units, unit = num_records, None
    else:
        distinct, unit = np.unique(np.asarray(groups), return_inverse=True)
        num_units = len(distinct)
    chunk = max(1, min(_CHUNK, _MAX_WEIGHTS // max(num_records, 1)))
    for start in range(0, num_replicates, chunk):
        size = min(chunk, num_replicates - start)
        drawn = rng.integers(num_units, size=(size, num_units)) + num_units * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * num_units).reshape(size, num_units)
        counts = np.ascontiguousarray(counts.T, dtype=np.float64)
        yield counts if unit is None else counts[unit]


class Ranking:
    """The ranking of one label, from which AUROC and average precision follow for any weights.

    With the records sorted by falling score and g running over the distinct scores that a positive has, p_g and n_g the
    weight of positives and negatives at that score, and P_g, N_g the weight of those at or above it:

        AUROC = sum_g p_g (N - N_g + n_g / 2) / (P N)        (ties count half)
        AP    = sum_g p_g / P * P_g / (P_g + N_g)            (scikit-learn's definition, no interpolation)

    Args:
        positive: [N] bool.
        scores: [N] float, higher means more likely positive.
    """

    def __init__(self, positive: np.ndarray, scores: np.ndarray):
        self.order = np.argsort(-scores, kind="stable")
        ranked, ranked_scores = positive[self.order], scores[self.order]
        starts = np.flatnonzero(np.r_[True, ranked_scores[1:] != ranked_scores[:-1]])
        ends = np.r_[starts[1:], len(ranked)]
        positives_before = np.r_[0, np.cumsum(ranked)]
        has_positive = positives_before[ends] > positives_before[starts]
        self.positives = self.order[ranked]
        # Where the positives of each distinct score start, among the positives.
        self.positive_starts = positives_before[starts[has_positive]]
        # Sums between the ranks that matter are enough: far fewer than all ranks where positives are rare.
        self.edges = np.unique(np.r_[0, starts[has_positive], ends[has_positive], len(ranked)])
        self.before = np.searchsorted(self.edges, starts[has_positive])
        self.through = np.searchsorted(self.edges, ends[has_positive])

    def __call__(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """AUROC and average precision for each column of weights.

        Args:
            weights: [N, R] float64.

        Returns:
            [R] AUROC and [R] average precision, NaN where a replicate has no positive or no negative.
        """
        if not len(self.positives):
            undefined = np.full(weights.shape[1], np.nan)
            return undefined, undefined.copy()
        above = np.zeros((len(self.edges), weights.shape[1]))
        segments = np.add.reduceat(np.take(weights, self.order, axis=0), self.edges[:-1], axis=0)
        np.cumsum(segments, axis=0, out=above[1:])
        before, through, total = above[self.before], above[self.through], above[-1]
        p = weights[self.positives]
        if len(self.positive_starts) < len(self.positives):
            p = np.add.reduceat(p, self.positive_starts, axis=0)
        P_through = np.cumsum(p, axis=0)
        P = P_through[-1]
        N = total - P
        with np.errstate(divide="ignore", invalid="ignore"):
            precision = P_through / through
            # Nothing was drawn from the top of the ranking: precision is 0 / 0 there, and p is 0.
            precision[through == 0] = 0.0
            defined = (P > 0) & (N > 0)
            auprc = np.where(defined, np.einsum("gr,gr->r", p, precision) / P, np.nan)
            # N - N_g + n_g / 2, with N_g = through - P_through and n_g = (through - before) - p.
            below = N - 0.5 * (through + before) + P_through - 0.5 * p
            auroc = np.where(defined, np.einsum("gr,gr->r", p, below) / (P * N), np.nan)
        return auroc, auprc


def interval(
    replicates: np.ndarray,
    value: float,
    confidence: float,
    unbias: bool = False,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> tuple[float, float]:
    """Interval of a value from its replicates; (nan, nan) where fewer than two are defined. It always holds the value.

    Args:
        replicates: [R] float, NaN where the metric is undefined.
        value: The metric of the records themselves.
        confidence: Level of the interval, in (0, 1).
        unbias: Shift by twice the bias, mean of the replicates less value: for means over labels.
        bounds: Range of the metric.
    """
    defined = replicates[np.isfinite(replicates)]
    if len(defined) < 2 or not np.isfinite(value):
        return float("nan"), float("nan")
    tail = (1 - confidence) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    if unbias:
        shift = 2 * (defined.mean() - value)
        low, high = np.clip([low - shift, high - shift], *bounds)
    return float(min(low, value)), float(max(high, value))
