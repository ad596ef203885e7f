"""Packing under torchrun, and what training and evaluation make of a store of several data sets."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hubert_ecg import cli
from hubert_ecg.config import EvaluateConfig, FinetuneConfig, PrepareConfig
from hubert_ecg.data import build, open_dataset
from hubert_ecg.data.folds import TEST_FOLD
from hubert_ecg.train import prepare
from hubert_ecg.train.evaluate import labelled_records
from hubert_ecg.train.finetune import TaskRecords
from hubert_ecg.train.records import split_for_pretraining

from . import pack

PACK = str(Path(pack.__file__))


def content(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.stem != "doctor"
    }


def write_table(folder, num_records, columns, row):
    """A data set of noise; ``row(k)`` is what the columns say of record k."""
    random = np.random.default_rng(len(columns))
    folder.mkdir(parents=True)
    lines = [f"filename,{columns}"]
    for k in range(num_records):
        np.save(folder / f"r{k}.npy", random.normal(0, 0.3, (12, 3000)))
        lines.append(f"r{k},{row(k)}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def clinics(tmp_path):
    """Labels and an ejection fraction; labels alone, of which one is unknown in the first; numbers alone."""
    a = write_table(tmp_path / "data/a", 10, "fold,AF,SR,ef", lambda k: f"{k + 1},{k % 2},{1 - k % 2},{50 + k}")
    b = write_table(tmp_path / "data/b", 20, "AF,LBBB", lambda k: f"{int(k % 4 == 0)},{int(k % 4 == 1)}")
    c = write_table(tmp_path / "data/c", 10, "fold,ef", lambda k: f"{k + 1},{40 + k}")
    return a, b, c


def test_two_ranks_go_on_after_one_was_killed(clinics, tmp_path, monkeypatch, processes):
    a, b, _ = clinics
    flags = ["--dataset", "csv,csv", "--data_path", f"{a},{b}", "--num_workers", "0", "--output_dir"]
    whole = build.build(open_dataset("csv", f"{a},{b}"), tmp_path / "whole", shard_records=pack.SHARD_RECORDS)
    command = [PACK, *flags, tmp_path / "s"]
    with monkeypatch.context() as killing:
        killing.setenv("PACK_KILLED", "1")
        processes.run(2, *command, fails=True)
    assert (tmp_path / "s/building.json").is_file()
    assert not (tmp_path / "s/shards/00001.parquet").exists()
    done = processes.run(2, *command)
    line = [line for line in done.err.splitlines() if line.startswith("packing")][-1]
    # What the first rank still has to do of 15 shards, some of which it has packed before.
    assert re.fullmatch(r"packing csv,csv, the share of one of 2 ranks: (\d+)/\1  0:\d\d:\d\d", line), line
    assert f"30 records in {tmp_path / 's'}\nof them csv-a 10, csv-b 20\n" in done.err
    assert content(tmp_path / "s") == content(whole.path)


def task_records(store, task, **fields):
    config = {"dataset": "csv,csv,csv", "task": task, "data_path": store.path, "pretrained_model": "random:tiny"}
    return TaskRecords(store, FinetuneConfig(**config | fields))


@pytest.fixture
def store(clinics, tmp_path):
    return prepare(PrepareConfig(",".join(map(str, clinics)), output_dir=tmp_path / "store", num_workers=0))


def names_of(store, positions):
    return {name: int((store.datasets[positions] == name).sum()) for name in np.unique(store.datasets)}


def test_records_of_a_data_set_without_the_task_are_not_trained_on(store):
    assert store.tasks == ("all", "ef")
    found = task_records(store, "all")
    assert found.label_names == ("AF", "LBBB", "SR")
    used = np.concatenate((found.train, found.validation))
    in_b = int(((store.datasets == "csv-b") & (store.folds != TEST_FOLD)).sum())
    assert names_of(store, used) == {"csv-a": 9, "csv-b": in_b, "csv-c": 0}
    assert np.isfinite(found.targets[used]).all()
    assert "9 records of which all is not known are left out" in found.news
    # Half of the second's records have no finding, which is something else.
    told = [line for line in found.news if "without a label of the task are kept as negatives" in line]
    assert int(told[0].split()[0]) == int((found.targets[used].sum(1) == 0).sum()) > 0
    assert "csv-a has no record with 1 of the labels: all are negatives" in found.news
    assert "csv-b has no record with 1 of the labels: all are negatives" in found.news
    fewer = task_records(store, "all", unlabelled="drop")
    assert (fewer.targets[fewer.train].sum(1) > 0).all()
    numbers = task_records(store, "ef")
    assert names_of(store, numbers.train) == {"csv-a": 8, "csv-b": 0, "csv-c": 8}
    assert any(line.startswith(f"{in_b} records of which ef is not known") for line in numbers.news)


def test_records_of_a_data_set_without_the_task_are_not_evaluated(store):
    model = SimpleNamespace(label_names=("AF", "SR"), config=SimpleNamespace(problem="multilabel"))
    config = {"dataset": "csv,csv,csv", "task": "all", "model_path": "m", "test_split": "all"}
    records, targets = labelled_records(store, model, EvaluateConfig(**config))
    assert names_of(store, records) == {"csv-a": 10, "csv-b": 20, "csv-c": 0}
    assert np.isfinite(targets).all()
    records, targets = labelled_records(store, model, EvaluateConfig(**config, unlabelled="drop"))
    assert names_of(store, records) == {"csv-a": 10, "csv-b": 10, "csv-c": 0}


def test_pretraining_keeps_the_folds_of_every_data_set(store):
    train, validation, said = split_for_pretraining(store, 0.1, 0)
    assert not set(train) & set(validation)
    in_b = int(((store.datasets == "csv-b") & (store.folds <= 8)).sum())
    assert names_of(store, train) == {"csv-a": 8, "csv-b": in_b, "csv-c": 8}
    assert said.startswith(f"{16 + in_b} records in folds 1-8 train, ")


def test_the_whole_path_of_a_store_of_several_data_sets(store, tmp_path, capsys):
    """Pretrained on all of them, fine-tuned on a task that one does not have, evaluated."""
    common = ["--data_path", str(store.path), "--output_dir", str(tmp_path), "--device", "cpu", "--max_steps", "1"]
    fast = ["--size", "tiny", "--num_clusters", "4", "--batch_size", "4", "--num_workers", "0"]
    assert cli.main(["pretrain", *common, *fast]) == 0
    task = ["--dataset", "csv,csv,csv", "--task", "all"]
    tuned = ["--pretrained_model", str(tmp_path / "hubert_ecg.pt"), "--num_crops", "1", "--num_workers", "0"]
    assert cli.main(["finetune", *common, *task, *tuned]) == 0
    assert "3 labels (multilabel)" in capsys.readouterr().out
    model = ["--model_path", str(tmp_path / "csv,csv,csv_all.pt"), "--data_path", str(store.path), "--num_workers", "0"]
    shown = ["--test_split", "all", "--num_bootstrap", "2", "--output_dir", str(tmp_path / "report")]
    assert cli.main(["evaluate", *task, *model, *shown]) == 0
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert report["facts"]["Data"]["source"] == "10 of csv-a, 20 of csv-b"
