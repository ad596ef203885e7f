"""From files as they were published to batches of model input.

Names load on first use, so that reading one file does not import pandas, and building a model does not import wfdb.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "Batch": "loader",
    "DATASETS": "datasets",
    "Dataset": "dataset",
    "Entry": "dataset",
    "LabelSet": "label_sets",
    "LabelWriter": "label_sets",
    "Loader": "loader",
    "READERS": "readers",
    "ReadError": "readers",
    "Record": "record",
    "Store": "store",
    "check_task": "build",
    "default_data_path": "datasets",
    "open_dataset": "datasets",
    "open_store": "build",
    "prepare": "build",
    "read_record": "readers",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"hubert_ecg.data.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'hubert_ecg.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
