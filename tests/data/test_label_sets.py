"""Precomputed labels: a column of a store that appears whole or not at all."""

from __future__ import annotations

import concurrent.futures
import json
import shutil

import numpy as np
import pytest

from hubert_ecg.config import UserError
from hubert_ecg.data import LabelWriter, Store

SIZES = {"num_models": 2, "num_tokens": 93, "num_clusters": 500, "crop_s": 5.0}


@pytest.fixture
def mine(store, tmp_path):
    """A copy of the store, to write into."""
    shutil.copytree(store.path, tmp_path / "mine")
    return Store(tmp_path / "mine")


@pytest.fixture
def labels(store):
    return np.random.default_rng(0).integers(0, 500, (2, len(store), 93))


def files(store):
    return sorted(path.name for path in (store.path / "labels").iterdir() if path.suffix != ".lock")


def test_what_is_written_is_read(mine, labels):
    assert mine.label_sets == ()
    facts = {"feature_type": "mfcc", "kmeans": ["a1", "b2"]}
    mine.write_labels("mfcc-1", labels, num_clusters=500, crop_s=5.0, facts=facts)
    assert mine.label_sets == ("mfcc-1",)
    found = Store(mine.path).labels("mfcc-1")
    np.testing.assert_array_equal(found.values, labels)
    assert found.values.dtype == np.int16
    assert isinstance(found.values, np.memmap)
    expected = {"crop": "first", "crop_s": 5.0, "num_clusters": 500, "sampling_rate_hz": 100.0}
    assert found.facts == {**facts, **expected, "store": mine.manifest["hash"]}
    assert files(mine) == ["mfcc-1.json", "mfcc-1.npy"]


def test_the_store_itself_does_not_change(mine, labels):
    manifest = (mine.path / "store.json").read_bytes()
    mine.write_labels("mfcc", labels, num_clusters=500, crop_s=5.0)
    assert (mine.path / "store.json").read_bytes() == manifest
    Store(mine.path).verify()


@pytest.mark.parametrize(("num_clusters", "dtype"), [(2**15, np.int16), (2**15 + 1, np.int32)])
def test_labels_are_as_narrow_as_they_may(mine, num_clusters, dtype):
    labels = np.full((1, len(mine), 3), num_clusters - 1)
    mine.write_labels("wide", labels, num_clusters=num_clusters, crop_s=5.0)
    found = mine.labels("wide").values
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, labels)


def test_several_write_disjoint_ranges(mine, labels):
    ends = [0, 1, 4, 6]

    def write(rank):
        writer = LabelWriter(mine, "shared", **SIZES)
        for record in reversed(range(ends[rank], ends[rank + 1])):
            writer.write(record, labels[:, record : record + 1])
        return writer

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        writers = list(pool.map(write, range(3)))
    assert mine.label_sets == ()
    writers[0].finish()
    np.testing.assert_array_equal(mine.labels("shared").values, labels)


def test_a_run_that_was_stopped_goes_on(mine, labels):
    LabelWriter(mine, "x", **SIZES).write(2, labels[:, 2:4])
    with pytest.raises(UserError, match=r"has no finished labels 'x'; its labels: none"):
        mine.labels("x")
    writer = LabelWriter(mine, "x", **SIZES)
    assert writer.missing().tolist() == [0, 1, 4, 5]
    assert writer.missing(3, 5).tolist() == [4]
    with pytest.raises(RuntimeError, match="4 records have none, the first is 0"):
        writer.finish()
    for record in writer.missing():
        writer.write(record, labels[:, record : record + 1])
    writer.finish()
    np.testing.assert_array_equal(mine.labels("x").values, labels)


def test_what_was_begun_of_other_facts_is_dropped(mine, labels):
    LabelWriter(mine, "x", **SIZES, facts={"kmeans": "old"}).write(0, labels)
    assert len(LabelWriter(mine, "x", **SIZES, facts={"kmeans": "new"}).missing()) == len(mine)
    with pytest.raises(UserError, match=r"labels x were begun as \[2, 6, 93\], not \[3, 6, 93\]"):
        LabelWriter(mine, "x", **{**SIZES, "num_models": 3}, facts={"kmeans": "new"})


def test_a_new_set_takes_the_place_of_an_old_one(mine, labels):
    mine.write_labels("x", labels, num_clusters=500, crop_s=5.0)
    before = mine.labels("x").values
    mine.write_labels("x", 499 - labels, num_clusters=500, crop_s=5.0)
    np.testing.assert_array_equal(mine.labels("x").values, 499 - labels)
    # Who still reads the old one is not disturbed.
    np.testing.assert_array_equal(before, labels)


def test_wrong_labels_are_refused(mine, labels):
    writer = LabelWriter(mine, "x", **SIZES)
    for first, block, message in [
        (5, labels[:, :2], r"block must be \[2, at most 1, 93\] at record 5, got \[2, 2, 93\]"),
        (-1, labels[:, :1], r"\[2, at most 0, 93\] at record -1"),
        (0, labels[:1], r"got \[1, 6, 93\]"),
        (0, labels[0], r"got \[6, 93\]"),
        (0, labels + 1, "labels must be 0 to 499, got 1 to 500"),
        (0, labels - 1, "labels must be 0 to 499, got -1 to 498"),
    ]:
        with pytest.raises(ValueError, match=message):
            writer.write(first, block)
    assert len(writer.missing()) == len(mine)
    with pytest.raises(ValueError, match=r"labels must be of 6 records, got \[2, 5, 93\]"):
        mine.write_labels("x", labels[:, :5], num_clusters=500, crop_s=5.0)


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".x", "a b"])
def test_a_name_that_is_no_file(mine, name):
    with pytest.raises(UserError, match="name of labels must be letters"):
        mine.labels(name)
    with pytest.raises(UserError, match="name of labels must be letters"):
        LabelWriter(mine, name, **SIZES)


def other_records(folder):
    facts = json.loads((folder / "x.json").read_text())
    (folder / "x.json").write_text(json.dumps(facts | {"store": "another"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "x.npy").unlink(), "are damaged"),
        (lambda folder: (folder / "x.npy").write_bytes(b"12"), "are damaged"),
        (lambda folder: np.save(folder / "x.npy", np.zeros((2, 5, 93), np.int16)), "are damaged"),
        (lambda folder: np.save(folder / "x.npy", np.zeros((2, 6, 93))), "are damaged"),
        (lambda folder: (folder / "x.json").write_text("{"), "are damaged"),
        (lambda folder: (folder / "x.json").write_text("[]"), "are damaged"),
        (other_records, "are of other records than the store holds now"),
    ],
)
def test_damage_is_noticed(mine, labels, damage, message):
    mine.write_labels("x", labels, num_clusters=500, crop_s=5.0)
    damage(mine.path / "labels")
    with pytest.raises(UserError, match=message):
        mine.labels("x")
