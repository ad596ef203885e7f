"""NumPy files: one array ``[n_leads, n_samples]`` in mV, the twelve leads in standard order."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hubert_ecg.data.record import Record
from hubert_ecg.signal import LEADS

_MAGIC = b"\x93NUMPY"


def read(path: Path, sampling_rate_hz: float) -> Record:
    """Read a .npy file. Arrays of Python objects are refused: they could run code.

    Raises:
        ValueError: The file is in another format, or its array is not of twelve leads.
    """
    with open(path, "rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ValueError("npy.read: file must be in NumPy's .npy format, got other content")
    array = np.load(path, allow_pickle=False)
    return Record(twelve_leads(array), sampling_rate_hz, LEADS, record_id=path.stem, source=path.name)


def twelve_leads(array: np.ndarray) -> np.ndarray:
    """``[12, n]`` from ``[12, n]`` or ``[n, 12]``; of two equal sides, the first is the leads.

    Raises:
        ValueError: Neither side is 12.
    """
    if array.ndim != 2 or len(LEADS) not in array.shape:
        raise ValueError(
            f"twelve_leads: array must be [12, n_samples] or [n_samples, 12], got {list(array.shape)}; "
            "where leads are missing, use a format that names its leads (WFDB, text)"
        )
    return np.asarray(array if len(array) == len(LEADS) else array.T)
