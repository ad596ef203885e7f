"""Building packed stores: read, preprocess and pack every recording once, resumable at each shard."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import signal as os_signal
import threading
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import hubert_ecg.signal
from hubert_ecg.config import Compat, PrepareConfig, UserError, cache_root
from hubert_ecg.data.dataset import Dataset, Entry, describe
from hubert_ecg.data.datasets import open_dataset
from hubert_ecg.data.folds import FOLD_SEED, assign_folds
from hubert_ecg.data.readers import ReadError
from hubert_ecg.data.record import Record, lead_list
from hubert_ecg.data.store import (
    BUILDING,
    FORMAT_VERSION,
    INDEX,
    MANIFEST,
    SHARDS,
    Store,
    file_hash,
    is_store,
    label_column,
    shard_name,
    stream_hash,
    value_column,
)
from hubert_ecg.files import replacing, write_text
from hubert_ecg.signal import LEADS, prepare_ecg_for_inference

if TYPE_CHECKING:
    import pyarrow as pa

BASE_RATE_HZ = 500.0
SHARD_RECORDS = 1024
# Records that go to a worker at once.
_CHUNK_RECORDS = 32
# Below this many records, starting worker processes costs more than it saves.
_POOL_FROM_RECORDS = 256
_SHORTEST_S = 1.0
# Another process may be creating these while this one looks.
_SKIPPED_SHOWN = 10
_OWN_FILES = {SHARDS, BUILDING, INDEX, MANIFEST}


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


def prepare(config: PrepareConfig, progress: bool = True) -> Store:
    """Pack recordings into a store at ``config.output_dir``.

    Run again after it was stopped, it goes on where it was; run again when it is finished, it opens the store.

    Args:
        config: The recordings and the settings.
        progress: Show a progress bar on stderr, then how many records there are and which were skipped, and why.

    Raises:
        UserError: The data set is unknown or missing, no record can be read, or output_dir holds something else.
    """
    if is_store(config.data_path):
        raise UserError(f"{config.data_path} is a packed store already")
    dataset = open_dataset(
        config.dataset,
        config.data_path,
        sampling_rate_hz=config.sampling_rate,
        lead_names=lead_list(config.lead_names),
        seed=config.seed,
    )
    settings = Settings(config.downsampling_factor, config.compat, config.signal_dtype)
    return build(dataset, config.output_dir, settings, num_workers=config.num_workers, progress=progress)


def open_store(
    data_path: str | Path | None = None,
    *,
    dataset: str = "auto",
    sampling_rate: float = BASE_RATE_HZ,
    lead_names: str | None = None,
    downsampling_factor: int = 5,
    compat: Compat = "corrected",
    cache_dir: str | Path | None = None,
    num_workers: int = 2,
    progress: bool = True,
) -> Store:
    """Open recordings as a store, packing them into the cache the first time.

    The cache notices changes of files (names, sizes, times), of settings, and of the code that prepares signals.

    Args:
        data_path: A packed store, or a folder of recordings; by default where the data set is found.
        dataset: Name of the data set, or "auto".
        sampling_rate: Rate in Hz of files that do not carry one.
        lead_names: Rows of files that do not name their leads, split by commas; None for the twelve in standard order.
        downsampling_factor: Model input has 500 Hz divided by this.
        compat: "corrected" or "published" preprocessing.
        cache_dir: Where stores are kept, see :func:`hubert_ecg.config.cache_root`.
        num_workers: Processes that read and prepare; 0 does it in this one.
        progress: Show a progress bar on stderr.

    Raises:
        UserError: The data cannot be had, or a given store has other settings.
    """
    settings = Settings(downsampling_factor, compat)
    if data_path is not None and is_store(data_path):
        return _matching(Store(data_path), dataset, settings)
    if data_path is None and dataset == "auto":
        raise UserError("which recordings? Give their folder with --data_path, or a data set with --dataset")
    source = open_dataset(dataset, data_path, sampling_rate_hz=sampling_rate, lead_names=lead_list(lead_names))
    folder = cache_root(None if cache_dir is None else Path(cache_dir)) / "stores"
    folder /= f"{source.name}-{_plan(source, settings)['hash'][:16]}"
    return build(source, folder, settings, num_workers=num_workers, progress=progress)


def check_task(dataset: str, data_path: str | Path | None, task: str) -> None:
    """Whether a data set is there and has a task: what a command can know before it reads or packs anything.

    Raises:
        UserError: The name is unknown, the folder is missing, or the data set has no such task.
    """
    source: Store | Dataset
    if data_path is not None and is_store(data_path):
        source, name = Store(data_path), dataset
    else:
        source = open_dataset(dataset, data_path)
        name = source.name
    if task not in source.tasks:
        raise UserError(f"{name} has no task {task!r}; its tasks: {', '.join(source.tasks) or 'none'}")


def build(
    dataset: Dataset,
    folder: str | Path,
    settings: Settings | None = None,
    *,
    num_workers: int = 0,
    progress: bool = False,
    shard_records: int = SHARD_RECORDS,
) -> Store:
    """Pack a data set into a folder, or finish what an earlier run began there; a finished store is opened.

    Several processes may ask for the same folder: one builds, the others wait.

    Raises:
        UserError: The folder holds something else, or no record can be read.
    """
    folder, settings = Path(folder), settings or Settings()
    plan = _plan(dataset, settings) | {"shard_records": shard_records}
    if (folder / MANIFEST).is_file():
        return _finished(folder, plan)
    if (
        folder.exists()
        and not is_store(folder)
        and any(not name.startswith(".") for name in {*os.listdir(folder)} - _OWN_FILES)
    ):
        raise UserError(f"{folder} holds other files: choose a new folder for the store")
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        # A worker that imports its parent's script would wait here for the parent, which waits for the worker.
        raise RuntimeError("a script that packs recordings must keep its work under: if __name__ == '__main__'")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make {folder}: {error.strerror}; HUBERT_ECG_CACHE names another cache folder"
        ) from error
    if not os.access(folder, os.W_OK):
        raise UserError(
            f"cannot write into {folder}: choose another folder; HUBERT_ECG_CACHE names another cache folder"
        )
    with _locked(folder / ".lock", progress):
        if (folder / MANIFEST).is_file():
            return _finished(folder, plan)
        begun = folder / BUILDING
        if begun.is_file() and json.loads(begun.read_text(encoding="utf-8")) != plan:
            raise UserError(
                f"{folder} holds an unfinished store of other data or settings: delete it, or choose a new one"
            )
        write_text(begun, json.dumps(plan, indent=1))
        (folder / SHARDS).mkdir(exist_ok=True)
        _pack(dataset, folder, settings, plan, num_workers, progress)
        store = Store(folder)
        if progress:
            _tell(store)
        return store


def _plan(dataset: Dataset, settings: Settings) -> dict[str, Any]:
    plan: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "code": _code_hash(),
        "dataset": dataset.name,
        "source": dataset.fingerprint(),
        "source_rate_hz": getattr(dataset, "sampling_rate_hz", None),
        "source_leads": getattr(dataset, "lead_names", None),
        **dataclasses.asdict(settings),
    }
    return plan | {"hash": stream_hash([json.dumps(plan, sort_keys=True).encode()])}


@functools.cache
def _code_hash() -> str:
    """Of the code that decides what a store holds: a changed filter or label rule must not meet an old cache."""
    digest = hashlib.blake2b(digest_size=16)
    data = Path(__file__).parent
    assert hubert_ecg.signal.__file__ is not None
    for path in [Path(hubert_ecg.signal.__file__), *sorted(data.rglob("*.py")), *sorted(data.rglob("*.csv"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _finished(folder: Path, plan: dict[str, Any]) -> Store:
    store = Store(folder)
    if store.manifest["plan"]["hash"] != plan["hash"]:
        raise UserError(f"{folder} holds a store of other data or settings: delete it, or choose another folder")
    return store


def _matching(store: Store, dataset: str, settings: Settings) -> Store:
    if dataset not in ("auto", store.dataset):
        raise UserError(f"store {store.path} holds {store.dataset}, not {dataset}")
    for name in ("downsampling_factor", "compat"):
        has, wanted = getattr(store, name), getattr(settings, name)
        if has != wanted:
            raise UserError(f"store {store.path} was prepared with {name} {has}, not {wanted}: prepare another one")
    return store


@contextlib.contextmanager
def _locked(path: Path, progress: bool) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if progress:
            _console().print(f"another process is packing {path.parent}: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _pack(
    dataset: Dataset, folder: Path, settings: Settings, plan: dict[str, Any], num_workers: int, progress: bool
) -> None:
    entries = dataset.entries()
    task = next((task for task in dataset.tasks if dataset.problem_of(task) != "regression"), None)
    folds = assign_folds(entries, task)
    official = all(entry.fold is not None for entry in entries)
    entries = [dataclasses.replace(entry, fold=fold) for entry, fold in zip(entries, folds, strict=True)]
    size = plan["shard_records"]
    shards = [entries[start : start + size] for start in range(0, len(entries), size)]
    todo = [position for position in range(len(shards)) if not _part(folder, position).is_file()]
    chunks = [
        (position, shards[position][start : start + _CHUNK_RECORDS])
        for position in todo
        for start in range(0, len(shards[position]), _CHUNK_RECORDS)
    ]
    remaining = sum(len(chunk) for _, chunk in chunks)
    schema = _schema(dataset)
    processes = num_workers if remaining >= _POOL_FROM_RECORDS else 0
    with (
        _progress_bar(f"packing {dataset.name}", len(entries), len(entries) - remaining, progress) as advance,
        contextlib.closing(_packed(dataset, settings, chunks, processes)) as packed,
    ):
        results: list[_Result] = []
        for position, chunk in packed:
            results += chunk
            advance(len(chunk))
            if len(results) == len(shards[position]):
                _write_shard(folder, position, results, schema, settings)
                results = []
    _finish(dataset, folder, settings, plan, len(shards), official)


@dataclasses.dataclass(frozen=True)
class _Packed:
    samples: np.ndarray
    row: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Skipped:
    source: str
    reason: str


_Result = _Packed | _Skipped


def _packed(
    dataset: Dataset, settings: Settings, chunks: Iterable[tuple[int, list[Entry]]], num_workers: int
) -> Generator[tuple[int, list[_Result]], None, None]:
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
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: tuple[Dataset, Settings] | None = None


def _start_worker(dataset: Dataset, settings: Settings) -> None:
    import torch

    global _worker
    # Ctrl-C reaches the whole group of processes; the parent ends the others in order.
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


def _work(chunk: list[Entry]) -> list[_Result]:
    assert _worker is not None
    return _pack_chunk(*_worker, chunk)


def _pack_chunk(dataset: Dataset, settings: Settings, entries: list[Entry]) -> list[_Result]:
    """Read and preprocess; what a reader or the preprocessing refuses is skipped with its reason."""
    results: list[_Result] = []
    for entry in entries:
        try:
            record = describe(dataset.read(entry), entry)
            leads, present = record.standard_leads()
            if record.duration_s < _SHORTEST_S:
                raise ReadError(f"only {record.duration_s:g} s long; at least {_SHORTEST_S:g} s are needed")
            signal = prepare_ecg_for_inference(
                leads,
                sampling_rate=record.sampling_rate_hz,
                target_length=None,
                downsampling_factor=1 if settings.compat == "published" else settings.downsampling_factor,
                compat=settings.compat,
            )
        except (ValueError, OSError) as error:
            reason = _without_folder(str(error), dataset).removeprefix(f"{entry.source}: ")
            results.append(_Skipped(_as_utf8(entry.source), _as_utf8(reason)))
        else:
            results.append(_quantise(signal, record, leads, present, entry, settings))
    return results


def _quantise(
    signal: np.ndarray, record: Record, leads: np.ndarray, present: np.ndarray, entry: Entry, settings: Settings
) -> _Result:
    signal = np.where(present[:, None], signal, np.float32(0))
    if not np.isfinite(signal).all():
        return _Skipped(_as_utf8(entry.source), "preprocessing gives values that are not finite: damaged samples?")
    peak = np.abs(signal).max(axis=1)
    if settings.signal_dtype == "int16":
        scale = np.where(peak > 0, peak, 1).astype(np.float32) / np.float32(np.iinfo(np.int16).max)
        samples = np.rint(signal / scale[:, None]).astype(np.int16)
    else:
        # Half precision ends at 65504.
        scale = np.maximum(peak / np.float32(2**15), 1).astype(np.float32)
        samples = (signal / scale[:, None]).astype(np.float16)
    missing = ~np.isfinite(leads)
    flat = present & (np.nanmax(np.where(missing, -np.inf, leads), 1) == np.nanmin(np.where(missing, np.inf, leads), 1))
    return _Packed(
        samples,
        {
            "record_id": _as_utf8(record.record_id),
            "source": _as_utf8(record.source),
            "source_rate_hz": record.sampling_rate_hz,
            "leads": list(record.lead_names),
            "num_samples": samples.shape[1],
            "duration_s": record.duration_s,
            "patient_id": record.patient_id,
            "fold": record.fold,
            "age": record.age,
            "sex": record.sex,
            "num_flat_leads": int(flat.sum()),
            "num_missing_samples": int(missing.sum()),
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


def _as_utf8(name: str) -> str:
    r"""A file name that is no UTF-8 with its odd bytes spelled out: the index and the manifest hold text.

    >>> _as_utf8("caf\udce9.npy")
    'caf\\xe9.npy'
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _schema(dataset: Dataset) -> pa.Schema:
    import pyarrow as pa

    fields = {
        "record_id": pa.string(),
        "source": pa.string(),
        "source_rate_hz": pa.float64(),
        "leads": pa.list_(pa.string()),
        "num_samples": pa.int64(),
        "duration_s": pa.float64(),
        "patient_id": pa.string(),
        "fold": pa.int8(),
        "age": pa.float32(),
        "sex": pa.string(),
        "num_flat_leads": pa.int8(),
        "num_missing_samples": pa.int64(),
    }
    for task in dataset.tasks:
        if dataset.problem_of(task) == "regression":
            fields[value_column(task)] = pa.float64()
        else:
            fields[label_column(task)] = pa.list_(pa.string())
    fields |= {
        "shard": pa.int32(),
        "offset": pa.int64(),
        "scale": pa.list_(pa.float32(), len(LEADS)),
        "present": pa.list_(pa.bool_(), len(LEADS)),
    }
    return pa.schema(list(fields.items()))


def _part(folder: Path, position: int) -> Path:
    """The index of one shard; where it is, the shard is finished."""
    return folder / SHARDS / f"{shard_name(position)}.parquet"


def _write_shard(folder: Path, position: int, results: list[_Result], schema: pa.Schema, settings: Settings) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    packed = [result for result in results if isinstance(result, _Packed)]
    unlabelled: dict[str, Any] = {name: [] for name in schema.names if name.startswith(label_column(""))}
    offset, rows = 0, []
    for item in packed:
        rows.append({**unlabelled, **item.row, "shard": position, "offset": offset})
        offset += item.samples.size
    with replacing(folder / SHARDS / f"{shard_name(position)}.bin") as path, open(path, "wb") as file:
        for item in packed:
            file.write(np.ascontiguousarray(item.samples).data)
    shard = {
        "name": shard_name(position),
        "num_records": len(packed),
        "num_bytes": offset * np.dtype(settings.signal_dtype).itemsize,
        "hash": stream_hash([item.samples.tobytes() for item in packed]),
    }
    skipped = [(result.source, result.reason) for result in results if isinstance(result, _Skipped)]
    facts = {"shard": json.dumps(shard), "skipped": json.dumps(skipped)}
    table = pa.Table.from_pylist(rows, schema=schema).replace_schema_metadata(facts)
    with replacing(_part(folder, position)) as path:
        pq.write_table(table, path)


def _finish(
    dataset: Dataset, folder: Path, settings: Settings, plan: dict[str, Any], num_shards: int, official: bool
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = [pq.read_table(_part(folder, position)) for position in range(num_shards)]
    shards = [json.loads(part.schema.metadata[b"shard"]) for part in parts]
    skipped = [item for part in parts for item in json.loads(part.schema.metadata[b"skipped"])]
    table = pa.concat_tables([part.replace_schema_metadata(None) for part in parts])
    if not table.num_rows:
        source, reason = skipped[0] if skipped else (str(folder), "it is empty")
        raise UserError(f"{dataset.name}: none of {len(skipped)} records can be read; the first, {source}: {reason}")
    label_names = {
        task: [task]
        if dataset.problem_of(task) == "regression"
        else sorted(table[label_column(task)].combine_chunks().flatten().unique().to_pylist())
        for task in dataset.tasks
    }
    with replacing(folder / INDEX) as path:
        pq.write_table(table, path)
    index_hash = file_hash(folder / INDEX)
    manifest = {
        "format_version": FORMAT_VERSION,
        "dataset": dataset.name,
        "num_records": table.num_rows,
        "hours": round(sum(table["duration_s"].to_pylist()) / 3600, 4),
        "sampling_rate_hz": settings.sampling_rate_hz,
        "stored_rate_hz": settings.stored_rate_hz,
        "leads": list(LEADS),
        "settings": dataclasses.asdict(settings),
        "folds": "official" if official else f"by patient, seed {FOLD_SEED}",
        "problem": dataset.problem,
        "tasks": list(dataset.tasks),
        "label_names": label_names,
        "shards": shards,
        "index_hash": index_hash,
        "hash": stream_hash([index_hash.encode(), *(shard["hash"].encode() for shard in shards)]),
        "skipped": skipped,
        "plan": plan,
    }
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False))
    # From here the store is whole; what is left over from building goes.
    for position in range(num_shards):
        _part(folder, position).unlink()
    (folder / BUILDING).unlink()


def _tell(store: Store) -> None:
    """Says what was packed, and names what was not."""
    say = functools.partial(_console().print, highlight=False, markup=False, soft_wrap=True)
    say(f"{len(store)} records in {store.path}" + (f", {len(store.skipped)} skipped:" if store.skipped else ""))
    for source, reason in store.skipped[:_SKIPPED_SHOWN]:
        say(f"  {source}: {reason}")
    if len(store.skipped) > _SKIPPED_SHOWN:
        say(f"  and {len(store.skipped) - _SKIPPED_SHOWN} more in {store.path / MANIFEST}")


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True)


@contextlib.contextmanager
def _progress_bar(title: str, total: int, done: int, shown: bool) -> Iterator[Any]:
    if not shown:
        yield lambda count: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=_console()) as bar:
        task = bar.add_task(title, total=total, completed=done)
        yield lambda count: bar.advance(task, count)
