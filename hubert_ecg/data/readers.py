"""Readers by file suffix: one file per format, one line here."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from hubert_ecg.config import UserError
from hubert_ecg.data import dicom, ecgdatakit_files, edf, hdf5, mat, npy, parquet, text, wfdb_files
from hubert_ecg.data.record import Record
from hubert_ecg.signal import LEADS

Reader = Callable[[Path, float, Sequence[str]], Record]

READERS: dict[str, Reader] = {
    ".hea": wfdb_files.read,
    ".npy": npy.read,
    ".npz": npy.read_npz,
    ".mat": mat.read,
    ".h5": hdf5.read,
    ".hdf5": hdf5.read,
    ".txt": text.read,
    ".csv": text.read,
    ".parquet": parquet.read,
    ".edf": edf.read,
    ".bdf": edf.read,
    ".dcm": dicom.read,
    ".xml": ecgdatakit_files.read,
    ".scp": ecgdatakit_files.read,
}


class ReadError(UserError):
    """A recording that cannot be read; the message names the file and the reason."""


def read_record(path: str | Path, sampling_rate_hz: float = 500.0, lead_names: Sequence[str] = LEADS) -> Record:
    """Read one recording; the reader follows from the suffix.

    Args:
        path: The file. A WFDB record may be named by its header, its signal file, or without a suffix.
        sampling_rate_hz: Rate of a file that does not carry one.
        lead_names: Rows of a file that does not name its leads.

    Raises:
        ReadError: The file is missing, damaged, or of no known format.
    """
    path = Path(path)
    header = path.with_name(path.name + ".hea")
    if not path.is_file() and header.is_file():
        path = header
    elif path.suffix.lower() in (".dat", ".mat") and path.with_suffix(".hea").is_file():
        path = path.with_suffix(".hea")
    if not path.is_file():
        raise ReadError(f"{path}: no such file")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ReadError(f"{path}: no reader for {path.suffix or 'files without suffix'}; known: {', '.join(READERS)}")
    try:
        with warnings.catch_warnings():
            # What a library does about a damaged file, beside what it says of it, is checked by the readers.
            warnings.simplefilter("ignore")
            return reader(path, sampling_rate_hz, lead_names)
    except MemoryError as error:
        raise ReadError(f"{path}: asks for more memory than there is; damaged?") from error
    # A damaged file makes the libraries below raise almost anything, and one record must not end a run over thousands.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ReadError(f"{path}: {reason}") from error
