"""CODE-15% and SaMi-Trop (Ribeiro et al.): HDF5 files with ``exams.csv``, or the WFDB form of the Challenge 2025."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from hubert_ecg.config import UserError
from hubert_ecg.data.dataset import Dataset, Entry, files_in, locate, number, read_table, walk
from hubert_ecg.data.readers import ReadError
from hubert_ecg.data.record import Record
from hubert_ecg.data.wfdb_files import Header, read_header
from hubert_ecg.signal import LEADS

_EXAMS, _CHAGAS_TABLE = "exams.csv", "code15_chagas_labels.csv"
_CHAGAS = "Chagas"
_RATE_HZ = 400.0
# Headers that "auto" looks into before it decides.
_LOOK_AT = 5


class Challenge2025(Dataset):
    """Records of any source of the Challenge 2025 in WFDB form: ``# Chagas label: True`` is the label of ``all``."""

    name = "challenge2025"
    spread: ClassVar[str] = ".hea"
    tasks: tuple[str, ...] = ("all",)

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        headers = files_in(folder, ".hea", _LOOK_AT) if cls is Challenge2025 else []
        return any("chagas label" in read_header(path).comments for path in headers)

    @classmethod
    def takes(cls, header: Header) -> bool:
        """Whether a record with this header belongs to the source."""
        return True

    def entries(self) -> list[Entry]:
        headers = ((path, read_header(path)) for path in walk(self.data_path, {".hea"}))
        entries = [self._entry(path, header) for path, header in headers if self.takes(header)]
        if not entries:
            raise UserError(f"{self.name}: no records (WFDB headers with # Chagas label) in {self.data_path}")
        return entries

    def _entry(self, path: Path, header: Header) -> Entry:
        source = path.relative_to(self.data_path).with_suffix("").as_posix()
        return Entry(
            record_id=source,
            path=path,
            source=source,
            patient_id=header.comments.get("patient id") or None,
            age=header.age,
            sex=header.sex,
            labels={"all": (_CHAGAS,) if header.comments.get("chagas label", "").lower() == "true" else ()},
        )


class _Exams(Challenge2025):
    """Exams in HDF5 where ``exams.csv`` is there, else the records of this source in WFDB form."""

    labels: ClassVar[tuple[str, ...]]

    def __init__(self, data_path: Path | None = None, **unstated: Any):
        super().__init__(data_path, **unstated)
        self._exams = locate(self.data_path, _EXAMS)
        self._chagas = locate(self.data_path, _CHAGAS_TABLE) if self._exams else None
        if self._chagas:
            self.tasks = ("all", "chagas")

    def entries(self) -> list[Entry]:
        if self._exams is None:
            return super().entries()
        rows = read_table(self.name, self._exams, {"exam_id", "age", "is_male", *self.labels})
        files = {path.name: path for path in walk(self._exams.parent, {".h5", ".hdf5"})}
        infected = None
        if self._chagas:
            table = read_table(self.name, self._chagas, {"exam_id", "chagas"})
            infected = {exam for exam, value in zip(table["exam_id"], table["chagas"], strict=True) if _is_true(value)}
        entries = []
        for position, row in enumerate(rows.to_dict("records")):
            exam = _digits(row["exam_id"])
            file = row.get("trace_file") or "exams.hdf5"
            path = files.get(file, self._exams.parent / file)
            labels = {"all": tuple(sorted(name for name in self.labels if _is_true(row[name])))}
            if infected is not None:
                labels["chagas"] = (_CHAGAS,) if exam in infected else ()
            entries.append(
                Entry(
                    record_id=exam,
                    path=path,
                    # Files without exam_id hold the exams in the order of the table.
                    source=f"{path.relative_to(self.data_path).as_posix()}#{position}",
                    patient_id=_digits(row.get("patient_id", "")) or None,
                    age=number(row["age"]),
                    sex=_sex(row["is_male"]),
                    labels=labels,
                )
            )
        return entries

    def read(self, entry: Entry) -> Record:
        if self._exams is None:
            return super().read(entry)
        assert entry.path is not None
        try:
            import h5py
        except ImportError as error:
            raise UserError("reading HDF5 needs h5py: pip install 'hubert-ecg[formats]'") from error

        try:
            with h5py.File(entry.path) as file:
                ids = _exam_ids(entry.path, entry.path.stat().st_mtime_ns)
                position = int(entry.source.rpartition("#")[2]) if ids is None else ids.get(int(entry.record_id), -1)
                tracings = file["tracings"]
                if not 0 <= position < len(tracings) or tracings.shape[2:] != (len(LEADS),):
                    raise ReadError(f"{entry.source}: exam {entry.record_id} is not in {list(tracings.shape)} tracings")
                signal = np.asarray(tracings[position], dtype=np.float32).T
        # h5py has no error of its own: what is damaged raises any of these.
        except (OSError, KeyError, RuntimeError, TypeError, AttributeError) as error:
            raise ReadError(f"{entry.source}: {' '.join(str(error).split())}") from error
        # Exams of 7 s and 10 s are centred in 4096 samples of zeros.
        used = np.flatnonzero(signal.any(0))
        if not len(used):
            raise ReadError(f"{entry.source}: exam {entry.record_id} is nothing but zeros")
        return Record(signal[:, used[0] : used[-1] + 1], _RATE_HZ, LEADS)


class Code15(_Exams):
    """CODE-15%: six abnormalities of ``exams.csv`` are ``all``, and ``chagas`` is there with
    ``code15_chagas_labels.csv``. In the WFDB form of the Challenge 2025, Chagas is ``all``.
    """

    name = "code15"
    labels = ("1dAVb", "RBBB", "LBBB", "SB", "ST", "AF")

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        return (folder / _EXAMS).is_file() and any(folder.glob("exams_part*.hdf5"))

    @classmethod
    def takes(cls, header: Header) -> bool:
        # The first version of the Challenge's files did not name the source; all of them were of CODE-15%.
        return "chagas label" in header.comments and "code-15" in header.comments.get("source", "code-15").lower()


class SamiTrop(_Exams):
    """SaMi-Trop, patients with Chagas disease: ``death`` and ``normal_ecg`` of ``exams.csv`` are ``all``. In the WFDB
    form of the Challenge 2025, Chagas is ``all``.
    """

    name = "samitrop"
    labels = ("death", "normal_ecg")

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        return (folder / _EXAMS).is_file() and (folder / "exams.hdf5").is_file()

    @classmethod
    def takes(cls, header: Header) -> bool:
        return "sami" in header.comments.get("source", "").lower()


@functools.lru_cache(maxsize=32)
def _exam_ids(path: Path, modified_ns: int) -> dict[int, int] | None:
    """Row of each exam in a file; None where the file does not name them. Of one state of the file."""
    import h5py

    with h5py.File(path) as file:
        if "exam_id" not in file:
            return None
        return {exam: row for row, exam in enumerate(file["exam_id"][()].tolist())}


def _sex(is_male: str) -> str | None:
    return ("male" if _is_true(is_male) else "female") if is_male.strip() else None


def _is_true(cell: str) -> bool:
    return cell.strip().lower() in ("true", "1", "1.0")


def _digits(cell: str) -> str:
    return cell.strip().removesuffix(".0")
