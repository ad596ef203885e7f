"""HuBERT-ECG: self-supervised ECG foundation models, from a folder of recordings to a report."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import Any

__version__ = version("hubert-ecg")

# Public name -> the module that holds it, loaded on first use so that `import hubert_ecg` stays light.
_PUBLIC = {
    "prepare_ecg_for_inference": "signal",
    "KMeans": "clustering",
    "HubertECG": "models",
    "HubertECGConfig": "models",
    "HubertECGForPretraining": "models",
    "HubertECGForClassification": "models",
    "Store": "data",
}
_MODULES = ("clustering", "data", "evaluation", "features", "models", "ops", "signal", "train")

__all__ = ["__version__", *_MODULES, *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"hubert_ecg.{_PUBLIC[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"hubert_ecg.{name}")
    raise AttributeError(f"module 'hubert_ecg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
