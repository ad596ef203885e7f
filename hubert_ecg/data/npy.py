"""NumPy files: one array ``[n_leads, n_samples]`` in mV; which leads it holds is for the caller to say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hubert_ecg.data.record import Record

_MAGIC = b"\x93NUMPY"


def read(path: Path, sampling_rate_hz: float, lead_names: Sequence[str]) -> Record:
    """Read a .npy file. Arrays of Python objects are refused: they could run code.

    Raises:
        ValueError: The file is in another format, or its array is not of these leads.
    """
    with open(path, "rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ValueError("npy.read: file must be in NumPy's .npy format, got other content")
    array = np.load(path, allow_pickle=False)
    signal = rows_are_leads(array, lead_names)
    return Record(signal, sampling_rate_hz, tuple(lead_names), record_id=path.stem, source=path.name)


def rows_are_leads(array: np.ndarray, lead_names: Sequence[str]) -> np.ndarray:
    """``[L, n]`` from ``[L, n]`` or ``[n, L]``; of two equal sides, the first is the leads. One lead may be ``[n]``.

    Raises:
        ValueError: Neither side is L.
    """
    num = len(lead_names)
    if array.ndim == 1 and num == 1:
        array = array[None]
    if array.ndim != 2 or num not in array.shape:
        raise ValueError(
            f"rows_are_leads: array must be [{num}, n_samples] or [n_samples, {num}], got {list(array.shape)}; "
            "where it holds other leads, name them: --lead_names I,II,V2"
        )
    return np.asarray(array if len(array) == num else array.T)
