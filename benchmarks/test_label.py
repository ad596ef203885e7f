"""Clusters of the tokens of many records: one pass against our own ops one by one, and against what people use."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch

from hubert_ecg import KMeans, features, ops
from hubert_ecg.config import ExtractConfig, LabelConfig
from hubert_ecg.features import tokens
from hubert_ecg.testing import assert_same_clusters, tiled_store, torchaudio_mfcc
from hubert_ecg.train import extract_features, write_labels

NUM_CLUSTERS = 100
NUM_RECORDS = {"cpu": 1000, "cuda": 50_000}
STORED_RECORDS = {"cpu": 8192, "cuda": 100_000}
# The answers are checked on these.
NUM_CHECKED = 1000


@pytest.fixture(scope="module")
def ecg(device):
    """Beats, wander and noise: [B, 12, 500] at 100 Hz."""
    num_records = NUM_RECORDS[device.type]
    random = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    time = torch.arange(500, device=device) / 100 + torch.rand(num_records, 12, 1, **random)
    beats = (0.2 + torch.rand(num_records, 12, 1, **random)) * torch.exp(-(((time % 0.8) - 0.4) ** 2) / 4e-4)
    noise = 0.03 * torch.randn(num_records, 12, 500, **random)
    return (beats + 0.1 * torch.sin(2 * math.pi * 1.2 * time) + noise).clamp(-1, 1).contiguous()


def unit(x):
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.where(length > 0, 1)


def points_of(ecg, feature_type, compat):
    return unit(features.extract(ecg, feature_type, compat)).flatten(0, 1)


def centroids_of(points):
    chosen = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:NUM_CLUSTERS]
    centroids = points[chosen.to(points.device)].clone()
    for _ in range(5):
        sums, counts = ops.kmeans_accumulate(points, ops.kmeans_assign(points, centroids), NUM_CLUSTERS)
        centroids = (sums / counts.clamp(min=1)[:, None]).float()
    return centroids


def check(labels, expected, ecg, feature_type, compat, centroids):
    ecg, points = ecg[:NUM_CHECKED], points_of(ecg[:NUM_CHECKED], feature_type, compat)
    labels, expected = (found.flatten()[: len(points)] for found in (labels, expected))
    plan = tokens.frame_plan("benchmark", ecg, compat, 100)
    exact = unit(features.FEATURE_TYPES[feature_type](tokens.cut_frames(ecg.double(), plan))).flatten(0, 1)
    rounding = 2 * (points.double() - exact).norm(dim=1) + 1e-5
    assert_same_clusters(labels, expected, exact, centroids, rounding)


def as_people_do(torchaudio, ecg, centroids):
    """torchaudio's coefficients in one batched call, its deltas, and normalisation and k-means of another library."""
    plan = tokens.frame_plan("benchmark", ecg, "corrected", 100)
    predict = (in_scikit_learn if ecg.device.type == "cpu" else in_torch)(centroids)
    low_hz, high_hz = plan.band_hz

    def slopes(x):
        leads = x.transpose(1, 2).split(plan.frames_per_lead, -1)
        return torch.cat([torchaudio.compute_deltas(lead) for lead in leads], -1).transpose(1, 2)

    def run():
        frames = tokens.cut_frames(ecg, plan).samples
        flat = torchaudio_mfcc(torchaudio.kaldi, frames.flatten(0, 1), 100.0, low_freq=low_hz, high_freq=high_hz)
        x = flat.view(len(ecg), plan.num_frames, -1)
        first = slopes(x)
        return predict(torch.cat([x, first, slopes(first)], -1).flatten(0, 1))

    return run


def in_scikit_learn(centroids):
    from sklearn.cluster import KMeans
    from sklearn.preprocessing import normalize

    kmeans = KMeans(NUM_CLUSTERS, init=centroids.numpy(), n_init=1, max_iter=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one iteration is too few
        kmeans.fit(centroids.numpy())
    kmeans.cluster_centers_ = centroids.numpy().copy()
    return lambda x: torch.from_numpy(kmeans.predict(normalize(x.numpy(), copy=False)).astype(np.int64))


def in_torch(centroids):
    half = centroids.square().sum(1) / 2

    def predict(x):
        rows = torch.nn.functional.normalize(x).split(1 << 18)
        return torch.cat([torch.addmm(half, part, centroids.T, alpha=-1).argmin(1) for part in rows])

    return predict


@pytest.mark.benchmark(group="label")
@pytest.mark.parametrize("compat", ["corrected", "published"])
@pytest.mark.parametrize("feature_type", features.ASSIGN)
def test_against_the_separate_steps(race, ecg, feature_type, compat):
    assign = features.ASSIGN[feature_type]
    points = points_of(ecg, feature_type, compat)
    centroids = centroids_of(points)

    def one_by_one():
        return ops.kmeans_assign(points_of(ecg, feature_type, compat), centroids)

    operations = 2 * points.numel() * NUM_CLUSTERS
    del points
    check(assign(ecg, centroids, compat=compat), one_by_one(), ecg, feature_type, compat, centroids)
    scale = torch.full((len(ecg), 12), 1 / 32767, device=ecg.device)
    stored = (ecg / scale[..., None]).round().to(torch.int16)
    peers = {
        "our ops, one by one": one_by_one,
        "one pass over int16": lambda: assign(stored, centroids, compat=compat, scale=scale),
    }
    floor = {"moved": ecg.nbytes, "operations": operations}
    race(lambda: assign(ecg, centroids, compat=compat), peers, "records", len(ecg), **floor)


@pytest.mark.benchmark(group="label")
def test_against_torchaudio_and_scikit_learn(race, torchaudio, ecg):
    points = points_of(ecg, "mfcc", "corrected")
    centroids, operations = centroids_of(points), 2 * points.numel() * NUM_CLUSTERS
    del points
    peer = as_people_do(torchaudio, ecg, centroids)
    check(ops.mfcc_assign(ecg, centroids), peer(), ecg, "mfcc", "corrected", centroids)
    peers = {"torchaudio + scikit-learn" if ecg.device.type == "cpu" else "torchaudio + torch": peer}
    floor = {"moved": ecg.nbytes, "operations": operations}
    race(lambda: ops.mfcc_assign(ecg, centroids), peers, "records", len(ecg), **floor)


@pytest.mark.benchmark(group="label")
def test_command(race, device, tmp_path):
    """The label command, from a packed store to labels on disk, and extract with k-means over what it wrote."""
    num_records = STORED_RECORDS[device.type]
    store = tiled_store(tmp_path / "store", num_records, 5.0)
    ecg = torch.from_numpy(store.gather(np.arange(64), None, 500)[0])
    kmeans = KMeans(NUM_CLUSTERS, random_state=0, max_iter=5).fit(features.extract(ecg, "mfcc").flatten(0, 1))
    kmeans.save(tmp_path / "kmeans.safetensors")
    common = {"cache_dir": tmp_path / "cache", "device": device.type}
    runs = itertools.count()

    def in_one_pass():
        named = {"kmeans_path": str(tmp_path / "kmeans.safetensors"), "name": f"run{next(runs)}"}
        return write_labels(LabelConfig(store.path, **named, **common))[0]

    def in_two_steps():
        given = extract_features(ExtractConfig(store.path, output_path=tmp_path / f"run{next(runs)}", **common))
        rows = given.features.reshape(-1, given.features.shape[-1])
        return np.concatenate([kmeans.predict(part) for part in np.array_split(rows, -(-len(rows) // (1 << 20)))])

    expected = kmeans.predict(features.extract(ecg, "mfcc").flatten(0, 1))
    for name, run in (("in one pass", in_one_pass), ("in two steps", in_two_steps)):
        same = np.asarray(run()).reshape(-1)[: len(expected)] == np.asarray(expected)
        assert same.mean() > 0.999, f"{name}: other labels"
    race(in_one_pass, {"extract, then predict": in_two_steps}, "records", num_records, rounds=3)
