"""From scores to a report: metrics with bootstrap intervals, pictures, one HTML page.

Everything is loaded on first use, so that importing a model never loads scikit-learn or matplotlib.
"""

from __future__ import annotations

import importlib
from typing import Any

# Public name -> the module that holds it.
_PUBLIC = {
    "Estimate": "metrics",
    "Evaluation": "metrics",
    "choose_thresholds": "metrics",
    "compare_table": "metrics",
    "evaluate": "metrics",
    "EcgExample": "report",
    "write_audit": "report",
    "write_doctor": "doctor",
    "write_json": "report",
    "write_predictions": "predictions",
    "write_report": "report",
}
_MODULES = ("audit", "audit_plots", "beats", "bootstrap", "doctor", "metrics", "plots", "predictions", "report")

__all__ = [*_MODULES, *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
