from __future__ import annotations

import numpy as np
import pytest

from hubert_ecg.data.build import build
from hubert_ecg.data.dataset import Dataset, Entry
from hubert_ecg.data.packing import Settings
from hubert_ecg.data.readers import ReadError
from hubert_ecg.data.record import Record
from hubert_ecg.signal import LEADS


class Beats(Dataset):
    """Twelve leads of a sine each, of known length; records named in ``broken`` cannot be read."""

    name = "beats"
    tasks = ("all", "rate")

    def __init__(self, lengths=(5000, 3000, 1500, 5000, 4000, 700), broken=(), rate_hz=500.0, leads=LEADS):
        self.lengths, self.broken, self.rate_hz, self.leads = lengths, frozenset(broken), rate_hz, leads
        self.reads: list[str] = []

    def problem_of(self, task):
        return "regression" if task == "rate" else "multilabel"

    def entries(self):
        return [
            Entry(
                f"r{position}",
                source=f"r{position}.npy",
                patient_id=f"p{position // 2}",
                age=20.0 + position,
                labels={"all": (("B", "A")[position % 2],) * (position != 2)},
                values={"rate": 60.0 + position} if position else {},
            )
            for position in range(len(self.lengths))
        ]

    def read(self, entry):
        self.reads.append(entry.record_id)
        if entry.record_id in self.broken:
            raise ReadError(f"{entry.source}: broken")
        position = int(entry.record_id[1:])
        time = np.arange(self.lengths[position]) / self.rate_hz
        phase = np.arange(len(self.leads))[:, None]
        signal = (1 + phase / 4) * np.sin(2 * np.pi * (2 + position) * time + phase)
        return Record(signal, self.rate_hz, self.leads)

    def fingerprint(self):
        return f"{self.lengths} {self.rate_hz} {self.leads}"


@pytest.fixture
def beats():
    return Beats


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """Six records in three shards, at 100 Hz."""
    return build(Beats(), tmp_path_factory.mktemp("store") / "s", shard_records=2)


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """The same records, kept at 500 Hz for the published decimation."""
    return build(Beats(), tmp_path_factory.mktemp("published") / "s", Settings(compat="published"), shard_records=2)


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """The same records with labels of two k-means models under one name, and of a third under another."""
    store = build(Beats(), tmp_path_factory.mktemp("labelled") / "s", shard_records=2)
    labels = np.random.default_rng(0).integers(0, 100, (3, len(store), 93))
    store.write_labels("mfcc", labels[:2], num_clusters=100, crop_s=5.0, facts={"feature_type": "mfcc"})
    store.write_labels("second", labels[2:], num_clusters=100, crop_s=5.0)
    return store
