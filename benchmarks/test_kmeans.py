"""One Lloyd iteration (labels, sums, counts): ours, scikit-learn's, faiss's and torch's products, on the same points.

``pytest benchmarks/test_kmeans.py`` first checks the answers, then times them in turns and prints millions of points a
second and how many times as fast ours is. On a GPU, flash-kmeans and cuML take part where they are installed.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch

from hubert_ecg import ops

# Points, features, clusters: MFCC with and without deltas, and hidden states of the base model.
SHAPES = [(1_000_000, 39, 100), (200_000, 13, 100), (100_000, 768, 500)]
GPU_SHAPES = [(10_000_000, 39, 100), (2_000_000, 768, 1000)]
CPU_PEERS = ("scikit-learn", "faiss")
ROUNDS = 3
# A peer's iteration is what this many more of them cost: its preparations do not count.
MORE = 4

Iterations = Callable[[int], object]


def points_of(shape, device="cpu"):
    n, d, k = shape
    random = torch.Generator(device).manual_seed(0)
    x = torch.randn(n, d, generator=random, device=device)
    x /= x.norm(dim=1, keepdim=True)
    return x, x[:k].clone()


def torch_products(x, centroids):
    """What torch offers: scores as a matrix product, some rows at a time."""
    half = centroids.square().sum(1) / 2
    labels = torch.cat([torch.addmm(half, rows, centroids.T, alpha=-1).argmin(1) for rows in x.split(1 << 14)])
    sums = torch.zeros(centroids.shape, dtype=x.dtype, device=x.device).index_add_(0, labels, x)
    return labels, sums, torch.bincount(labels, minlength=len(centroids))


def scikit_learn(x, centroids) -> Iterations:
    from sklearn.cluster import KMeans

    points, start = x.numpy(), centroids.numpy()

    def run(iterations):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it did not converge, and was not to
            model = KMeans(len(start), init=start, n_init=1, max_iter=iterations, tol=0, algorithm="lloyd").fit(points)
        assert model.n_iter_ == iterations
        return model.cluster_centers_

    return run


def faiss(x, centroids) -> Iterations:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    points, start = x.numpy(), centroids.numpy()

    def run(iterations):
        model = faiss.Kmeans(x.shape[1], len(start), niter=iterations, max_points_per_centroid=len(points), seed=1)
        model.train(points, init_centroids=start)
        return model.centroids

    return run


def flash_kmeans(x, centroids) -> Iterations:
    from flash_kmeans import batch_kmeans_Euclid

    def run(iterations):
        found = batch_kmeans_Euclid(
            x[None], len(centroids), iterations, tol=-1.0, init_centroids=centroids[None].clone()
        )
        return found[1][0].cpu().numpy()

    return run


def cuml(x, centroids) -> Iterations:
    from cuml.cluster import KMeans

    def run(iterations):
        model = KMeans(len(centroids), init=centroids.cpu().numpy(), n_init=1, max_iter=iterations, tol=0.0)
        return np.asarray(model.fit(x).cluster_centers_.get())

    return run


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def iteration_of(run: Iterations) -> Callable[[], float]:
    return lambda: (seconds(lambda: run(1 + MORE)) - seconds(lambda: run(1))) / MORE


def race(shape, device, candidates, benchmark, capsys):
    """Checks all answers, then times all in turns; where a round of a peer's is lost in noise, it is left out."""
    x, centroids = points_of(shape, device)
    labels, sums, counts = ops.kmeans_step(x, centroids)
    assert torch.equal(counts, torch.bincount(labels, minlength=len(centroids)))
    distances = torch.cdist(x[:500].double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.equal(labels[:500], distances.argmin(1))
    means = (sums / counts.clamp_min(1)[:, None]).float()
    # Products in float32 miss some of the closest calls.
    missed = int((torch_products(x, centroids)[0] != labels).sum())
    assert missed <= max(4, len(x) // 5000), f"{missed} labels of torch's products differ"
    peers = {"torch": lambda: seconds(lambda: torch_products(x, centroids))}
    for name, (module, make) in candidates.items():
        if importlib.util.find_spec(module):
            run = make(x, centroids)
            close = np.isclose(run(1), means.cpu().numpy(), atol=1e-4)[counts.cpu().numpy() > 0]
            assert close.mean() > 0.99, f"{name} finds other centres"
            peers[name] = iteration_of(run)

    def ours():
        return ops.kmeans_step(x, centroids)

    benchmark.pedantic(ours, rounds=ROUNDS, warmup_rounds=1)
    if benchmark.disabled:
        return
    times: dict[str, list[float]] = {name: [] for name in ("ours", *peers)}
    for _ in range(ROUNDS):
        times["ours"].append(statistics.median(seconds(ours) for _ in range(3)))
        for name, measure in peers.items():
            times[name].append(measure())
    median = {name: statistics.median(found) for name, found in times.items()}
    if both := [name for name in CPU_PEERS if name in median]:
        median["the better of scikit-learn and faiss"] = min(median[name] for name in both)
    ratio = {name: round(value / median["ours"], 2) for name, value in median.items() if name != "ours"}
    benchmark.extra_info.update(unit="points", count=len(x), median_s=median, ratio=ratio)
    with capsys.disabled():
        for name, value in median.items():
            times_as_fast = f"ours is {ratio[name]:.2f} times as fast" if name in ratio else ""
            print(f"\n{shape}: {name:36} {len(x) / value / 1e6:8.2f} M points/s  {times_as_fast}", end="")


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_lloyd_iteration(shape, benchmark, capsys):
    peers = {"scikit-learn": ("sklearn", scikit_learn), "faiss": ("faiss", faiss)}
    race(shape, "cpu", peers, benchmark, capsys)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_lloyd_iteration_on_a_gpu(shape, benchmark, capsys):
    peers = {"flash-kmeans": ("flash_kmeans", flash_kmeans), "cuML": ("cuml", cuml)}
    race(shape, "cuda", peers, benchmark, capsys)
