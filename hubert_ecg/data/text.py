"""Text files: a first line of lead names, then one line per sample, in mV; columns split by blanks, commas or tabs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hubert_ecg.data.record import Record, lead_name


def header(path: Path) -> tuple[str, ...]:
    """The lead names of a text recording; empty when the file is another kind of text."""
    with open(path, encoding="utf-8", errors="replace") as file:
        names = tuple(file.readline(1000).replace(",", " ").split())
    return names if names and all(lead_name(name) for name in names) else ()


def read(path: Path, sampling_rate_hz: float, lead_names: Sequence[str] = ()) -> Record:
    """Read a text recording; its own lead names hold.

    Raises:
        ValueError: The first line does not name leads, or a line is not of as many numbers.
    """
    names = header(path)
    if not names:
        raise ValueError("text.read: first line must name the leads (I II V1 ...), got other words")
    with open(path, encoding="utf-8") as file:
        next(file)
        signal = np.loadtxt((line.replace(",", " ") for line in file), dtype=np.float32, ndmin=2)
    return Record(signal.T, sampling_rate_hz, names, record_id=path.stem, source=path.name)
