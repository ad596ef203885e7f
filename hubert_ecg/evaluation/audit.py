"""What clusters of tokens are: their use, how their samples look, and what they tell of lead, beat and labels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from hubert_ecg import features
from hubert_ecg.evaluation.beats import beat_phase, r_peaks
from hubert_ecg.features.tokens import FramePlan
from hubert_ecg.signal import LEADS

NUM_PHASES = 20
NUM_EXAMPLES = 8
# A longer interval is a pause, or a beat that was not found.
_LONGEST_BEAT_S = 2.5
_NUM_PERMUTATIONS = 20
# Below this many records with or without a label, what clusters tell of it is chance.
_FEW_RECORDS = 5


@dataclasses.dataclass(frozen=True)
class Information:
    """What the cluster of one token tells of something.

    Args:
        share: Mutual information over the entropy of that something: 1 says all of it, 0 nothing.
        chance: The same where the something was moved about at random: what few tokens seem to tell.
        chance_sd: Standard deviation of that, where it was done often enough to know.
        bits: The mutual information in bits.
    """

    share: float
    chance: float
    chance_sd: float
    bits: float

    @property
    def above_chance(self) -> float:
        return self.share - self.chance


class ClusterAudit:
    """Tallies over the tokens of many records, batch by batch; memory grows with K and, slowly, with the records.

    Args:
        num_clusters: K.
        plan: The frames that were clustered.
        num_samples: Samples T of each lead of a crop.
        seed: Seed of the examples and of what is compared with chance.
    """

    def __init__(self, num_clusters: int, plan: FramePlan, num_samples: int, seed: int = 0) -> None:
        self.num_clusters, self.plan, self.rate_hz = num_clusters, plan, plan.sample_rate_hz
        self._random = np.random.default_rng(seed)
        places, frame = plan.places(num_samples), plan.frame_length
        self.lead, self.sample = places.numpy().T
        half = frame // 2
        self._two_leads = (self.sample < half) | (self.sample + frame - half > num_samples)
        K, bins = num_clusters, frame // 2 + 1
        self.counts = np.zeros(K, np.int64)
        self.two_leads = np.zeros(K, np.int64)
        self.leads, self._leads_by_chance = np.zeros((2, K, len(LEADS)), np.int64)
        self.phases, self._phases_by_chance = np.zeros((2, K, NUM_PHASES), np.int64)
        self._sums, self._squares = torch.zeros(2, K, frame, dtype=torch.float64)
        self._power = torch.zeros(K, bins, dtype=torch.float64)
        self._examples = _Examples(NUM_EXAMPLES, frame)
        self._beats_s: list[np.ndarray] = []
        self._per_record: list[scipy.sparse.csr_matrix] = []

    def add(self, ecg: Tensor, labels: Tensor, valid: Tensor) -> None:
        """Count a batch of records.

        Args:
            ecg: ``[B, 12, T] float32``, what the features were computed from; absent leads and padding are 0.
            labels: ``[B, N] int64`` clusters.
            valid: ``[B, N]`` bool, tokens that are no padding.
        """
        valid, labels = valid.to(ecg.device), labels.to(ecg.device)
        frames = features.cut_frames(ecg, self.plan).samples[valid]
        cluster = labels[valid]
        self._add_samples(frames, cluster)
        mask, clusters = valid.cpu().numpy(), labels.cpu().numpy()
        here = clusters[mask]
        self._examples.add(frames, here, self._random)
        self.counts += np.bincount(here, minlength=self.num_clusters)
        two = np.broadcast_to(self._two_leads, mask.shape)[mask]
        self.two_leads += np.bincount(here[two], minlength=self.num_clusters)

        num_records = len(mask)
        lead = np.broadcast_to(self.lead, mask.shape)
        turned = (lead + self._random.integers(len(LEADS), size=(num_records, 1))) % len(LEADS)
        self.leads += _table(here, lead[mask], (self.num_clusters, len(LEADS)))
        self._leads_by_chance += _table(here, turned[mask], (self.num_clusters, len(LEADS)))

        peaks = r_peaks(ecg.cpu().numpy(), self.rate_hz)
        self._beats_s += [np.diff(of_record) / self.rate_hz for of_record in peaks]
        longest = _LONGEST_BEAT_S * self.rate_hz
        phase = np.stack([beat_phase(self.sample, of_record, longest) for of_record in peaks])
        known = mask & np.isfinite(phase)
        moved = (phase + self._random.random((num_records, 1))) % 1
        for table, of in ((self.phases, phase), (self._phases_by_chance, moved)):
            part = np.minimum((of[known] * NUM_PHASES).astype(np.int64), NUM_PHASES - 1)
            table += _table(clusters[known], part, table.shape)

        record = np.broadcast_to(np.arange(num_records)[:, None], mask.shape)[mask]
        ones = np.ones(len(here), np.int32)
        self._per_record.append(
            scipy.sparse.coo_matrix((ones, (record, here)), (num_records, self.num_clusters)).tocsr()
        )

    def _add_samples(self, frames: Tensor, cluster: Tensor) -> None:
        # In float64, which Apple's GPUs have not.
        if frames.device.type == "mps":
            frames, cluster = frames.cpu(), cluster.cpu()
        x = frames.double()
        window = torch.hann_window(x.shape[1], periodic=True, dtype=x.dtype, device=x.device)
        spectrum = torch.fft.rfft((x - x.mean(1, keepdim=True)) * window).abs().square()
        for total, values in ((self._sums, x), (self._squares, x.square()), (self._power, spectrum)):
            total += torch.zeros_like(total, device=x.device).index_add_(0, cluster, values).cpu()

    def result(
        self, targets: Mapping[str, tuple[Sequence[str], np.ndarray]] | None = None, seed: int = 0
    ) -> dict[str, Any]:
        """All numbers, clusters by falling use.

        Args:
            targets: Task -> its label names and ``[R, C]`` 0 or 1, for the records in the order they were added; NaN
                in a record of which the task is not known.
            seed: Seed of the permutations that say what chance would tell.

        Raises:
            ValueError: If no token was added.
        """
        total = int(self.counts.sum())
        if not total:
            raise ValueError("audit: there must be at least one token that is no padding, got none")
        share = self.counts / total
        used = share[share > 0]
        entropy = float(-(used * np.log(used)).sum())
        per_record = scipy.sparse.vstack(self._per_record, format="csr")
        beats_s = np.concatenate(self._beats_s)
        S, rate = self.plan.frame_length, self.rate_hz
        window = np.hanning(S + 1)[:-1]
        scale = 2 / (rate * np.square(window).sum()) / np.maximum(self.counts, 1)[:, None]
        counts = np.maximum(self.counts, 1)[:, None]
        mean = self._sums.numpy() / counts
        sd = np.sqrt(np.maximum(self._squares.numpy() / counts - mean**2, 0))
        power = self._power.numpy() * scale
        rms = np.sqrt(self._squares.numpy().sum(1) / counts[:, 0] / S)
        with_cluster = np.asarray((per_record > 0).sum(0)).ravel()
        examples = self._examples.of_clusters()
        order = np.argsort(-self.counts, kind="stable")
        clusters = [
            {
                "cluster": int(k),
                "num_tokens": int(self.counts[k]),
                "share": float(share[k]),
                "share_of_records": float(with_cluster[k] / per_record.shape[0]),
                "share_across_two_leads": float(self.two_leads[k] / counts[k, 0]),
                "rms": float(rms[k]),
                "lead_bits": _divergence(self.leads[k], self.leads.sum(0)),
                "phase_bits": _divergence(self.phases[k], self.phases.sum(0)),
                "mean": mean[k],
                "sd": sd[k],
                "power_density": power[k],
                "lead_counts": self.leads[k],
                "phase_counts": self.phases[k],
                "examples": examples.get(int(k), np.empty((0, S), np.float32)),
            }
            for k in order
        ]
        return {
            "num_records": int(per_record.shape[0]),
            "num_tokens": total,
            "num_clusters": self.num_clusters,
            "use": {
                "perplexity": math.exp(entropy),
                "entropy": entropy / math.log(self.num_clusters) if self.num_clusters > 1 else 1.0,
                "num_empty": int((self.counts == 0).sum()),
                "largest_share": float(share.max()),
                "half_of_tokens": int((np.cumsum(np.sort(share)[::-1]) < 0.5).sum() + 1),
            },
            "beats": {
                "num_beats": len(beats_s),
                "median_rate_bpm": float(60 / np.median(beats_s)) if len(beats_s) else float("nan"),
                "share_of_tokens": float(self.phases.sum() / total),
            },
            "information": {
                "lead": information(self.leads, [self._leads_by_chance]),
                "beat": information(self.phases, [self._phases_by_chance]),
                "tasks": {
                    task: _of_labels(per_record, names, values, np.random.default_rng(seed))
                    for task, (names, values) in (targets or {}).items()
                },
            },
            "axes": {
                "time_s": (np.arange(S) - S // 2) / rate,
                "frequency_hz": np.arange(S // 2 + 1) * rate / S,
                "phase": (np.arange(NUM_PHASES) + 0.5) / NUM_PHASES,
                "leads": list(LEADS),
                "lead_counts": self.leads.sum(0),
                "phase_counts": self.phases.sum(0),
            },
            "clusters": clusters,
        }


def remarks(found: Mapping[str, Any]) -> list[str]:
    """What somebody who reads these numbers should not overlook, in sentences."""
    use, K, said = found["use"], found["num_clusters"], []

    def named(where: Callable[[Mapping[str, Any]], bool]) -> str:
        return ", ".join(str(c["cluster"]) for c in found["clusters"] if c["num_tokens"] and where(c))

    if use["perplexity"] < 0.3 * K:
        said.append(
            f"Clusters are used very unevenly: {use['perplexity']:.1f} in even use would do, of {K}. "
            "Fewer clusters, or another feature type, may give better targets."
        )
    if use["num_empty"]:
        said.append(f"{use['num_empty']} of {K} clusters hold no token of these records.")
    if alone := named(lambda c: c["num_tokens"] > 1 and c["share_of_records"] * found["num_records"] < 1.5):
        said.append(f"All tokens of one record: clusters {alone}.")
    if flat := named(lambda c: c["rms"] < 1e-4):
        said.append(f"Flat signal: clusters {flat}.")
    if across := named(lambda c: c["share_across_two_leads"] > 0.5):
        said.append(
            "Mostly tokens that end one lead and begin the next, which say more about the order of the leads than "
            f"about the heart: clusters {across}."
        )
    for what, name in (("lead", "lead"), ("beat", "position in the beat")):
        told = found["information"][what]
        if told.above_chance < 0.01:
            said.append(f"Clusters tell next to nothing of the {name}.")
    if found["beats"]["share_of_tokens"] < 0.3:
        said.append("Few R peaks were found: what is said of positions in the beat rests on few tokens.")
    return said


class _Examples:
    """A few tokens of each cluster, each token as likely: those with the smallest of random numbers."""

    def __init__(self, count: int, frame: int) -> None:
        self._count = count
        self._key, self._cluster = np.empty(0), np.empty(0, np.int64)
        self._frames = np.empty((0, frame), np.float32)

    def add(self, frames: Tensor, cluster: np.ndarray, random: np.random.Generator) -> None:
        key = random.random(len(cluster))
        first = _first_of_each(cluster, key, self._count)
        keys = np.concatenate([self._key, key[first]])
        clusters = np.concatenate([self._cluster, cluster[first]])
        kept = frames[torch.from_numpy(first).to(frames.device)].cpu().numpy()
        rows = np.concatenate([self._frames, kept])
        best = _first_of_each(clusters, keys, self._count)
        self._key, self._cluster, self._frames = keys[best], clusters[best], rows[best]

    def of_clusters(self) -> dict[int, np.ndarray]:
        return {int(k): self._frames[self._cluster == k] for k in np.unique(self._cluster)}


def _first_of_each(cluster: np.ndarray, key: np.ndarray, count: int) -> np.ndarray:
    """Places of the ``count`` smallest keys of each cluster."""
    order = np.lexsort([key, cluster])
    ranked = cluster[order]
    begin = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]]) if len(ranked) else np.empty(0, np.int64)
    rank = np.arange(len(ranked)) - np.repeat(begin, np.diff(np.r_[begin, len(ranked)]))
    return order[rank < count]


def entropy_bits(counts: np.ndarray) -> np.ndarray:
    """Entropy of counts along the last axis, in bits.

    >>> entropy_bits(np.array([2, 1, 1, 0])).item()
    1.5
    """
    total = counts.sum(-1, keepdims=True)
    share = counts / np.maximum(total, 1)
    return -(share * np.log2(np.where(share > 0, share, 1))).sum(-1) + 0.0


def mutual_information(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mutual information of the axes of tables of counts ``[..., K, Y]`` in bits, and its share of the entropy of Y.

    >>> bits, share = mutual_information(np.array([[4, 0], [0, 4]]))
    >>> bits.item(), share.item()
    (1.0, 1.0)
    """
    flat = table.reshape(*table.shape[:-2], math.prod(table.shape[-2:]))
    of_y = entropy_bits(table.sum(-2))
    bits = np.maximum(entropy_bits(table.sum(-1)) + of_y - entropy_bits(flat), 0)
    return bits, np.where(of_y > 0, bits / np.where(of_y > 0, of_y, 1), 0)


def information(table: np.ndarray, by_chance: Sequence[np.ndarray]) -> Information:
    """What clusters (rows of ``table [K, Y]``) tell of its columns, beside what moved tables seem to tell."""
    bits, share = mutual_information(table)
    chances = [float(mutual_information(moved)[1]) for moved in by_chance]
    sd = float(np.std(chances, ddof=1)) if len(chances) > 1 else float("nan")
    return Information(float(share), float(np.mean(chances)), sd, float(bits))


def _of_labels(
    per_record: scipy.sparse.csr_matrix, names: Sequence[str], targets: np.ndarray, random: np.random.Generator
) -> dict[str, Any]:
    """What the cluster of one token tells of each label of its record; by chance: with labels of other records."""
    stated = np.isfinite(targets).all(1)
    per_record, targets = per_record[stated], targets[stated].astype(np.float64)
    positives = targets.sum(0).astype(np.int64)
    known = np.flatnonzero((positives >= _FEW_RECORDS) & (len(targets) - positives >= _FEW_RECORDS))
    total = np.asarray(per_record.sum(0), np.float64).ravel()

    def tables(rows: np.ndarray) -> np.ndarray:
        with_label = np.asarray(per_record.T @ rows).T
        return np.stack([with_label, total - with_label], -1)

    targets = targets[:, known]
    found = tables(targets)
    bits, share = mutual_information(found)
    chances = np.stack(
        [mutual_information(tables(targets[random.permutation(len(targets))]))[1] for _ in range(_NUM_PERMUTATIONS)]
    )
    weights = entropy_bits(found.sum(1))
    labels = {}
    for c, column in enumerate(known.tolist()):
        # The cluster that adds most to the mutual information by being commoner with the label.
        joint = found[c, :, 0] / total.sum()
        expected = found[c, :, 0].sum() / total.sum() * total / total.sum()
        lift = joint / np.where(expected > 0, expected, 1)
        gain = joint * np.log2(np.where(lift > 0, lift, 1))
        best = int(gain.argmax())
        labels[str(names[column])] = {
            **dataclasses.asdict(Information(share[c], chances[:, c].mean(), chances[:, c].std(ddof=1), bits[c])),
            "num_records": int(positives[column]),
            "cluster": best,
            "lift": float(lift[best]),
        }
    together = float((weights * share).sum() / weights.sum()) if len(known) else float("nan")
    by_chance = (weights * chances).sum(1) / weights.sum() if len(known) else np.full(2, np.nan)
    return {
        **dataclasses.asdict(Information(together, by_chance.mean(), by_chance.std(ddof=1), float(bits.sum()))),
        "labels": dict(sorted(labels.items(), key=lambda item: item[1]["chance"] - item[1]["share"])),
        "left_out": [str(names[c]) for c in range(len(names)) if c not in set(known.tolist())],
    }


def _table(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.bincount(rows * shape[1] + columns, minlength=shape[0] * shape[1]).reshape(shape)


def _divergence(counts: np.ndarray, of_all: np.ndarray) -> float:
    """How far the shares of a cluster are from those of all tokens: Kullback-Leibler divergence in bits."""
    if not counts.sum():
        return 0.0
    p, q = counts / counts.sum(), of_all / of_all.sum()
    return float((p * np.log2(np.where(p > 0, p / np.where(q > 0, q, 1), 1))).sum()) + 0.0
