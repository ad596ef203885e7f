"""Batches out of a packed store: ours against torch's DataLoader over the same shards; and memory over many batches."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from hubert_ecg.data import Loader, Store
from hubert_ecg.signal import LEADS
from hubert_ecg.testing import tiled_store

NUM_RECORDS = 8192
BATCH = 256
NUM_WORKERS = 2


class OneByOne(torch.utils.data.Dataset):
    """Crops of a store, one record at a time: how a data set for torch's loader is written."""

    def __init__(self, store: Store, starts: np.ndarray, num_samples: int) -> None:
        index = pq.read_table(store.path / "index.parquet")
        self.shard, self.offset, self.length = (index[name].to_numpy() for name in ("shard", "offset", "num_samples"))
        self.scale = np.stack(index["scale"].to_numpy()).astype(np.float32)
        self.starts, self.num_samples = starts, num_samples
        paths = sorted((store.path / "shards").glob("*.bin"))
        self.maps = [np.memmap(path, np.int16, mode="r") for path in paths]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> torch.Tensor:
        offset, length, start = self.offset[i], self.length[i], self.starts[i]
        record = self.maps[self.shard[i]][offset : offset + len(LEADS) * length].reshape(len(LEADS), length)
        crop = record[:, start : start + self.num_samples].astype(np.float32) * self.scale[i][:, None]
        return torch.from_numpy(np.pad(crop, ((0, 0), (0, self.num_samples - crop.shape[1]))))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return tiled_store(tmp_path_factory.mktemp("store") / "s", NUM_RECORDS, 10.0)


@pytest.mark.benchmark(group="loader")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_loader(race, store):
    """An epoch of random crops of 5 s, shuffled, out of the page cache."""
    ours = Loader(store, store.split("all"), BATCH, crop_s=5.0, shuffle=True, num_workers=NUM_WORKERS)
    order = torch.cat([batch.index for batch in ours.batches(0)])
    peer = torch.utils.data.DataLoader(
        OneByOne(store, ours._starts(0)[0], 500),
        BATCH,
        sampler=order.tolist(),
        num_workers=NUM_WORKERS,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    for batch, expected in zip(ours.batches(0), peer, strict=True):
        torch.testing.assert_close(batch.ecg, expected, rtol=0, atol=0)

    def epoch(batches) -> None:
        assert sum(len(batch) for batch in batches) == NUM_RECORDS

    peers = {"DataLoader, a record at a time, 2 processes": lambda: epoch(peer)}
    race(lambda: epoch(batch.ecg for batch in ours.batches(0)), peers, "records", NUM_RECORDS)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_stays_flat(store, capsys):
    """100,000 small batches; memory is an answer, not a time, and has a bound."""
    loader = Loader(store, store.split("all"), 8, crop_s=0.5, shuffle=True, num_workers=NUM_WORKERS)
    num_batches = num_epochs = 0
    before = 0
    while num_batches < 100_000:
        num_batches += sum(1 for _ in loader.batches(num_epochs))
        num_epochs += 1
        # After the first epochs everything that is kept is there, the shards' pages too.
        before = before or (num_epochs == 5 and resident_bytes())
    growth = resident_bytes() - before
    with capsys.disabled():
        print(f"\n{num_batches:,} batches: resident memory {before / 1e6:.0f} MB, grown by {growth / 1e6:.1f} MB")
    assert growth < 16e6


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
