"""Tables of samples as text (.txt, .csv): a first line of lead names, then one line per sample, in mV.

Columns are split by blanks, tabs, commas or semicolons. A name may state its unit, ``II [uV]`` or ``II_uV``; a column
``time`` (in s, or as it states: ``time (ms)``) gives the rate; other columns are left out. A sample that is left blank
between commas is missing.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hubert_ecg.data.record import SLOWEST_HZ, Record, lead_name, split_unit, voltages

_TIME_NAMES = ("time", "t", "seconds")
_SECONDS = {"": 1.0, "s": 1.0, "sec": 1.0, "seconds": 1.0, "ms": 1e-3, "us": 1e-6}


def header(path: Path) -> tuple[str, ...]:
    """The columns of a text recording; empty when the file is another kind of text.

    A recording has two leads or more, or one and the time at most.
    """
    with open(path, encoding=_encoding(path), errors="replace") as file:
        names = _split(file.readline(1000))[0]
    leads = [name for name in names if lead_name(split_unit(name)[0])]
    return names if len(leads) > 1 or (leads and all(name in leads or _is_time(name) for name in names)) else ()


def read(path: Path, sampling_rate_hz: float, lead_names: Sequence[str] = ()) -> Record:
    """Read a text recording; its own lead names hold.

    Raises:
        ValueError: The first line does not name leads, or a line is not of as many numbers.
    """
    names = header(path)
    if not names:
        got = "other words" if path.stat().st_size else "an empty file"
        raise ValueError(f"text.read: first line must name the leads (I II V1 ...), got {got}")
    used = used_columns(names)
    with open(path, encoding=_encoding(path)) as file:
        delimiter = _split(next(file))[1]
        # Each line must have all columns; those that are left out may hold words.
        converters: Any = {place: _number if place in used else _left_out for place in range(len(names))}
        table = np.loadtxt(file, ndmin=2, delimiter=delimiter, comments=None, converters=converters)
    if table.shape[1] != len(names):
        raise ValueError(f"text.read: each line must hold {len(names)} numbers, got {table.shape[1]}")
    return from_columns(table.T[used], [names[place] for place in used], sampling_rate_hz, path)


def used_columns(names: Sequence[str]) -> list[int]:
    """The places of the leads and of the time among the columns of a table."""
    return [place for place, name in enumerate(names) if lead_name(split_unit(name)[0]) or _is_time(name)]


def from_columns(
    columns: Sequence[np.ndarray] | np.ndarray, names: Sequence[str], sampling_rate_hz: float, path: Path
) -> Record:
    """A record from columns of samples: leads, in mV or the unit that a name states, and perhaps the time.

    Raises:
        ValueError: There is no lead, its unit is no voltage, or the time is not even.
    """
    leads = []
    for name, column in zip(names, columns, strict=True):
        bare, unit = split_unit(name)
        if _is_time(name):
            if unit.lower() not in _SECONDS:
                raise ValueError(f"from_columns: time must be in s, ms or us, got {name!r}")
            sampling_rate_hz = _rate_hz(np.asarray(column, dtype=np.float64) * _SECONDS[unit.lower()])
        else:
            leads.append((column, bare, unit))
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
    return tuple(name.strip().strip('"') for name in line.rstrip("\r\n").split(delimiter)), delimiter


def _number(cell: str) -> float:
    return float(cell.strip() or "nan")


def _left_out(cell: str) -> float:
    return math.nan


def _is_time(name: str) -> bool:
    return split_unit(name)[0].lower() in _TIME_NAMES


def _encoding(path: Path) -> str:
    with open(path, "rb") as file:
        return "utf-16" if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
