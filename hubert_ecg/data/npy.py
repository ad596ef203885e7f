"""NumPy files: an array ``[n_leads, n_samples]`` in mV; which leads a .npy holds is for the caller to say.

A .npz archive is read like HDF5 and MATLAB files: the array ``ecg``, ``signal``, ``tracings`` or ``data``, or its only
matrix. What stands beside it wins over the caller, in upper or lower case: the rate (``fs``, ``sampling_rate_hz``,
``SamplingFrequency``, ...: :data:`RATE_NAMES`), the leads (``lead_names``, ``leads``, ``sig_name`` or ``channels``; a
name may state its unit, ``II (uV)``), and the unit of all or of each (``units`` or ``unit``).
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hubert_ecg.data.record import Record, lead_name, split_unit, voltages

SIGNAL_NAMES = ("ecg", "signal", "tracings", "data")
# As :func:`_plain` spells them, from the plainest to what may mean another rate.
RATE_NAMES = (
    *("samplingrate", "samplerate", "samplingfrequency", "samplefrequency", "samplingfreq", "samplefreq"),
    *("currsamplerate", "sfreq", "fs", "sr", "frequency", "freq", "rate"),
)
_LEADS_NAMES = ("lead_names", "leads", "sig_name", "channels")
_UNIT_NAMES = ("units", "unit")
_STATED = {*_LEADS_NAMES, *_UNIT_NAMES}

_MAGIC = b"\x93NUMPY"

# Deflate, the strongest compression in use, makes nothing smaller than this; and what is small does no harm.
_LARGEST_RATIO = 1032
_HARMLESS_BYTES = 2**26


def read(path: Path, sampling_rate_hz: float, lead_names: Sequence[str]) -> Record:
    """Read a .npy file. Arrays of Python objects are refused: they could run code.

    Raises:
        ValueError: The file is in another format, or its array is not of these leads.
    """
    with open(path, "rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ValueError("npy.read: file must be in NumPy's .npy format, got other content")
        file.seek(0)
        shape, dtype = _claimed(file, path.stat().st_size)
        wanted = file.tell() + math.prod(shape) * dtype.itemsize
        if not dtype.hasobject and wanted != path.stat().st_size:
            raise ValueError(f"npy.read: file must have {wanted} bytes, as its header says, got {path.stat().st_size}")
    signal = rows_are_leads(np.load(path, allow_pickle=False), lead_names)
    return Record(signal, sampling_rate_hz, tuple(lead_names), record_id=path.stem, source=path.name)


def read_npz(path: Path, sampling_rate_hz: float, lead_names: Sequence[str]) -> Record:
    """Read a .npz archive. Arrays of Python objects are refused: they could run code.

    Raises:
        ValueError: The archive holds no array of these leads, or several.
        zipfile.BadZipFile: The archive is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        check_claim(sum(item.file_size for item in archive.infolist()), path.stat().st_size)
        ndims = {}
        for item in archive.infolist():
            with archive.open(item) as file:
                ndims[item.filename.removesuffix(".npy")] = len(_claimed(file, path.stat().st_size)[0])
    with np.load(path, allow_pickle=False) as arrays:
        name = signal_name(ndims, "npy.read_npz")
        array, beside = arrays[name], {other: arrays[other] for other in filter(is_stated, ndims)}
    return from_array(array, beside, sampling_rate_hz, lead_names, path)


def from_array(
    array: np.ndarray,
    beside: Mapping[str, Any],
    sampling_rate_hz: float,
    lead_names: Sequence[str],
    path: Path,
    default_unit: str = "mV",
    **facts: Any,
) -> Record:
    """The recording that an array holds, with what its file states beside it.

    Args:
        array: ``[n_leads, n]`` or ``[n, n_leads]``.
        beside: Values by name, of which those of a rate, leads and units hold.
        sampling_rate_hz: Rate where none is stated.
        lead_names: Leads where none are stated.
        path: The file.
        default_unit: The unit where none is stated.
        **facts: Other fields of the record.

    Raises:
        ValueError: The array is not of these leads, or a unit is no voltage.
    """
    stated = _texts(beside, _LEADS_NAMES)
    names = stated if any(map(lead_name, stated)) else list(lead_names)
    units = _texts(beside, _UNIT_NAMES)
    if not units and (own := [split_unit(name)[1] for name in names]) and any(own):
        names, units = [split_unit(name)[0] for name in names], [unit or default_unit for unit in own]
    units = units or [default_unit]
    rows = rows_are_leads(array, names)
    if len(units) not in (1, len(rows)):
        raise ValueError(f"from_array: units must be one or {len(rows)}, one of each lead, got {len(units)}")
    signal, kept = voltages(rows, names, units if len(units) == len(rows) else units * len(rows))
    return Record(signal, rate_of(beside, sampling_rate_hz), kept, record_id=path.stem, source=path.name, **facts)


def is_stated(name: str) -> bool:
    """Whether what a file holds under this name says something of its recording: its rate, leads or units."""
    return name.lower() in _STATED or _plain(name) in RATE_NAMES


def rate_of(beside: Mapping[str, Any], default_hz: float) -> float:
    """The rate that a file states in Hz, under one of :data:`RATE_NAMES` however it is spelled."""
    stated = {_plain(name): value for name, value in beside.items()}
    return next((float(np.ravel(stated[name])[0]) for name in RATE_NAMES if name in stated), default_hz)


def _plain(name: str) -> str:
    """``Sampling_Rate (Hz)`` as ``samplingrate``."""
    return "".join(filter(str.isalnum, name.lower())).removesuffix("hz")


def _texts(beside: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The words under the first of these names that has some, however the format nests them."""

    def words(value: Any) -> list[str]:
        if isinstance(value, bytes):
            value = value.decode(errors="replace")
        if isinstance(value, str):
            return [word.strip() for word in value.split(",")]
        return [word for item in np.ravel(value) for word in words(item)] if isinstance(value, np.ndarray) else []

    stated = {name.lower(): value for name, value in beside.items()}
    return next((found for name in names if name in stated and (found := words(stated[name]))), [])


def _claimed(file: Any, held: int) -> tuple[tuple[int, ...], np.dtype]:
    """The shape and type that an array's header claims, before memory is taken for it."""
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(file)
    check_claim(math.prod(shape) * dtype.itemsize, held)
    return tuple(shape), dtype


def check_claim(num_bytes: int, held: int) -> None:
    """Whether what is held can be as many bytes as it says, before memory is taken for them.

    Raises:
        ValueError: No compression in use makes so much so small.
    """
    if num_bytes > max(_HARMLESS_BYTES, _LARGEST_RATIO * held):
        raise ValueError(f"check_claim: file must hold its arrays, got {held} bytes that claim to be {num_bytes:.3g}")


def signal_name(ndims: Mapping[str, int], reader: str) -> str:
    """Which array of a file is its recording: one of :data:`SIGNAL_NAMES`, or its only matrix.

    Raises:
        ValueError: There is none, or there are several; ``reader`` is named in the message.
    """
    named = [name for name in SIGNAL_NAMES if name in ndims]
    matrices = [name for name, ndim in ndims.items() if ndim == 2]
    if not named and len(matrices) != 1:
        wanted = ", ".join(SIGNAL_NAMES)
        raise ValueError(f"{reader}: file must hold one of {wanted} or one 2-D array, got {sorted(ndims)}")
    return named[0] if named else matrices[0]


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
