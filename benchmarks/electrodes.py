"""The weights by which ``hubert_ecg.data.quality`` sees leads I and II in the chest leads, and how often it is right.

``python benchmarks/electrodes.py FOLDER`` fits them to all recordings of a folder, prints them, and says how many
exchanged electrodes are found in recordings that weights were not fitted to: of five parts, each is judged by the other
four, as recorded and with each exchange simulated. What is in ``quality.py`` came of the recordings that tests use.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from hubert_ecg.data import quality
from hubert_ecg.data.datasets import open_dataset
from hubert_ecg.data.readers import ReadError

NUM_PARTS = 5
# Of the mean power of the chest leads, which are nearly dependent.
RIDGE = 1e-3
CHEST = slice(6, 12)


def grams(folder: Path) -> np.ndarray:
    """``[N, 12, 12]`` products of the leads of each recording that has leads I and II and the chest leads."""
    found = []
    dataset = open_dataset("auto", folder)
    for entry in dataset.entries():
        try:
            record = dataset.read(entry)
            leads, present = record.standard_leads()
        except (ReadError, ValueError):
            continue
        missing = ~np.isfinite(leads)
        signal = np.where(missing, np.float32(0), leads)
        usable = present & (signal.max(1) > signal.min(1))
        if usable[[0, 1, *range(6, 12)]].all():
            gram = quality._gram(signal, missing.any(0) if missing.any() else None, record.sampling_rate_hz)
            found.append(gram / np.trace(gram[:2, :2]))
    return np.array(found)


def fitted(grams: np.ndarray) -> np.ndarray:
    """``[2, 6]`` leads I and II from V1 to V6, by least squares."""
    total = grams.sum(0)
    chest = total[CHEST, CHEST]
    return np.linalg.solve(chest + RIDGE * np.trace(chest) / 6 * np.eye(6), total[CHEST, :2]).T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    found = grams(parser.parse_args().folder)
    print(f"{len(found)} recordings\nweights of V1 to V6\n{fitted(found).round(3)}")
    part = np.random.default_rng(0).integers(0, NUM_PARTS, len(found))
    weights = [fitted(found[part != one]) for one in range(NUM_PARTS)]
    present, flat = np.ones(12, bool), np.zeros(12, bool)
    for swap, true in zip(quality._SWAPS, quality._TRUE, strict=True):
        recorded = np.eye(12)
        recorded[:2, :2] = true
        said = [
            quality._suspected_swap(recorded @ gram @ recorded.T, present, flat, weights[one])
            for gram, one in zip(found, part, strict=True)
        ]
        right = sum(one == (swap or None) for one in said) / len(said)
        others = sum(one is not None and one != swap for one in said)
        print(f"{swap or 'as recorded'}: right in {right:.1%}, another exchange suspected in {others}")


if __name__ == "__main__":
    main()
