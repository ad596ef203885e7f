"""Crops out of shards: the native function against the one in NumPy, and records that lie nowhere."""

from __future__ import annotations

import concurrent.futures
import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hubert_ecg import native
from hubert_ecg.config import UserError
from hubert_ecg.data import Store
from hubert_ecg.data.gather import gather_reference, open_shards

NUM_LEADS = 12
BACKENDS = ["native", "reference"]


def shards_of(folder, dtype, sizes=(7, 0, 1000, 333)):
    """Shards of these many samples per lead, of every value that the dtype has."""
    rng = np.random.default_rng(0)
    shards = [rng.integers(-(2**15), 2**15, NUM_LEADS * size).astype(np.int16).view(dtype) for size in sizes]
    # No NaN, which is unlike itself, and no infinity.
    shards = [np.where(np.isfinite(shard), shard, 1).astype(dtype) for shard in shards]
    paths = [folder / f"{i}.bin" for i in range(len(sizes))]
    for path, shard in zip(paths, shards, strict=True):
        shard.tofile(path)
    return paths, shards


def crops(num, shards, seed=0):
    """Places of records anywhere in the shards, with a start in each, and their scales."""
    rng = np.random.default_rng(seed)
    room = np.array([len(shard) // NUM_LEADS for shard in shards])
    shard = rng.choice(np.flatnonzero(room), num)
    length = 1 + (rng.random(num) * room[shard]).astype(np.int64)
    offset = (rng.random(num) * (NUM_LEADS * (room[shard] - length) + 1)).astype(np.int64)
    start = (rng.random(num) * length).astype(np.int64)
    scale = rng.standard_normal((num, NUM_LEADS)).astype(np.float32)
    return shard, offset, length, start, scale


def poisoned(num, num_samples):
    return np.full((num, NUM_LEADS, num_samples), np.nan, dtype=np.float32)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("dtype", [np.int16, np.float16])
def test_agrees_with_the_reference_bit_for_bit(tmp_path, dtype, num_threads):
    paths, shards = shards_of(tmp_path, dtype)
    gather = open_shards(paths, [len(shard) for shard in shards], np.dtype(dtype))
    assert native._C is not None
    for num, num_samples in [(0, 5), (1, 1), (50, 1), (50, 100), (33, 501), (9, 2000)]:
        places, found, expected = crops(num, shards, num), poisoned(num, num_samples), poisoned(num, num_samples)
        gather(*places, found, num_threads)
        gather_reference(shards, *places, expected)
        np.testing.assert_array_equal(found, expected)


def test_zero_after_the_end_and_the_scale_of_the_lead(tmp_path):
    samples = np.arange(1, 2 * NUM_LEADS * 3 + 1, dtype=np.int16)
    samples.tofile(tmp_path / "0.bin")
    gather = open_shards([tmp_path / "0.bin"], [len(samples)], np.dtype(np.int16))
    out = poisoned(2, 4)
    scale = np.arange(2 * NUM_LEADS, dtype=np.float32).reshape(2, NUM_LEADS)
    gather(np.array([0, 0]), np.array([0, 36]), np.array([3, 3]), np.array([0, 2]), scale, out, 1)
    leads = samples.reshape(2, NUM_LEADS, 3)
    np.testing.assert_array_equal(out[0, :, :3], leads[0] * scale[0, :, None])
    np.testing.assert_array_equal(out[1, :, 0], leads[1, :, 2] * scale[1])
    assert not out[0, :, 3:].any()
    assert not out[1, :, 1:].any()


HUGE = 2**63 - 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"shard": 4}, "record 1 must lie within its shard, got shard 4 of 4"),
        ({"shard": -1}, "got shard -1 of 4"),
        ({"shard": HUGE}, "must lie within its shard"),
        # An empty shard.
        ({"shard": 1}, "must lie within its shard"),
        ({"offset": -1}, "offset -1 and length 3"),
        ({"offset": 12 * 4 + 1}, "offset 49 and length 3"),
        ({"offset": HUGE}, "must lie within its shard"),
        ({"length": 8}, "offset 0 and length 8"),
        ({"length": -1}, "offset 0 and length -1"),
        # Twelve leads of it overflow.
        ({"length": 2**62}, "must lie within its shard"),
        ({"length": HUGE}, "must lie within its shard"),
        ({"start": 4}, "start of record 1 must be 0 to 3, got 4"),
        ({"start": -1}, "start of record 1 must be 0 to 3, got -1"),
    ],
)
def test_a_record_that_lies_nowhere_is_refused_before_anything_is_read(tmp_path, backend, place, message):
    paths, shards = shards_of(tmp_path, np.int16)
    gather = functools.partial(gather_reference, shards)
    if backend == "native":
        gather = open_shards(paths, [len(shard) for shard in shards], np.dtype(np.int16))
    good = {"shard": 0, "offset": 0, "length": 3, "start": 0}
    columns = [np.array([good[name], {**good, **place}[name]]) for name in good]
    out = poisoned(2, 5)
    with pytest.raises(ValueError, match=message):
        gather(*columns, np.ones((2, NUM_LEADS), np.float32), out, 1)
    assert np.isnan(out).all()


def test_the_wrong_kind_of_array_is_refused(tmp_path):
    paths, shards = shards_of(tmp_path, np.int16)
    gather = open_shards(paths, [len(shard) for shard in shards], np.dtype(np.int16))
    shard, offset, length, start, scale = crops(4, shards)
    for args, message in [
        ((shard, offset, length, start, scale, poisoned(3, 5)), r"scale must be contiguous float32 \[3, 12\]"),
        ((shard, offset, length, start, scale[:, :11], poisoned(4, 5)), "scale must be"),
        (
            (shard.astype(np.int32), offset, length, start, scale, poisoned(4, 5)),
            r"shard must be contiguous int64 \[4\]",
        ),
        ((shard, offset[:3], length, start, scale, poisoned(4, 5)), "offset must be"),
        ((shard, offset, length, start, scale, poisoned(4, 10)[:, :, ::2]), "out must be contiguous float32"),
        ((shard, offset, length, start, scale, poisoned(4, 5).astype(np.float64)), "out must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            gather(*args, 1)


def test_a_shard_of_another_size_is_not_mapped(tmp_path):
    paths, _ = shards_of(tmp_path, np.int16)
    with pytest.raises(ValueError, match=r"0\.bin must have 166 bytes, got 168"):
        open_shards(paths[:1], [83], np.dtype(np.int16))
    with pytest.raises(RuntimeError, match=r"gone\.bin"):
        open_shards([tmp_path / "gone.bin"], [1], np.dtype(np.int16))


def test_a_store_whose_index_is_wrong_is_damaged(store):
    other = Store(store.path)
    other._offset = other._offset + 10**6
    with pytest.raises(UserError, match=r"is damaged: gather: record 0 must lie within its shard"):
        other.gather(np.array([0]), None, 10)


def test_a_store_without_native_code_gathers_the_same(store, published, monkeypatch):
    indices, starts = np.array([5, 0, 3, 3]), np.array([100, 0, 7, 999])
    for each in (store, published):
        expected, lengths = each.gather(indices, starts, 300)
        with monkeypatch.context() as without:
            without.setattr(native, "_C", None)
            found, valid = Store(each.path).gather(indices, starts, 300)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(valid, lengths)


def test_threads_gather_side_by_side(tmp_path):
    paths, shards = shards_of(tmp_path, np.int16)
    gather = open_shards(paths, [len(shard) for shard in shards], np.dtype(np.int16))

    def right(seed):
        places, found, expected = crops(64, shards, seed), poisoned(64, 200), poisoned(64, 200)
        gather(*places, found, 2)
        gather_reference(shards, *places, expected)
        return np.array_equal(found, expected)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(right, range(40)))


MANY = """
import resource, sys
from pathlib import Path
import numpy as np
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from hubert_ecg.data.gather import open_shards
folder = Path(sys.argv[1])
paths = [folder / f"{i}.bin" for i in range(300)]
gather = open_shards(paths, [24] * 300, np.dtype(np.int16))
out = np.zeros((300, 12, 2), np.float32)
zeros, ones = np.zeros(300, np.int64), np.ones((300, 12), np.float32)
gather(np.arange(300), zeros, zeros + 2, zeros, ones, out, 1)
assert (out == np.arange(300)[:, None, None]).all()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of open files")
def test_a_store_may_have_more_shards_than_a_process_open_files(tmp_path):
    for i in range(300):
        np.full(24, i, dtype=np.int16).tofile(tmp_path / f"{i}.bin")
    subprocess.run([sys.executable, "-c", MANY, tmp_path], check=True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_was_read_of_large_shards_is_given_back_to_the_system(tmp_path):
    # 30 files of 25 MB, more than stays mapped; holes in them take no room on the disk.
    size, num_shards = 2**20, 30
    paths = [tmp_path / f"{i}.bin" for i in range(num_shards)]
    for path in paths:
        path.touch()
        os.truncate(path, 2 * NUM_LEADS * size)
    gather = open_shards(paths, [NUM_LEADS * size] * num_shards, np.dtype(np.int16))
    out, scale = np.zeros((1, NUM_LEADS, size), np.float32), np.ones((1, NUM_LEADS), np.float32)

    def resident():
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("RssFile:")[1].split()[0])

    before, most = resident(), 0
    for shard in range(num_shards):
        gather(np.array([shard]), np.array([0]), np.array([size]), np.array([0]), scale, out, 1)
        most = max(most, resident())
    # All of it was read, and most of it at a time was mapped, but not all.
    assert 2**28 < most - before < 2**29 + 2**26


AGREE = """
import sys
from pathlib import Path
import numpy as np
from hubert_ecg.data.gather import gather_reference, open_shards
path = Path(sys.argv[1])
for dtype in (np.int16, np.float16):
    samples = np.fromfile(path, dtype)
    gather = open_shards([path], [len(samples)], np.dtype(dtype))
    out, expected = np.zeros((1, 12, 77), np.float32), np.zeros((1, 12, 77), np.float32)
    places = [np.array([value]) for value in (0, 5, len(samples) // 12 - 1, 3)]
    scale = np.random.default_rng(0).standard_normal((1, 12)).astype(np.float32)
    gather(*places, scale, out, 1)
    gather_reference([samples], *places, scale, expected)
    np.testing.assert_array_equal(out, expected)
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_agrees_on_older_processors(tmp_path, isa):
    np.arange(-(2**15), 2**15, 7, dtype=np.int16).tofile(tmp_path / "0.bin")
    environment = {**os.environ, "HUBERT_ECG_ISA": isa}
    subprocess.run([sys.executable, "-c", AGREE, tmp_path / "0.bin"], env=environment, check=True)
