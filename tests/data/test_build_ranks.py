"""Ranks that build one store together, as threads: torchrun's own are in tests/train/test_prepare.py."""

from __future__ import annotations

import threading

import pytest

from hubert_ecg.config import PrepareConfig, UserError
from hubert_ecg.data import Store, build, prepare
from hubert_ecg.data.build import Ranks


def content(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".tmp")
    }


def together(num_ranks, work):
    """What ``work(ranks)`` gives or raises on each rank."""
    values, found = [None] * num_ranks, [None] * num_ranks
    barrier = threading.Barrier(num_ranks, timeout=60)

    def run(rank):
        def gather(value):
            values[rank] = value
            barrier.wait()
            heard = list(values)
            barrier.wait()
            return heard

        try:
            found[rank] = work(Ranks(rank, num_ranks, gather))
        except BaseException as error:
            found[rank] = error
            # As torchrun ends the others.
            if not isinstance(error, UserError):
                barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


class Killed(BaseException):
    pass


@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_the_same_store_whatever_the_number_of_ranks(tmp_path, beats, store, num_ranks):
    datasets = [beats() for _ in range(num_ranks)]
    stores = together(
        num_ranks, lambda ranks: build.build(datasets[ranks.rank], tmp_path / "s", shard_records=2, ranks=ranks)
    )
    assert [len(found) for found in stores] == [6] * num_ranks
    assert content(tmp_path / "s") == content(store.path)
    # Three shards of two records: each is read once, by the rank whose turn it is.
    reads = [dataset.reads for dataset in datasets]
    assert reads[:2] == [["r0", "r1", "r4", "r5"], ["r2", "r3"]] if num_ranks == 2 else reads[2] == ["r4", "r5"]
    assert sorted(name for its in reads for name in its) == [f"r{k}" for k in range(6)]


@pytest.mark.parametrize("later", [1, 3])
def test_a_stopped_job_goes_on_with_another_number_of_ranks(tmp_path, beats, store, monkeypatch, later):
    read = beats.read

    def dying(self, entry):
        if entry.record_id == "r5":
            raise Killed
        return read(self, entry)

    with monkeypatch.context() as killing:
        killing.setattr(beats, "read", dying)
        found = together(2, lambda ranks: build.build(beats(), tmp_path / "s", shard_records=2, ranks=ranks))
    assert isinstance(found[0], Killed)
    assert isinstance(found[1], threading.BrokenBarrierError)
    with pytest.raises(UserError, match="unfinished"):
        Store(tmp_path / "s")
    datasets = [beats() for _ in range(later)]
    found = together(
        later, lambda ranks: build.build(datasets[ranks.rank], tmp_path / "s", shard_records=2, ranks=ranks)
    )
    assert len(found[0]) == 6
    assert [name for dataset in datasets for name in dataset.reads] == ["r4", "r5"]
    assert content(tmp_path / "s") == content(store.path)


def test_a_finished_store_is_opened_by_all(tmp_path, beats, store):
    datasets = [beats(), beats()]
    found = together(2, lambda ranks: build.build(datasets[ranks.rank], store.path, shard_records=2, ranks=ranks))
    assert [found[rank].manifest for rank in (0, 1)] == [store.manifest] * 2
    assert [dataset.reads for dataset in datasets] == [[], []]


def test_what_the_first_rank_finds_wrong_all_say(tmp_path, beats):
    (tmp_path / "s").mkdir()
    (tmp_path / "s/thesis.tex").touch()
    for error in together(2, lambda ranks: build.build(beats(), tmp_path / "s", ranks=ranks)):
        assert isinstance(error, UserError)
        assert "holds other files" in str(error)
    broken = {"lengths": (900, 900), "broken": ("r0", "r1")}
    for error in together(2, lambda ranks: build.build(beats(**broken), tmp_path / "t", ranks=ranks)):
        assert isinstance(error, UserError)
        assert "none of 2 records can be read" in str(error)


def test_ranks_that_do_not_share_a_folder(tmp_path, beats, monkeypatch):
    monkeypatch.setattr(build, "_SEEN_WITHIN_S", 0.2)
    errors = together(2, lambda ranks: build.build(beats(), tmp_path / str(ranks.rank), ranks=ranks))
    for error in errors:
        assert isinstance(error, UserError)
        assert "rank 1 does not see what rank 0 writes" in str(error)
        assert "file system that all machines share" in str(error)
    others = together(2, lambda ranks: build.build(beats(rate_hz=500.0 + ranks.rank), tmp_path / "s", ranks=ranks))
    for error in others:
        assert isinstance(error, UserError)
        assert "ranks see other recordings" in str(error)


def test_a_shard_that_does_not_come(tmp_path, beats, monkeypatch):
    monkeypatch.setattr(build, "_SEEN_WITHIN_S", 0.2)
    write = build.write_shard

    def elsewhere(folder, position, *rest):
        if position != 1:
            write(folder, position, *rest)

    monkeypatch.setattr(build, "write_shard", elsewhere)
    for error in together(2, lambda ranks: build.build(beats(), tmp_path / "s", shard_records=2, ranks=ranks)):
        assert isinstance(error, UserError)
        assert "00001.parquet is not to be seen" in str(error)


def test_only_the_first_rank_shows_progress_of_its_share(tmp_path, beats, capsys):
    together(
        2,
        lambda ranks: build.build(beats(), tmp_path / "s", shard_records=2, progress=ranks.rank == 0, ranks=ranks),
    )
    said = capsys.readouterr().err
    assert "packing beats, the share of one of 2 ranks: 4/4" in said
    assert said.count("packing") == 1
    assert "6 records in" in said


def test_more_shards_than_are_indexed_together(tmp_path, beats, store, monkeypatch):
    lengths = (700,) * 9
    whole = build.build(beats(lengths), tmp_path / "whole", shard_records=1)
    monkeypatch.setattr("hubert_ecg.data.writing._INDEX_SHARDS", 2)
    some = build.build(beats(lengths), tmp_path / "some", shard_records=1)
    assert some.index.equals(whole.index)
    assert {**some.manifest, "index_hash": 0, "hash": 0} == {**whole.manifest, "index_hash": 0, "hash": 0}
    some.verify()


def test_rates_at_which_no_beat_is_seen(tmp_path, beats):
    with pytest.raises(UserError, match=r"r0\.npy: sampled at 5 Hz; at least 20 Hz show a QRS complex"):
        build.build(beats(rate_hz=5.0), tmp_path / "s")
    assert len(build.build(beats(rate_hz=20.0), tmp_path / "t")) == 6


def test_prepare_takes_ranks(tmp_path, shared_data):
    config = PrepareConfig(shared_data / "sph", output_dir=tmp_path / "s", num_workers=0)
    for store in together(2, lambda ranks: prepare(config, progress=False, ranks=ranks)):
        assert len(store) == 6
