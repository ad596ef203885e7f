from __future__ import annotations

import collections
import dataclasses
import json
import re

import numpy as np
import pandas as pd
import pytest

from hubert_ecg.config import PrepareConfig, UserError
from hubert_ecg.data import Entry, Store, check_task, open_store, prepare
from hubert_ecg.data.dataset import learnable
from hubert_ecg.data.folds import assign_folds, check_given, given_folds, read_splits, split_name
from hubert_ecg.data.store import file_hash

RNG = np.random.default_rng(0)


def records(labels, patients=None):
    return [
        Entry(f"r{k}", source=f"x/A{k:04d}", patient_id=patients and patients[k], labels={"all": tuple(sorted(names))})
        for k, names in enumerate(labels)
    ]


def splits_of(entries, label, folds):
    return sorted(split_name(fold) for entry, fold in zip(entries, folds, strict=True) if label in entry.labels["all"])


def test_folds_keep_patients_together_and_labels_apart():
    rng = np.random.default_rng(0)
    labels = rng.choice(["A", "B", "C"], 2000)
    entries = [Entry(f"{k}", patient_id=f"p{k // 2}", labels={"all": (label,)}) for k, label in enumerate(labels)]
    folds = assign_folds(entries, "all")
    assert folds == assign_folds(entries, "all")
    assert folds != assign_folds(entries, "all", seed=1)
    by_patient = collections.defaultdict(set)
    for entry, fold in zip(entries, folds, strict=True):
        by_patient[entry.patient_id].add(fold)
    assert {len(of_patient) for of_patient in by_patient.values()} == {1}
    assert collections.Counter(folds).keys() == set(range(1, 11))
    assert min(collections.Counter(folds).values()) >= 190
    rare = [Entry(f"r{k}", labels={"all": ("R",) if k % 50 == 0 else ()}) for k in range(1000)]
    spread = collections.Counter(f for e, f in zip(rare, assign_folds(rare, "all"), strict=True) if e.labels["all"])
    assert set(spread.values()) == {2}


def test_folds_of_few_records_and_official_ones():
    entries = [Entry(f"{k}") for k in range(3)]
    assert sorted(assign_folds(entries)) == [1, 9, 10]
    entries = [Entry("a", patient_id="p", fold=4), Entry("b", patient_id="p"), Entry("c", patient_id="q")]
    assert assign_folds(entries)[:2] == [4, 4]


@pytest.mark.parametrize("num_others", [5, 400])
def test_rare_labels_go_where_they_are_needed(num_others):
    """Two patients: train and test. Three: one each. However many others there are."""
    labels = [{"C"} if k % 3 else {"C", "D"} for k in range(num_others)]
    labels += [{"two", "C"}, {"two"}, {"three"}, {"three"}, {"three", "D"}]
    entries = records(labels)
    for seed in range(3):
        folds = assign_folds(entries, "all", seed)
        assert splits_of(entries, "two", folds) == ["test", "train"]
        assert splits_of(entries, "three", folds) == ["test", "train", "validation"]


def test_no_split_goes_short_of_a_label():
    labels = [{"C"} for _ in range(300)]
    for number, label in enumerate(("four", "five", "seven", "nine", "fifteen")):
        labels += [{label}] * (4, 5, 7, 9, 15)[number]
    entries = records(labels)
    folds = assign_folds(entries, "all")
    for label in ("four", "five", "seven", "nine", "fifteen"):
        assert set(splits_of(entries, label, folds)) == {"train", "validation", "test"}
    assert np.abs(np.bincount(folds, minlength=11)[1:] - 34).max() <= 5


def test_a_patient_with_several_rare_labels():
    entries = records([{"a", "b"}, {"a"}, {"b"}, *[{"C"}] * 100])
    folds = assign_folds(entries, "all")
    assert splits_of(entries, "a", folds) == splits_of(entries, "b", folds) == ["test", "train"]


def test_labels_of_patients_and_not_of_records_are_counted():
    entries = records([{"a"}, {"a"}, {"a"}, {"b"}, {"b"}, {"C"}, {"C"}], ["p", "p", "p", "p", "q", "r", "s"])
    kept, dropped = learnable(entries, {})
    assert dropped == {"all": ["a"]}
    assert [entry.labels["all"] for entry in kept][:4] == [(), (), (), ("b",)]
    assert splits_of(kept, "b", assign_folds(kept, "all")) == ["test", "train"]
    assert learnable(entries, {}, keep_lone=True) == (entries, {})
    official = [Entry(entry.record_id, fold=1, labels=entry.labels) for entry in entries]
    assert learnable(official, {}) == (official, {})
    merged, dropped = learnable(records([{"CRBBB"}, {"RBBB", "AF"}]), {"CRBBB": "RBBB"})
    assert ([entry.labels["all"] for entry in merged], dropped) == ([("RBBB",), ("RBBB",)], {"all": ["AF"]})


def test_shares_of_every_label_are_alike():
    """Iterative stratification: each fold has a tenth of each label, though labels overlap."""
    chances = np.array([0.5, 0.2, 0.1, 0.05, 0.02, 0.01])
    has = RNG.random((3000, 6)) < chances
    entries = records([{f"L{k}" for k in np.flatnonzero(row)} for row in has], [f"p{k // 2}" for k in range(3000)])
    folds = np.array(assign_folds(entries, "all"))
    patients = np.array(folds).reshape(-1, 2)
    assert (patients[:, 0] == patients[:, 1]).all()
    assert np.abs(np.bincount(folds, minlength=11)[1:] - 300).max() <= 4
    of_patient = has.reshape(-1, 2, 6).any(1)
    per_fold = np.stack([of_patient[patients[:, 0] == fold].sum(0) for fold in range(1, 11)])
    # Labels share records, so a count may be a few off; a draw by chance is some five times as far off.
    assert (np.abs(per_fold - of_patient.sum(0) / 10) <= 3).all()


def test_neither_order_nor_other_tasks_matter():
    entries = records([{"A"} if k % 3 else {"B"} for k in range(200)])
    folds = dict(zip((entry.record_id for entry in entries), assign_folds(entries, "all"), strict=True))
    turned = entries[::-1]
    assert dict(zip((entry.record_id for entry in turned), assign_folds(turned, "all"), strict=True)) == folds
    assert sorted(collections.Counter(assign_folds(entries)).values()) == [20] * 10


def test_tables_of_splits(tmp_path):
    table = tmp_path / "s.csv"
    table.write_text("filename,split\nx/A0001.hea.npy,Train\nA0002,val\nA0003,TEST\n")
    splits = read_splits(table)
    entries = records([set()] * 5)
    names = [entry.record_id for entry in entries], [entry.source for entry in entries]
    assert given_folds(splits, *names, table) == [0, 1, 9, 10, 0]
    # A name that leaves something open says nothing.
    table.write_text("filename,split\na/1.txt,train\nb/1.txt,test\nvisit.1.npy,val\n")
    sources = ["x/a/1.txt", "x/b/1.txt", "x/visit.1.npy", "x/visit.2.npy", "b/1.txt"]
    assert given_folds(read_splits(table), sources, sources, table) == [0, 0, 9, 0, 10]
    table.write_text(" Record_ID ;fold;split\nr4;7;test\nr0;9;test\n")
    assert given_folds(read_splits(table), *names, table) == [9, 0, 0, 0, 7]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read"),
        ("a,b\n1,2\n", "must have a column record_id or filename, and a column fold or split, got a, b"),
        ("record_id,fold\nr1,3\nr2,11\n", "line 3: must be a fold from 1 to 10, or train, .*got '11'"),
        ("record_id,split\n,train\n", "line 2: record_id must name a record, got a blank"),
        ("record_id,split\nr1,train\nr1,test\n", "line 3: r1 has two folds"),
        ("record_id,split\nz,train\n", "has none of the records; it names z"),
    ],
)
def test_mistakes_in_tables_of_splits(tmp_path, content, message):
    table = tmp_path / "s.csv"
    table.write_text(content)
    with pytest.raises(UserError, match=f"--splits_from: .*{message}"):
        given_folds(read_splits(table), ["r1"], ["x.npy"], table)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "none.csv"))):
        read_splits(tmp_path / "none.csv")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for k in range(8):
        np.save(folder / f"r{k}.npy", RNG.normal(0, 0.3, (12, 1000)))
    lines = [f"r{k},{int(k < 4)},{int(k >= 4)},{int(k == 2)}" for k in range(8)]
    (folder / "labels.csv").write_text("filename,A,B,once\n" + "\n".join(lines))
    return folder


def test_a_store_says_its_splits(tmp_path, folder, capsys):
    store = prepare(PrepareConfig(data_path=folder, output_dir=tmp_path / "s", num_workers=0))
    table = pd.read_csv(store.path / "splits.csv", dtype={"record_id": str})
    assert table["record_id"].tolist() == store.index["record_id"].tolist()
    assert table["fold"].tolist() == store.folds.tolist()
    for split in ("train", "validation", "test"):
        assert np.flatnonzero(table["split"] == split).tolist() == store.split(split).tolist()
        assert len(store.split(split))
    assert store.manifest["splits_hash"] == file_hash(store.path / "splits.csv")
    assert store.manifest["dropped_labels"] == {"all": ["once"]}
    assert store.label_names("all") == ("A", "B")
    assert store.splits == "by patient, labels spread evenly, seed 0"
    assert "all: labels of one patient alone are left out: once" in capsys.readouterr().err
    # The table of one store splits another in the same way.
    again = open_store(folder, splits_from=store.path / "splits.csv", num_workers=0, progress=False)
    assert again.folds.tolist() == store.folds.tolist()


@pytest.mark.parametrize("broken", ["r0", "r2"])
def test_labels_are_spread_over_what_can_be_read(tmp_path, folder, broken):
    """A label of two records is in train and test, one of a single record in neither, whatever else a table names."""
    has = {"once": {"r2", "r3"}, "twice": {"r1", "r4", broken}, "thrice": {"r5", "r6", "r7", broken}}
    lines = [",".join([f"r{k}", *(str(int(f"r{k}" in records)) for records in has.values())]) for k in range(8)]
    (folder / "labels.csv").write_text("filename," + ",".join(has) + "\n" + "\n".join(lines))
    (folder / f"{broken}.npy").write_bytes(b"")
    store = prepare(PrepareConfig(data_path=folder, output_dir=tmp_path / "s", num_workers=0), progress=False)
    once = [] if broken == "r2" else ["once"]
    assert store.label_names("all") == (*once, "thrice", "twice")
    assert store.manifest["dropped_labels"] == ({"all": ["once"]} if broken == "r2" else {})
    index = store.index
    split_of = {name: split_name(fold) for name, fold in zip(index["record_id"], store.folds, strict=True)}
    splits = {label: sorted(split_of[name] for name in records - {broken}) for label, records in has.items()}
    assert splits["twice"] == ["test", "train"]
    assert splits["thrice"] == ["test", "train", "validation"]
    table = pd.read_csv(store.path / "splits.csv", dtype={"record_id": str})
    assert table["fold"].tolist() == store.folds.tolist()
    # As if what cannot be read was not there.
    (folder / f"{broken}.npy").unlink()
    (folder / "labels.csv").write_text((folder / "labels.csv").read_text().replace(lines[int(broken[1])] + "\n", ""))
    other = prepare(PrepareConfig(data_path=folder, output_dir=tmp_path / "o", num_workers=0), progress=False)
    assert (other.folds.tolist(), other.label_names("all")) == (store.folds.tolist(), store.label_names("all"))


def test_columns_of_words_are_told(tmp_path, folder, capsys):
    lines = [f"r{k},{int(k < 4)},{int(k >= 4)},{'AF' if k else ''}" for k in range(8)]
    (folder / "labels.csv").write_text("filename,A,B,rhythm\n" + "\n".join(lines))
    said = "nor of numbers: rhythm ('AF' in labels.csv, line 3)"
    store = prepare(PrepareConfig(data_path=folder, output_dir=tmp_path / "s", num_workers=0))
    assert said in capsys.readouterr().err
    assert store.manifest["datasets"]["csv"]["left_out_columns"] == {"rhythm": "'AF' in labels.csv, line 3"}
    for path in (folder, store.path):
        with pytest.raises(UserError, match="csv has no task 'rhythm'; its tasks: all; csv: .*" + re.escape(said)):
            check_task("csv", path, "rhythm")


def test_given_splits(tmp_path, folder):
    table = tmp_path / "splits.csv"
    table.write_text("record_id,split\nr1,test\nr0,train\nr5,train\nr3,val\n")
    baked = prepare(
        PrepareConfig(data_path=folder, output_dir=tmp_path / "s", num_workers=0, splits_from=table), progress=False
    )
    assert (baked.splits, baked.label_names("all")) == ("given", ("A", "B", "once"))
    plain = prepare(PrepareConfig(data_path=folder, output_dir=tmp_path / "p", num_workers=0), progress=False)
    viewed = open_store(plain.path, splits_from=table, progress=False)
    for store in (baked, viewed):
        found = {split: [store.index["record_id"][k] for k in store.split(split)] for split in ("train", "test")}
        assert found == {"train": ["r0", "r5"], "test": ["r1"]}
        assert store.split("validation").tolist() == [3]
        assert len(store.split("all")) == 8
    assert Store(plain.path).folds.tolist() != viewed.folds.tolist()
    function, arguments = viewed.__reduce__()
    assert function(*arguments).folds.tolist() == viewed.folds.tolist()
    table.write_text("record_id,split\nr1,test\nr0,test\n")
    with pytest.raises(UserError, match="holds a store of other data or settings"):
        prepare(PrepareConfig(data_path=folder, output_dir=tmp_path / "s", splits_from=table), progress=False)


def test_official_folds_are_said(tmp_path, folder):
    lines = [f"r{k},{k + 1},{int(k == 2)}" for k in range(8)]
    (folder / "labels.csv").write_text("filename,fold,once\n" + "\n".join(lines))
    store = open_store(folder, num_workers=0, progress=False)
    assert (store.splits, store.label_names("all")) == ("official", ("once",))
    assert json.loads((store.path / "store.json").read_text())["folds"] == "official"


def test_given_splits_that_part_patients_are_told(tmp_path, folder, capsys):
    lines = [f"r{k},p{k // 2},{k % 2},{int(k > 3)}" for k in range(8)]
    (folder / "labels.csv").write_text("filename,patient_id,A,B\n" + "\n".join(lines))
    table = tmp_path / "splits.csv"
    table.write_text("record_id,split\nr0,train\nr1,test\nr2,val\nr4,train\nr5,train\nr6,test\nr7,val\n")
    plain = open_store(folder, num_workers=0, progress=False)
    capsys.readouterr()
    config = PrepareConfig(data_path=folder, output_dir=tmp_path / "s", num_workers=0, splits_from=table)
    for work in (lambda: prepare(config), lambda: open_store(plain.path, splits_from=table)):
        work()
        said = capsys.readouterr().err
        assert f"{table} leaves out 1 of 8 records" in said
        assert "parts 2 of 4 patients: patient p0 is in test and train; their tests are no tests" in said
    # Folds of one split are no matter, and neither is a patient whom nobody knows.
    assert check_given([1, 2, 9, 10], ["p", "p", None, None], table) == []
    assert check_given([1, 0], ["p", "p"], table) == [f"{table} leaves out 1 of 2 records"]
    prepare(dataclasses.replace(config, output_dir=tmp_path / "t"), progress=False)
    assert capsys.readouterr().err == ""
