"""k-means ops beyond what every op is tested for: close calls, order, memory, and words of the kernels themselves."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from hubert_ecg import ops
from hubert_ecg.ops import OPS, use_backend
from hubert_ecg.testing import assert_close, poisoned_memory

native = pytest.mark.skipif("native" not in OPS["kmeans_step"].backends["cpu"], reason="the native module is not built")


def exact_distances(x, centroids):
    return (x[:, None].double() - centroids.double()).square().sum(2)


# Register tiles are 4 to 32 points and 6 or 12 centroids, dimensions come in blocks of 128 to 512, groups are 128; 192
# to 1024 dimensions are rounded to bytes first where the processor multiplies these.
@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [1, 31, 128, 129, 300])
@pytest.mark.parametrize(
    ("k", "d"),
    [(1, 1), (6, 3), (7, 4), (13, 39), (100, 5), (61, 129), (25, 515), (40, 1030), (1, 192), (90, 259), (37, 1024)],
)
def test_labels_at_the_edges_of_tiles(n, k, d, dtype):
    random = torch.Generator().manual_seed(n + k + d)
    x, centroids = torch.randn(n, d, generator=random).to(dtype), torch.randn(k, d, generator=random).to(dtype)
    with poisoned_memory():
        labels = ops.kmeans_assign(x, centroids)
    assert torch.equal(labels, exact_distances(x, centroids).argmin(1))


@native
@pytest.mark.parametrize("k", [1500, 9000])
def test_many_clusters(k):
    random = torch.Generator().manual_seed(k)
    x, centroids = torch.randn(200, 11, generator=random), torch.randn(k, 11, generator=random)
    labels = ops.kmeans_assign(x, centroids)
    assert torch.equal(labels, exact_distances(x, centroids).argmin(1))
    assert torch.equal(ops.kmeans_step(x, centroids)[0], labels)


@native
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-6, 1.0, 1e6, 1e15, 1e18, 1e19, 1e36])
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("d", [3, 40, 600])
def test_close_calls_at_any_scale(scale, offset, d):
    # Points around the borders between pairs of centroids: float32 scores decide hardly any of them.
    random = torch.Generator().manual_seed(d)
    centroids = (torch.randn(12, d, generator=random) + offset) * scale
    pairs = torch.randint(0, 12, (400, 2), generator=random)
    x = centroids[pairs[:, 0]] / 2 + centroids[pairs[:, 1]] / 2
    x = x * (1 + 1e-7 * torch.randn(400, d, generator=random))
    labels, distances = ops.kmeans_assign(x, centroids), exact_distances(x, centroids)
    mine, least = distances.gather(1, labels[:, None])[:, 0], distances.amin(1)
    # Nothing but the rounding of float64 itself may differ.
    assert (mine <= least * (1 + 1e-13)).all()
    assert (labels == distances.argmin(1)).float().mean() > 0.99


@native
def test_equal_centroids_go_to_the_first():
    random = torch.Generator().manual_seed(0)
    few = torch.randn(9, 20, generator=random)
    x = torch.randn(1000, 20, generator=random)
    assert int(ops.kmeans_assign(x, few.repeat(4, 1)).max()) < 9
    assert torch.equal(ops.kmeans_assign(x, few[:1].expand(50, -1)), torch.zeros(1000, dtype=torch.int64))


@native
@pytest.mark.parametrize("clump", [1e-1, 1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize(("k", "d"), [(100, 39), (300, 5), (50, 700)])
def test_centroids_close_together_beside_one_far_away(clump, k, d):
    # Numbers rounded to 16 bits of the longest tell the others apart less and less.
    random = torch.Generator().manual_seed(k)
    centroids, x = clump * torch.randn(k, d, generator=random), clump * torch.randn(700, d, generator=random)
    centroids[k // 2] = 30
    x[::50] = 29
    labels, distances = ops.kmeans_assign(x, centroids), exact_distances(x, centroids)
    least = distances.amin(1)
    assert (distances.gather(1, labels[:, None])[:, 0] <= least * (1 + 1e-13)).all()
    assert (labels == distances.argmin(1)).float().mean() > 0.99


@native
def test_a_few_dimensions_that_are_much_larger_than_the_others():
    # Hidden states of a transformer are like that: rounded to the largest, little is left of the others.
    random = torch.Generator().manual_seed(0)
    scale = torch.exp(3 * torch.randn(300, generator=random))
    x, centroids = torch.randn(900, 300, generator=random) * scale, torch.randn(70, 300, generator=random) * scale
    x[:200] = centroids[:1] + 0.01 * torch.randn(200, 300, generator=random)
    assert torch.equal(ops.kmeans_assign(x, centroids), exact_distances(x, centroids).argmin(1))


@native
def test_equal_rows_that_are_about_as_near_to_all():
    random = torch.Generator().manual_seed(0)
    centroids = torch.nn.functional.normalize(torch.randn(100, 39, generator=random))
    x = torch.randn(1000, 39, generator=random)
    x[100:400], x[500::3], x[501::3] = 0, -0.0, 1e-9 * x[0]
    x[600:620, 0] = torch.nan
    labels = ops.kmeans_assign(x, centroids)
    expected = exact_distances(x, centroids).nan_to_num(nan=torch.inf).argmin(1)
    assert torch.equal(labels, expected)


@native
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("d", [5, 300])
def test_a_bad_point_or_centroid_spoils_no_other(bad, d):
    random = torch.Generator().manual_seed(0)
    x, centroids = torch.randn(300, d, generator=random), torch.randn(20, d, generator=random)
    clean = ops.kmeans_assign(x, centroids)
    spoiled = x.clone()
    spoiled[::7, 2] = bad
    labels = ops.kmeans_assign(spoiled, centroids)
    rest = torch.arange(300) % 7 != 0
    assert torch.equal(labels[rest], clean[rest])
    assert (labels[::7] == 0).all()
    centroids = torch.cat([centroids, torch.full((1, d), bad)])
    assert torch.equal(ops.kmeans_assign(x, centroids), clean)


@native
@pytest.mark.parametrize(
    ("n", "k", "d"), [(5000, 7, 3), (20_000, 100, 39), (700, 300, 400), (100, 300, 400), (5000, 300, 400)]
)
def test_a_step_is_its_parts_and_the_same_bits_every_time(n, k, d):
    random = torch.Generator().manual_seed(0)
    x, centroids = torch.randn(n, d, generator=random), torch.randn(k, d, generator=random)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(ops.kmeans_step(x, centroids, with_inertia=True))
            assert torch.equal(ops.kmeans_assign(x, centroids), results[0][0])
            sums, counts = ops.kmeans_accumulate(x, results[0][0], k)
            assert torch.equal(sums, results[0][1])
            assert torch.equal(counts, results[0][2])
    finally:
        torch.set_num_threads(before)
    for mine, asked in zip(ops.kmeans_step(x, centroids), results[0][:3], strict=True):
        assert torch.equal(mine, asked)
    for result in results[1:]:
        for mine, first in zip(result, results[0], strict=True):
            assert torch.equal(mine, first)
    with use_backend("composed"):
        assert_close(ops.kmeans_step(x, centroids, True), results[0], rtol=1e-12, atol=0, name="kmeans_step")


@native
def test_sums_keep_what_float32_would_lose():
    # 1 + 2^-24 is 1 in float32, and 2^24 + 1 is 2^24.
    x = torch.full((1 << 18, 1), 1.0)
    x[::2] = 2.0**-24
    sums, counts = ops.kmeans_accumulate(x, torch.zeros(len(x), dtype=torch.int64), 2)
    assert sums[:, 0].tolist() == [(1 + 2.0**-24) * (1 << 17), 0.0]
    assert counts.tolist() == [1 << 18, 0]


MEMORY = """
import sys, torch
from hubert_ecg import ops
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
n, d, k = map(int, sys.argv[1:])
torch.set_num_threads(2)
x = torch.rand(n, d)
centroids = x[:k].clone()
ops.kmeans_step(x[:k], centroids)
before = peak()
ops.kmeans_step(x, centroids)
print(peak() - before)
"""


@native
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("shape", [(1_000_000, 39, 100), (200_000, 13, 100), (30_000, 768, 500)])
def test_an_iteration_takes_less_than_64_mb(shape):
    command = [sys.executable, "-c", MEMORY, *map(str, shape)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 56


@native
def test_the_kernels_refuse_what_the_layer_above_did_not_see():
    from torch.utils.dlpack import to_dlpack

    from hubert_ecg import _C

    x, labels, counts = torch.zeros(8, 3), torch.zeros(8, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    sums, inertia = torch.zeros(2, 3, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    good = [x, x[:2], labels, sums, counts, inertia, sums[None], counts[None]]
    bad = {
        0: (x.double()[:, ::2], r"x must be a contiguous float32 or float64 \[N, D\], got float64\[8, 2\] \(not cont"),
        1: (x[:2, :2].contiguous(), r"centroids must be .* got float32\[2, 2\]"),
        2: (labels[:5], r"labels must be .*int64 \[8\], got int64\[5\]"),
        3: (sums.float(), r"sums must be float64 \[K, 3\], got float32\[2, 3\]"),
        4: (counts[:1], r"counts must be int64 \[2\], got int64\[1\]"),
        5: (inertia.float(), r"inertia must be float64 \[\], got float32\[\]"),
        6: (sums, r"partial_sums must be float64 \[P, 2, 3\], got float64\[2, 3\]"),
        7: (counts, r"partial_counts must be int64 \[1, 2\], got int64\[2\]"),
    }
    for place, (wrong, words) in bad.items():
        given = [*good]
        given[place] = wrong
        with pytest.raises(ValueError, match=rf"^kmeans_step: {words}"):
            _C.kmeans_step_cpu(*map(to_dlpack, given), True)
    with pytest.raises(ValueError, match=r"^kmeans_step: sums must be float64 \[3, 3\], got float64\[2, 3\]"):
        _C.kmeans_step_cpu(*map(to_dlpack, [good[0], x[:3], *good[2:]]), True)


@pytest.mark.parametrize("op", [ops.kmeans_assign, ops.kmeans_step])
def test_memory_maps_and_numpy_arrays(op, tmp_path):
    random = np.random.default_rng(0)
    stored = np.memmap(tmp_path / "points", dtype=np.float32, mode="w+", shape=(500, 7))
    stored[:] = random.standard_normal((500, 7))
    stored.flush()
    x = np.memmap(tmp_path / "points", dtype=np.float32, mode="r", shape=(500, 7))
    found, expected = op(x, x[:9]), op(torch.tensor(np.array(x)), torch.tensor(np.array(x[:9])))
    for mine, want in zip(*((r if isinstance(r, tuple) else (r,)) for r in (found, expected)), strict=True):
        np.testing.assert_array_equal(mine, want.numpy())
