"""PTB-XL from its published folder (Wagner et al., Scientific Data 2020): labels, tasks and official folds."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubert_ecg.config import UserError
from hubert_ecg.data.dataset import Dataset, Entry, locate, number
from hubert_ecg.data.record import sex_of

if TYPE_CHECKING:
    import pandas as pd

_DATABASE, _TABLE, _STATEMENTS = "ptbxl_database.csv", "ptbxl_labels.csv", "scp_statements.csv"
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
        import pandas as pd

        try:
            rows = pd.read_csv(self._table, dtype={"ecg_id": str, "patient_id": str})
        except ValueError as error:
            raise UserError(f"ptbxl: {self._table} cannot be read: {error}") from error
        missing = {"ecg_id", "patient_id", "strat_fold", "filename_hr"} - set(rows.columns)
        if missing:
            raise UserError(f"ptbxl: {self._table} has no column {', '.join(sorted(missing))}")
        labels_of = _labels_by_column if self._table.name == _TABLE else self._labels_by_statement(rows)
        return [self._entry(row, labels_of(row)) for row in rows.to_dict("records")]

    def _entry(self, row: dict[str, Any], labels: dict[str, tuple[str, ...]]) -> Entry:
        root = self._table.parent
        source = str(row["filename_hr"])
        low = str(row.get("filename_lr") or source.replace("records500", "records100").replace("_hr", "_lr"))
        if not (root / f"{source}.hea").is_file() and (root / f"{low}.hea").is_file():
            source = low
        age = number(row.get("age"))
        # Patients are numbers, and a column with gaps reads them as 123.0.
        patient = number(row["patient_id"])
        sex = number(row.get("sex"))
        return Entry(
            record_id=row["ecg_id"],
            path=root / f"{source}.hea",
            source=source,
            patient_id=None if patient is None else str(int(patient)),
            fold=int(row["strat_fold"]),
            age=_SHOWN_AGE if age == _HIDDEN_AGE else age,
            sex={0.0: "male", 1.0: "female"}.get(sex) if sex is not None else sex_of(row.get("sex")),
            labels=labels,
        )

    def _labels_by_statement(self, rows: pd.DataFrame) -> Any:
        import pandas as pd

        path = self._table.with_name(_STATEMENTS)
        if not path.is_file():
            raise UserError(f"ptbxl: no {_STATEMENTS} beside {self._table}")
        statements = pd.read_csv(path, index_col=0)
        kinds = {kind: set(statements.index[statements[kind] == 1]) for kind in ("diagnostic", "form", "rhythm")}
        diagnostic = statements.loc[sorted(kinds["diagnostic"])]
        subclasses = diagnostic["diagnostic_subclass"].dropna().to_dict()
        superclasses = diagnostic["diagnostic_class"].dropna().to_dict()

        def labels(row: dict[str, Any]) -> dict[str, tuple[str, ...]]:
            codes = _statements(row)
            diag = codes & kinds["diagnostic"]
            return _sorted(
                {
                    "all": codes,
                    "diag": diag,
                    "diag_subclass": (subclasses[code] for code in diag if code in subclasses),
                    "diag_superclass": (superclasses[code] for code in diag if code in superclasses),
                    "form": codes & kinds["form"],
                    "rhythm": codes & kinds["rhythm"],
                }
            )

        if "scp_codes" not in rows:
            raise UserError(f"ptbxl: {self._table} has no column scp_codes")
        return labels


def _statements(row: dict[str, Any]) -> set[str]:
    """The keys of a literal such as ``{'NORM': 100.0, 'SR': 0.0}``, which is parsed and never run."""
    try:
        codes = ast.literal_eval(row["scp_codes"])
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        codes = None
    if not isinstance(codes, dict):
        raise UserError(f"ptbxl: scp_codes of ecg_id {row['ecg_id']} must be a dictionary, got {row['scp_codes']!r}")
    return {str(code) for code in codes}


def _labels_by_column(row: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    def split(column: str) -> set[str]:
        value = row.get(column)
        return {label.strip() for label in value.split(";") if label.strip()} if isinstance(value, str) else set()

    subclass, form, rhythm = split("sub_class"), split("form"), split("rhythm")
    return _sorted(
        {
            "all": subclass | form | rhythm,
            "diag": subclass,
            "diag_subclass": subclass,
            "diag_superclass": split("super_class"),
            "form": form,
            "rhythm": rhythm,
        }
    )


def _sorted(labels: Mapping[str, Iterable[str]]) -> dict[str, tuple[str, ...]]:
    return {task: tuple(sorted(set(names))) for task, names in labels.items()}
