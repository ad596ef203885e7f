"""Parquet tables of samples: a column per lead, a row per sample, columns named as in :mod:`hubert_ecg.data.text`.

The rate is a column ``time``, or an entry ``fs``, ``sampling_rate``, ... of the file's metadata.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hubert_ecg.data.npy import check_claim, rate_of
from hubert_ecg.data.record import Record
from hubert_ecg.data.text import from_columns, used_columns


def read(path: Path, sampling_rate_hz: float, lead_names: Sequence[str] = ()) -> Record:
    """Read a Parquet table; its own lead names hold. Nulls are missing samples.

    Raises:
        ValueError: There is no lead, or one is not of numbers.
        pyarrow.ArrowInvalid: The file is damaged.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        check_claim(file.metadata.num_rows * len(file.schema_arrow.names) * 8, path.stat().st_size)
        used = used_columns(file.schema_arrow.names)
        names = [file.schema_arrow.names[place] for place in used]
        facts = {key.decode(errors="replace"): value for key, value in (file.schema_arrow.metadata or {}).items()}
        table = file.read().select(used)
    sampling_rate_hz = rate_of(facts, sampling_rate_hz)
    columns = [column.to_numpy() for column in table.columns]
    if odd := [name for name, column in zip(names, columns, strict=True) if column.dtype.kind not in "iuf"]:
        raise ValueError(f"parquet.read: columns must be numbers, got other values in {odd}")
    return from_columns(np.stack(columns) if columns else [], names, sampling_rate_hz, path)
