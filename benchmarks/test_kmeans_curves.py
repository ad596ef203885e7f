"""Nearest centroids of many points: speed against features and against clusters."""

from __future__ import annotations

import pytest
import torch

from hubert_ecg import ops

NUM_POINTS = {"cpu": 100_000, "cuda": 2_000_000}
SHAPES = [("features, K = 100", d, 100) for d in (4, 13, 39, 128, 512)]
SHAPES += [("clusters, D = 39", 39, k) for k in (10, 50, 200, 500, 2000)]


@pytest.mark.benchmark(group="kmeans_assign")
@pytest.mark.parametrize(("axis", "D", "K"), SHAPES, ids=[f"{axis[:8]}-{d}x{k}" for axis, d, k in SHAPES])
def test_kmeans_assign(race, peer, device, axis, D, K):
    random = torch.Generator(device).manual_seed(0)
    x = torch.randn(NUM_POINTS[device.type], D, generator=random, device=device)
    centroids = torch.randn(K, D, generator=random, device=device)

    num_rows = 1 << (16 if device.type == "cuda" else 12)

    def products():
        half = centroids.square().sum(1) / 2
        rows = x.split(num_rows)
        return torch.cat([torch.addmm(half, part, centroids.T, alpha=-1).argmin(1) for part in rows])

    few = x[:2000].double()
    distance = torch.cdist(few, centroids.double())
    labels = ops.kmeans_assign(x, centroids)
    # Two centroids may be as near as float32 can tell.
    nearest, chosen = distance.amin(1), distance.gather(1, labels[:2000, None])[:, 0]
    assert ((chosen - nearest) <= 1e-6 * nearest).all()

    def flat_index(faiss):
        index = faiss.IndexFlatL2(D)
        index.add(centroids.numpy())
        return lambda: index.search(x.numpy(), 1)

    peers = {"torch, products and argmin": products}
    if device.type == "cpu":
        peers["faiss"] = peer("faiss-cpu", flat_index)
    curve = (f"k-means assignment against {axis}", D if axis.startswith("features") else K)
    race(lambda: ops.kmeans_assign(x, centroids), peers, "points", len(x), curve=curve)
