"""Each data set from a small tree in its published layout, and from the real recordings."""

from __future__ import annotations

import contextlib
import csv
import os

import numpy as np
import pandas as pd
import pytest
import wfdb

from hubert_ecg.config import UserError
from hubert_ecg.data import DATASETS, ReadError, open_dataset
from hubert_ecg.data.datasets.challenge import snomed
from hubert_ecg.data.datasets.sph import aha_statements
from hubert_ecg.signal import LEADS

h5py = pytest.importorskip("h5py")
rng = np.random.default_rng(0)


def write_wfdb(path, comments, num_samples=1000, rate_hz=500, leads=LEADS, fmt="16"):
    path.parent.mkdir(parents=True, exist_ok=True)
    signal = rng.normal(0, 0.3, (num_samples, len(leads)))
    kind = {"fmt": [fmt] * len(leads), "units": ["mV"] * len(leads), "sig_name": list(leads)}
    gains = {"adc_gain": [1000.0] * len(leads), "baseline": [0] * len(leads)}
    wfdb.wrsamp(path.name, rate_hz, p_signal=signal, comments=comments, write_dir=str(path.parent), **kind, **gains)
    return signal.T


def challenge(folder, names, nesting):
    codes = (["426783006"], ["164889003", "59118001"], ["713427006", "426783006"], ["59118001"])
    for position, name in enumerate(names):
        dx = codes[position % 4]
        write_wfdb(folder / nesting / name, ["Age: 50", "Sex: Male", f"Dx: {','.join(dx)}"])
    return {"all": {"NSR": 2, "RBBB": 3}, "rhythm": {"NSR": 2}}


def make_ptbxl(folder, shared_data, records=("records500", "records100")):
    (folder / "scp_statements.csv").write_text((shared_data / "ptbxl/scp_statements.csv").read_text())
    codes = [{"NORM": 100.0, "SR": 0.0}, {"ASMI": 15.0, "SR": 0.0}, {"AMI": 100.0, "AFIB": 0.0}, {"NDT": 100.0}]
    rows = []
    for number, statements in enumerate(codes, start=1):
        row = {"ecg_id": number, "patient_id": 100.0 + number, "age": 56.0, "sex": 1, "scp_codes": repr(statements)}
        row |= {"strat_fold": (1, 8, 9, 10)[number - 1]}
        for column, kind, suffix in (("filename_lr", "records100", "lr"), ("filename_hr", "records500", "hr")):
            row[column] = f"{kind}/00000/{number:05d}_{suffix}"
            if kind in records:
                rate_hz = 100 if suffix == "lr" else 500
                write_wfdb(folder / row[column], [], num_samples=10 * rate_hz, rate_hz=rate_hz)
        rows.append(row)
    pd.DataFrame(rows).to_csv(folder / "ptbxl_database.csv", index=False)
    return {
        "all": {"NORM": 1, "SR": 2, "ASMI": 1, "AMI": 1, "AFIB": 1, "NDT": 1},
        "diag": {"NORM": 1, "ASMI": 1, "AMI": 1, "NDT": 1},
        "diag_subclass": {"NORM": 1, "AMI": 2, "STTC": 1},
        "diag_superclass": {"NORM": 1, "MI": 2, "STTC": 1},
        "form": {"NDT": 1},
        "rhythm": {"SR": 2, "AFIB": 1},
    }


def make_hefei(folder):
    for number in (1, 2, 3):
        path = folder / f"hf_round2_train/{number}.txt"
        path.parent.mkdir(exist_ok=True)
        np.savetxt(path, rng.integers(-99, 99, (5000, 8)), "%d", header="I II V1 V2 V3 V4 V5 V6", comments="")
    (folder / "hf_round2_arrythmia.txt").write_text("窦性心律\n电轴左偏\n", encoding="utf-8")
    lines = ("1.txt\t83\tFEMALE\t窦性心律\n", "2.txt\t\t\t窦性心律\t电轴左偏\n", "3.txt\t40\tMALE\t电轴左偏\n")
    (folder / "hf_round2_label.txt").write_text("".join(lines), encoding="utf-8")
    return {"all": {"NSR": 2, "LAD": 2}, "findings": {"窦性心律": 2, "电轴左偏": 2}}


def make_sph(folder):
    (folder / "records").mkdir()
    for name in ("A00001", "A00002", "A00003", "A00004"):
        with h5py.File(folder / f"records/{name}.h5", "w") as file:
            file["ecg"] = rng.normal(0, 0.3, (12, 5000)).astype(np.float16)
    (folder / "metadata.csv").write_text(
        "ECG_ID,AHA_Code,Patient_ID,Age,Sex,N,Date\n"
        "A00001,22;23,S00001,55,M,5000,2020-03-04\n"
        "A00002,1,S00002,32,F,5000,2019-09-03\n"
        "A00003,60+310;22,S00003,32,F,5000,2019-09-03\n"
        "A00004,1,S00002,33,F,5000,2020-09-03\n"
    )
    (folder / "code.csv").write_text("Code,Description\n1,Normal ECG\n")
    # A normal ECG is of one patient, twice.
    return {"all": {"Sinus bradycardia": 2}}


def exams(folder, columns, file_rows, with_ids):
    """Files of exams, centred in zeros, with one row of zeros too many, as CODE-15 has it."""
    for name, ids in file_rows.items():
        tracings = np.zeros((len(ids) + with_ids, 4096, 12), dtype=np.float32)
        for row, exam in enumerate(ids):
            tracings[row, 648:3448] = np.sin(np.arange(1, 2801) * exam / 500)[:, None]
        with h5py.File(folder / name, "w") as file:
            file["tracings"] = tracings
            if with_ids:
                file["exam_id"] = np.array([*ids, 0])
    pd.DataFrame(columns).to_csv(folder / "exams.csv", index=False)


def make_code15(folder):
    labels = {name: [False] * 5 for name in ("1dAVb", "RBBB", "LBBB", "SB", "ST", "AF")}
    labels["RBBB"], labels["AF"] = [True, True, False, False, False], [True, False, False, True, True]
    people = {"age": [38] * 5, "is_male": [True, False, None, True, True], "nn_predicted_age": [40.5] * 5}
    files = {"patient_id": [1, 2, 3, 4, 4], "trace_file": ["exams_part0.hdf5"] * 3 + ["exams_part17.hdf5"] * 2}
    columns = {"exam_id": [11, 12, 13, 14, 15], **people, **labels, **files, "normal_ecg": [False] * 5}
    exams(folder, columns, {"exams_part17.hdf5": [15, 14], "exams_part0.hdf5": [12, 13, 11]}, with_ids=True)
    (folder / "code15_chagas_labels.csv").write_text("exam_id,patient_id,chagas\n11,1,True\n12,2,True\n13,3,False\n")
    return {"all": {"RBBB": 2, "AF": 3}, "chagas": {"Chagas": 2}}


def make_samitrop(folder):
    columns = {"exam_id": [21, 22, 23], "age": [60, 61, 62], "is_male": [True, False, False]}
    columns |= {"normal_ecg": [False, True, True], "death": [True, True, False], "timey": [1.5, 2.5, 3.5]}
    exams(folder, columns, {"exams.hdf5": [21, 22, 23]}, with_ids=False)
    return {"all": {"death": 2, "normal_ecg": 2}}


def make_ludb(folder):
    (folder / "ludb.csv").write_text("ID,Sex,Age,Rhythms\n1,F\n,51\n,Sinus rhythm\n")
    notes = (
        ("Rhythm: Sinus rhythm.",),
        ("Rhythm: Sinus rhythm.", "Left atrial hypertrophy. "),
        ("Left atrial hypertrophy",),
    )
    for number, lines in enumerate(notes, start=1):
        comments = ["<age>: 51", "<sex>: F", "<diagnoses>:", *lines]
        write_wfdb(folder / f"data/{number}", comments, leads=[name.lower() for name in LEADS])
    return {"all": {"Rhythm: Sinus rhythm": 2, "Left atrial hypertrophy": 2}, "rhythm": {"Sinus rhythm": 2}}


def make_cpsc2018(folder):
    from scipy.io import savemat

    for part, name in ((1, "A0001"), (1, "A0002"), (2, "A2500")):
        (folder / f"TrainingSet{part}").mkdir(exist_ok=True)
        content = {"sex": "Male", "age": 74, "data": rng.normal(0, 0.3, (12, 5000))}
        savemat(folder / f"TrainingSet{part}/{name}.mat", {"ECG": content})
    table = "Recording,First_label,Second_label,Third_label\nA0001,5,,\nA0002,2,5,\nA2500,2,,\n"
    (folder / "REFERENCE.csv").write_text(table)
    return {"all": {"RBBB": 2, "AF": 2}}


def make_ptbdb(folder):
    for patient, record, reason in ((1, "s0010_re", "Myocardial infarction"), (2, "s0015lre", "Myocardial infarction")):
        leads = [*(name.lower() for name in LEADS), "vx", "vy", "vz"]
        comments = ["age: 81", "sex: female", "Diagnose:", f"Reason for admission: {reason}"]
        write_wfdb(folder / f"patient{patient:03d}/{record}", comments, rate_hz=1000, leads=leads)
    return {"all": {"Myocardial infarction": 2}}


def make_challenge2025(folder):
    for name, source, chagas in (("1", "CODE-15%", True), ("2", "SaMi-Trop", True), ("3", "PTB-XL", False)):
        comments = ["Age: 22", "Sex: Female", f"Chagas label: {chagas}", f"Source: {source}"]
        write_wfdb(folder / f"part/{name}", comments, rate_hz=400)
    return {"all": {"Chagas": 2}}


def make_csv(folder):
    for name in ("a", "b", "c"):
        np.save(folder / f"{name}.npy", rng.normal(0, 0.3, (12, 5000)))
    (folder / "labels.csv").write_text("filename,split,AF,SR\na,train,1,0\nb,val,1,1\nc.npy,test,0,1\n")
    return {"all": {"AF": 2, "SR": 2}}


def make_folder(folder):
    np.save(folder / "a.npy", rng.normal(0, 0.3, (12, 5000)))
    return {}


MAKERS = {
    "hefei": (make_hefei, 3, 500),
    "sph": (make_sph, 4, 500),
    "code15": (make_code15, 5, 400),
    "samitrop": (make_samitrop, 3, 400),
    "ludb": (make_ludb, 3, 500),
    "cpsc2018": (make_cpsc2018, 3, 500),
    "ptbdb": (make_ptbdb, 2, 1000),
    "challenge2025": (make_challenge2025, 3, 400),
    "csv": (make_csv, 3, 500),
    "folder": (make_folder, 1, 500),
    "challenge": (lambda folder: challenge(folder, ["A0001", "E00001", "HR00001", "S0001"], "training/x/g1"), 4, 500),
}


def check(dataset, tasks, num_records, rate_hz):
    entries = dataset.entries()
    assert len(entries) == num_records
    assert dict.fromkeys(dataset.tasks) == dict.fromkeys(tasks)
    for task, counts in tasks.items():
        assert dataset.label_names(task) == tuple(sorted(counts))
        has = [dataset.synonyms.get(label, label) for entry in entries for label in entry.labels[task]]
        assert {label: has.count(label) for label in counts} == counts
    assert len({entry.record_id for entry in entries}) == num_records
    for entry in entries:
        record = dataset.read(entry)
        assert record.sampling_rate_hz == rate_hz
        leads, present = record.standard_leads()
        assert present.all()
        assert 0.1 < np.abs(leads).max() < 5


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "in_a_folder_more"])
@pytest.mark.parametrize("name", MAKERS)
def test_layout(tmp_path, name, nested):
    make, num_records, rate_hz = MAKERS[name]
    folder = tmp_path / "download/of-this-version-1.0.3" if nested else tmp_path / "download"
    folder.mkdir(parents=True)
    tasks = make(folder)
    dataset = open_dataset("auto", tmp_path / "download")
    assert dataset.name == name
    check(dataset, tasks, num_records, rate_hz)
    assert open_dataset(name, tmp_path / "download").entries() == dataset.entries()


def test_every_data_set_has_a_layout_here():
    elsewhere = {"ptbxl", "synthetic", "chapman", "ningbo", "cpsc", "cpsc_extra", "georgia", "ptb"}
    assert MAKERS.keys() | elsewhere == DATASETS.keys()


@pytest.mark.parametrize("records", [("records100", "records500"), ("records500",), ("records100",)])
def test_ptbxl_layouts(tmp_path, shared_data, records):
    folder = tmp_path / "ptb-xl-a-large-publicly-available-electrocardiography-dataset-1.0.3"
    folder.mkdir()
    tasks = make_ptbxl(folder, shared_data, records)
    dataset = open_dataset("auto", tmp_path)
    assert dataset.name == "ptbxl"
    check(dataset, tasks, 4, 500 if "records500" in records else 100)
    assert [entry.fold for entry in dataset.entries()] == [1, 8, 9, 10]


@pytest.mark.parametrize(
    ("name", "records"),
    {
        "chapman": ("JS00001", "JS00002", "JS10645", "JS10646"),
        "ningbo": ("JS10647", "JS10648", "JS45550", "JS45551"),
        "cpsc": ("A0001", "A0002", "A0003", "A6877"),
        "cpsc_extra": ("Q0001", "Q0002", "Q0003", "Q3581"),
        "georgia": ("E00001", "E00002", "E00003", "E10344"),
        "ptb": ("S0001", "S0002", "S0003", "S0549"),
    }.items(),
)
@pytest.mark.parametrize("nesting", ["training/source/g1", "WFDBRecords/01/010", "."])
def test_challenge_layouts(tmp_path, name, records, nesting):
    tasks = challenge(tmp_path, records, nesting)
    check(open_dataset(name, tmp_path), tasks, 4, 500)


@pytest.mark.parametrize(
    ("name", "column", "num_labels", "first"),
    [
        ("chapman", "Chapman_Shaoxing", 52, "JS0000{}"),
        ("ningbo", "Ningbo", 76, "JS2000{}"),
        ("cpsc", "CPSC", 9, "A000{}"),
        ("georgia", "Georgia", 62, "E0000{}"),
    ],
)
def test_counts_of_complete_downloads(tmp_path, shared_data, name, column, num_labels, first):
    """Headers with each code as often as the Challenge counted it, up to three times."""
    tables = [
        pd.read_csv(shared_data / f"cinc2021/dx_mapping_{kind}.csv", dtype=str) for kind in ("scored", "unscored")
    ]
    counts = pd.concat(tables).set_index("SNOMEDCTCode")[column].astype(int)
    for number in (1, 2, 3):
        codes = ",".join(counts.index[counts >= number])
        (tmp_path / f"{first.format(number)}.hea").write_text(f"x 12 500 5000\n# Dx: {codes}\n")
    dataset = open_dataset(name, tmp_path)
    assert len(dataset.label_names("all")) == num_labels
    assert len(dataset.entries()[0].labels["all"]) == (counts > 0).sum()


def test_tables_of_codes():
    assert len(snomed()) == 133
    assert len(aha_statements()) == 117
    assert (aha_statements()["22"], aha_statements()["106"]) == ("Sinus bradycardia", "Right bundle-branch block")


def test_published_splits(tmp_path):
    for name in ("A0001", "A0002", "A0003"):
        write_wfdb(tmp_path / "WFDBRecords/01" / name, [])
    for split, name in (("train", "A0001"), ("val", "A0002"), ("test", "A0003")):
        (tmp_path / f"cpsc_{split}.csv").write_text(
            f"filename,age,sex,AF,SR\n{name}.hea.npy,50,M,1,{int(split == 'val')}\n"
        )
    dataset = open_dataset("csv", tmp_path)
    entries = {entry.path.stem: entry for entry in dataset.entries()}
    assert {name: entry.fold for name, entry in entries.items()} == {"A0001": 1, "A0002": 9, "A0003": 10}
    assert {entry.path.suffix for entry in entries.values()} == {".hea"}
    # Folds of the table are official: a label of one record stays.
    assert dataset.label_names("all") == ("AF", "SR")
    (tmp_path / "other.csv").write_text("filename\n")
    with pytest.raises(UserError, match=r"csv: .* must hold labels\.csv, one other table, or NAME_train\.csv"):
        open_dataset("csv", tmp_path)


def test_exams_are_told_apart_by_id(tmp_path):
    make_code15(tmp_path)
    dataset = open_dataset("code15", tmp_path)
    for entry in dataset.entries():
        signal = dataset.read(entry).signal
        np.testing.assert_allclose(signal[3], np.sin(np.arange(1, 2801) * int(entry.record_id) / 500), atol=1e-6)
        assert signal.shape == (12, 2800)
    assert [entry.patient_id for entry in dataset.entries()] == ["1", "2", "3", "4", "4"]
    assert [entry.sex for entry in dataset.entries()][:3] == ["male", "female", None]
    (tmp_path / "exams_part0.hdf5").unlink()
    with h5py.File(tmp_path / "exams_part17.hdf5", "r+") as file:
        file["exam_id"][0] = 99
        file["tracings"][1] = 0
    first, *_, fourth, fifth = dataset.entries()
    for entry, reason in ((first, "exams_part0.hdf5"), (fourth, "nothing but zeros"), (fifth, "exam 15 is not in")):
        with pytest.raises(ReadError, match=reason):
            dataset.read(entry)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_damaged_part_is_left_out(tmp_path):
    make_code15(tmp_path)
    dataset = open_dataset("code15", tmp_path)
    first, *_ = dataset.entries()
    with h5py.File(tmp_path / "exams_part0.hdf5", "r+") as file:
        del file["tracings"]
        file.create_group("tracings")
    with pytest.raises(ReadError, match=r"exams_part0\.hdf5#"):
        dataset.read(first)
    part = tmp_path / "exams_part17.hdf5"
    content = part.read_bytes()
    for place in range(0, len(content), max(1, len(content) // 200)):
        part.write_bytes(content[:place] + b"\xff" * 16 + content[place + 16 :])
        for entry in dataset.entries()[3:]:
            with contextlib.suppress(ReadError):
                dataset.read(entry)


def test_sources_of_the_challenge_2025(tmp_path):
    make_challenge2025(tmp_path)
    assert [entry.record_id for entry in open_dataset("samitrop", tmp_path).entries()] == ["part/2"]
    assert [entry.record_id for entry in open_dataset("code15", tmp_path).entries()] == ["part/1"]


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("sph", "metadata.csv", "ECG_ID,Age\n", r"sph: .* has no column AHA_Code, Patient_ID, Sex"),
        ("sph", "other.csv", "", r"sph: no metadata\.csv"),
        ("code15", "exams.csv", "exam_id\n", r"code15: .* has no column 1dAVb, AF"),
        ("code15", "exams.csv", "", r"code15: .*exams\.csv cannot be read"),
        ("samitrop", "a.txt", "", r"samitrop: no records"),
        ("ludb", "a.txt", "", r"ludb: no WFDB headers"),
        ("ptbdb", "a.txt", "", r"ptbdb: no WFDB headers"),
        ("cpsc2018", "a.txt", "", r"cpsc2018: no REFERENCE\.csv"),
        ("cpsc2018", "REFERENCE.csv", "Recording,First_label\nA1,10\n", r"must be 1 to 9, got '10' for A1"),
    ],
)
def test_mistakes(tmp_path, name, file, content, message):
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=message):
        open_dataset(name, tmp_path).entries()


CPSC_NAMES = {"1AVB": "IAVB"}


def code_names(labels):
    return {aha_statements()[label] for label in labels}


# source of index.csv -> data set, task, folder, and the index's labels as that data set has them.
REAL = {
    "ptbxl": ("ptbxl", "diag_superclass", "ptbxl", set),
    "ludb": ("ludb", "all", "ludb", set),
    "code15_samitrop": (
        "challenge2025",
        "all",
        "code15_samitrop",
        lambda labels: {"Chagas"} & {x[:-5] for x in labels},
    ),
    "code15_ecgfm": ("csv", "all", "code15_ecgfm", set),
    "sph": ("sph", "all", "sph", code_names),
    "cpsc2018_raw": ("cpsc2018", "all", "cpsc2018_raw", lambda labels: {CPSC_NAMES.get(name, name) for name in labels}),
    "ptbdb": ("ptbdb", "all", "ptbdb", lambda labels: {labels[0].removeprefix("Reason for admission: ")}),
    **{
        f"cinc2021/{folder}": (name, "all", f"cinc2021/{folder}", set)
        for folder, name in {
            "ptb-xl": "challenge",
            "chapman_ningbo": "challenge",
            "georgia": "georgia",
            "cpsc_2018": "cpsc",
            "cpsc_2018_extra": "cpsc_extra",
            "ptb": "ptb",
        }.items()
    },
}


@pytest.mark.parametrize("source", REAL)
def test_real_recordings_are_read_and_labelled_as_indexed(shared_data, tmp_path, source):
    with open(shared_data / "index.csv", encoding="utf-8") as file:
        rows = {row["record"]: row for row in csv.DictReader(file) if row["source"] == source}
    name, task, folder, as_labels = REAL[source]
    place = shared_data / folder
    if source == "cpsc2018_raw":
        # Its table is not among the files; the index has the labels.
        classes = ("NSR", "AF", "1AVB", "LBBB", "RBBB", "PAC", "PVC", "STD", "STE")
        lines = [f"{record},{classes.index(row['labels']) + 1},," for record, row in rows.items()]
        (tmp_path / "REFERENCE.csv").write_text("Recording,First_label,Second_label,Third_label\n" + "\n".join(lines))
        (tmp_path / "TrainingSet1").symlink_to(place)
        place = tmp_path
    dataset = open_dataset(name, place)
    entries = {entry.path.stem: entry for entry in dataset.entries()}
    assert entries.keys() == rows.keys()
    for record, row in rows.items():
        labels = set(entries[record].labels[task]) - {"normal_ecg", "death"}
        assert labels == as_labels(row["labels"].split(";") if row["labels"] else []), record
        signal = dataset.read(entries[record])
        assert signal.sampling_rate_hz == float(row["fs"]), record
        # Frank leads are no standard leads.
        assert signal.num_samples == int(row["n_samples"]), record
        leads, present = signal.standard_leads()
        assert present.all()
        assert np.isfinite(leads).all()


def test_the_index_has_no_other_source(shared_data):
    with open(shared_data / "index.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["source"] for row in rows} == REAL.keys()
    assert {row["fs"] for row in rows} == {"400", "500", "1000"}
    assert os.path.isfile(shared_data / "cinc2021/georgia/E07520.hea")
