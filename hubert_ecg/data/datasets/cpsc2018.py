"""CPSC 2018 as its own challenge published it: MATLAB structures and ``REFERENCE.csv``."""

from __future__ import annotations

from pathlib import Path

from hubert_ecg.config import UserError
from hubert_ecg.data.dataset import Dataset, Entry, locate, number, walk
from hubert_ecg.data.readers import read_record
from hubert_ecg.data.record import Record
from hubert_ecg.data.tables import read_table

_TABLE = "REFERENCE.csv"
# Classes 1 to 9 of the challenge (Liu et al., J Med Imaging Health Inform 2018), by their Challenge 2020 abbreviations.
_CLASSES = ("NSR", "AF", "IAVB", "LBBB", "RBBB", "PAC", "PVC", "STD", "STE")


class Cpsc2018(Dataset):
    """CPSC 2018 with the task ``all``: up to three of nine classes. Patients are not published."""

    name = "cpsc2018"
    tasks = ("all",)
    spread, gathers = ".mat", True

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        return (folder / _TABLE).is_file()

    def entries(self) -> list[Entry]:
        table = locate(self.data_path, _TABLE)
        if table is None:
            raise UserError(f"cpsc2018: no {_TABLE} in {self.data_path}")
        files = {path.stem: path for path in walk(self.data_path, {".mat"})}
        entries = []
        for row in read_table("cpsc2018", table, {"Recording", "First_label"}).rows.values():
            name = row["Recording"]
            path = files.get(name, table.parent / f"{name}.mat")
            entries.append(
                Entry(
                    record_id=name,
                    path=path,
                    source=path.relative_to(self.data_path).as_posix(),
                    labels={"all": tuple(sorted({_label(table, name, row[c]) for c in row if "label" in c} - {""}))},
                )
            )
        return entries

    def read(self, entry: Entry) -> Record:
        assert entry.path is not None
        return read_record(entry.path, sampling_rate_hz=500.0)


def _label(table: Path, name: str, cell: str) -> str:
    if not cell:
        return ""
    position = number(cell)
    if position is None or position not in range(1, len(_CLASSES) + 1):
        raise UserError(f"cpsc2018: labels in {table} must be 1 to {len(_CLASSES)}, got {cell!r} for {name}")
    return _CLASSES[int(position) - 1]
