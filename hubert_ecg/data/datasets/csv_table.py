"""Any table with a column of file names and columns of labels."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hubert_ecg.config import UserError
from hubert_ecg.data.dataset import Dataset, Entry, files_in, number, walk
from hubert_ecg.data.folds import FOLD_COLUMNS, fold_of, plain_name
from hubert_ecg.data.readers import READERS
from hubert_ecg.data.record import sex_of
from hubert_ecg.data.store import stream_hash
from hubert_ecg.data.tables import SUFFIXES, Table, check_unique, is_blank, read_table, whole

_LABELS = {f"labels{suffix}" for suffix in SUFFIXES}
# ptbxl_all_train.csv, ptbxl_all_val.csv and ptbxl_all_test.csv: published splits.
_SPLIT = re.compile(r"(?P<name>.+)_(?P<split>train|val|valid|validation|test)", re.IGNORECASE)
_COLUMNS = {
    "file": ("filename", "file_name", "file", "save_file", "path", "record"),
    "record_id": ("record_id", "ecg_id"),
    "patient_id": ("patient_id", "patient", "subject_id", "subject"),
    "fold": FOLD_COLUMNS,
    "age": ("age",),
    "sex": ("sex", "gender", "is_male"),
}
_NAMES = {*_COLUMNS["file"], *_COLUMNS["record_id"]}
_BITS = {**dict.fromkeys(("true", "yes", "y"), 1), **dict.fromkeys(("false", "no", "n"), 0)}


class CsvTable(Dataset):
    """Recordings listed in ``labels.csv``, in the only table of the folder, or in the tables of published splits
    ``<name>_train.csv``, ``<name>_val.csv`` and ``<name>_test.csv``. Tables may end in .tsv too.

    A table has a column ``filename`` (a path relative to the folder, or a name found once below it; the suffix may be
    left out or another), and may have ``record_id``, ``patient_id``, ``fold`` (1 to 10) or ``split`` (train,
    validation, test), ``age`` and ``sex``. Every other column of 0 and 1, true and false, yes and no, or y and n is a
    label of the task ``all``; a blank there counts as 0. Every other column of numbers is a regression task of its own,
    named like the column. Other columns are left out, and :attr:`left_out` says why. Commas, semicolons or tabs split
    the columns.

    Attributes:
        left_out: Columns that are neither labels nor numbers, each with the first cell that says so.
    """

    name = "csv"

    def __init__(self, data_path: Path | None = None, **unstated: Any):
        super().__init__(data_path, **unstated)
        self._tables = _find_tables(self.data_path)
        tables = self._read()
        first = tables[0]
        self._roles = {role: first.column(names) for role, names in _COLUMNS.items()}
        if self._roles["file"] is None:
            raise UserError(
                f"csv: {first.path} must have a column filename, got {', '.join(first.columns)}; "
                "--dataset folder reads the recordings without it"
            )
        self._labels, self._numbers = [], []
        self.left_out: dict[str, str] = {}
        for name in first.columns:
            # A second name of a file is no label, whatever it is.
            if name in self._roles.values() or name.lower() in _NAMES or name.startswith("Unnamed: "):
                continue
            cells = [cell for cell in _cells(tables, name) if not is_blank(cell[0])]
            no_bit = next((place for place, cell in enumerate(cells) if _as_bit(cell[0]) is None), None)
            no_number = next((place for place, cell in enumerate(cells) if number(cell[0]) is None), None)
            if not cells:
                self.left_out[name] = "blank"
            elif no_bit is None:
                self._labels.append(name)
            elif no_number is None:
                self._numbers.append(name)
            else:
                value, where = cells[max(no_bit, no_number)]
                self.left_out[name] = f"{reprlib.repr(value)} in {where}"
        self.tasks = (("all",) if self._labels else ()) + tuple(self._numbers)

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        return any(map(_is_labels, _tables_in(folder)))

    def problem_of(self, task: str) -> str:
        return "regression" if task in self._numbers else "multilabel"

    def entries(self) -> list[Entry]:
        root = self._tables[0][0].parent
        files = {path.relative_to(root).as_posix(): path for path in walk(root, READERS.keys())}
        # A header wins over the .mat file that it describes: it comes last.
        last = sorted(files, key=lambda source: source.endswith(".hea"))
        stems = {Path(source).with_suffix("").as_posix(): files[source] for source in last}
        names: dict[str, list[Path]] = {}
        for stem, path in stems.items():
            names.setdefault(plain_name(stem), []).append(path)
        entries, rows = [], []
        for table, (_, split) in zip(self._read(), self._tables, strict=True):
            for line, row in table.rows.items():
                if not (named := row[self._roles["file"] or ""]):
                    raise UserError(f"csv: {table.where(line)}: {self._roles['file']} must name a file, got a blank")
                source = Path(named).as_posix()
                found = files.get(source) or stems.get(source) or stems.get(Path(source).with_suffix("").as_posix())
                alike = names.get(plain_name(source), [])
                path = found or (alike[0] if len(alike) == 1 else root / source)
                entries.append(self._entry(row, source, path, split, table.where(line)))
                rows.append((entries[-1].record_id, table.where(line)))
        check_unique("csv", rows)
        return entries

    def fingerprint(self) -> str:
        # Whatever the tables end in.
        return stream_hash([super().fingerprint().encode(), *(path.read_bytes() for path, _ in self._tables)])

    def _read(self) -> list[Table]:
        tables = [read_table("csv", path) for path, _ in self._tables]
        for table in tables:
            if odd := set(table.columns) ^ set(tables[0].columns):
                raise UserError(
                    f"csv: {table.path} must have the columns of {tables[0].path}, got others: {', '.join(sorted(odd))}"
                )
        return tables

    def _entry(self, row: Mapping[str, str], source: str, path: Path, split: str | None, where: str) -> Entry:
        def fact(role: str) -> str | None:
            column = self._roles[role]
            return None if column is None or is_blank(row[column]) else row[column]

        patient, stated, sex = fact("patient_id"), split or fact("fold"), fact("sex")
        fold = None if stated is None else fold_of(stated)
        if fold is None and stated is not None:
            raise UserError(
                f"csv: fold in {where} must be 1 to 10, got {stated} for {source}; or a column split says train, "
                "validation or test"
            )
        if self._roles["sex"] is not None and self._roles["sex"].lower() == "is_male":
            sex = {1: "male", 0: "female", None: None}[_as_bit(sex or "")]
        values = {name: number(row[name]) for name in self._numbers}
        return Entry(
            record_id=fact("record_id") or source,
            path=path,
            source=source,
            patient_id=None if patient is None else whole(patient),
            fold=fold,
            age=number(fact("age")),
            sex=sex_of(sex),
            labels={"all": tuple(sorted(name for name in self._labels if _as_bit(row[name]) == 1))}
            if self._labels
            else {},
            values={name: value for name, value in values.items() if value is not None},
        )


def _find_tables(folder: Path) -> list[tuple[Path, str | None]]:
    """The tables to read, each with the split that its name says."""
    below = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    levels = [_tables_in(folder), [table for path in below for table in _tables_in(path)]]
    for level in levels:
        labels = [table for table in level if _is_labels(table)]
        if len(labels) > 1 and len({table.read_bytes() for table in labels}) > 1:
            places = list(dict.fromkeys(str(table.parent) for table in labels))
            if len(places) < len(labels):
                names = ", ".join(str(table) for table in labels)
                raise UserError(f"csv: a folder must hold one table of labels, got {names}: keep one")
            raise UserError(
                f"several folders below {folder} have a labels.csv: name one of them, or all: "
                f"--data_path {','.join(places)}"
            )
        if labels:
            return [(labels[0], None)]
    tables = levels[0] or levels[1]
    splits = [_SPLIT.fullmatch(table.stem) for table in tables]
    if len(tables) > 1 and all(splits) and len({match["name"] for match in splits if match}) == 1:
        return [(table, match["split"]) for table, match in zip(tables, splits, strict=True) if match]
    if len(tables) != 1:
        found = ", ".join(path.name for path in tables) or "no .csv or .tsv file"
        raise UserError(
            f"csv: {folder} must hold labels.csv, one other table, or NAME_train.csv, NAME_val.csv and NAME_test.csv, "
            f"got {found}"
        )
    return [(tables[0], None)]


def _tables_in(folder: Path) -> list[Path]:
    return [path for suffix in SUFFIXES for path in files_in(folder, suffix)]


def _is_labels(table: Path) -> bool:
    return table.name.lower() in _LABELS


def _cells(tables: Sequence[Table], column: str) -> list[tuple[str, str]]:
    """The different cells of a column, each with the row that has it first."""
    first: dict[str, str] = {}
    for table in tables:
        for line, row in table.rows.items():
            if row[column] not in first:
                first[row[column]] = f"{table.path.name}, line {line}"
    return list(first.items())


def _as_bit(cell: str) -> int | None:
    """1 or 0, if a cell says either."""
    value = _BITS.get(cell.lower(), number(cell))
    return int(value) if value in (0, 1) else None
