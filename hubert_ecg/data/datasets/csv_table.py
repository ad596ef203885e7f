"""Any table with a column of file names and columns of labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubert_ecg.config import UserError
from hubert_ecg.data.dataset import Dataset, Entry, number, sex_name, walk
from hubert_ecg.data.readers import READERS

if TYPE_CHECKING:
    import pandas as pd

_TABLE = "labels.csv"
_COLUMNS = {
    "file": ("filename", "file_name", "file", "path", "record"),
    "record_id": ("record_id", "ecg_id"),
    "patient_id": ("patient_id", "patient", "subject_id", "subject"),
    "fold": ("fold", "strat_fold"),
    "age": ("age",),
    "sex": ("sex", "gender"),
}


class CsvTable(Dataset):
    """Recordings listed in ``labels.csv`` (or the only .csv file of the folder).

    The table has a column ``filename`` (a path relative to the folder; the suffix may be left out), and may have
    ``record_id``, ``patient_id``, ``fold`` (1 to 10), ``age`` and ``sex``. Every other column of 0 and 1 is a label of
    the task ``all``; a blank there counts as 0. Every other column of numbers is a regression task of its own, named
    like the column. Columns of text are left out.
    """

    name = "csv"

    def __init__(self, data_path: Path | None = None, **unstated: Any):
        super().__init__(data_path, **unstated)
        tables = [self.data_path / _TABLE]
        if not tables[0].is_file():
            tables = sorted(self.data_path.glob("*.csv"))
        if len(tables) != 1:
            found = ", ".join(path.name for path in tables) or "no .csv file"
            raise UserError(f"csv: {self.data_path} must hold {_TABLE}, got {found}")
        self._table = tables[0]
        rows = self._rows()
        self._roles = {
            role: next((name for name in rows.columns if name.strip().lower() in names), None)
            for role, names in _COLUMNS.items()
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

    def problem_of(self, task: str) -> str:
        return "regression" if task in self._numbers else "multilabel"

    def entries(self) -> list[Entry]:
        files = {path.relative_to(self.data_path).as_posix(): path for path in walk(self.data_path, READERS.keys())}
        # A header wins over the .mat file that it describes: it comes last.
        last = sorted(files, key=lambda source: source.endswith(".hea"))
        stems = {Path(source).with_suffix("").as_posix(): files[source] for source in last}
        entries = []
        for row in self._rows().to_dict("records"):
            source = Path(str(row[self._roles["file"]]).strip()).as_posix()
            path = files.get(source) or stems.get(source) or stems.get(Path(source).with_suffix("").as_posix())
            entries.append(self._entry(row, source, path or self.data_path / source))
        _check_unique(self._table, [entry.record_id for entry in entries])
        return entries

    def _rows(self) -> pd.DataFrame:
        import pandas as pd

        try:
            columns = pd.read_csv(self._table, nrows=0).columns
            # 00001 is a name and not the number 1.
            names = [name for name in columns if name.strip().lower() in (*_COLUMNS["file"], *_COLUMNS["record_id"])]
            return pd.read_csv(self._table, dtype=dict.fromkeys(names, str))
        except (ValueError, UnicodeDecodeError) as error:
            raise UserError(f"csv: {self._table} cannot be read: {error}") from error

    def _entry(self, row: dict[str, Any], source: str, path: Path) -> Entry:
        def fact(role: str) -> Any:
            column = self._roles[role]
            return None if column is None or row[column] != row[column] else row[column]

        patient, fold, record_id = fact("patient_id"), number(fact("fold")), fact("record_id")
        if fold is not None and fold not in range(1, 11):
            raise UserError(f"csv: fold in {self._table} must be 1 to 10, got {fold:g} for {source}")
        values = {name: number(row[name]) for name in self._numbers}
        return Entry(
            record_id=_name(record_id) if record_id is not None else source,
            path=path,
            source=source,
            patient_id=None if patient is None else _name(patient),
            fold=None if fold is None else int(fold),
            age=number(fact("age")),
            sex=sex_name(fact("sex")),
            labels={"all": tuple(sorted(name for name in self._labels if _as_bit(row[name]) == 1))}
            if self._labels
            else {},
            values={name: value for name, value in values.items() if value is not None},
        )


def _is_label(column: pd.Series) -> bool:
    values = {_as_bit(value) for value in column.dropna().unique()}
    return bool(values) and values <= {0, 1}


def _as_bit(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return {"true": 1, "false": 0, "1": 1, "0": 0}.get(value.strip().lower(), value)


def _name(value: Any) -> str:
    """A number as its digits: a column with gaps reads 123 as 123.0."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _check_unique(table: Path, names: list[str]) -> None:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"csv: record {twice} occurs twice in {table}")
