"""The commands that examine recordings."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from hubert_ecg import cli
from hubert_ecg.data import Store, open_dataset


@pytest.fixture
def folder(tmp_path):
    """Three recordings, one of them twice, and a file that is none."""
    cohort = open_dataset("synthetic", None)
    (tmp_path / "data").mkdir()
    for place, entry in enumerate(cohort.entries()[:3]):
        np.save(tmp_path / "data" / f"r{place}.npy", cohort.read(entry).signal)
    shutil.copy(tmp_path / "data" / "r1.npy", tmp_path / "data" / "again.npy")
    (tmp_path / "data" / "empty.npy").write_bytes(b"")
    return tmp_path / "data"


def test_prepare_ends_with_the_report_and_doctor_makes_it_again(folder, tmp_path, capsys):
    store = tmp_path / "store"
    assert cli.main(["prepare", "--data_path", str(folder), "--output_dir", str(store), "--num_workers", "0"]) == 0
    said = capsys.readouterr().out
    assert "doctor: 0 of 4 records to look at, 1 with duplicates" in said
    assert f"1 unreadable; see doctor.html in {store}" in said
    found = json.loads((store / "doctor.json").read_text())
    assert found["unreadable"]["files"][0]["source"] == "empty.npy"
    page = (store / "doctor.html").read_text()
    assert "Duplicates (1)" in page
    # Known where it was packed, and there alone.
    assert f"{100 * found.pop('read_share'):.1f} % of the work was reading files" in page

    (store / "doctor.json").unlink()
    assert cli.main(["doctor", "--data_path", str(store)]) == 0
    assert json.loads((store / "doctor.json").read_text()) == found
    # A store with other settings than the flags' defaults, elsewhere.
    other = tmp_path / "other"
    flags = ["--compat", "published", "--num_workers", "0"]
    assert cli.main(["prepare", "--data_path", str(folder), "--output_dir", str(other), *flags]) == 0
    assert cli.main(["doctor", "--data_path", str(other), "--output_dir", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "doctor.json").read_text())["settings"]["compat"] == "published"
    # What lies beside the shards changes nothing.
    assert len(Store(store)) == 4


def test_doctor_of_a_folder_packs_it_into_the_cache(folder, tmp_path, capsys):
    flags = ["--cache_dir", str(tmp_path / "cache"), "--num_workers", "0"]
    assert cli.main(["doctor", "--data_path", str(folder), *flags]) == 0
    (report,) = (tmp_path / "cache").rglob("doctor.html")
    assert f"in {report.parent}" in capsys.readouterr().out.replace("\n", "")


def test_doctor_without_recordings(tmp_path, capsys):
    assert cli.main(["doctor", "--data_path", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
