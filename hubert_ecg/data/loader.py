"""Batches of crops from a store, in an order that depends on nothing but seed and epoch."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch

from hubert_ecg.data.store import Store
from hubert_ecg.files import forget_pages
from hubert_ecg.signal import LEADS, decimate_flattened, decimate_leads

Crop = Literal["random", "first", "even"]

# Streams of random numbers of one epoch.
_ORDER, _STARTS = 0, 1


@dataclasses.dataclass(frozen=True)
class Batch:
    """Crops of one length.

    Args:
        ecg: ``[B, 12, T] float32``; zero after the end of a record and in absent leads.
        lengths: Valid samples per lead, ``[B] int64``, on the CPU.
        index: Positions of the records in the store, ``[B] int64``, on the CPU.
        present: Leads that were measured or derived, ``[B, 12] bool``, on the CPU.
        leads: What features are computed from: ``ecg``, or with published preprocessing the same crops with each lead
            decimated by itself, ``[B, 12, T] float32``.
        num_global: Rows of this batch on all ranks together.
        labels: Precomputed labels of each token, ``[E, B, N] int64``, or None.
    """

    ecg: torch.Tensor
    lengths: torch.Tensor
    index: torch.Tensor
    present: torch.Tensor
    leads: torch.Tensor
    num_global: int
    labels: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its signals and labels on another device. What says which rows and samples there are
        stays: the host decides by it what to run, and would wait for the device."""
        ecg = self.ecg.to(device, non_blocking=True)
        leads = ecg if self.leads is self.ecg else self.leads.to(device, non_blocking=True)
        labels = None if self.labels is None else self.labels.to(device, non_blocking=True)
        return dataclasses.replace(self, ecg=ecg, leads=leads, labels=labels)

    def on_device(self) -> list[torch.Tensor]:
        """The tensors that :meth:`to` moves."""
        return [x for x in (self.ecg, self.leads, self.labels) if x is not None]

    def __len__(self) -> int:
        return len(self.index)


class DevicePrefetch:
    """Copies batches to a device while the one before is in use.

    To a CUDA device they go by a stream of their own, the next one before the last one is given out; from pinned
    memory, neither the host nor the computation waits for it. On a CPU, batches pass through.

    Args:
        device: Where they shall be.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def __call__(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches in their order, ready for the current stream of whoever takes them."""
        if self._stream is None:
            yield from (batch.to(self.device) for batch in batches)
            return
        waiting: tuple[Batch, torch.cuda.Event] | None = None
        for batch in batches:
            with torch.cuda.stream(self._stream):
                copy = batch.to(self.device), self._stream.record_event()
            if waiting is not None:
                yield self._ready(*waiting)
            waiting = copy
        if waiting is not None:
            yield self._ready(*waiting)

    def _ready(self, batch: Batch, copied: torch.cuda.Event) -> Batch:
        current = torch.cuda.current_stream(self.device)
        current.wait_event(copied)
        for x in batch.on_device():
            # Its memory is of the copying stream, which must not use it again before the current one is done.
            x.record_stream(current)
        return batch


class Loader:
    """Cuts crops out of records and stacks them.

    The order of the records and where each is cropped are functions of (seed, epoch) and of (seed, epoch, record)
    alone: batch k is the same whether the epoch was read from its beginning or from k on, and for any num_workers.
    Ranks share each batch: their parts, one after another, are the batch of one rank with num_ranks * batch_size.

    Args:
        store: Where the records are.
        indices: ``[N] int64`` positions in the store to read.
        batch_size: Records in a batch of one rank; with num_crops crops of each, it has batch_size * num_crops rows.
        crop_s: Seconds of a crop. Shorter records are padded with zeros at the end.
        crop: Where a longer record is cropped: at random, at its beginning, or num_crops times evenly from beginning
            to end (once: in the middle).
        num_crops: Crops of each record, in consecutive rows.
        shuffle: Read the records in a new order in each epoch.
        seed: Seed of order and crops.
        drop_last: Leave out a last batch that is not full.
        num_workers: Threads that read ahead; 0 reads when asked.
        rank: Which part of each batch this process takes. Parts differ by a record at most; where the last batch has
            fewer records than there are ranks, those of the last ranks are empty.
        num_ranks: Processes that share the batches.
        device: Where batches shall be, see :class:`DevicePrefetch`; None leaves them where they were read.
        labels: Precomputed labels of the store that batches carry: a name, or several, whose models come one after
            another. They are of the beginning of each record, and so must the crops be.

    Raises:
        ValueError: A size is not positive, an index is not in the store, or labels are of other crops.
        UserError: The store has no such labels.
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
        rank: int = 0,
        num_ranks: int = 1,
        device: torch.device | str | None = None,
        labels: str | Sequence[str] = (),
    ):
        self.store = store
        self.indices = np.asarray(indices, dtype=np.int64)
        if batch_size < 1 or num_crops < 1:
            raise ValueError(f"Loader: batch_size and num_crops must be at least 1, got {batch_size} and {num_crops}")
        if crop not in ("random", "first", "even") or (crop == "first" and num_crops > 1):
            raise ValueError(f"Loader: crop must be random, even, or first with num_crops 1, got {crop}, {num_crops}")
        if self.indices.ndim != 1 or not ((self.indices >= 0) & (self.indices < len(store))).all():
            raise ValueError(f"Loader: indices must be positions below {len(store)} in one dimension, got {indices}")
        if not 0 <= rank < num_ranks:
            raise ValueError(f"Loader: rank must be 0 to num_ranks - 1 = {num_ranks - 1}, got {rank}")
        self.num_samples = round(crop_s * store.sampling_rate_hz)
        if self.num_samples < 1:
            raise ValueError(f"Loader: crop_s must hold a sample, got {crop_s} s at {store.sampling_rate_hz:g} Hz")
        self.batch_size, self.crop, self.num_crops = batch_size, crop, num_crops
        self.shuffle, self.seed, self.drop_last, self.num_workers = shuffle, seed, drop_last, num_workers
        self.rank, self.num_ranks = rank, num_ranks
        self._labels = self._label_sets([labels] if isinstance(labels, str) else labels, crop_s)
        self._prefetch = None if device is None else DevicePrefetch(device)
        self._pin = self._prefetch is not None and self._prefetch.device.type == "cuda"
        # The published decimation comes after the crop, so the store then holds this many times the samples.
        self._decimation = round(store.stored_rate_hz / store.sampling_rate_hz)

    @property
    def num_batches(self) -> int:
        """Batches of an epoch, the same number on all ranks."""
        whole, rest = divmod(len(self.indices), self.num_ranks * self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __len__(self) -> int:
        return self.num_batches

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from batch ``start`` on.

        Args:
            epoch: Which epoch, from 0.
            start: The first batch to give; to resume, the number of those already used.
        """
        batches = self._read(epoch, start)
        return batches if self._prefetch is None else self._prefetch(batches)

    def _read(self, epoch: int, start: int) -> Iterator[Batch]:
        order = self.indices
        if self.shuffle:
            order = order[self._random(epoch, _ORDER).permutation(len(order))]
        starts = self._starts(epoch)
        if self.num_workers == 0:
            for k in range(start, self.num_batches):
                yield self._batch(order, starts, k)
            return
        ahead = 2 * self.num_workers
        pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="hubert-ecg-loader")
        pending: collections.deque[Future[Batch]] = collections.deque()
        try:
            for k in range(start, self.num_batches):
                pending.append(pool.submit(self._batch, order, starts, k))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _batch(self, order: np.ndarray, starts: np.ndarray | None, k: int) -> Batch:
        size = self.num_ranks * self.batch_size
        together = order[k * size : (k + 1) * size]
        records = np.array_split(together, self.num_ranks)[self.rank]
        rows = np.repeat(records, self.num_crops)
        num_samples = self.num_samples * self._decimation
        pin = self._pin and self._decimation == 1
        signal = leads = torch.empty(len(rows), len(LEADS), num_samples, pin_memory=pin)
        _, valid = self.store.gather(
            rows,
            None if starts is None else starts[:, records].T.reshape(-1),
            num_samples,
            out=signal.numpy(),
            # Batches are read side by side already.
            num_threads=1 if self.num_workers else None,
        )
        lengths = torch.from_numpy(valid)
        if self._decimation > 1:
            leads = self._pinned(decimate_leads(signal, self._decimation))
            signal = self._pinned(decimate_flattened(signal, self._decimation))
            lengths = -(-lengths // self._decimation)
        return Batch(
            signal,
            lengths,
            torch.from_numpy(rows),
            torch.from_numpy(self.store.present(rows)),
            leads,
            len(together) * self.num_crops,
            self._labels_of(rows),
        )

    def _pinned(self, x: torch.Tensor) -> torch.Tensor:
        return x.pin_memory() if self._pin else x

    def _label_sets(self, names: Sequence[str], crop_s: float) -> list[np.ndarray]:
        sets = [self.store.labels(name) for name in names]
        if sets and self.crop != "first":
            raise ValueError(
                f"Loader: crop must be first with labels, got {self.crop}: the labels {', '.join(names)} are of the "
                "beginning of each record, and elsewhere its tokens have others; label other crops as they are read"
            )
        for name, labels in zip(names, sets, strict=True):
            if labels.facts["crop_s"] != crop_s:
                raise ValueError(
                    f"Loader: crop_s must be {labels.facts['crop_s']:g} with labels {name}, got {crop_s:g}"
                )
        return [labels.values for labels in sets]

    def _labels_of(self, rows: np.ndarray) -> torch.Tensor | None:
        if not self._labels:
            return None
        labels = np.concatenate([values[:, rows] for values in self._labels]).astype(np.int64)
        for values in self._labels:
            forget_pages(values)
        return self._pinned(torch.from_numpy(labels))

    def _starts(self, epoch: int) -> np.ndarray | None:
        """First stored sample of each crop of every record of the store, ``[num_crops, N] int64``; None is 0."""
        if self.crop == "first":
            return None
        # Drawn for the whole store, a record's crop does not depend on which other records are read.
        room = np.maximum(self.store.num_samples - self.num_samples * self._decimation, 0)
        if self.crop == "random":
            return (self._random(epoch, _STARTS).random((self.num_crops, len(room))) * (room + 1)).astype(np.int64)
        share = np.linspace(0, 1, self.num_crops) if self.num_crops > 1 else np.array([0.5])
        return np.rint(share[:, None] * room).astype(np.int64)

    def _random(self, epoch: int, stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch, stream])))
