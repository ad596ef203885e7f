"""Clusters of the tokens of 1,000 records: one pass against our own ops one by one, and against what people use."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from hubert_ecg import features, ops
from hubert_ecg.features import tokens
from hubert_ecg.testing import assert_same_clusters, torchaudio_mfcc

NUM_RECORDS, NUM_CLUSTERS = 1000, 100


@pytest.fixture(scope="module")
def ecg():
    """Beats, wander and noise: [1000, 12, 500] at 100 Hz."""
    random = torch.Generator().manual_seed(0)
    time = torch.arange(500) / 100 + torch.rand(NUM_RECORDS, 12, 1, generator=random)
    beats = (0.2 + torch.rand(NUM_RECORDS, 12, 1, generator=random)) * torch.exp(-(((time % 0.8) - 0.4) ** 2) / 4e-4)
    noise = 0.03 * torch.randn(NUM_RECORDS, 12, 500, generator=random)
    return (beats + 0.1 * torch.sin(2 * math.pi * 1.2 * time) + noise).clamp(-1, 1).contiguous()


def unit(x):
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.where(length > 0, 1)


def points_of(ecg, feature_type, compat):
    return unit(features.extract(ecg, feature_type, compat)).flatten(0, 1)


def centroids_of(points):
    centroids = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:NUM_CLUSTERS]].clone()
    for _ in range(5):
        sums, counts = ops.kmeans_accumulate(points, ops.kmeans_assign(points, centroids), NUM_CLUSTERS)
        centroids = (sums / counts.clamp(min=1)[:, None]).float()
    return centroids


def check(labels, expected, ecg, feature_type, compat, points, centroids):
    plan = tokens.frame_plan("benchmark", ecg, compat, 100)
    exact = unit(features.FEATURE_TYPES[feature_type](tokens.cut_frames(ecg.double(), plan))).flatten(0, 1)
    rounding = 2 * (points.double() - exact).norm(dim=1) + 1e-5
    assert_same_clusters(labels.flatten(), expected.flatten(), exact, centroids, rounding)


def as_people_do(torchaudio, ecg, centroids):
    """torchaudio's coefficients in one batched call, torchaudio's deltas, scikit-learn's normalisation and k-means."""
    from sklearn.cluster import KMeans
    from sklearn.preprocessing import normalize

    plan = tokens.frame_plan("benchmark", ecg, "corrected", 100)
    kmeans = KMeans(NUM_CLUSTERS, init=centroids.numpy(), n_init=1, max_iter=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one iteration is too few
        kmeans.fit(centroids.numpy())
    kmeans.cluster_centers_ = centroids.numpy().copy()
    low_hz, high_hz = plan.band_hz

    def slopes(x):
        leads = x.transpose(1, 2).split(plan.frames_per_lead, -1)
        return torch.cat([torchaudio.compute_deltas(lead) for lead in leads], -1).transpose(1, 2)

    def run():
        frames = tokens.cut_frames(ecg, plan).samples
        flat = torchaudio_mfcc(torchaudio.kaldi, frames.flatten(0, 1), 100.0, low_freq=low_hz, high_freq=high_hz)
        x = flat.view(len(ecg), plan.num_frames, -1)
        first = slopes(x)
        rows = torch.cat([x, first, slopes(first)], -1).flatten(0, 1).numpy()
        return torch.from_numpy(kmeans.predict(normalize(rows, copy=False)).astype(np.int64))

    return run


@pytest.mark.benchmark(group="label")
@pytest.mark.parametrize("compat", ["corrected", "published"])
@pytest.mark.parametrize("feature_type", features.ASSIGN)
def test_against_the_separate_steps(race, ecg, feature_type, compat):
    assign = features.ASSIGN[feature_type]
    points = points_of(ecg, feature_type, compat)
    centroids = centroids_of(points)

    def one_by_one():
        return ops.kmeans_assign(points_of(ecg, feature_type, compat), centroids)

    check(assign(ecg, centroids, compat=compat), one_by_one(), ecg, feature_type, compat, points, centroids)
    scale = torch.full((NUM_RECORDS, 12), 1 / 32767)
    stored = (ecg / scale[..., None]).round().to(torch.int16)
    peers = {
        "our ops, one by one": one_by_one,
        "one pass over int16": lambda: assign(stored, centroids, compat=compat, scale=scale),
    }
    race(lambda: assign(ecg, centroids, compat=compat), peers, "records", NUM_RECORDS)


@pytest.mark.benchmark(group="label")
def test_against_torchaudio_and_scikit_learn(race, torchaudio, ecg):
    pytest.importorskip("sklearn")
    points = points_of(ecg, "mfcc", "corrected")
    centroids = centroids_of(points)
    peer = as_people_do(torchaudio, ecg, centroids)
    check(ops.mfcc_assign(ecg, centroids), peer(), ecg, "mfcc", "corrected", points, centroids)
    peers = {"torchaudio + scikit-learn": peer}
    race(lambda: ops.mfcc_assign(ecg, centroids), peers, "records", NUM_RECORDS)
