from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hubert_ecg.data import Store
from hubert_ecg.data.build import build
from hubert_ecg.data.synthetic import Cohort

from .processes import Processes


@pytest.fixture(scope="session")
def cohort(tmp_path_factory) -> Store:
    """A packed store of 40 generated records, with labels and all ten folds."""
    return build(Cohort(num_records=40, seed=3), tmp_path_factory.mktemp("cohort") / "store")


@pytest.fixture(scope="session")
def cohort_path(cohort) -> Path:
    return cohort.path


@pytest.fixture(scope="session")
def processes(tmp_path_factory) -> Iterator[Processes]:
    """Starts processes that have imported all they need."""
    found = Processes(tmp_path_factory.mktemp("processes"))
    yield found
    found.close()
