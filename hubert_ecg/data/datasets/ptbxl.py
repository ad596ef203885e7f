"""PTB-XL from its published folder (Wagner et al., Scientific Data 2020): labels, tasks and official folds."""

from __future__ import annotations

import ast
import reprlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from hubert_ecg.config import UserError
from hubert_ecg.data.dataset import Dataset, Entry, locate, number
from hubert_ecg.data.folds import NUM_FOLDS, fold_of
from hubert_ecg.data.record import sex_of
from hubert_ecg.data.tables import check_unique, is_blank, read_table, whole

_Labels = Callable[[dict[str, str]], dict[str, tuple[str, ...]]]

_DATABASE, _TABLE, _STATEMENTS = "ptbxl_database.csv", "ptbxl_labels.csv", "scp_statements.csv"
_KINDS = ("diagnostic", "form", "rhythm")
_LABEL_COLUMNS = ("super_class", "sub_class", "form", "rhythm")
# Ages above 89 are published as 300.
_HIDDEN_AGE, _SHOWN_AGE = 300.0, 90.0


class PtbXl(Dataset):
    """PTB-XL with its six tasks and official folds (1-8 train, 9 validation, 10 test).

    With ``ptbxl_database.csv`` and ``scp_statements.csv``, every statement of a record counts as its label whatever its
    likelihood, as in the published benchmark: ``all``, the diagnostic ones (``diag``), their subclasses
    (``diag_subclass``) and superclasses (``diag_superclass``), ``form`` and ``rhythm``.

    With ``ptbxl_labels.csv`` in its place, whose columns ``super_class``, ``sub_class``, ``form`` and ``rhythm`` hold
    labels split by ``;``, the single diagnostic statements are not known: ``diag`` is then the same as
    ``diag_subclass``, and ``all`` joins sub_class, form and rhythm.

    Signals come from records500; where a 500 Hz file is missing, from records100.
    """

    name = "ptbxl"
    tasks = ("all", "diag", "diag_subclass", "diag_superclass", "form", "rhythm")

    def __init__(self, data_path: Path | None = None, **unstated: Any):
        super().__init__(data_path, **unstated)
        table = locate(self.data_path, _DATABASE) or locate(self.data_path, _TABLE)
        if table is None:
            raise UserError(f"ptbxl: neither {_DATABASE} nor {_TABLE} in {self.data_path}")
        self._table = table

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        return any((folder / name).is_file() for name in (_DATABASE, _TABLE))

    def entries(self) -> list[Entry]:
        by_column = self._table.name == _TABLE
        own = _LABEL_COLUMNS if by_column else {"scp_codes"}
        table = read_table("ptbxl", self._table, {"ecg_id", "patient_id", "strat_fold", "filename_hr", *own})
        labels_of = _labels_by_column if by_column else self._labels_by_statement()
        check_unique("ptbxl", [(row["ecg_id"], table.where(line)) for line, row in table.rows.items()])
        entries = []
        for line, row in table.rows.items():
            try:
                entries.append(self._entry(row, labels_of(row)))
            except UserError as error:
                raise UserError(f"ptbxl: {table.where(line)}: {error}") from error
        return entries

    def _entry(self, row: dict[str, str], labels: dict[str, tuple[str, ...]]) -> Entry:
        root = self._table.parent
        for column in ("ecg_id", "filename_hr"):
            if is_blank(row[column]):
                raise UserError(f"{column} must not be blank")
        fold = fold_of(row["strat_fold"])
        if fold is None:
            raise UserError(f"strat_fold of ecg_id {row['ecg_id']} must be 1 to {NUM_FOLDS}, got {row['strat_fold']!r}")
        source = row["filename_hr"]
        low = row.get("filename_lr") or source.replace("records500", "records100").replace("_hr", "_lr")
        if not (root / f"{source}.hea").is_file() and (root / f"{low}.hea").is_file():
            source = low
        age, sex = number(row.get("age")), number(row.get("sex"))
        return Entry(
            record_id=row["ecg_id"],
            path=root / f"{source}.hea",
            source=source,
            patient_id=None if is_blank(row["patient_id"]) else whole(row["patient_id"]),
            fold=fold,
            age=_SHOWN_AGE if age == _HIDDEN_AGE else age,
            sex={0.0: "male", 1.0: "female"}.get(sex) if sex is not None else sex_of(row.get("sex")),
            labels=labels,
        )

    def _labels_by_statement(self) -> _Labels:
        path = self._table.with_name(_STATEMENTS)
        if not path.is_file():
            raise UserError(f"ptbxl: no {_STATEMENTS} beside {self._table}")
        table = read_table("ptbxl", path, {*_KINDS, "diagnostic_class", "diagnostic_subclass"})
        # The column of the statements has no name.
        statements = {row[table.columns[0]]: row for row in table.rows.values()}
        kinds = {kind: {code for code, row in statements.items() if number(row[kind]) == 1} for kind in _KINDS}

        def labels(row: dict[str, str]) -> dict[str, tuple[str, ...]]:
            codes = _statements(row)
            if unknown := codes - statements.keys():
                got = ", ".join(sorted(unknown))
                raise UserError(f"scp_codes of ecg_id {row['ecg_id']} must be statements of {path}, got {got}")
            diag = codes & kinds["diagnostic"]
            return _sorted(
                {
                    "all": codes,
                    "diag": diag,
                    "diag_subclass": {statements[code]["diagnostic_subclass"] for code in diag},
                    "diag_superclass": {statements[code]["diagnostic_class"] for code in diag},
                    "form": codes & kinds["form"],
                    "rhythm": codes & kinds["rhythm"],
                }
            )

        return labels


def _statements(row: dict[str, str]) -> set[str]:
    """The keys of a literal such as ``{'NORM': 100.0, 'SR': 0.0}``, which is parsed and never run."""
    try:
        codes = ast.literal_eval(row["scp_codes"])
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        codes = None
    if not isinstance(codes, dict):
        got = reprlib.repr(row["scp_codes"])
        raise UserError(f"scp_codes of ecg_id {row['ecg_id']} must be a dictionary of statements, got {got}")
    return {str(code) for code in codes}


def _labels_by_column(row: dict[str, str]) -> dict[str, tuple[str, ...]]:
    split = {column: {label.strip() for label in row[column].split(";")} for column in _LABEL_COLUMNS}
    return _sorted(
        {
            "all": split["sub_class"] | split["form"] | split["rhythm"],
            "diag": split["sub_class"],
            "diag_subclass": split["sub_class"],
            "diag_superclass": split["super_class"],
            "form": split["form"],
            "rhythm": split["rhythm"],
        }
    )


def _sorted(labels: Mapping[str, Iterable[str]]) -> dict[str, tuple[str, ...]]:
    return {task: tuple(sorted({name for name in names if not is_blank(name)})) for task, names in labels.items()}
