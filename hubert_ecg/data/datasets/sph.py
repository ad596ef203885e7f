"""The Shandong Provincial Hospital database (Liu et al., Scientific Data 2022): HDF5 files, AHA statement codes."""

from __future__ import annotations

import csv
import functools
from importlib import resources
from pathlib import Path
from typing import Any

from hubert_ecg.config import UserError
from hubert_ecg.data.dataset import Dataset, Entry, locate, number, walk
from hubert_ecg.data.readers import read_record
from hubert_ecg.data.record import Record, sex_of
from hubert_ecg.data.tables import read_table

_TABLE = "metadata.csv"
_COLUMNS = {"ECG_ID", "AHA_Code", "Patient_ID", "Age", "Sex"}


@functools.cache
def aha_statements() -> dict[str, str]:
    """AHA code to primary statement.

    Codes and wording are those of the AHA/ACC/HRS recommendations (Mason et al., Circulation 115, 2007, table 1).
    """
    table = resources.files(__package__).joinpath("aha.csv").read_text(encoding="utf-8")
    return {row["code"]: row["name"] for row in csv.DictReader(table.splitlines())}


class Sph(Dataset):
    """SPH with the task ``all``: the primary statements of each record, by name.

    ``metadata.csv`` gives codes such as ``22;60+310``: statements split by ``;``, each with its modifiers (``+``),
    which are left out. A code outside the AHA's table of primary statements stays a number.
    """

    name = "sph"
    tasks = ("all",)

    def __init__(self, data_path: Path | None = None, **unstated: Any):
        super().__init__(data_path, **unstated)
        table = locate(self.data_path, _TABLE)
        if table is None:
            raise UserError(f"sph: no {_TABLE} in {self.data_path}")
        self._table = table

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        if not (folder / _TABLE).is_file():
            return False
        with open(folder / _TABLE, encoding="utf-8", errors="replace") as file:
            return "AHA_Code" in file.readline(1000)

    def entries(self) -> list[Entry]:
        table = read_table("sph", self._table, _COLUMNS)
        files = {path.stem: path for path in walk(self._table.parent, {".h5", ".hdf5"})}
        entries = []
        for row in table.rows.values():
            name = Path(row["ECG_ID"]).stem
            path = files.get(name, self._table.parent / "records" / f"{name}.h5")
            codes = {statement.split("+")[0].strip() for statement in row["AHA_Code"].split(";")} - {""}
            entries.append(
                Entry(
                    record_id=name,
                    path=path,
                    source=path.relative_to(self.data_path).as_posix(),
                    patient_id=row["Patient_ID"] or None,
                    age=number(row["Age"]),
                    sex=sex_of(row["Sex"]),
                    labels={"all": tuple(sorted({aha_statements().get(code, code) for code in codes}))},
                )
            )
        return entries

    def read(self, entry: Entry) -> Record:
        assert entry.path is not None
        return read_record(entry.path, sampling_rate_hz=500.0)
