"""Predictions as a table: one row a record, the score and the target of each label."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from hubert_ecg.files import replacing


def write_predictions(
    path: str | Path,
    record_ids: Sequence[str],
    label_names: Sequence[str],
    scores: np.ndarray,
    targets: np.ndarray | None = None,
    format: Literal["csv", "parquet"] | None = None,
) -> Path:
    """Write predictions with the columns ``record_id``, ``score_<label>`` ... and ``target_<label>`` ...

    The file appears whole or not at all.

    Args:
        path: File to write.
        record_ids: N record ids.
        label_names: C names.
        scores: [N, C] float.
        targets: [N, C], or None where there are none. [N] class numbers give one column ``target``.
        format: "csv" or "parquet". Default: by the suffix of path.

    Returns:
        The path.
    """
    import pandas as pd

    path = Path(path)
    format = format or ("parquet" if path.suffix == ".parquet" else "csv")
    if format not in ("csv", "parquet"):
        raise ValueError(f"write_predictions: format must be csv or parquet, got {format!r}")
    if len(set(label_names)) != len(label_names):
        raise ValueError(f"write_predictions: label_names must be distinct, got {list(label_names)}")
    scores = np.asarray(scores)
    if scores.shape != (len(record_ids), len(label_names)):
        raise ValueError(
            f"write_predictions: scores must be [{len(record_ids)}, {len(label_names)}], a row for each record and a "
            f"column for each label, got {list(scores.shape)}"
        )
    columns: dict[str, object] = {"record_id": [str(record_id) for record_id in record_ids]}
    columns |= {f"score_{name}": scores[:, c] for c, name in enumerate(label_names)}
    if targets is not None:
        targets = np.asarray(targets)
        if targets.shape not in (scores.shape, scores.shape[:1]):
            raise ValueError(f"write_predictions: targets must be {list(scores.shape)}, got {list(targets.shape)}")
        if targets.ndim == 1:
            columns["target"] = targets
        else:
            columns |= {f"target_{name}": targets[:, c] for c, name in enumerate(label_names)}
    table = pd.DataFrame(columns)
    with replacing(path) as temporary:
        if format == "csv":
            table.to_csv(temporary, index=False)
        else:
            table.to_parquet(temporary, index=False)
    return path
