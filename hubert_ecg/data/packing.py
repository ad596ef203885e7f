"""From one recording to the samples and the row that a store keeps of it, in this process or in others."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import multiprocessing
import os
import signal as os_signal
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from typing import Any

import numpy as np

from hubert_ecg.config import Compat, UserError
from hubert_ecg.data import quality
from hubert_ecg.data.dataset import Dataset, Entry, describe
from hubert_ecg.data.readers import ReadError
from hubert_ecg.data.record import SLOWEST_HZ, Record
from hubert_ecg.data.store import label_column, value_column
from hubert_ecg.signal import prepare_ecg_for_inference

BASE_RATE_HZ = 500.0
_SHORTEST_S = 1.0
# Samples of all leads that wait for records to be prepared together with: 64 MiB.
_WAITING_SAMPLES = 2**24


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the samples of a store."""

    downsampling_factor: int = 5
    compat: Compat = "corrected"
    signal_dtype: str = "int16"

    def __post_init__(self) -> None:
        if self.downsampling_factor < 1:
            raise UserError(f"downsampling_factor must be at least 1, got {self.downsampling_factor}")
        if self.signal_dtype not in ("int16", "float16"):
            raise UserError(f"signal_dtype must be int16 or float16, got {self.signal_dtype}")

    @property
    def sampling_rate_hz(self) -> float:
        return BASE_RATE_HZ / self.downsampling_factor

    @property
    def stored_rate_hz(self) -> float:
        # The published decimation runs over the flattened crop, so it has to wait for the crop.
        return BASE_RATE_HZ if self.compat == "published" else self.sampling_rate_hz


@dataclasses.dataclass(frozen=True)
class Packed:
    samples: np.ndarray
    row: dict[str, Any]
    read_s: float = 0.0
    prepare_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class Skipped:
    source: str
    reason: str
    read_s: float = 0.0
    prepare_s: float = 0.0


Result = Packed | Skipped


def packed_chunks(
    dataset: Dataset, settings: Settings, chunks: Iterable[tuple[int, list[Entry]]], num_workers: int
) -> Generator[tuple[int, list[Result]], None, None]:
    """Chunks after reading and preprocessing, in order."""
    if num_workers == 0:
        for position, chunk in chunks:
            yield position, _pack_chunk(dataset, settings, chunk)
        return
    pool = ProcessPoolExecutor(
        num_workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(dataset, settings),
    )
    pending: collections.deque[tuple[int, Any]] = collections.deque()
    try:
        for position, chunk in chunks:
            with _deaf_children():
                pending.append((position, pool.submit(_work, chunk)))
            if len(pending) > 4 * num_workers:
                position, future = pending.popleft()
                yield position, future.result()
        while pending:
            position, future = pending.popleft()
            yield position, future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a process that packs recordings died (out of memory?): run again to go on, or with num_workers 0; "
            "a script must keep its work under: if __name__ == '__main__'"
        ) from error
    except BaseException:
        # They write nothing: what they are at, or still import, is not worth waiting for.
        for worker in list((pool._processes or {}).values()):
            worker.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _deaf_children() -> Iterator[None]:
    """Processes that begin here do not hear Ctrl-C, which reaches the whole group.

    They import for seconds before they can see to that themselves, and each would tell where it was.
    """
    if not hasattr(os_signal, "pthread_sigmask"):
        yield
        return
    # Begun with the first process, it would let the signal through again.
    resource_tracker.ensure_running()
    mask = os_signal.pthread_sigmask(os_signal.SIG_BLOCK, {os_signal.SIGINT})
    try:
        yield
    finally:
        os_signal.pthread_sigmask(os_signal.SIG_SETMASK, mask)


_worker: tuple[Dataset, Settings] | None = None


def _start_worker(dataset: Dataset, settings: Settings) -> None:
    import torch

    global _worker
    # Where a process cannot begin deaf.
    os_signal.signal(os_signal.SIGINT, os_signal.SIG_IGN)
    # A parent that is killed cannot end anyone: without this its workers would wait for work for ever.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _worker = dataset, settings


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(chunk: list[Entry]) -> list[Result]:
    assert _worker is not None
    return _pack_chunk(*_worker, chunk)


@dataclasses.dataclass(frozen=True)
class _Read:
    place: int
    entry: Entry
    record: Record
    leads: np.ndarray
    present: np.ndarray
    read_s: float


def _pack_chunk(dataset: Dataset, settings: Settings, entries: list[Entry]) -> list[Result]:
    """Read and preprocess; what a reader or the preprocessing refuses is skipped with its reason.

    Records of one rate and length are prepared together, as many as fit into memory.
    """
    results: dict[int, Result] = {}
    waiting: dict[tuple[float, int], list[_Read]] = collections.defaultdict(list)
    num_samples = 0
    for place, entry in enumerate(entries):
        start = time.perf_counter()
        try:
            record = describe(dataset.read(entry), entry)
            leads, present = record.standard_leads()
            if record.sampling_rate_hz < SLOWEST_HZ:
                raise ReadError(
                    f"sampled at {record.sampling_rate_hz:g} Hz; at least {SLOWEST_HZ:g} Hz show a QRS complex"
                )
            if record.duration_s < _SHORTEST_S:
                raise ReadError(f"only {record.duration_s:g} s long; at least {_SHORTEST_S:g} s are needed")
        except (ValueError, OSError) as error:
            results[place] = _skipped(error, dataset, entry, read_s=time.perf_counter() - start)
            continue
        waiting[record.sampling_rate_hz, record.num_samples].append(
            _Read(place, entry, record, leads, present, time.perf_counter() - start)
        )
        num_samples += leads.size
        if num_samples > _WAITING_SAMPLES:
            for group in waiting.values():
                results |= _prepared(dataset, settings, group)
            waiting.clear()
            num_samples = 0
    for group in waiting.values():
        results |= _prepared(dataset, settings, group)
    return [results[place] for place in range(len(entries))]


def _prepared(dataset: Dataset, settings: Settings, group: list[_Read]) -> dict[int, Result]:
    """Records of one rate and length; these alone decide whether the preprocessing refuses a record."""
    start = time.perf_counter()
    results: dict[int, Result] = {}
    try:
        signals = prepare_ecg_for_inference(
            np.stack([item.leads for item in group]),
            sampling_rate=group[0].record.sampling_rate_hz,
            target_length=None,
            downsampling_factor=1 if settings.compat == "published" else settings.downsampling_factor,
            compat=settings.compat,
        )
    except ValueError as error:
        results = {item.place: _skipped(error, dataset, item.entry) for item in group}
    else:
        for item, signal in zip(group, signals, strict=True):
            results[item.place] = _quantise(signal, item.record, item.leads, item.present, item.entry, settings)
    each_s = (time.perf_counter() - start) / len(group)
    return {
        item.place: dataclasses.replace(results[item.place], read_s=item.read_s, prepare_s=each_s) for item in group
    }


def _skipped(error: Exception, dataset: Dataset, entry: Entry, read_s: float = 0.0) -> Skipped:
    reason = _without_folder(str(error), dataset).removeprefix(f"{entry.source}: ")
    return Skipped(as_utf8(entry.source), as_utf8(reason), read_s)


def _quantise(
    signal: np.ndarray, record: Record, leads: np.ndarray, present: np.ndarray, entry: Entry, settings: Settings
) -> Result:
    signal = np.where(present[:, None], signal, np.float32(0))
    if not np.isfinite(signal).all():
        return Skipped(as_utf8(entry.source), "preprocessing gives values that are not finite: damaged samples?")
    peak = np.abs(signal).max(axis=1)
    if settings.signal_dtype == "int16":
        scale = np.where(peak > 0, peak, 1).astype(np.float32) / np.float32(np.iinfo(np.int16).max)
        samples = np.rint(signal / scale[:, None]).astype(np.int16)
    else:
        # Half precision ends at 65504.
        scale = np.maximum(peak / np.float32(2**15), 1).astype(np.float32)
        samples = (signal / scale[:, None]).astype(np.float16)
    return Packed(
        samples,
        {
            "record_id": as_utf8(record.record_id),
            **({"dataset": entry.dataset} if entry.dataset else {}),
            "source": as_utf8(record.source),
            "source_rate_hz": record.sampling_rate_hz,
            "leads": list(record.lead_names),
            "num_samples": samples.shape[1],
            "duration_s": record.duration_s,
            "patient_id": record.patient_id,
            "fold": record.fold,
            "age": record.age,
            "sex": record.sex,
            **quality.facts(record, leads, present),
            "signal_hash": quality.signal_hash(signal, settings.stored_rate_hz),
            **{label_column(task): list(labels) for task, labels in entry.labels.items()},
            **{value_column(task): value for task, value in entry.values.items()},
            "scale": scale.tolist(),
            "present": present.tolist(),
        },
    )


def _without_folder(message: str, dataset: Dataset) -> str:
    """A reason that stays true when the store moves to a machine with other folders."""
    folder = getattr(dataset, "data_path", None)
    return message.replace(f"{folder}{os.sep}", "") if folder else message


def as_utf8(name: str) -> str:
    r"""A file name that is no UTF-8 with its odd bytes spelled out: the index and the manifest hold text.

    >>> as_utf8("caf\udce9.npy")
    'caf\\xe9.npy'
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
