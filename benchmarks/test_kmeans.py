"""One Lloyd iteration (labels, sums, counts): ours, scikit-learn's, faiss's and torch's products, on the same points.

``pytest benchmarks/test_kmeans.py`` first checks the answers, then times them in turns and prints millions of points a
second and how many times as fast ours is. With ``--device cuda``, flash-kmeans and cuML take part where they are
installed.
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

from .ceilings import finished, floor_s

# Points, features, clusters: MFCC with and without deltas, and hidden states of the base model.
SHAPES = {
    "cpu": [(1_000_000, 39, 100), (200_000, 13, 100), (100_000, 768, 500)],
    "cuda": [(10_000_000, 39, 100), (20_000_000, 13, 100), (2_000_000, 768, 1000)],
}
ROUNDS = 3
# Labels of these are compared with distances in float64.
NUM_CHECKED = 5000
# A peer's iteration is what this many more of them cost: its preparations do not count.
MORE = 4

Iterations = Callable[[int], object]


def points_of(shape, device):
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


def seconds(run: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    finished(run, device)()
    return time.perf_counter() - start


def pytest_generate_tests(metafunc):
    shapes = SHAPES[metafunc.config.getoption("device")]
    metafunc.parametrize("shape", shapes, ids=["x".join(map(str, shape)) for shape in shapes])


@pytest.mark.benchmark(group="kmeans")
def test_lloyd_iteration(shape, device, checked, benchmark, capsys):
    """All answers are checked, then all are timed in turns."""
    x, centroids = points_of(shape, device)
    labels, sums, counts = ops.kmeans_step(x, centroids)
    assert torch.equal(counts, torch.bincount(labels, minlength=len(centroids)))
    for rows, found in zip(x[:NUM_CHECKED].split(500), labels[:NUM_CHECKED].split(500), strict=True):
        distances = torch.cdist(rows.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist")
        assert torch.equal(found, distances.argmin(1))
    means = (sums / counts.clamp_min(1)[:, None]).float()
    # Products in float32 miss some of the closest calls.
    missed = int((torch_products(x, centroids)[0] != labels).sum())
    assert missed <= max(4, len(x) // 5000), f"{missed} labels of torch's products differ"
    peers = {"torch": lambda: seconds(lambda: torch_products(x, centroids), device)}
    makers = {name: make for name, (module, make) in PEERS[device.type].items() if importlib.util.find_spec(module)}

    def check(name, found):
        close = np.isclose(found, means.cpu().numpy(), atol=1e-4)[counts.cpu().numpy() > 0]
        assert close.mean() > 0.99, f"{name} finds other centres"

    one = {name: lambda make=make: make(x, centroids)(1) for name, make in makers.items()}
    absent = {name: run for name, run in checked(one, check).items() if isinstance(run, str)}
    for name, make in makers.items():
        if name not in absent:
            peers[name] = iteration_of(make(x, centroids), device)

    def ours():
        return ops.kmeans_step(x, centroids)

    benchmark.pedantic(finished(ours, device), rounds=ROUNDS, warmup_rounds=1)
    if benchmark.disabled:
        return
    times: dict[str, list[float]] = {name: [] for name in ("ours", *peers)}
    shares = []
    for _ in range(ROUNDS):
        times["ours"].append(statistics.median(seconds(ours, device) for _ in range(3)))
        floor = floor_s(device, x.nbytes, 2 * x.numel() * len(centroids), torch.float32)
        shares.append(floor / times["ours"][-1])
        for name, measure in peers.items():
            times[name].append(measure())
    median = {name: statistics.median(found) for name, found in times.items()}
    if both := [name for name in PEERS["cpu"] if name in median]:
        median["the better of scikit-learn and faiss"] = min(median[name] for name in both)
    ratio = {name: round(value / median["ours"], 2) for name, value in median.items() if name != "ours"}
    share = statistics.median(shares)
    benchmark.extra_info.update(
        unit="points", count=len(x), median_s=median, ratio=ratio, share_of_floor=round(share, 3)
    )
    with capsys.disabled():
        print(f"\n{shape}: of the time of ours, {100 * share:.0f} % is its floor in float32", end="")
        for name, value in median.items():
            times_as_fast = f"ours is {ratio[name]:.2f} times as fast" if name in ratio else ""
            print(f"\n{shape}: {name:36} {len(x) / value / 1e6:8.2f} M points/s  {times_as_fast}", end="")
        for name, reason in absent.items():
            print(f"\n{shape}: {name:36} {reason}", end="")


def iteration_of(run: Iterations, device: torch.device) -> Callable[[], float]:
    return lambda: (seconds(lambda: run(1 + MORE), device) - seconds(lambda: run(1), device)) / MORE


PEERS = {
    "cpu": {"scikit-learn": ("sklearn", scikit_learn), "faiss": ("faiss", faiss)},
    "cuda": {"flash-kmeans": ("flash_kmeans", flash_kmeans), "cuML": ("cuml", cuml)},
}
