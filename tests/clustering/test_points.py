"""Points of any kind, in memory and not."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
import torch

from hubert_ecg import KMeans
from hubert_ecg.clustering import points

from .toy import blobs


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("batch_size", [None, 50])
def test_the_points_given_stay_as_they_are(dtype, batch_size):
    x = blobs(200, dtype=dtype)
    before = x.copy()
    model = KMeans(5, batch_size=batch_size, max_iter=3, random_state=0).fit(x).partial_fit(x)
    model.predict(x), model.score(x), model.transform(x), model.normalized(x)
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize(
    "kind", ["numpy", "torch", "list", "float16", "read-only", "strided", "int", "big-endian", "long double"]
)
def test_any_kind_of_points(kind):
    x = np.round(blobs(200, 4, 3) * 8)
    give = {
        "numpy": lambda: x,
        "torch": lambda: torch.from_numpy(x),
        "list": lambda: x.tolist(),
        "float16": lambda: x.astype(np.float16),
        "read-only": lambda: np.lib.stride_tricks.as_strided(x, writeable=False),
        "strided": lambda: np.repeat(x, 2, axis=1)[:, ::2],
        "int": lambda: x.astype(np.int32),
        "big-endian": lambda: x.astype(">f4"),
        "long double": lambda: x.astype(np.longdouble),
    }[kind]()
    model = KMeans(3, init=x[:3], normalize=False).fit(give)
    want = KMeans(3, init=x[:3], normalize=False).fit(x)
    np.testing.assert_allclose(model.cluster_centers_, want.cluster_centers_, rtol=1e-6)
    predicted = model.predict(give)
    assert isinstance(predicted, torch.Tensor if kind == "torch" else np.ndarray)
    np.testing.assert_array_equal(predicted, want.labels_)
    np.testing.assert_array_equal(KMeans(3, init=x[:3], normalize=False).fit_predict(give), want.labels_)


class Source:
    """A source of blocks that ignores the size it is asked for."""

    def __init__(self, x, rows=77, take=False):
        self.x, self.rows, self.passes, self.shape, self.dtype = x, rows, 0, x.shape, x.dtype
        if take:
            self.take = lambda indices: x[indices]

    def blocks(self, rows):
        self.passes += 1
        return (self.x[first : first + self.rows] for first in range(0, len(self.x), self.rows))


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setitem(points._BLOCK, "cpu", 1000)
    monkeypatch.setitem(points._CHUNK, "cpu", 300)


def not_in_memory(kind, x, tmp_path):
    mapped = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", x.dtype, x.shape)
    mapped[:] = x
    mapped.flush()
    if kind.startswith("source"):
        return Source(x, take=kind == "source with take")
    return {
        "memory map": lambda: np.load(tmp_path / "x.npy", mmap_mode="r"),
        "writable map": lambda: mapped,
        "private map": lambda: np.load(tmp_path / "x.npy", mmap_mode="c"),
        "view of a map": lambda: np.asarray(np.load(tmp_path / "x.npy", mmap_mode="r"))[:, :],
    }[kind]()


MAPS = ["memory map", "writable map", "private map", "view of a map"]
SOURCES = ["source", "source with take"]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", [*MAPS, *SOURCES])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (np.float32, {"init": "k-means||"}),
        (np.float64, {"init": "random", "n_init": 2}),
        (np.float16, {}),
        (">f4", {"normalize": False}),
    ],
)
def test_what_is_not_in_memory_gives_the_same_bits(kind, dtype, options, tmp_path):
    x = blobs(1500, 7, 9).astype(dtype)
    weight = np.random.default_rng(0).integers(0, 3, size=len(x))
    streamed, model = KMeans(9, random_state=0, **options), KMeans(9, random_state=0, **options)
    for given in (None, weight):
        streamed.fit(not_in_memory(kind, x, tmp_path), sample_weight=given)
        model.fit(x, sample_weight=given)
        assert "labels_" not in vars(streamed)
        np.testing.assert_array_equal(streamed.cluster_centers_, model.cluster_centers_)
        np.testing.assert_array_equal(streamed.labels_, model.labels_)
        np.testing.assert_array_equal(streamed.cluster_sizes_, model.cluster_sizes_)
        assert (streamed.inertia_, streamed.n_iter_) == (model.inertia_, model.n_iter_)
    again = not_in_memory(kind, x, tmp_path)
    np.testing.assert_array_equal(streamed.predict(again), model.labels_)
    np.testing.assert_array_equal(streamed.transform(again), model.transform(x))
    np.testing.assert_array_equal(streamed.normalized(again), model.normalized(x))
    assert streamed.score(again, sample_weight=weight) == model.score(x, sample_weight=weight)
    np.testing.assert_array_equal(
        KMeans(9, random_state=0, **options).fit_predict(again, sample_weight=weight), model.labels_
    )


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", [*MAPS, "source with take"])
def test_mini_batches_of_what_is_not_in_memory_give_the_same_bits(kind, tmp_path):
    x = blobs(1500, 7, 9)
    options = {"batch_size": 400, "max_iter": 3, "random_state": 0}
    streamed = KMeans(9, **options).fit(not_in_memory(kind, x, tmp_path))
    np.testing.assert_array_equal(streamed.cluster_centers_, KMeans(9, **options).fit(x).cluster_centers_)


def test_mini_batches_of_a_source_in_order_come_in_its_order():
    x = blobs(1500, 7, 9)
    model = KMeans(9, init=x[:9], batch_size=400, max_iter=1, tol=0, normalize=False).fit(Source(x))
    other = KMeans(9, init=x[:9], normalize=False)
    for first in range(0, 1500, 400):
        # The first call takes its centres from init too.
        other.partial_fit(x[first : first + 400])
    np.testing.assert_array_equal(model.cluster_centers_, other.cluster_centers_)


@pytest.mark.usefixtures("small_blocks")
def test_a_private_map_keeps_its_changes(tmp_path):
    x = blobs(500, 7)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="c")
    mapped *= 2
    KMeans(3, random_state=0).fit(mapped)
    np.testing.assert_array_equal(mapped, 2 * x)
    written = np.load(tmp_path / "x.npy", mmap_mode="r+")
    written[0] = 7
    KMeans(3, random_state=0).fit(written)
    np.testing.assert_array_equal(written[0], 7)
    del written
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy")[0], 7)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", ["array", "memory map", "source"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_first_bad_row_is_named_wherever_it_is(kind, value, tmp_path):
    x = blobs(1000, 7)
    x[[777, 900], 3] = value
    given = x if kind == "array" else not_in_memory(kind, x, tmp_path)
    for call in (KMeans(3).fit, KMeans(3).fit(blobs(50, 7)).predict):
        with pytest.raises(
            ValueError, match="x must be finite, got NaN or infinity in row 777; drop or fill such rows"
        ):
            call(given)


def test_finite_numbers_whose_sum_is_not_are_taken():
    x = np.repeat([[1.7e308, 1.0], [1.0, 1.7e308]], 5, axis=0)
    centers = KMeans(2, random_state=0).fit(x).cluster_centers_
    np.testing.assert_allclose(centers[centers[:, 0].argsort()], [[0, 1], [1, 0]], atol=1e-9)
    half = np.full((9, 2), 60000, np.float16)
    assert KMeans(1).fit(half).inertia_ == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shape": (99, 7)}, "fit: x must give the 99 rows of its shape on every pass, got 100 from blocks"),
        ({"shape": (100, 8)}, r"fit: x must give blocks \[rows, 8\], got shape \[77, 7\]"),
        ({"shape": (100,)}, r"fit: x must be \[N, D\] with D > 0, got shape \[100\]"),
        ({"dtype": np.complex64}, "fit: x must hold numbers, got dtype complex64"),
    ],
)
def test_sources_that_do_not_keep_their_word(change, said):
    source = Source(blobs(100, 7))
    vars(source).update(change)
    with pytest.raises(ValueError, match=said):
        KMeans(3, random_state=0).fit(source)


def test_an_error_while_reading_ahead_is_raised_and_no_thread_is_left():
    class Broken(Source):
        def blocks(self, rows):
            yield self.x[:50]
            raise OSError("the disk is gone")

    threads = threading.active_count()
    with pytest.raises(OSError, match="the disk is gone"):
        KMeans(3, random_state=0).fit(Broken(blobs(100, 7)))
    iterator = points.ahead(iter(range(10)))
    assert [next(iterator), next(iterator)] == [0, 1]
    iterator.close()
    assert threading.active_count() == threads


def test_labels_of_a_stream_are_found_when_asked_for_and_do_not_travel():
    x = blobs(300, 7)
    source = Source(x)
    model = KMeans(3, random_state=0).fit(source)
    passes = source.passes
    copied = pickle.loads(pickle.dumps(copy.copy(KMeans(3, random_state=0).fit(x))))
    np.testing.assert_array_equal(model.labels_, copied.labels_)
    assert model.labels_ is model.labels_
    assert source.passes == passes + 1
    assert "_fitted_points" not in model.__getstate__()
    with pytest.raises(AttributeError, match="no attribute 'labels_'; call fit first"):
        _ = KMeans().labels_
    with pytest.raises(AttributeError, match="no attribute 'labels_'; a copy or a file does not keep it"):
        _ = copy.deepcopy(model.__class__.from_state(model.state())).labels_


def test_labels_are_those_of_the_fit_whatever_is_changed_after():
    x = np.random.default_rng(0).standard_normal((500, 3)) * [[1.0, 5.0, 0.2]]
    expected = KMeans(7, random_state=0).fit(x).labels_
    model = KMeans(7, random_state=0).fit(Source(x)).set_params(normalize=False)
    np.testing.assert_array_equal(model.labels_, expected)


def test_a_source_may_fill_one_buffer_again_and_again():
    x = np.random.default_rng(0).standard_normal((1003, 5)).astype(np.float32)

    class Reused:
        shape, dtype = x.shape, x.dtype

        def blocks(self, rows):
            buffer = np.empty((100, 5), np.float32)
            for first in range(0, len(x), 100):
                part = buffer[: len(x[first : first + 100])]
                part[:] = x[first : first + 100]
                yield part

    expected = KMeans(6, random_state=0, init=x[:6]).fit(x)
    model = KMeans(6, random_state=0, init=x[:6]).fit(Reused())
    assert model.inertia_ == expected.inertia_
    np.testing.assert_array_equal(model.cluster_centers_, expected.cluster_centers_)


@pytest.mark.parametrize("weight", [1e36, 1e-290])
def test_weights_of_any_size(weight):
    x = np.random.default_rng(0).standard_normal((300, 4))
    expected = KMeans(5, random_state=0, init=x[:5]).fit(x)
    model = KMeans(5, random_state=0, init=x[:5]).fit(x, sample_weight=np.full(300, weight))
    np.testing.assert_allclose(model.cluster_centers_, expected.cluster_centers_, rtol=1e-12)


def test_arrays_through_dlpack(monkeypatch):
    """A stand-in for CuPy: an array of another module, known by ``__dlpack__`` alone."""
    module = types.ModuleType("elsewhere")

    class Array:
        def __init__(self, tensor):
            self.tensor = tensor

        def __dlpack__(self, **options):
            return self.tensor.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.tensor.__dlpack_device__()

    Array.__module__ = "elsewhere"
    module.from_dlpack = lambda capsule: Array(torch.from_dlpack(capsule))
    monkeypatch.setitem(sys.modules, "elsewhere", module)
    x = torch.from_numpy(blobs(300, 7))
    model = KMeans(5, random_state=0, normalize=False)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        given, weight = Array(x.to(dtype)), Array(torch.ones(300))
        labels = model.fit_predict(given, sample_weight=weight)
        assert isinstance(labels, Array)
        np.testing.assert_array_equal(labels.tensor, KMeans(**model.get_params()).fit(x.to(dtype)).labels_)
        np.testing.assert_array_equal(model.predict(given).tensor, labels.tensor)
        wanted = torch.float64 if dtype == torch.float64 else torch.float32
        for found in (model.transform(given), model.normalized(given)):
            assert isinstance(found, Array)
            assert found.tensor.dtype == wanted
    # A module that gives arrays and takes none.
    del module.from_dlpack
    assert torch.equal(model.predict(Array(x)), torch.from_numpy(model.predict(x.numpy())))
    kept = points.Points("fit", Array(x), normalize=False)
    assert kept.take(np.arange(3)).x.shape == (3, 7)
    assert next(kept.blocks()).x.data_ptr() == x.data_ptr()
    init = KMeans(5, init=Array(x[:5].clone()), normalize=False).fit(x)
    np.testing.assert_array_equal(KMeans.from_state(init.state()).init, x[:5])


def test_rows_too_many_to_keep_are_prepared_on_every_pass(monkeypatch):
    x = blobs(500, 7).astype(np.float16)
    kept = KMeans(5, random_state=0).fit(x)
    monkeypatch.setattr(points, "_KEPT_BYTES", 0)
    again = KMeans(5, random_state=0, batch_size=None).fit(x)
    np.testing.assert_array_equal(kept.cluster_centers_, again.cluster_centers_)
    np.testing.assert_array_equal(kept.labels_, again.labels_)


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (np.full(20, -1.0), "got -1.0 in row 0"),
        (np.r_[np.ones(7), np.nan, np.ones(12)], "got nan in row 7"),
        (np.r_[np.ones(7), np.inf, np.ones(12)], "got inf in row 7"),
        (np.ones(19), r"\[20\], got shape \[19\]"),
        (np.ones((20, 1)), r"got shape \[20, 1\]"),
        (np.zeros(20), "above 0 somewhere, and finite added up, got a sum of 0.0"),
        (np.full(20, 1e308), "finite added up, got a sum of inf"),
    ],
)
def test_wrong_weights(weight, said):
    with pytest.raises(ValueError, match=f"KMeans.fit: sample_weight must be .*{said}"):
        KMeans(2).fit(blobs(20, 3, 2), sample_weight=weight)


MEMORY = """
import sys
import numpy as np
from hubert_ecg import KMeans
from hubert_ecg.clustering import points, starts

points._BLOCK["cpu"] = points._CHUNK["cpu"] = 1 << 16
starts._DRAWN = 1 << 14

def most():
    # Of this process alone: what getrusage says starts from the size of the process that made it.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) >> 10

x = np.memmap(sys.argv[1], np.float32, "r").reshape(-1, 16)
for options in ({}, {"init": "k-means||"}, {"init": "random", "batch_size": 5000}):
    for rows in (len(x) // 10, len(x)):
        KMeans(8, max_iter=2, random_state=0, **options).fit(x[:rows]).score(x[:rows])
        print(most(), end=" ")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_ten_times_the_points_take_no_more_memory(tmp_path):
    with (tmp_path / "x").open("wb") as file:
        for seed in range(10):
            file.write(np.random.default_rng(seed).normal(size=(100_000, 16)).astype(np.float32).tobytes())
    command, environment = [sys.executable, "-c", MEMORY, tmp_path / "x"], {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    peaks = list(map(int, run.stdout.split()))
    # The 900,000 points more take 55 MiB; pages that are read around a row, and freed blocks, come to up to 10.
    assert max(peaks[1] - peaks[0], peaks[3] - peaks[2], peaks[5] - peaks[4]) < 20, peaks
