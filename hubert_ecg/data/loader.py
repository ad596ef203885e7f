"""Batches of crops from a store, in an order that depends on nothing but seed and epoch."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch

from hubert_ecg.data.store import Store
from hubert_ecg.signal import decimate_flattened, decimate_leads

Crop = Literal["random", "first", "even"]

# Streams of random numbers of one epoch.
_ORDER, _STARTS = 0, 1


@dataclasses.dataclass(frozen=True)
class Batch:
    """Crops of one length.

    Args:
        ecg: ``[B, 12, T] float32``; zero after the end of a record and in absent leads.
        lengths: Valid samples per lead, ``[B] int64``.
        index: Positions of the records in the store, ``[B] int64``.
        present: Leads that were measured or derived, ``[B, 12] bool``.
        leads: What features are computed from: ``ecg``, or with published preprocessing the same crops with each lead
            decimated by itself, ``[B, 12, T] float32``.
    """

    ecg: torch.Tensor
    lengths: torch.Tensor
    index: torch.Tensor
    present: torch.Tensor
    leads: torch.Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(*(getattr(self, field.name).to(device, non_blocking=True) for field in dataclasses.fields(self)))

    def __len__(self) -> int:
        return len(self.index)


class Loader:
    """Cuts crops out of records and stacks them.

    The order of the records and where each is cropped are functions of (seed, epoch) and of (seed, epoch, record)
    alone: batch k is the same whether the epoch was read from its beginning or from k on, and for any num_workers.

    Args:
        store: Where the records are.
        indices: ``[N] int64`` positions in the store to read.
        batch_size: Records in a batch; with num_crops crops of each, a batch has batch_size * num_crops rows.
        crop_s: Seconds of a crop. Shorter records are padded with zeros at the end.
        crop: Where a longer record is cropped: at random, at its beginning, or num_crops times evenly from beginning
            to end (once: in the middle).
        num_crops: Crops of each record, in consecutive rows.
        shuffle: Read the records in a new order in each epoch.
        seed: Seed of order and crops.
        drop_last: Leave out a last batch that is not full.
        num_workers: Threads that read ahead; 0 reads when asked.

    Raises:
        ValueError: A size is not positive, or an index is not in the store.
    """

    def __init__(
        self,
        store: Store,
        indices: np.ndarray,
        batch_size: int,
        *,
        crop_s: float = 5.0,
        crop: Crop = "random",
        num_crops: int = 1,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        num_workers: int = 2,
    ):
        self.store = store
        self.indices = np.asarray(indices, dtype=np.int64)
        if batch_size < 1 or num_crops < 1:
            raise ValueError(f"Loader: batch_size and num_crops must be at least 1, got {batch_size} and {num_crops}")
        if crop not in ("random", "first", "even") or (crop == "first" and num_crops > 1):
            raise ValueError(f"Loader: crop must be random, even, or first with num_crops 1, got {crop}, {num_crops}")
        if self.indices.ndim != 1 or not ((self.indices >= 0) & (self.indices < len(store))).all():
            raise ValueError(f"Loader: indices must be positions below {len(store)} in one dimension, got {indices}")
        self.num_samples = round(crop_s * store.sampling_rate_hz)
        if self.num_samples < 1:
            raise ValueError(f"Loader: crop_s must hold a sample, got {crop_s} s at {store.sampling_rate_hz:g} Hz")
        self.batch_size, self.crop, self.num_crops = batch_size, crop, num_crops
        self.shuffle, self.seed, self.drop_last, self.num_workers = shuffle, seed, drop_last, num_workers
        # The published decimation comes after the crop, so the store then holds this many times the samples.
        self._decimation = round(store.stored_rate_hz / store.sampling_rate_hz)

    @property
    def num_batches(self) -> int:
        """Batches of an epoch."""
        whole, rest = divmod(len(self.indices), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __len__(self) -> int:
        return self.num_batches

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from batch ``start`` on.

        Args:
            epoch: Which epoch, from 0.
            start: The first batch to give; to resume, the number of those already used.
        """
        order = self.indices
        if self.shuffle:
            order = order[self._random(epoch, _ORDER).permutation(len(order))]
        starts = self._starts(epoch)
        chosen = [order[k * self.batch_size : (k + 1) * self.batch_size] for k in range(start, self.num_batches)]
        if self.num_workers == 0:
            for records in chosen:
                yield self._batch(records, starts)
            return
        ahead = 2 * self.num_workers
        pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="hubert-ecg-loader")
        pending: collections.deque[Future[Batch]] = collections.deque()
        try:
            for records in chosen:
                pending.append(pool.submit(self._batch, records, starts))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _batch(self, records: np.ndarray, starts: np.ndarray) -> Batch:
        rows = np.repeat(records, self.num_crops)
        ecg, lengths = self.store.gather(rows, starts[:, records].T.reshape(-1), self.num_samples * self._decimation)
        signal = leads = torch.from_numpy(ecg)
        if self._decimation > 1:
            leads = decimate_leads(signal, self._decimation)
            signal = decimate_flattened(signal, self._decimation)
            lengths = -(-lengths // self._decimation)
        return Batch(
            signal,
            torch.from_numpy(lengths),
            torch.from_numpy(rows),
            torch.from_numpy(self.store.present(rows)),
            leads,
        )

    def _starts(self, epoch: int) -> np.ndarray:
        """First stored sample of each crop of every record of the store, ``[num_crops, N] int64``."""
        # Drawn for the whole store, a record's crop does not depend on which other records are read.
        room = np.maximum(self.store.num_samples - self.num_samples * self._decimation, 0)
        if self.crop == "random":
            return (self._random(epoch, _STARTS).random((self.num_crops, len(room))) * (room + 1)).astype(np.int64)
        if self.crop == "first":
            return np.zeros((1, len(room)), dtype=np.int64)
        share = np.linspace(0, 1, self.num_crops) if self.num_crops > 1 else np.array([0.5])
        return np.rint(share[:, None] * room).astype(np.int64)

    def _random(self, epoch: int, stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch, stream])))
