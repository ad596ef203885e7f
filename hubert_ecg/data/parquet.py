"""Parquet tables of samples: a column per lead, a row per sample, columns named as in :mod:`hubert_ecg.data.text`.

The rate is a column ``time``, or an entry ``fs``, ``sampling_rate`` or ``sample_rate`` of the file's metadata.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hubert_ecg.data.npy import check_claim, rate_of
from hubert_ecg.data.record import Record
from hubert_ecg.data.text import from_columns


def read(path: Path, sampling_rate_hz: float, lead_names: Sequence[str] = ()) -> Record:
    """Read a Parquet table; its own lead names hold. Nulls are missing samples.

    Raises:
        ValueError: A column names neither a lead nor the time, or is not of numbers.
        pyarrow.ArrowInvalid: The file is damaged.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        check_claim(file.metadata.num_rows * len(file.schema_arrow.names) * 8, path.stat().st_size)
        names = file.schema_arrow.names
        facts = {key.decode(errors="replace"): value for key, value in (file.schema_arrow.metadata or {}).items()}
        table = file.read()
    sampling_rate_hz = rate_of(facts, sampling_rate_hz)
    columns = [column.to_numpy() for column in table.columns]
    if odd := [name for name, column in zip(names, columns, strict=True) if column.dtype.kind not in "iuf"]:
        raise ValueError(f"parquet.read: columns must be numbers, got other values in {odd}")
    return from_columns(np.stack(columns) if columns else [], names, sampling_rate_hz, path)
