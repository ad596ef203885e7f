"""Any tree of readable files: recordings without labels, for pretraining."""

from __future__ import annotations

from pathlib import Path

from hubert_ecg.config import UserError
from hubert_ecg.data import text
from hubert_ecg.data.dataset import Dataset, Entry, walk
from hubert_ecg.data.readers import READERS
from hubert_ecg.data.wfdb_files import segments_of

# Of all that is written as text, those are recordings that say so.
_TABLES = (".txt", ".csv")


class Folder(Dataset):
    """Every readable file below a folder is one recording and one patient; there are no labels.

    A .mat file with a header beside it is part of a WFDB record, and so are the segments that a header lists; a .txt or
    .csv file counts when its first line names leads, or when it is empty, so that it is listed as unreadable.
    """

    name = "folder"

    def entries(self) -> list[Entry]:
        paths = [path for path in walk(self.data_path, READERS.keys()) if is_recording(path) or _is_empty_table(path)]
        segments = {segment for path in paths if path.suffix.lower() == ".hea" for segment in segments_of(path)}
        paths = [path for path in paths if path not in segments]
        if not paths:
            raise UserError(f"no recordings in {self.data_path}: looked for {', '.join(READERS)}")
        sources = [path.relative_to(self.data_path) for path in paths]
        names = [source.with_suffix("").as_posix() for source in sources]
        if len(set(names)) < len(names):
            names = [source.as_posix() for source in sources]
        return [
            Entry(record_id=name, path=path, source=source.as_posix())
            for name, path, source in zip(names, paths, sources, strict=True)
        ]


def is_recording(path: Path) -> bool:
    if path.suffix.lower() in _TABLES:
        try:
            return bool(text.header(path))
        except OSError:
            # Listed, so that reading it says why it is skipped.
            return True
    return path.suffix.lower() != ".mat" or not path.with_suffix(".hea").is_file()


def _is_empty_table(path: Path) -> bool:
    return path.suffix.lower() in _TABLES and path.is_file() and path.stat().st_size == 0
