from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# As the commands do, before torch is loaded: threads that wait leave their core to the ranks beside them.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available() or os.environ.get("FAIL_WITHOUT_CUDA"):
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real recordings, beside the project and never in it."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real recordings at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HUBERT_ECG_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def set_products(monkeypatch):
    """``set_products(dtypes)``: a CPU whose products of half precision are of these dtypes; others it emulates."""
    # The package has the function under the module's name.
    module = sys.modules["hubert_ecg.ops.linear"]

    def choose(halves):
        monkeypatch.setattr(module, "_PRODUCTS_OF_THIS_CPU", frozenset({torch.float32, torch.float64, *halves}))

    return choose


@pytest.fixture
def emulated(set_products):
    """A CPU without products of half precision."""
    set_products(())
