"""Tables of samples as text (.txt, .csv): a first line of lead names, then one line per sample, in mV.

Columns are split by blanks, tabs, commas or semicolons. A name may state its unit, ``II [uV]``; a column ``time`` (in
s, or as it states: ``time (ms)``) gives the rate. A sample that is left blank between commas is missing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hubert_ecg.data.record import SLOWEST_HZ, Record, lead_name, voltages

_COLUMN = re.compile(r"(?P<name>.*?)\s*(?:[\[(](?P<unit>[^\])]*)[\])])?")
_TIME_NAMES = ("time", "t", "seconds")
_SECONDS = {"": 1.0, "s": 1.0, "sec": 1.0, "seconds": 1.0, "ms": 1e-3, "us": 1e-6}


def header(path: Path) -> tuple[str, ...]:
    """The columns of a text recording; empty when the file is another kind of text."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        names = _split(file.readline(1000))[0]
    return names if any(lead_name(_parts(name)[0]) for name in names) and all(map(_is_known, names)) else ()


def read(path: Path, sampling_rate_hz: float, lead_names: Sequence[str] = ()) -> Record:
    """Read a text recording; its own lead names hold.

    Raises:
        ValueError: The first line does not name leads, or a line is not of as many numbers.
    """
    names = header(path)
    if not names:
        got = "other words" if path.stat().st_size else "an empty file"
        raise ValueError(f"text.read: first line must name the leads (I II V1 ...), got {got}")
    with open(path, encoding="utf-8-sig") as file:
        delimiter = _split(next(file))[1]
        missing = (lambda cell: float(cell.strip() or "nan")) if delimiter else None
        table = np.loadtxt(file, ndmin=2, delimiter=delimiter, comments=None, converters=missing)
    if table.shape[1] != len(names):
        raise ValueError(f"text.read: each line must hold {len(names)} numbers, got {table.shape[1]}")
    return from_columns(table.T, names, sampling_rate_hz, path)


def from_columns(
    columns: Sequence[np.ndarray] | np.ndarray, names: Sequence[str], sampling_rate_hz: float, path: Path
) -> Record:
    """A record from columns of samples: leads by name, in mV or the unit that a name states, and perhaps the time.

    Raises:
        ValueError: A column names neither a lead nor the time, or the time is not even.
    """
    leads = []
    for name, column in zip(names, columns, strict=True):
        bare, unit = _parts(name)
        if not _is_known(name):
            raise ValueError(f"from_columns: columns must be leads or the time, got {name!r}")
        if lead_name(bare):
            leads.append((column, bare, unit))
        else:
            sampling_rate_hz = _rate_hz(np.asarray(column, dtype=np.float64) * _SECONDS[unit.lower()])
    rows, kept, units = zip(*leads, strict=True) if leads else ((), (), ())
    signal, kept_names = voltages(rows, kept, units)
    return Record(signal, sampling_rate_hz, kept_names, record_id=path.stem, source=path.name)


def _rate_hz(time_s: np.ndarray) -> float:
    """Of times that may be rounded: within half a step of an even grid."""
    step = (time_s[-1] - time_s[0]) / max(len(time_s) - 1, 1)
    grid = time_s[0] + step * np.arange(len(time_s))
    if not step > 0 or not np.abs(time_s - grid).max() <= step / 2:
        raise ValueError("from_columns: time must grow in even steps, got gaps or none")
    if step > 1 / SLOWEST_HZ:
        raise ValueError(
            f"from_columns: time must give {SLOWEST_HZ:g} Hz or more, got steps of {step:g} s; "
            "name another unit: time (ms), or leave a column of counts out"
        )
    return float(np.round(1 / step, 6))


def _split(line: str) -> tuple[tuple[str, ...], str | None]:
    delimiter = next((mark for mark in ",;\t" if mark in line), None)
    return tuple(name.strip().strip('"') for name in line.strip().split(delimiter)), delimiter


def _parts(name: str) -> tuple[str, str]:
    match = _COLUMN.fullmatch(name.strip())
    return (match["name"], match["unit"] or "") if match else (name, "")


def _is_known(name: str) -> bool:
    bare, unit = _parts(name)
    return lead_name(bare) is not None or (bare.lower() in _TIME_NAMES and unit.lower() in _SECONDS)
