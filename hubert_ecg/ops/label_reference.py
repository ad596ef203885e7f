"""The nearest centroid of each frame of a signal in plain PyTorch, by the references of the ops that it joins."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hubert_ecg.ops.deltas_reference import deltas
from hubert_ecg.ops.kmeans_reference import kmeans_assign
from hubert_ecg.ops.mfcc_reference import mfcc
from hubert_ecg.ops.time_freq_reference import time_freq

#: Width of each feature type.
WIDTHS = {"mfcc": 39, "time_freq": 16, "mixed": 29}


def frame_assign(
    ecg: Tensor,
    scale: Tensor | None,
    centroids: Tensor,
    feature_type: str,
    start: int,
    num_frames: int,
    frame_length: int,
    frames_per_lead: list[int] | None,
    sample_rate_hz: float,
    low_hz: float,
    high_hz: float,
    normalize: bool,
) -> Tensor:
    x = features(
        ecg,
        scale,
        feature_type,
        start,
        num_frames,
        frame_length,
        frames_per_lead,
        sample_rate_hz,
        low_hz,
        high_hz,
        normalize,
    )
    return kmeans_assign(x.flatten(0, 1), centroids).view(x.shape[:2])


def features(
    ecg: Tensor,
    scale: Tensor | None,
    feature_type: str,
    start: int,
    num_frames: int,
    frame_length: int,
    frames_per_lead: list[int] | None,
    sample_rate_hz: float,
    low_hz: float,
    high_hz: float,
    normalize: bool,
) -> Tensor:
    """What is labelled: [B, N, D], of length 1 with ``normalize``."""
    signal = ecg if ecg.dtype == torch.float64 else ecg.float()
    if scale is not None:
        signal = signal * scale.float().repeat_interleave(ecg.shape[1] // max(1, scale.shape[1]), 1)
    frames = signal[:, start : start + num_frames * frame_length].reshape(len(ecg), num_frames, frame_length)
    parts = []
    if feature_type != "mfcc":
        parts.append(time_freq(frames))
    if feature_type != "time_freq":
        parts.append(mfcc(frames, sample_rate_hz, low_hz, high_hz))
    if feature_type == "mfcc":
        lengths = None if frames_per_lead is None else torch.tensor(frames_per_lead)
        for _ in range(2):
            parts.append(torch.zeros_like(parts[-1]) if lengths is None else deltas(parts[-1], lengths))
    x = torch.cat(parts, -1)
    if not normalize:
        return x
    length = torch.linalg.vector_norm(x.double(), dim=-1, keepdim=True)
    return (x / length.where(length > 0, 1)).to(x.dtype)


@functools.cache
def _samples() -> list[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(0)

    def sample(ecg: Tensor, k: int, feature_type: str, *how: Any, scale: Tensor | None = None) -> tuple[Any, ...]:
        """With ``k`` centroids at most, so far apart that the rounding of the features decides no label."""
        exact = ecg.double() if scale is None else ecg
        x = features(exact, scale, feature_type, *how).flatten(0, 1)
        others = x[torch.randperm(len(x), generator=random)[:k]].nan_to_num(0, 0, 0)
        if len(others) < k:
            others = torch.cat([others, torch.randn(k - len(others), x.shape[1], generator=random)])
        spread = others.std(0, correction=0) * torch.randn(others.shape, generator=random) / 4
        return ecg, scale, _apart(x, (others + spread).float()), feature_type, *how

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).cumsum(-1).sub(0.1).sin() + 0.1 * torch.randn(
            shape, generator=random
        )

    corrected = (9, 9, 64, [1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1], 100.0, 0.5, 50.0, True)
    samples = [sample(noise(2, 600), 7, "mfcc", *corrected)]
    leads = [8] * 9 + [7] * 3
    for feature_type in WIDTHS:
        for normalize in (True, False):
            samples.append(sample(noise(3, 6000), 40, feature_type, 9, 93, 64, leads, 100.0, 0.5, 50.0, normalize))
        # The transform of 322 samples, and 512 under the mel filters; no neighbours.
        samples.append(sample(noise(1, 5000), 5, feature_type, 0, 15, 322, None, 500.0, 20.0, 250.0, True))
        samples.append(sample(noise(2, 1000), 1, feature_type, 3, 30, 33, [29, 1], 100.0, 20.0, 0.0, False))
        samples.append(
            sample(noise(1, 32 * 1200 + 5), 23, feature_type, 5, 1200, 32, [700, 0, 500], 50.0, 0.5, 25.0, True)
        )
        samples.append(sample(noise(0, 600), 3, feature_type, *corrected))
        samples.append(sample(noise(2, 600), 3, feature_type, 9, 0, 64, None, *corrected[4:]))
        scale = 0.001 * (1 + torch.rand(3, 12, generator=random))
        stored = (900 * noise(3, 1200)).to(torch.int16)
        samples.append(sample(stored, 9, feature_type, 9, 17, 64, [2] * 5 + [1] * 7, *corrected[4:], scale=scale))
        broken = noise(4, 1280)
        broken[0, 70], broken[1, 0], broken[1, 1279], broken[2, 640:] = torch.nan, torch.inf, -torch.inf, 0
        broken[3] = 0.25
        samples.append(sample(broken, 6, feature_type, 0, 20, 64, [10, 10], *corrected[4:]))
    return samples


def _apart(x: Tensor, centroids: Tensor) -> Tensor:
    """Centroids without those that leave a row of ``x`` in doubt within a relative error of 5e-5 of its length."""
    while len(x):
        finite, mode = x.nan_to_num(0, 0, 0).double(), "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(finite, centroids.double(), compute_mode=mode)
        if len(centroids) == 1:
            break
        nearest, who = distances.topk(2, 1, largest=False)
        doubtful = nearest[:, 1] - nearest[:, 0] < 1e-4 * x.norm(dim=1)
        if not bool(doubtful.any()):
            break
        drop = int(who[int(doubtful.nonzero()[0, 0]), 1])
        centroids = torch.cat([centroids[:drop], centroids[drop + 1 :]])
    return centroids


def frame_assign_samples(device: str) -> Iterator[tuple[Any, ...]]:
    for sample in _samples():
        yield tuple(part.to(device) if isinstance(part, Tensor) else part for part in sample)


# Labels are equal, never close: the centroids of the samples lie apart.
frame_assign_tolerance = {torch.float32: (0.0, 0.0), torch.float64: (0.0, 0.0)}


def frame_assign_errors() -> Iterator[tuple[tuple[Any, ...], str]]:
    ecg, centroids = torch.zeros(2, 600), torch.zeros(5, 39)
    how = ("mfcc", 9, 9, 64, [9], 100.0, 0.5, 50.0, True)
    yield (ecg[0], None, centroids, *how), r"frame_assign: ecg must be .*\[B, n\], got float32\[600\]"
    yield (
        (ecg.int(), None, centroids, *how),
        r"frame_assign: ecg must be .* or int16.*, got int32\[2, 600\]",
    )
    yield (ecg.short(), None, centroids, *how), r"frame_assign: scale must be .*\[2, L\] for an ecg of int16, got None"
    scale = torch.ones(2, 12)
    yield (ecg, scale, centroids, *how), r"frame_assign: scale must be None for an ecg of float32, got float32\[2, 12\]"
    yield (ecg.short(), scale[:1], centroids, *how), r"frame_assign: scale must be .*, got float32\[1, 12\]"
    yield (
        (ecg.short(), scale[:, :7], centroids, *how),
        r"frame_assign: scale must be .*divides 600, got .*\[2, 7\]",
    )
    yield (ecg.short(), scale.int(), centroids, *how), r"frame_assign: scale must be floating .*, got int32\[2, 12\]"
    yield (ecg, None, centroids[:, :16], *how), r"frame_assign: centroids must be .*\[K, 39\].*, got float32\[5, 16\]"
    yield (ecg, None, centroids[:0], *how), r"frame_assign: centroids must be .*K > 0.*, got float32\[0, 39\]"
    yield (ecg, None, centroids.long(), *how), r"frame_assign: centroids must be floating .*, got int64\[5, 39\]"
    yield (ecg, None, centroids, "mel", *how[1:]), r"frame_assign: feature_type must be one of .*, got 'mel'"
    yield (ecg, None, centroids, "mfcc", 9, 10, *how[3:]), r"frame_assign: frames must lie in .*600.*, got 9 \+ 10 x 64"
    yield (ecg, None, centroids, "mfcc", -1, *how[2:]), r"frame_assign: frames must lie in .*, got -1 \+ 9 x 64"
    yield (ecg, None, centroids, *how[:3], 1, *how[4:]), r"frame_assign: frame_length must be at least 2, got 1"
    yield (None, None, centroids, *how), r"frame_assign: ecg must be a NumPy, CuPy or torch array, got None"
    yield (ecg, None, None, *how), r"frame_assign: centroids must be a NumPy, CuPy or torch array, got None"
    for place, name in ((1, "start"), (2, "num_frames"), (3, "frame_length")):
        args = (*how[:place], 2.5, *how[place + 1 :])
        yield (ecg, None, centroids, *args), rf"frame_assign: {name} must be a whole number, got 2\.5"
    yield (ecg, None, centroids, *how[:-1], 1), r"frame_assign: normalize must be True or False, got 1"
    yield (ecg, None, centroids, *how[:5], None, *how[6:]), r"frame_assign: sample_rate_hz must be a number, got None"
    lengths = (ecg, None, centroids, *how[:4], [4, 4], *how[5:])
    yield lengths, r"frame_assign: frames_per_lead must be .* add up to 9, got \[4, 4\]"
    yield (
        (ecg, None, centroids, *how[:5], -100.0, *how[6:]),
        r"frame_assign: sample_rate_hz must be positive and finite, got -100",
    )
    yield (ecg, None, centroids, *how[:6], 60.0, 50.0, True), r"frame_assign: low_hz must be in \[0, 50\).*, got 60"
    yield ([1.0], None, centroids, *how), r"frame_assign: ecg must be a NumPy, CuPy or torch array, got list"
