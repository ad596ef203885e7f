"""The doctor's page."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from hubert_ecg.data import ReadError, open_dataset
from hubert_ecg.data.build import build
from hubert_ecg.data.dataset import Dataset, Entry
from hubert_ecg.evaluation import write_doctor

HOSTILE = "<script>alert('x')</script>&\"{{ 7 * 7 }}"


class Hostile(Dataset):
    """Names and labels that a page must not run: of a record with a flat lead, twice, and an unreadable file."""

    name = "hostile"
    tasks = (f"task {HOSTILE}",)

    def __init__(self, num_records=3):
        self.num_records = num_records

    def entries(self):
        labels = [{self.tasks[0]: (f"label {HOSTILE}",)}, {self.tasks[0]: ()}, {}]
        return [
            Entry(f"{place} {HOSTILE}", source=f"{place} {HOSTILE}", fold=(1, 10, 1)[place], labels=labels[place])
            for place in range(self.num_records)
        ]

    def read(self, entry):
        if entry.record_id[0] == "2":
            raise ReadError(f"reason {HOSTILE}")
        cohort = open_dataset("synthetic", None)
        record = cohort.read(cohort.entries()[0])
        signal = record.signal.copy()
        signal[8, :2000] = 0.2
        return record.replace(signal=signal)

    def fingerprint(self):
        return "h"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    found = write_doctor(build(Hostile(), folder / "s"), folder / "out")
    assert json.loads((folder / "out" / "doctor.json").read_text()) == found
    return (folder / "out" / "doctor.html").read_text()


def test_the_page_says_what_was_found(page):
    for words in (
        "Recordings of hostile",
        "2 records of 3 files",
        "1 file of 3 is unreadable and left out",
        "1 recording is in more than one of training, validation and test",
        "Partly flat leads: 2 records.",
        "Duplicates (1)",
        "Unreadable files (1)",
        "--unlabelled drop",
    ):
        assert words in page
    sections = re.findall(r'<section id="(\w+)"', page)
    assert sections == [
        *("remarks", "recordings", "leads", "findings", "ecgs", "labels", "duplicates", "unreadable", "facts", "method")
    ]
    # The pictures: histograms, and the two recordings.
    assert page.count("<svg") == 3


def test_names_of_files_and_labels_are_text(page):
    assert "<script" not in page
    escaped = "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&amp;&#34;{{ 7 * 7 }}"
    for name in ("0 ", "1 ", "2 ", "task ", "label ", "reason "):
        assert name + escaped in page
    assert not re.search(r'(?:src|href)="(?!#)', page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_a_store_with_nothing_odd_has_a_short_page(tmp_path, monkeypatch):
    monkeypatch.setattr(Hostile, "read", lambda self, entry: _noise(entry))
    found = write_doctor(build(Hostile(1), tmp_path / "s"), tmp_path)
    page = (tmp_path / "doctor.html").read_text()
    assert found["num_flagged"] == 0
    assert not {"ecgs", "duplicates", "unreadable"} & set(re.findall(r'<section id="(\w+)"', page))


def _noise(entry):
    cohort = open_dataset("synthetic", None)
    return cohort.read(cohort.entries()[int(entry.record_id[0])])


def test_many_rates_and_long_records(tmp_path):
    class Rates(Hostile):
        tasks = ()

        def entries(self):
            return [Entry(f"r{place}", source=f"r{place}") for place in range(12)]

        def read(self, entry):
            place = int(entry.record_id[1:])
            record = open_dataset("synthetic", None)
            record = record.read(record.entries()[place])
            return record.replace(signal=np.tile(record.signal, 1 + place % 3), sampling_rate_hz=500.0 - place)

    found = write_doctor(build(Rates(), tmp_path / "s"), tmp_path)
    assert len(found["rates_hz"]) == 12
    assert (tmp_path / "doctor.html").stat().st_size < 2_000_000
