"""Folds 1 to 10 for data sets that publish none: by patient, alike in labels, and the same on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from hubert_ecg.data.dataset import Entry

NUM_FOLDS = 10
# Not a run's seed: a model trained under one seed must not meet its training records in a test under another.
FOLD_SEED = 0
# A small set fills train, validation and test first.
_FIRST_BLOCK = (1, 9, 10, 2, 3, 4, 5, 6, 7, 8)


def assign_folds(entries: Sequence[Entry], task: str | None = None, seed: int = FOLD_SEED) -> list[int]:
    """The fold of each entry: its official one, else one dealt to its patient.

    Patients in the order of their label combinations, at random within one, are dealt to the ten folds in blocks of
    ten, so that each combination spreads over the folds.

    Args:
        entries: The entries; those without patient_id are patients of their own.
        task: The task whose labels are spread; None deals at random.
        seed: Seed of the order and the deal.
    """
    patients = [
        f"record {entry.record_id}" if entry.patient_id is None else f"patient {entry.patient_id}" for entry in entries
    ]
    folds: dict[str, int] = {}
    labels: dict[str, frozenset[str]] = {}
    none: frozenset[str] = frozenset()
    for patient, entry in zip(patients, entries, strict=True):
        if entry.fold is not None:
            folds.setdefault(patient, entry.fold)
        known, found = labels.get(patient, none), entry.labels.get(task, ()) if task else ()
        labels[patient] = known.union(found) if found else known

    def order(patient: str) -> tuple[tuple[str, ...], bytes]:
        shuffled = hashlib.blake2b(f"{seed} {patient}".encode(errors="surrogateescape"))
        return tuple(sorted(labels[patient])), shuffled.digest()

    dealt = sorted((patient for patient in labels if patient not in folds), key=order)
    rng = np.random.Generator(np.random.Philox(key=seed))
    for start in range(0, len(dealt), NUM_FOLDS):
        block = rng.permutation(NUM_FOLDS) + 1 if start else np.array(_FIRST_BLOCK)
        folds.update(zip(dealt[start : start + NUM_FOLDS], block.tolist(), strict=False))
    return [entry.fold or folds[patient] for patient, entry in zip(patients, entries, strict=True)]
