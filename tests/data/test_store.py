from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from hubert_ecg.config import PrepareConfig, UserError
from hubert_ecg.data import Store, build, open_dataset, open_store, prepare
from hubert_ecg.data.packing import Settings
from hubert_ecg.signal import LEADS, prepare_ecg_for_inference


def expected(dataset, position, **options):
    entry = dataset.entries()[position]
    leads, _ = dataset.read(entry).standard_leads()
    return prepare_ecg_for_inference(leads, dataset.rate_hz, None, **options)


def content(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.mark.parametrize("dtype", ["int16", "float16"])
@pytest.mark.parametrize("compat", ["corrected", "published"])
def test_records_are_those_of_the_preprocessing(tmp_path, beats, dtype, compat):
    dataset = beats()
    store = build.build(dataset, tmp_path / "s", Settings(compat=compat, signal_dtype=dtype))
    factor = 1 if compat == "published" else 5
    assert (store.sampling_rate_hz, store.stored_rate_hz) == (100, 500 / factor)
    assert len(store) == len(dataset.lengths)
    for position, record in enumerate(store):
        signal = expected(dataset, position, downsampling_factor=factor, compat=compat)
        # Half a step of 16 bits at full scale; half precision has 11 bits.
        np.testing.assert_allclose(record.signal, signal, atol=2e-5 if dtype == "int16" else 5e-4)
        assert (record.record_id, record.source) == (f"r{position}", f"r{position}.npy")
        assert (record.patient_id, record.age) == (f"p{position // 2}", 20 + position)
        assert record.sampling_rate_hz == store.stored_rate_hz
        assert record.lead_names == LEADS


def test_a_folder_of_fewer_leads(tmp_path):
    random = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for name in "ab":
        np.save(tmp_path / "data" / f"{name}.npy", random.standard_normal((3, 2000)))
    np.save(tmp_path / "data" / "c.npy", random.standard_normal((12, 2000)))
    with pytest.raises(UserError, match="--lead_names must be"):
        open_store(tmp_path / "data", lead_names="I,V9", cache_dir=tmp_path / "cache")
    store = open_store(tmp_path / "data", lead_names="I,II,V2", sampling_rate=400, cache_dir=tmp_path / "cache")
    assert store.index["leads"].tolist() == [["I", "II", "V2"]] * 2
    assert [source for source, _ in store.skipped] == ["c.npy"]
    assert store.skipped[0][1].endswith("where it holds other leads, name them: --lead_names I,II,V2")
    assert len(open_store(tmp_path / "data", sampling_rate=400, cache_dir=tmp_path / "cache")) == 1


def test_index_and_labels(store):
    index = store.index
    assert index["record_id"].tolist() == [f"r{k}" for k in range(6)]
    assert index["num_samples"].tolist() == [1000, 600, 300, 1000, 800, 140]
    assert index["duration_s"].tolist() == [10, 6, 3, 10, 8, 1.4]
    assert index["labels_all"].tolist() == [["B"], ["A"], [], ["A"], ["B"], ["A"]]
    assert index["leads"].tolist() == [list(LEADS)] * 6
    assert (index["source_rate_hz"] == 500).all()
    assert not index["flat_leads"].str.len().any()
    assert store.label_names("all") == ("A", "B")
    np.testing.assert_array_equal(store.targets("all"), [[0, 1], [1, 0], [0, 0], [1, 0], [0, 1], [1, 0]])
    assert store.targets("all").dtype == np.float32
    assert store.problem_of("rate") == "regression"
    assert store.label_names("rate") == ("rate",)
    np.testing.assert_array_equal(store.targets("rate"), [[np.nan], [61], [62], [63], [64], [65]])
    assert store[2].labels == {"all": ()}
    assert store[-1].record_id == "r5"
    assert store.column("record_id").tolist() == index["record_id"].tolist()
    assert store.column("num_samples").tolist() == index["num_samples"].tolist()
    assert store.column("patient_id").tolist() == index["patient_id"].tolist()
    with pytest.raises(IndexError, match="index must be below 6, got 6"):
        store[6]
    with pytest.raises(UserError, match="beats has no task 'form'; its tasks: all, rate"):
        store.targets("form")


def test_splits_are_disjoint_and_keep_patients(store):
    parts = [store.split(name) for name in ("train", "validation", "test")]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), store.split("all"))
    patients = [set(store.index["patient_id"].iloc[part]) for part in parts]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 3
    with pytest.raises(UserError, match="unknown split 'val'; known: train, validation, test, all"):
        store.split("val")


def test_gather_is_slicing_with_zeros_after_the_end(store):
    rng = np.random.default_rng(0)
    indices = rng.integers(0, len(store), 50)
    starts = (rng.random(50) * store.num_samples[indices]).astype(np.int64)
    ecg, lengths = store.gather(indices, starts, 250)
    assert ecg.shape == (50, 12, 250)
    assert ecg.dtype == np.float32
    for row, index, start, length in zip(ecg, indices, starts, lengths, strict=True):
        signal = store[index].signal[:, start : start + 250]
        assert length == signal.shape[1]
        np.testing.assert_array_equal(row[:, :length], signal)
        assert not row[:, length:].any()


def test_gather_of_nothing_and_out_of_range(store):
    assert store.gather(np.zeros(0, dtype=np.int64), None, 100)[0].shape == (0, 12, 100)
    for indices in ([6], [-1]):
        with pytest.raises(IndexError, match="indices must be 0 to 5"):
            store.gather(np.array(indices), None, 100)
    for starts in ([300], [-1], [0, 0]):
        with pytest.raises(ValueError, match="starts must lie inside each record"):
            store.gather(np.array([2]), np.array(starts), 100)


def test_absent_leads_are_zero_and_known(tmp_path, beats):
    store = build.build(beats(lengths=(3000,), leads=("II", "V1", "vx")), tmp_path / "s")
    present = store.present(np.array([0, 0]))
    assert present.tolist() == [[lead in ("II", "V1") for lead in LEADS]] * 2
    signal = store[0].signal
    assert not signal[~present[0]].any()
    assert np.abs(signal[present[0]]).max(axis=1).min() > 0.3
    assert store.index["leads"].tolist() == [["II", "V1", "vx"]]


def test_a_store_moves_and_is_pickled(tmp_path, store):
    moved = tmp_path / "elsewhere"
    shutil.copytree(store.path, moved)
    twin = pickle.loads(pickle.dumps(Store(moved)))
    np.testing.assert_array_equal(twin[3].signal, store[3].signal)
    assert len(pickle.dumps(twin)) < 1000
    twin.verify()


def test_skipped_records_have_a_reason(tmp_path, beats):
    dataset = beats(lengths=(5000, 3000, 200, 5000), broken=("r1",))
    store = build.build(dataset, tmp_path / "s", shard_records=2)
    assert store.index["record_id"].tolist() == ["r0", "r3"]
    assert store.skipped == [
        ("r1.npy", "broken"),
        ("r2.npy", "only 0.4 s long; at least 1 s are needed"),
    ]
    np.testing.assert_allclose(store[1].signal, expected(dataset, 3), atol=2e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems take UTF-8 names only")
def test_names_that_are_no_utf8(tmp_path):
    folder = os.fsencode(tmp_path / "données 心")
    os.mkdir(folder)
    with open(folder + b"/caf\xe9.npy", "wb") as file:
        np.save(file, np.random.default_rng(0).standard_normal((12, 1000)))
    with open(folder + b"/th\xe9.npy", "wb"):
        pass
    store = build.build(open_dataset("folder", tmp_path / "données 心"), tmp_path / "s")
    assert [(record.record_id, record.source) for record in store] == [("caf\\xe9", "caf\\xe9.npy")]
    ((source, reason),) = store.skipped
    assert source == "th\\xe9.npy"
    assert reason.startswith("npy.read: ")


def test_indexing_is_that_of_a_list(store):
    names = [record.record_id for record in store]
    for position in (0, 5, -1, -6, np.int64(2), np.uint8(3), np.int16(-2)):
        assert store[position].record_id == names[position]
    for part in (slice(1, 3), slice(None, None, -2), slice(4, 99), slice(3, 3)):
        assert [record.record_id for record in store[part]] == names[part]
    for position in (6, -7, np.int64(6)):
        with pytest.raises(IndexError, match="Store: index must be below 6"):
            store[position]
    for position in (1.0, "r1", None, np.array([0, 1])):
        with pytest.raises(TypeError, match="Store: index must be a whole number or a slice"):
            store[position]


def test_nothing_readable(tmp_path, beats):
    with pytest.raises(UserError, match=r"beats: none of 2 records can be read; the first, r0\.npy: broken"):
        build.build(beats(lengths=(900, 900), broken=("r0", "r1")), tmp_path / "s")


def test_a_rate_that_the_published_preprocessing_refuses_is_skipped(tmp_path, beats):
    with pytest.raises(UserError, match=r"none of 6 records .* sampling_rate"):
        build.build(beats(rate_hz=80.0), tmp_path / "s", Settings(compat="published"))


@pytest.mark.parametrize("crash", ["read", "shard", "part", "index", "manifest"])
def test_a_killed_build_goes_on(tmp_path, beats, store, monkeypatch, crash):
    class Killed(BaseException):
        pass

    dataset, folder = beats(), tmp_path / "s"
    replace, read = os.replace, beats.read
    fatal = {"shard": "00001.bin", "part": "00001.parquet", "index": "index.parquet", "manifest": "store.json"}

    def dying_replace(source, target):
        if os.path.basename(target) == fatal.get(crash):
            raise Killed
        replace(source, target)

    def dying_read(self, entry):
        if crash == "read" and entry.record_id == "r3":
            raise Killed
        return read(self, entry)

    with monkeypatch.context() as dying:
        dying.setattr(os, "replace", dying_replace)
        dying.setattr(beats, "read", dying_read)
        with pytest.raises(Killed):
            build.build(dataset, folder, shard_records=2)
    with pytest.raises(UserError, match="is unfinished: run the command that makes it again"):
        Store(folder)
    dataset.reads.clear()
    build.build(dataset, folder, shard_records=2)
    # Finished shards are not read again.
    assert dataset.reads == ([] if crash in ("index", "manifest") else ["r2", "r3", "r4", "r5"])
    assert {name: data for name, data in content(folder).items() if not name.endswith(".tmp")} == content(store.path)


@pytest.mark.parametrize("lead_names", [None, "I,II,V2"])
def test_a_killed_build_of_files_goes_on(tmp_path, monkeypatch, lead_names):
    (tmp_path / "in").mkdir()
    for name in "ab":
        np.save(tmp_path / "in" / f"{name}.npy", np.random.default_rng(0).normal(size=(3 if lead_names else 12, 5000)))
    config = PrepareConfig(tmp_path / "in", lead_names=lead_names, output_dir=tmp_path / "s", num_workers=0)
    with monkeypatch.context() as dying:
        dying.setattr(build, "write_shard", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build.prepare(config)
    assert len(build.prepare(config)) == 2


def test_an_unfinished_store_of_other_settings(tmp_path, beats, monkeypatch):
    with monkeypatch.context() as dying:
        dying.setattr(build, "_pack", lambda *args: None)
        with pytest.raises(UserError, match="unfinished"):
            build.build(beats(), tmp_path / "s")
    with pytest.raises(UserError, match="unfinished store of other data or settings"):
        build.build(beats(), tmp_path / "s", Settings(downsampling_factor=10))


def test_a_folder_that_holds_something_else(tmp_path, beats, store):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="holds other files: choose a new folder"):
        build.build(beats(), tmp_path)
    with pytest.raises(UserError, match="holds a store of other data or settings"):
        build.build(beats(), store.path, Settings(compat="published"))
    assert (tmp_path / "thesis.tex").exists()


def test_a_folder_that_is_closed(tmp_path, beats, store, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"cannot write into .*closed: .*HUBERT_ECG_CACHE"):
        build.build(beats(), tmp_path / "closed")
    assert not list((tmp_path / "closed").iterdir())
    # A finished store is only read.
    assert len(build.build(beats(), store.path, shard_records=2)) == 6


def test_two_builders_make_one_store(tmp_path, beats):
    datasets = [beats(), beats()]
    threads = [
        threading.Thread(target=build.build, args=(dataset, tmp_path / "s"), kwargs={"shard_records": 2})
        for dataset in datasets
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(len(dataset.reads) for dataset in datasets) == [0, 6]
    Store(tmp_path / "s").verify()


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "store.json").unlink(), "is not a packed store"),
        (lambda folder: (folder / "store.json").write_text("{"), r"damaged: store\.json cannot be read"),
        (lambda folder: (folder / "index.parquet").unlink(), r"damaged: index\.parquet is missing"),
        (lambda folder: flip(folder / "index.parquet"), r"damaged: index\.parquet is missing or not as it was"),
        (lambda folder: (folder / "shards/00001.bin").unlink(), r"damaged: shards/00001\.bin is missing"),
        (lambda folder: (folder / "shards/00001.bin").write_bytes(b"12"), "is 2 bytes long and not"),
        (lambda folder: flip(folder / "shards/00002.bin"), r"shards/00002\.bin is not as it was written"),
    ],
)
def test_damage_is_noticed(tmp_path, store, damage, message):
    folder = tmp_path / "s"
    shutil.copytree(store.path, folder)
    damage(folder)
    with pytest.raises(UserError, match=message):
        Store(folder).verify()


def test_a_store_of_another_version(tmp_path, store):
    folder = tmp_path / "s"
    shutil.copytree(store.path, folder)
    manifest = json.loads((folder / "store.json").read_text())
    (folder / "store.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(UserError, match="has format 99, and this version reads 1: prepare it again"):
        Store(folder)


@pytest.fixture
def recordings(tmp_path):
    folder = tmp_path / "recordings"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in "abc":
        np.save(folder / f"{name}.npy", rng.normal(size=(12, 1250)).cumsum(axis=1) / 10)
    (folder / "bad.npy").write_bytes(b"no array")
    return folder


def test_open_store_packs_once(recordings, monkeypatch):
    store = open_store(recordings, sampling_rate=250, num_workers=0, progress=False)
    assert store.index["record_id"].tolist() == ["a", "b", "c"]
    assert store.index["num_samples"].tolist() == [500] * 3
    assert [source for source, _ in store.skipped] == ["bad.npy"]
    assert not any(str(recordings) in reason for _, reason in store.skipped)
    with monkeypatch.context() as never:
        never.setattr(build, "_pack", None)
        assert open_store(recordings, sampling_rate=250).path == store.path
        assert open_store(store.path, dataset="folder").path == store.path
    others = [
        open_store(recordings, num_workers=0, progress=False, **options) for options in ({}, {"compat": "published"})
    ]
    assert len({store.path, *(other.path for other in others)}) == 3
    os.utime(recordings / "a.npy", (1, 1))
    assert open_store(recordings, sampling_rate=250, num_workers=0, progress=False).path != store.path


def test_a_store_among_recordings_is_none_of_them(recordings):
    def seen():
        dataset = open_dataset("folder", recordings)
        return dataset.fingerprint(), [entry.source for entry in dataset.entries()]

    before = seen()
    build.build(open_dataset("folder", recordings), recordings / "packed")
    assert (recordings / "packed" / "index.parquet").is_file()
    assert seen() == before


@pytest.mark.slow
def test_the_same_store_whatever_the_number_of_processes(recordings, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_POOL_FROM_RECORDS", 1)
    dataset = open_dataset("folder", recordings)
    for num_workers in (0, 1):
        build.build(dataset, tmp_path / f"{num_workers}", num_workers=num_workers, shard_records=2)
    assert content(tmp_path / "1") == content(tmp_path / "0")


def test_open_store_checks_what_a_store_holds(store):
    with pytest.raises(UserError, match="holds beats, not ptbxl"):
        open_store(store.path, dataset="ptbxl")
    with pytest.raises(UserError, match="was prepared with downsampling_factor 5, not 1"):
        open_store(store.path, downsampling_factor=1)
    with pytest.raises(UserError, match="was prepared with compat corrected, not published"):
        open_store(store.path, compat="published")
    with pytest.raises(UserError, match="which recordings"):
        open_store()


def test_prepare(recordings, tmp_path, capsys):
    for i in range(12):
        (recordings / f"broken [{i:02}].npy").write_bytes(b"nonsense")
    config = PrepareConfig(recordings, output_dir=tmp_path / "out", sampling_rate=250, num_workers=0)
    store = prepare(config)
    assert len(store) == 3
    said = capsys.readouterr().err
    assert "packing folder" in said
    assert f"3 records in {store.path}, 13 skipped:\n" in said
    assert "  broken [00].npy: npy.read: file must be" in said
    assert "broken [11].npy" not in said
    assert f"and 3 more in {store.path}/store.json" in said
    assert re.search(r"\n[0-9]+% of the work was reading files, the rest preparing what they hold\n", said)
    assert prepare(config).manifest == store.manifest
    with pytest.raises(UserError, match="is a packed store already"):
        prepare(PrepareConfig(store.path, output_dir=tmp_path / "again"))


def test_a_worker_that_imports_an_unguarded_script_does_not_hang(tmp_path, beats, monkeypatch):
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(RuntimeError, match="__name__ == '__main__'"):
        build.build(beats(), tmp_path / "s")


_KILLED_PARENT = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from hubert_ecg.data.packing import _start_worker

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, mp_context=context, initializer=_start_worker, initargs=(None, None))
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(600)
"""


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    (tmp_path / "parent.py").write_text(_KILLED_PARENT)
    with subprocess.Popen([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE) as parent:
        worker = int(parent.stdout.readline())
        parent.kill()
        try:
            # The worker holds the other end of the pipe as well: it closes when the worker is gone.
            parent.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            os.kill(worker, signal.SIGKILL)
            raise


_STOPPED_PARENT = """
import sys, time
from pathlib import Path

if __name__ == "__mp_main__":
    # What a worker does first, and for seconds: it imports.
    Path(sys.argv[1]).touch()
    time.sleep(600)

if __name__ == "__main__":
    from hubert_ecg.data.packing import Settings, packed_chunks

    try:
        list(packed_chunks(None, Settings(), [(0, [])], 2))
    except KeyboardInterrupt:
        sys.exit("stopped")
"""


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="no masks of signals")
def test_workers_that_still_import_end_without_a_word_at_ctrl_c(tmp_path):
    (tmp_path / "parent.py").write_text(_STOPPED_PARENT)
    command = [sys.executable, tmp_path / "parent.py", tmp_path / "begun"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as parent:
        try:
            end = time.monotonic() + 60
            while not (tmp_path / "begun").exists() and time.monotonic() < end:
                time.sleep(0.01)
            os.killpg(parent.pid, signal.SIGINT)
            assert parent.communicate(timeout=30) == (None, "stopped\n")
        except BaseException:
            os.killpg(parent.pid, signal.SIGKILL)
            raise


def test_real_recordings_of_every_source_are_packed(shared_data, tmp_path):
    source = tmp_path / "some"
    for pattern in (
        "cinc2021/*/*1.hea",
        "cinc2021/georgia/E0750*.hea",
        "ptbdb/*.hea",
        "ludb/data/11.hea",
        "sph/SPH00002.h5",
    ):
        for path in sorted(shared_data.glob(pattern))[:4]:
            for part in path.parent.glob(f"{path.stem}.*"):
                (source / part.relative_to(shared_data)).parent.mkdir(parents=True, exist_ok=True)
                (source / part.relative_to(shared_data)).symlink_to(part)
    store = open_store(source, dataset="folder", num_workers=0, progress=False)
    assert store.skipped == []
    assert len(store) == 10
    assert set(store.index["source_rate_hz"]) == {500, 1000}
    assert store.present(store.split("all")).all()
    rate = store.index["source_rate_hz"]
    np.testing.assert_allclose(store.index["num_samples"], store.index["duration_s"] * 100, atol=1)
    assert (rate > 0).all()
    for record in store:
        assert np.isfinite(record.signal).all()
