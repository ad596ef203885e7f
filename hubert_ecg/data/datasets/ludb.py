"""LUDB (Kalyakulina et al., IEEE Access 2020): 200 WFDB records whose headers hold the diagnoses as text."""

from __future__ import annotations

import itertools
from pathlib import Path

from hubert_ecg.config import UserError
from hubert_ecg.data.dataset import Dataset, Entry, files_in, walk
from hubert_ecg.data.wfdb_files import read_header

_MARK = "<diagnoses>:"
_RHYTHM = "Rhythm: "


class Ludb(Dataset):
    """LUDB with the tasks ``all``, the lines of a header after ``<diagnoses>``, and ``rhythm``, those that begin with
    ``Rhythm:``. Each record is of a subject of its own. The annotations of waves are not read.
    """

    name = "ludb"
    tasks = ("all", "rhythm")
    spread = ".hea"

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        return any(_MARK in line for path in files_in(folder, ".hea", 1) for line in _lines(path))

    def entries(self) -> list[Entry]:
        entries = []
        for path in walk(self.data_path, {".hea"}):
            header = read_header(path)
            labels = diagnoses(path)
            entries.append(
                Entry(
                    record_id=path.stem,
                    path=path,
                    source=path.relative_to(self.data_path).with_suffix("").as_posix(),
                    patient_id=path.stem,
                    age=header.age,
                    sex=header.sex,
                    labels={
                        "all": labels,
                        "rhythm": tuple(name.removeprefix(_RHYTHM) for name in labels if name.startswith(_RHYTHM)),
                    },
                )
            )
        if not entries:
            raise UserError(f"ludb: no WFDB headers (data/1.hea, ...) in {self.data_path}")
        return sorted(entries, key=lambda entry: (len(entry.record_id), entry.record_id))


def diagnoses(path: Path) -> tuple[str, ...]:
    """The lines of a header after ``#<diagnoses>:``, without their full stop, sorted."""
    lines = itertools.dropwhile(lambda line: _MARK not in line, _lines(path))
    found = (line.lstrip("# ").rstrip(" .") for line in itertools.islice(lines, 1, None) if line.startswith("#"))
    return tuple(sorted({name for name in found if name}))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        # Reading its record tells why.
        return []
