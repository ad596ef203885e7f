"""How many clusters targets and predictions use, and when that is too few to go on.

The number is the perplexity of their counts, ``exp(-sum_k p_k ln p_k)``: as many clusters, used alike, would have that
entropy. A model that has learned nothing but the commonest clusters, or whose codebook entries have become one,
predicts few: its loss may still fall. Likeliest clusters are fewer than drawn ones would be, so a sound model stays
below its targets too; a tenth of them is far from that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Predictions use too few clusters below this share of the targets', targets below this share of all.
COLLAPSED_SHARE = 0.1
# Below this number it is one cluster, and the rest is chance.
_ONE = 1.5


class ClusterUse:
    """Counts of targets and predictions, codebook by codebook, over the batches of a validation.

    Args:
        vocab_sizes: Clusters K of each of the E codebooks.
        device: Where the batches are.

    Attributes:
        counts: For each codebook ``[2, K] int64``: of targets and of predictions. Where ranks share the records, their
            sums are those of the run.
    """

    def __init__(self, vocab_sizes: Sequence[int], device: torch.device) -> None:
        self.counts = [torch.zeros(2, size, dtype=torch.int64, device=device) for size in vocab_sizes]

    @staticmethod
    def columns(num_codebooks: int) -> tuple[str, ...]:
        """Names of :meth:`metrics`; where there are several codebooks, each has its own after them."""
        names = ("target_clusters", "predicted_clusters")
        each = tuple(f"{name}_{e}" for e in range(num_codebooks) for name in names) if num_codebooks > 1 else ()
        return (*names, *each, "collapsed")

    def add(self, targets: Tensor, guesses: Tensor, valid: Tensor | None = None) -> None:
        """Count a batch.

        Args:
            targets: ``[E, B, N]`` or, of one codebook, ``[B, N]`` int64.
            guesses: ``[E, B, N]`` int64, the likeliest clusters.
            valid: ``[B, N]`` bool, tokens that count; default: all.
        """
        targets = targets.expand_as(guesses) if targets.ndim == 2 else targets
        ones = torch.ones_like(guesses[0]) if valid is None else valid.long()
        for counts, *both in zip(self.counts, targets, guesses, strict=True):
            for row, clusters in zip(counts, both, strict=True):
                row.scatter_add_(0, clusters.flatten(), ones.flatten())

    def metrics(self) -> dict[str, float]:
        """Perplexities, means over codebooks and then each, and how many codebooks are collapsed: :meth:`columns`."""
        pairs = self._perplexities()
        means = np.mean(pairs, 0).tolist()
        values = means if len(pairs) == 1 else [*means, *(value for pair in pairs for value in pair)]
        collapsed = float(sum(_too_few(predicted, target) for target, predicted in pairs))
        return dict(zip(self.columns(len(pairs)), [*values, collapsed], strict=True))

    def alarms(self) -> dict[str, str]:
        """What is wrong, as lines for the user, each under a name that stays the same while it lasts."""
        found = {}
        for e, (counts, (target, predicted)) in enumerate(zip(self.counts, self._perplexities(), strict=True)):
            which = f" of codebook {e}" if len(self.counts) > 1 else ""
            num_clusters, num_tokens = counts.shape[1], int(counts[0].sum())
            if _too_few(predicted, target):
                found[f"predictions {e}"] = (
                    f"the predictions{which} use {predicted:.1f} clusters, far fewer than the "
                    f"{target:.1f} that the targets use: the codebook has collapsed, or nothing is learned yet; if the "
                    "loss does not fall either, try a lower --learning_rate, a longer --warmup or fewer --num_clusters"
                )
            # As many as there can be: few tokens cannot use many clusters.
            most = min(num_clusters, num_tokens)
            if _too_few(target, most):
                found[f"targets {e}"] = (
                    f"the targets{which} use {target:.1f} of {num_clusters} clusters: there is little to predict; "
                    "look at them with hubert-ecg audit, and try another --feature_type or fewer --num_clusters"
                )
        return found

    def _perplexities(self) -> list[tuple[float, float]]:
        """Of targets and of predictions, for each codebook."""
        counts = [of_both.cpu().numpy() for of_both in self.counts]
        return [(effective_number(target), effective_number(predicted)) for target, predicted in counts]


def _too_few(used: float, of: float) -> bool:
    return of >= 2 and used < max(_ONE, COLLAPSED_SHARE * of)


def effective_number(counts: np.ndarray) -> float:
    """How many clusters are in use: the exponential of the entropy of their counts.

    >>> effective_number(np.array([5, 5, 0]))
    2.0
    """
    share = counts[counts > 0] / max(counts.sum(), 1)
    return round(math.exp(-(share * np.log(share)).sum()), 6)
