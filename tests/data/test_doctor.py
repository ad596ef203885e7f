"""What the doctor says of a store whose faults are known."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.signal

from hubert_ecg.config import UserError
from hubert_ecg.data import ReadError, Store, open_dataset
from hubert_ecg.data.build import build
from hubert_ecg.data.dataset import Dataset, Entry
from hubert_ecg.data.doctor import duplicates, examine
from hubert_ecg.data.packing import Settings
from hubert_ecg.data.record import Record
from hubert_ecg.data.store import file_hash
from hubert_ecg.signal import LEADS

NAMES = (
    "plain",
    "flat",
    "clipped",
    "inverted",
    "arms",
    "gaps",
    "volts",
    "copy",
    "slow",
    "part",
    "other",
    "broken",
    "mad",
)
LABELS = {"plain": ("A",), "flat": ("A", "B"), "clipped": ("B",), "copy": ("A",), "slow": ("A",)}
FOLDS = {"copy": 10, "slow": 9, "part": 9}
HOSTILE = "<img src=x onerror=alert(1)>.npy"


class Patients(Dataset):
    """Synthetic recordings with one fault each."""

    name = "patients"
    tasks = ("all", "rate")

    def __init__(self, names=NAMES):
        self.names = names
        cohort = open_dataset("synthetic", None)
        self.clean = [cohort.read(entry) for entry in cohort.entries()[: len(NAMES)]]

    def problem_of(self, task):
        return "regression" if task == "rate" else "multilabel"

    def entries(self):
        return [
            Entry(
                name,
                source=HOSTILE if name == "broken" else f"{name}.npy",
                # One patient in training and in test.
                patient_id={"clipped": "p", "copy": "p"}.get(name),
                fold=FOLDS.get(name, 1),
                age=40.0,
                sex="female" if name == "plain" else None,
                labels={"all": LABELS.get(name, ())},
                values={"rate": 60.0} if name == "plain" else {},
            )
            for name in self.names
        ]

    def read(self, entry):
        name = entry.record_id
        copied = name in ("copy", "slow", "part")
        record = self.clean[0 if copied else NAMES.index(name)]
        signal, rate, leads = record.signal.copy(), record.sampling_rate_hz, record.lead_names
        if name == "flat":
            signal[7] = 0.1
        elif name == "clipped":
            signal[9] = np.clip(signal[9], 0.5 * signal[9].min(), 0.5 * signal[9].max())
        elif name == "inverted":
            signal[4] *= -1
        elif name == "arms":
            signal[:6] = signal[[0, 2, 1, 4, 3, 5]] * np.array([[-1], [1], [1], [1], [1], [1]])
        elif name == "gaps":
            signal[1, 100:140] = np.nan
        elif name == "volts":
            signal *= 1e-3
        elif name == "copy":
            # Of other bits, offset and gain, and of fewer leads.
            signal, leads = np.rint(signal[6:] * 200) / 150 + 0.3, leads[6:]
        elif name == "slow":
            signal, rate = scipy.signal.resample_poly(signal, 1, 5, axis=1), rate / 5
        elif name == "part":
            # The beginning alone.
            signal = signal[:, :4000]
        elif name == "broken":
            raise ReadError("12 bytes are missing")
        elif name == "mad":
            raise ReadError("7 bytes are missing")
        return Record(signal, rate, leads)

    def fingerprint(self):
        return " ".join(self.names)


@pytest.fixture(scope="module")
def patients(tmp_path_factory):
    return build(Patients(), tmp_path_factory.mktemp("patients") / "s", shard_records=4)


@pytest.fixture(scope="module")
def found(patients):
    return examine(patients)


def records(found, name):
    of = found["findings"][name]
    assert of["num_records"] == len(of["records"])
    return {record["record_id"]: record["detail"] for record in of["records"]}


def test_every_planted_fault_is_found_and_nothing_else(found):
    assert {name: records(found, name) for name in found["findings"]} == {
        "flat_leads": {"flat": "V2"},
        "partly_flat_leads": {},
        "clipped_leads": {"clipped": "V4"},
        "gap_leads": {"gaps": "II"},
        "size": {"volts": records(found, "size")["volts"]},
        "limb_columns": {"inverted": records(found, "limb_columns")["inverted"]},
        "limb_residual": {},
        "electrodes": {"arms": "RA-LA"},
    }
    assert records(found, "limb_columns")["inverted"].startswith("aVL inverted (residual 0.")
    assert records(found, "size")["volts"].endswith(" mV")
    assert found["num_flagged"] == 6
    position = found["findings"]["electrodes"]["records"][0]["position"]
    assert position == NAMES.index("arms")


def test_totals(patients, found):
    assert (found["num_files"], found["num_records"]) == (13, 11)
    assert found["hours"] == pytest.approx(sum(patients.column("duration_s")) / 3600)
    assert found["rates_hz"] == {"500": 10, "100": 1}
    assert (found["durations_s"]["min"], found["durations_s"]["max"]) == (8, 10)
    assert sum(found["durations_s"]["histogram"]["counts"]) == 11
    assert found["num_leads"] == {"12": 10, "6": 1}
    assert found["sex"] == {"female": 1, "unknown": 10}
    assert found["ages"] == {"num_records": 11, "median": 40, "min": 40, "max": 40}
    assert (found["num_patients"], found["num_without_patient"], found["patients_in_several_splits"]) == (1, 9, 1)
    assert found["splits"] == {"from": "official", "train": 8, "validation": 2, "test": 1}
    # Of the copy there are no limb leads.
    assert found["limb_residual"]["num_records"] == 10


def test_leads(found):
    assert list(found["leads"]) == list(LEADS)
    assert found["leads"]["V2"] == {
        "measured": 11,
        "derived": 0,
        "absent": 0,
        "flat_leads": 1,
        "partly_flat_leads": 0,
        "clipped_leads": 0,
        "gap_leads": 0,
    }
    assert (found["leads"]["II"]["measured"], found["leads"]["II"]["absent"], found["leads"]["II"]["gap_leads"]) == (
        10,
        1,
        1,
    )


def test_derived_leads(tmp_path, beats):
    found = examine(build(beats(leads=("I", "II", "V2")), tmp_path / "s"))
    assert [found["leads"][lead]["derived"] for lead in ("I", "III", "aVF", "V2")] == [0, 6, 6, 0]
    assert found["leads"]["V1"]["absent"] == 6
    assert found["num_leads"] == {"3": 6}


def test_labels_and_which_records_have_none(found):
    task = found["tasks"]["all"]
    assert task["labels"] == {
        "A": {"all": 4, "train": 2, "validation": 1, "test": 1},
        "B": {"all": 2, "train": 2, "validation": 0, "test": 0},
    }
    assert task["unlabelled"]["num_records"] == 6
    assert task["unlabelled"]["splits"] == {"train": 5, "validation": 1}
    names = [record["record_id"] for record in task["unlabelled"]["records"]]
    assert names == ["inverted", "arms", "gaps", "volts", "part", "other"]
    rate = found["tasks"]["rate"]
    assert (rate["problem"], rate["unlabelled"]["num_records"], rate["labels"]) == ("regression", 10, {})


def test_copies_in_another_unit_of_other_leads_at_another_rate_and_cut(found):
    copies = found["duplicates"]
    assert (copies["num_groups"], copies["num_records"], copies["num_across_splits"]) == (1, 4, 1)
    group = copies["groups"][0]
    assert [record["record_id"] for record in group["records"]] == ["plain", "copy", "slow", "part"]
    assert [record["split"] for record in group["records"]] == ["train", "test", "validation", "validation"]
    assert group["across_splits"]


def test_unreadable_files_by_reason(found):
    assert found["unreadable"] == {
        "num_files": 2,
        "reasons": [{"reason": "12 bytes are missing", "num_files": 2}],
        "files": [
            {"source": HOSTILE, "reason": "12 bytes are missing"},
            {"source": "mad.npy", "reason": "7 bytes are missing"},
        ],
    }


def test_remarks_begin_with_what_spoils_a_test(found):
    said = found["remarks"]
    assert said[0].startswith("1 recording is in more than one of training, validation and test")
    assert said[1].startswith("1 patient is in more than one")
    assert said[2] == "2 files of 13 are unreadable and left out."
    assert "1 recording is there more than once, 4 records in all." in said
    assert "Electrodes exchanged (suspected): 1 record." in said
    assert any("without a label of a task: all 6 of 11" in line and "--unlabelled drop" in line for line in said)


def test_the_answer_is_json_of_known_names(found):
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    names = "format_version dataset store_hash settings num_files num_records hours num_patients num_without_patient"
    names += (
        " patients_in_several_splits ages sex num_flagged rates_hz durations_s num_leads leads limb_residual splits"
    )
    names += " tasks dropped_labels findings duplicates unreadable remarks"
    assert set(names.split()) <= found.keys() <= {*names.split(), "datasets"}
    assert found["format_version"] == 1


def test_other_splits_are_those_that_count(patients):
    folds = patients.folds.copy()
    folds[1:] = 0
    found = examine(Store(patients.path, folds))
    assert found["splits"] == {"from": "given", "train": 1, "none": 10}
    assert found["duplicates"]["num_across_splits"] == 0
    assert found["tasks"]["all"]["labels"]["A"] == {"all": 4, "train": 1, "none": 3}


@pytest.mark.parametrize("compat", ["corrected", "published"])
def test_copies_and_nothing_else_in_either_preprocessing(tmp_path, compat):
    store = build(Patients(("plain", "other", "part", "flat")), tmp_path / "s", Settings(compat=compat))
    assert [group.tolist() for group in duplicates(store)] == [[0, 2]]


def test_a_store_without_oddities(tmp_path):
    found = examine(build(Patients(("plain", "other")), tmp_path / "s"))
    assert found["num_flagged"] == 0
    assert found["duplicates"]["groups"] == []
    assert not any(of["num_records"] for of in found["findings"].values())


def test_no_copies_in_a_cohort(tmp_path):
    cohort = open_dataset("synthetic", None)

    class Some(type(cohort)):
        def entries(self):
            return super().entries()[:60]

    assert duplicates(build(Some(), tmp_path / "s")) == []


def test_a_store_of_an_earlier_version_is_refused(tmp_path, beats):
    store = build(beats(), tmp_path / "s")
    index, manifest = store.path / "index.parquet", store.path / "store.json"
    pq.write_table(pq.read_table(index).drop_columns(["signal_hash"]), index)
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"index_hash": file_hash(index)}))
    store = Store(store.path)
    assert len(store[0].signal) == 12
    with pytest.raises(UserError, match="prepare it again"):
        examine(store)


def test_copies_of_real_recordings(shared_data, tmp_path):
    """Of Physikalisch-Technische Bundesanstalt in two data sets, whose samples differ by rounding."""
    (tmp_path / "data").mkdir()
    for folder in ("cinc2021/ptb", "ptbdb"):
        (tmp_path / "data" / folder.replace("/", "_")).symlink_to(shared_data / folder)
    store = build(open_dataset("folder", tmp_path / "data"), tmp_path / "s")
    assert [sorted(store.column("source")[group]) for group in duplicates(store)] == [
        ["cinc2021_ptb/S0001.hea", "ptbdb/s0010_re.hea"]
    ]
