"""The PTB Diagnostic ECG Database as published (Bousseljot et al. 1995): patient001/s0010_re.hea, at 1000 Hz."""

from __future__ import annotations

from pathlib import Path

from hubert_ecg.config import UserError
from hubert_ecg.data.dataset import Dataset, Entry, files_in, walk
from hubert_ecg.data.record import sex_of
from hubert_ecg.data.wfdb_files import read_header

_REASON = "reason for admission"


class PtbDiagnostic(Dataset):
    """The original PTB with the task ``all``: the diagnosis that a header gives as the reason for admission. Folders
    are patients, and the Frank leads are left out. The Challenge's version of it is ``ptb``.
    """

    name = "ptbdb"
    tasks = ("all",)
    spread = ".hea"

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        return any(_REASON in read_header(path).comments for path in files_in(folder, ".hea", 1))

    def entries(self) -> list[Entry]:
        entries = []
        for path in walk(self.data_path, {".hea"}):
            header = read_header(path)
            folder = path.parent.name
            source = path.relative_to(self.data_path).with_suffix("").as_posix()
            reason = header.comments.get(_REASON, "")
            entries.append(
                Entry(
                    record_id=source,
                    path=path,
                    source=source,
                    patient_id=folder if folder.startswith("patient") else None,
                    age=header.age,
                    sex=sex_of(header.comments.get("sex")),
                    labels={"all": (reason,) if reason and reason.lower() != "n/a" else ()},
                )
            )
        if not entries:
            raise UserError(f"ptbdb: no WFDB headers (patient001/s0010_re.hea, ...) in {self.data_path}")
        return entries
