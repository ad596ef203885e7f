"""The table of data sets in the documentation is the one in the code."""

from __future__ import annotations

import re
from pathlib import Path

from hubert_ecg.data import DATASETS
from hubert_ecg.data.dataset import Dataset
from hubert_ecg.data.datasets.csv_table import CsvTable

TABLE = (Path(__file__).resolve().parents[1] / "docs" / "datasets.md").read_text(encoding="utf-8")
ROWS = {
    cells[0].split("`")[1]: cells
    for cells in (re.findall(r"(?<=\| )[^|]+", line) for line in TABLE.splitlines() if line.startswith("| `"))
    if not cells[0].startswith("`--")
}


def test_every_data_set_is_in_the_table():
    assert ROWS.keys() == DATASETS.keys()


def test_tasks_are_those_of_the_code():
    for name, cells in ROWS.items():
        own = set(DATASETS[name].tasks) or ({"all"} if DATASETS[name] is CsvTable else set())
        said = set(re.findall(r"`([^`]+)`", cells[2])) - {"code15_chagas_labels.csv"}
        assert said - ({"chagas"} if name == "code15" else set()) == own, name


def test_marked_data_sets_are_never_guessed():
    for name, cells in ROWS.items():
        guesses = DATASETS[name].recognises.__func__ is not Dataset.recognises.__func__
        assert "*" in cells[0] or guesses or name in ("synthetic", "folder"), name
