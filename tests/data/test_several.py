"""Several data sets in one store: whose record is whose, what nobody says, and folders that hold many."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest

from hubert_ecg.config import PrepareConfig, UserError
from hubert_ecg.data import build, check_task, open_dataset, open_store, prepare
from hubert_ecg.data.datasets.several import Several
from hubert_ecg.data.folds import split_entries
from hubert_ecg.signal import LEADS

RNG = np.random.default_rng(0)
CODES = {"AF": "164889003", "RBBB": "59118001", "CRBBB": "713427006", "NSR": "426783006", "MI": "164865005"}


def write_table(folder, lines, names=("r0", "r1", "r2")):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        np.save(folder / f"{name}.npy", RNG.normal(0, 0.3, (12, 600)))
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


def write_wfdb(folder, diagnoses):
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in diagnoses.items():
        RNG.integers(-500, 500, (600, 12)).astype("<i2").tofile(folder / f"{name}.dat")
        leads = "".join(f"{name}.dat 16 1000/mV 16 0 0 0 0 {lead}\n" for lead in LEADS)
        codes = ",".join(CODES[label] for label in found)
        (folder / f"{name}.hea").write_text(f"{name} 12 500 600\n{leads}# Dx: {codes}\n")
    return folder


@pytest.fixture
def official(tmp_path):
    """Folds, and a regression task; AF is of one patient."""
    lines = ["filename,patient_id,fold,AF,SR,ef", "r0,7,1,1,0,55", "r1,8,9,0,1,", "r2,9,10,0,0,60"]
    return write_table(tmp_path / "data/official", lines)


@pytest.fixture
def dealt(tmp_path):
    """The same record and patient numbers without folds; AF and X are of one patient each."""
    lines = ["filename,patient_id,AF,X,SR"] + [f"r{k},{k + 7},{int(k == 1)},{int(k == 2)},{k % 2}" for k in range(6)]
    return write_table(tmp_path / "data/dealt", lines, [f"r{k}" for k in range(6)])


@pytest.fixture
def challenge(tmp_path):
    found = {f"E{k:05d}": ["NSR"] if k % 2 else ["CRBBB"] for k in range(1, 9)} | {"E00009": ["RBBB", "AF"]}
    return write_wfdb(tmp_path / "data/georgia", found)


def pack(dataset, folder, **options):
    return build.build(dataset, folder, shard_records=4, **options)


@pytest.fixture
def store(tmp_path, official, dealt, challenge):
    return pack(open_dataset("csv,csv,georgia", f"{official},{dealt},{challenge}"), tmp_path / "store")


def test_records_and_patients_of_two_data_sets_do_not_meet(store, official, dealt, challenge):
    index = store.index
    assert index["record_id"].is_unique
    ids = ["csv-official/r0", "csv-dealt/r0", "georgia/E00001"]
    assert set(ids) < set(index["record_id"])
    assert store.datasets.tolist() == ["csv-official"] * 3 + ["csv-dealt"] * 6 + ["georgia"] * 9
    patients = dict(zip(index["record_id"], index["patient_id"], strict=True))
    assert [patients[name] for name in ids[:2]] == ["csv-official/7", "csv-dealt/7"]
    assert index["patient_id"].isna().tolist() == [False] * 9 + [True] * 9
    assert index["source"].tolist()[3] == "csv-dealt/r0"
    assert store.dataset == "csv,csv,georgia"
    assert store.manifest["datasets"]["csv-dealt"] == {"num_records": 6, "tasks": ["all"]}
    # Samples are those of each data set alone.
    alone = pack(open_dataset("georgia", challenge), store.path.with_name("alone"))
    assert alone.datasets.tolist() == ["georgia"] * 9
    for position, record in enumerate(alone):
        np.testing.assert_array_equal(store[9 + position].signal, record.signal)


def test_entries_go_back_to_their_data_set(official, dealt):
    dataset = open_dataset("csv", f"{official},{dealt}")
    parts = [entry for part in dataset.parts.values() for entry in part.entries()]
    assert [dataset.own(entry) for entry in dataset.entries()] == parts
    assert len(dataset) == 9
    assert [record.record_id for record in dataset][:1] == ["csv-official/r0"]


def test_what_a_data_set_does_not_know_is_no_negative(store):
    assert store.tasks == ("all", "ef", "rhythm")
    assert store.label_names("all") == ("AF", "NSR", "RBBB", "SR")
    everything, ef, rhythm = (store.targets(task) for task in store.tasks)
    assert np.isfinite(everything).all()
    np.testing.assert_array_equal(everything[2], [0, 0, 0, 0])
    assert np.isnan(rhythm[:9]).all()
    assert np.isfinite(rhythm[9:]).all()
    np.testing.assert_array_equal(ef[:, 0], [55, np.nan, 60] + [np.nan] * 15)
    labels = store.index["labels_rhythm"].tolist()
    assert labels[:10] == [None] * 9 + [["NSR"]]
    # A known task without a finding is an empty list.
    assert labels[10] == []
    assert store[0].labels == {"all": ("AF",)}
    assert store[10].labels == {"all": ("RBBB",), "rhythm": ()}


def test_labels_are_learnable_over_all_of_them(store, dealt, tmp_path):
    """AF is of one patient in each data set, X of one at all; CRBBB counts as RBBB in the Challenge's records alone."""
    assert store.manifest["dropped_labels"] == {"all": ["X"], "rhythm": ["AF"]}
    assert pack(open_dataset("csv", dealt), tmp_path / "one").manifest["dropped_labels"] == {"all": ["AF", "X"]}


def test_a_label_of_one_patient_with_an_official_fold_stays(official, challenge):
    (official / "labels.csv").write_text("filename,fold,CRBBB,lone\nr0,1,1,0\nr1,9,1,1\n")
    entries, facts = split_entries(open_dataset("csv,georgia", f"{official},{challenge}"))
    assert [entry.labels["all"] for entry in entries[:2]] == [("CRBBB",), ("CRBBB", "lone")]
    assert facts["dropped_labels"] == {"all": ["AF"], "rhythm": ["AF"]}


def test_folds_are_those_of_each_data_set_alone(store, official, dealt, challenge, tmp_path):
    alone = [pack(open_dataset(name, path), tmp_path / path.name) for name, path in
             (("csv", official), ("csv", dealt), ("georgia", challenge))]  # fmt: skip
    assert store.folds.tolist() == [fold for part in alone for fold in part.folds.tolist()]
    assert store.folds[:3].tolist() == [1, 9, 10]
    assert store.splits == "official (csv-official); by patient, labels spread evenly, seed 0 (csv-dealt, georgia)"


def test_the_splits_of_one_store_split_another(store, official, dealt, challenge):
    places = f"{official},{dealt},{challenge}"
    again = open_store(places, dataset="csv,csv,georgia", splits_from=store.path / "splits.csv", progress=False)
    assert again.folds.tolist() == store.folds.tolist()
    assert again.path.name.startswith("several-")
    # The order of the names does not matter to a store, what they are does.
    assert open_store(store.path, dataset="georgia, csv,csv").path == store.path
    with pytest.raises(UserError, match="holds csv,csv,georgia, not csv"):
        open_store(store.path, dataset="csv")


def test_nothing_is_said_of_the_folds_of_a_data_set_that_cannot_be_read(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for k in range(4):
            np.save(tmp_path / name / f"r{k}.npy", np.random.default_rng(k).normal(size=(12, 5000)))
            if name == "b":
                (tmp_path / name / f"r{k}.npy").write_bytes(b"")
        (tmp_path / name / "labels.csv").write_text("filename,A\n" + "".join(f"r{k},{k % 2}\n" for k in range(4)))
    paths = f"{tmp_path / 'a'},{tmp_path / 'b'}"
    store = prepare(PrepareConfig(paths, dataset="csv,csv", output_dir=tmp_path / "s", num_workers=0), progress=False)
    assert (len(store), store.splits) == (4, "by patient, labels spread evenly, seed 0")


def test_skipped_records_are_named_with_their_data_set(official, challenge, tmp_path):
    (official / "r1.npy").write_bytes(b"nonsense")
    (challenge / "E00002.dat").unlink()
    store = pack(open_dataset("auto", f"{official},{challenge}"), tmp_path / "s")
    assert [source for source, _ in store.skipped] == ["csv/r1", "challenge/E00002"]
    for _, reason in store.skipped:
        assert str(tmp_path) not in reason
    alone = pack(open_dataset("csv", official), tmp_path / "alone")
    assert [reason for _, reason in alone.skipped] == [store.skipped[0][1]]


def test_one_folder_of_several_names(tmp_path):
    folder = write_wfdb(tmp_path / "all", {"JS00001": ["AF"], "JS10647": ["AF"], "E00001": ["AF"]})
    dataset = open_dataset("chapman,ningbo", folder)
    assert [entry.record_id for entry in dataset.entries()] == ["chapman/JS00001", "ningbo/JS10647"]
    assert dataset.tasks == ("all", "rhythm")
    with pytest.raises(UserError, match=r"JS00001\.hea is in chapman and in challenge: name each recording once"):
        open_dataset("chapman,challenge", folder).entries()
    with pytest.raises(UserError, match=r"ptb: no records \(S0001 onwards\)"):
        open_dataset("chapman,ptb", folder).entries()


def test_mistakes_in_names_and_folders(official, dealt, tmp_path):
    for names, folders, message in (
        ("csv,csv,csv", f"{official},{dealt}", r"--data_path must name a folder for each of 3 data sets .* got 2"),
        ("csv", f"{official},{official}/", "data set csv in .*official is named twice"),
        ("csv,csv", official, "is named twice"),
        ("synthetic,synthetic", None, "data set synthetic is named twice"),
        ("csv,ptbx", official, "unknown data set 'ptbx'"),
        ("csv", f"{official},{tmp_path}/nowhere", "no folder .*nowhere"),
        ("auto", f"{official},", "which recordings"),
    ):
        with pytest.raises(UserError, match=message):
            open_dataset(names, folders)
    with pytest.raises(UserError, match="is in folder-data and in folder-official"):
        open_dataset("folder", f"{tmp_path / 'data'},{official}").entries()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no recordings in .*empty"):
        open_dataset("csv,folder", f"{official},{tmp_path / 'empty'}").entries()
    (dealt / "labels.csv").write_text("filename,AF\n")
    with pytest.raises(UserError, match="data set csv-dealt has no records"):
        open_dataset("csv,csv", f"{official},{dealt}").entries()


def test_a_name_alone_takes_no_one_of_several(official, dealt, tmp_path):
    with pytest.raises(UserError, match=r"several folders below .*data have a labels\.csv: .* --data_path .*dealt,/"):
        open_dataset("csv", tmp_path / "data")
    shutil.copy(official / "labels.csv", dealt / "labels.csv")
    assert open_dataset("csv", tmp_path / "data").data_path == tmp_path / "data"


def test_a_task_of_labels_here_and_of_numbers_there(official, challenge):
    (official / "labels.csv").write_text("filename,rhythm\nr0,1.5\nr1,2.5\n")
    with pytest.raises(UserError, match=r"task rhythm .* got regression in csv, multilabel in georgia: rename"):
        open_dataset("csv,georgia", f"{official},{challenge}")


def test_default_places_and_folders_with_commas(official, dealt, tmp_path, monkeypatch):
    monkeypatch.setenv("HUBERT_ECG_DATA", str(tmp_path / "data"))
    assert list(open_dataset("synthetic,georgia", write_wfdb(tmp_path / "g", {"E00001": []})).parts) == [
        "synthetic",
        "georgia",
    ]
    (tmp_path / "data/csv").symlink_to(official)
    dataset = open_dataset("csv,csv", f",{dealt}")
    assert [part.data_path for part in dataset.parts.values()] == [tmp_path / "data/csv", dealt]
    odd = tmp_path / "a,b"
    shutil.copytree(dealt, odd)
    assert open_dataset("csv", odd).data_path == odd
    check_task("csv,csv", f"{official},{dealt}", "ef")
    with pytest.raises(UserError, match="csv,csv has no task 'rhythm'; its tasks: all, ef"):
        check_task("csv,csv", f"{official},{dealt}", "rhythm")


def test_names_of_equal_folders(tmp_path):
    places = [write_table(tmp_path / site / "ecg", ["filename,AF", "r0,1"]) for site in "abc"]
    dataset = open_dataset("csv", ",".join(map(str, places)))
    assert list(dataset.parts) == ["csv-ecg", "csv-ecg-2", "csv-ecg-3"]


def test_a_generated_record_is_the_same_in_company(official, tmp_path):
    from hubert_ecg.data.synthetic import Cohort

    cohort = Cohort(num_records=4)
    both = Several([cohort, open_dataset("csv", official)])
    entries, facts = split_entries(both)
    assert facts["dropped_labels"] == {}
    for alone, entry in zip(cohort.entries(), entries, strict=False):
        np.testing.assert_array_equal(both.read(entry).signal, cohort.read(alone).signal)


def test_the_fingerprint_follows_every_folder(official, dealt):
    places = f"{official},{dealt}"
    before = open_dataset("csv", places).fingerprint()
    assert open_dataset("csv", places).fingerprint() == before
    os.utime(dealt / "r3.npy", (1, 1))
    assert open_dataset("csv", places).fingerprint() != before


def test_auto_takes_a_folder_of_data_sets(official, dealt, challenge, tmp_path, capsys):
    write_wfdb(tmp_path / "data/more/g1", {"A0001": ["AF"]})
    (tmp_path / "data/plain/sub").mkdir(parents=True)
    np.save(tmp_path / "data/plain/sub/x.npy", RNG.normal(0, 0.3, (12, 600)))
    (tmp_path / "data/plain/notes.txt").write_text("No ECG\n")
    pack(open_dataset("csv", official), tmp_path / "data/packed")
    store = prepare(PrepareConfig(tmp_path / "data", output_dir=tmp_path / "s", num_workers=0))
    counts = {name: facts["num_records"] for name, facts in store.manifest["datasets"].items()}
    # Each Challenge folder by itself, as there are others between them.
    assert counts == {
        "csv-dealt": 6,
        "challenge-georgia": 9,
        "challenge-more": 1,
        "csv-official": 3,
        "folder": 1,
    }
    said = capsys.readouterr().err
    assert "of them csv-dealt 6, challenge-georgia 9, challenge-more 1, csv-official 3, folder 1" in said
    assert store.index["record_id"].tolist()[-1] == "folder/sub/x"


def test_auto_puts_parts_of_one_data_set_together(tmp_path):
    for name in ("a/g1/A0001", "a/g2/A0002", "b/E00001"):
        write_wfdb((tmp_path / name).parent, {name.rsplit("/", 1)[1]: ["AF"]})
    dataset = open_dataset("auto", tmp_path)
    assert (dataset.name, dataset.data_path) == ("challenge", tmp_path)
    assert [entry.record_id for entry in dataset.entries()] == ["A0001", "A0002", "E00001"]


def test_auto_finds_a_table_in_any_depth(tmp_path, official):
    (tmp_path / "x/y/z").mkdir(parents=True)
    official.rename(tmp_path / "x/y/z/official")
    assert open_dataset("auto", tmp_path / "x").data_path == tmp_path / "x/y/z/official"
    # As ever, an archive's own folder goes without saying.
    assert open_dataset("auto", tmp_path / "x/y/z").data_path == tmp_path / "x/y/z"


def test_auto_gathers_recordings_beside_the_folder_of_their_table(tmp_path):
    for number, names in (("1", ("A0001",)), ("2", ("A0002", "A0003"))):
        (tmp_path / f"cpsc/TrainingSet{number}").mkdir(parents=True)
        for name in names:
            (tmp_path / f"cpsc/TrainingSet{number}/{name}.mat").touch()
    table = tmp_path / "cpsc/TrainingSet1/REFERENCE.csv"
    table.write_text("Recording,First_label\n" + "".join(f"A000{k},1\n" for k in (1, 2, 3)))
    dataset = open_dataset("auto", tmp_path / "cpsc")
    assert (dataset.name, [entry.path.is_file() for entry in dataset.entries()]) == ("cpsc2018", [True] * 3)
    # Other recordings stay apart, and so does what its table does not ask for.
    np.save(tmp_path / "x.npy", np.zeros((12, 600)))
    (tmp_path / "plain").mkdir()
    (tmp_path / "x.npy").rename(tmp_path / "plain/x.npy")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/B.mat").touch()
    assert list(open_dataset("auto", tmp_path).parts) == ["cpsc2018", "folder-other", "folder-plain"]


def test_auto_refuses_recordings_beside_data_sets(official, challenge, tmp_path):
    # A mark that somebody left is no recording.
    (tmp_path / "data/done.txt").touch()
    assert len(open_dataset("auto", tmp_path / "data").parts) == 2
    np.save(tmp_path / "data/x.npy", np.zeros((12, 600)))
    with pytest.raises(UserError, match=r"data holds recordings beside other data sets \(challenge in georgia, csv in"):
        open_dataset("auto", tmp_path / "data")
    assert open_dataset("folder", tmp_path / "data").name == "folder"


def test_every_real_recording_is_in_one_data_set(shared_data):
    dataset = open_dataset("auto", shared_data)
    counts = {name: len(part) for name, part in dataset.parts.items()}
    assert counts == {
        "challenge": 143,
        "folder-code15_ecgfm": 10,
        "challenge2025": 133,
        "folder-cpsc2018_raw": 2,
        "ludb": 120,
        "ptbdb": 1,
        "ptbxl": 78,
        "sph": 6,
    }
    entries = dataset.entries()
    assert len({entry.record_id for entry in entries}) == len(entries) == 493
