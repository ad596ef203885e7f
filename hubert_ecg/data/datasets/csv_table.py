"""Any table with a column of file names and columns of labels."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubert_ecg.config import UserError
from hubert_ecg.data.dataset import Dataset, Entry, locate, number, walk
from hubert_ecg.data.folds import fold_of, plain_name
from hubert_ecg.data.readers import READERS
from hubert_ecg.data.record import sex_of

if TYPE_CHECKING:
    import pandas as pd

_TABLE = "labels.csv"
# ptbxl_all_train.csv, ptbxl_all_val.csv and ptbxl_all_test.csv: published splits.
_SPLIT = re.compile(r"(?P<name>.+)_(?P<split>train|val|valid|validation|test)", re.IGNORECASE)
_COLUMNS = {
    "file": ("filename", "file_name", "file", "save_file", "path", "record"),
    "record_id": ("record_id", "ecg_id"),
    "patient_id": ("patient_id", "patient", "subject_id", "subject"),
    "fold": ("fold", "strat_fold", "split"),
    "age": ("age",),
    "sex": ("sex", "gender", "is_male"),
}


class CsvTable(Dataset):
    """Recordings listed in ``labels.csv``, in the only .csv file of the folder, or in the tables of published splits
    ``<name>_train.csv``, ``<name>_val.csv`` and ``<name>_test.csv``.

    A table has a column ``filename`` (a path relative to the folder, or a name found once below it; the suffix may be
    left out or another), and may have ``record_id``, ``patient_id``, ``fold`` (1 to 10) or ``split`` (train,
    validation, test), ``age`` and ``sex``. Every other column of 0 and 1, true and false, or yes and no is a label of
    the task ``all``; a blank there counts as 0. Every other column of numbers is a regression task of its own, named
    like the column. Columns of text are left out. Commas, semicolons or tabs split the columns.
    """

    name = "csv"

    def __init__(self, data_path: Path | None = None, **unstated: Any):
        super().__init__(data_path, **unstated)
        self._tables = _find_tables(self.data_path)
        rows = self._rows()
        columns = {name.strip().lower(): name for name in reversed(rows.columns)}
        self._roles = {
            role: next((columns[name] for name in names if name in columns), None) for role, names in _COLUMNS.items()
        }
        if self._roles["file"] is None:
            raise UserError(
                f"csv: {self._table} must have a column filename, got {', '.join(rows.columns)}; "
                "--dataset folder reads the recordings without it"
            )
        used = set(self._roles.values())
        facts = [name for name in rows.columns if name not in used and not name.startswith("Unnamed")]
        self._labels = [name for name in facts if _is_label(rows[name])]
        self._numbers = [name for name in facts if name not in self._labels and rows[name].dtype.kind in "iuf"]
        self.tasks = (("all",) if self._labels else ()) + tuple(self._numbers)

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        return (folder / _TABLE).is_file()

    @property
    def _table(self) -> Path:
        """The table, or the first of several, as messages name it."""
        return self._tables[0][0]

    def problem_of(self, task: str) -> str:
        return "regression" if task in self._numbers else "multilabel"

    def entries(self) -> list[Entry]:
        root = self._table.parent
        files = {path.relative_to(root).as_posix(): path for path in walk(root, READERS.keys())}
        # A header wins over the .mat file that it describes: it comes last.
        last = sorted(files, key=lambda source: source.endswith(".hea"))
        stems = {Path(source).with_suffix("").as_posix(): files[source] for source in last}
        names: dict[str, list[Path]] = {}
        for stem, path in stems.items():
            names.setdefault(plain_name(stem), []).append(path)
        entries = []
        for row in self._rows().to_dict("records"):
            source = Path(str(row[self._roles["file"]]).strip()).as_posix()
            found = files.get(source) or stems.get(source) or stems.get(Path(source).with_suffix("").as_posix())
            alike = names.get(plain_name(source), [])
            entries.append(self._entry(row, source, found or (alike[0] if len(alike) == 1 else root / source)))
        _check_unique(self._table, [entry.record_id for entry in entries])
        return entries

    def _rows(self) -> pd.DataFrame:
        import pandas as pd

        frames = []
        for table, split in self._tables:
            try:
                separator = _separator(table)
                columns = pd.read_csv(table, sep=separator, nrows=0).columns
                # 00001 is a name and not the number 1.
                names = [n for n in columns if n.strip().lower() in (*_COLUMNS["file"], *_COLUMNS["record_id"])]
                frame = pd.read_csv(table, sep=separator, dtype=dict.fromkeys(names, str))
            except (ValueError, UnicodeDecodeError) as error:
                raise UserError(f"csv: {table} cannot be read: {error}") from error
            frames.append(frame if split is None else frame.assign(fold=fold_of(split)))
        return pd.concat(frames, ignore_index=True)

    def _entry(self, row: dict[str, Any], source: str, path: Path) -> Entry:
        def fact(role: str) -> Any:
            column = self._roles[role]
            return None if column is None or row[column] != row[column] else row[column]

        patient, stated, record_id = fact("patient_id"), fact("fold"), fact("record_id")
        fold = None if stated is None else fold_of(stated)
        if fold is None and stated is not None:
            raise UserError(
                f"csv: fold in {self._table} must be 1 to 10, got {stated} for {source}; or a column split says train, "
                "validation or test"
            )
        values = {name: number(row[name]) for name in self._numbers}
        return Entry(
            record_id=_name(record_id) if record_id is not None else source,
            path=path,
            source=source,
            patient_id=None if patient is None else _name(patient),
            fold=fold,
            age=number(fact("age")),
            sex=self._sex(fact("sex")),
            labels={"all": tuple(sorted(name for name in self._labels if _as_bit(row[name]) == 1))}
            if self._labels
            else {},
            values={name: value for name, value in values.items() if value is not None},
        )

    def _sex(self, value: Any) -> str | None:
        if str(self._roles["sex"]).strip().lower() == "is_male":
            return {1: "male", 0: "female"}.get(_as_bit(value))
        return sex_of(value)


def _find_tables(folder: Path) -> list[tuple[Path, str | None]]:
    """The tables to read, each with the split that its name says."""
    table = locate(folder, _TABLE)
    if table is not None:
        return [(table, None)]
    tables = sorted(folder.glob("*.csv")) or sorted(folder.glob("*/*.csv"))
    splits = [_SPLIT.fullmatch(table.stem) for table in tables]
    if len(tables) > 1 and all(splits) and len({match["name"] for match in splits if match}) == 1:
        return [(table, match["split"]) for table, match in zip(tables, splits, strict=True) if match]
    if len(tables) != 1:
        found = ", ".join(path.name for path in tables) or "no .csv file"
        raise UserError(
            f"csv: {folder} must hold {_TABLE}, one other table, or NAME_train.csv, NAME_val.csv and NAME_test.csv, "
            f"got {found}"
        )
    return [(tables[0], None)]


def _separator(table: Path) -> str:
    """What splits the columns of the first line."""
    with open(table, encoding="utf-8-sig") as file:
        line = file.readline()
    return next((mark for mark in ",;\t" if mark in line), ",")


def _is_label(column: pd.Series) -> bool:
    values = {_as_bit(value) for value in column.dropna().unique()}
    return bool(values) and values <= {0, 1}


def _as_bit(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return {"true": 1, "false": 0, "yes": 1, "no": 0, "1": 1, "0": 0}.get(value.strip().lower(), value)


def _name(value: Any) -> str:
    """A number as its digits: a column with gaps reads 123 as 123.0."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _check_unique(table: Path, names: list[str]) -> None:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"csv: record {twice} occurs twice in {table}")
