"""Building packed stores: every recording is packed once, resumable at each shard."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import hubert_ecg.signal
from hubert_ecg.config import Compat, PrepareConfig, UserError, cache_root
from hubert_ecg.data.dataset import Dataset, Entry, learnable
from hubert_ecg.data.datasets import open_dataset
from hubert_ecg.data.folds import FOLD_SEED, NO_FOLD, assign_folds, given_folds, read_splits, split_name
from hubert_ecg.data.packing import BASE_RATE_HZ, Packed, Result, Settings, Skipped, packed_chunks
from hubert_ecg.data.quality import LEAD_FAULTS, NUM_HASH_BYTES
from hubert_ecg.data.record import lead_list
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
from hubert_ecg.signal import LEADS

if TYPE_CHECKING:
    import pyarrow as pa

SHARD_RECORDS = 1024
SPLITS_TABLE = "splits.csv"
# Records that go to a worker at once.
_CHUNK_RECORDS = 32
# Below this many records, starting worker processes costs more than it saves.
_POOL_FROM_RECORDS = 256
# Shards whose rows are in memory together while the index is put together.
_INDEX_SHARDS = 256
_SKIPPED_SHOWN = 10
# Another process may be creating these while this one looks.
_OWN_FILES = {SHARDS, BUILDING, INDEX, MANIFEST}


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
    return build(
        dataset,
        config.output_dir,
        settings,
        num_workers=config.num_workers,
        progress=progress,
        splits_from=config.splits_from,
    )


def open_store(
    data_path: str | Path | None = None,
    *,
    dataset: str = "auto",
    sampling_rate: float = BASE_RATE_HZ,
    lead_names: str | None = None,
    downsampling_factor: int = 5,
    compat: Compat = "corrected",
    splits_from: str | Path | None = None,
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
        splits_from: A table of splits instead of the store's own, see :func:`hubert_ecg.data.folds.read_splits`.
        cache_dir: Where stores are kept, see :func:`hubert_ecg.config.cache_root`.
        num_workers: Processes that read and prepare; 0 does it in this one.
        progress: Show a progress bar on stderr.

    Raises:
        UserError: The data cannot be had, or a given store has other settings.
    """
    settings = Settings(downsampling_factor, compat)
    splits = None if splits_from is None else read_splits(splits_from)

    def with_splits(store: Store) -> Store:
        if splits is None:
            return store
        folds = given_folds(splits, store.column("record_id"), store.column("source"), str(splits_from))
        if progress and (left_out := folds.count(NO_FOLD)):
            _console().print(f"{splits_from} leaves out {left_out} of {len(store)} records", highlight=False)
        return Store(store.path, np.array(folds))

    if data_path is not None and is_store(data_path):
        return with_splits(_matching(Store(data_path), dataset, settings))
    if data_path is None and dataset == "auto":
        raise UserError("which recordings? Give their folder with --data_path, or a data set with --dataset")
    source = open_dataset(dataset, data_path, sampling_rate_hz=sampling_rate, lead_names=lead_list(lead_names))
    folder = cache_root(None if cache_dir is None else Path(cache_dir)) / "stores"
    folder /= f"{source.name}-{_plan(source, settings)['hash'][:16]}"
    return with_splits(build(source, folder, settings, num_workers=num_workers, progress=progress))


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
    splits_from: str | Path | None = None,
) -> Store:
    """Pack a data set into a folder, or finish what an earlier run began there; a finished store is opened.

    Several processes may ask for the same folder: one builds, the others wait.

    Raises:
        UserError: The folder holds something else, or no record can be read.
    """
    folder, settings = Path(folder), settings or Settings()
    plan = _plan(dataset, settings) | {"shard_records": shard_records}
    if splits_from is not None:
        plan["splits"] = read_splits(splits_from)
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
        _pack(dataset, folder, settings, plan, num_workers, progress, splits_from)
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
    if any(store.manifest["plan"].get(key) != plan.get(key) for key in ("hash", "splits")):
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


def _with_splits(
    dataset: Dataset, splits: dict[str, int] | None, splits_from: str | Path | None
) -> tuple[list[Entry], dict[str, Any]]:
    """The entries as they are packed, with folds and learnable labels, and what the manifest says of both."""
    entries, dropped = learnable(dataset.entries(), dataset.synonyms, keep_lone=splits is not None)
    if splits is not None:
        said = "given"
        names = [entry.record_id for entry in entries], [entry.source for entry in entries]
        folds = given_folds(splits, *names, str(splits_from))
    else:
        official = all(entry.fold is not None for entry in entries)
        said = "official" if official else f"by patient, labels spread evenly, seed {FOLD_SEED}"
        task = next((task for task in dataset.tasks if dataset.problem_of(task) != "regression"), None)
        folds = assign_folds(entries, task)
    entries = [dataclasses.replace(entry, fold=fold) for entry, fold in zip(entries, folds, strict=True)]
    return entries, {"folds": said, "dropped_labels": dropped}


def _pack(
    dataset: Dataset,
    folder: Path,
    settings: Settings,
    plan: dict[str, Any],
    num_workers: int,
    progress: bool,
    splits_from: str | Path | None,
) -> None:
    entries, split_facts = _with_splits(dataset, plan.get("splits"), splits_from)
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
        contextlib.closing(packed_chunks(dataset, settings, chunks, processes)) as packed,
    ):
        results: list[Result] = []
        for position, chunk in packed:
            results += chunk
            advance(len(chunk))
            if len(results) == len(shards[position]):
                _write_shard(folder, position, results, schema, settings)
                results = []
    _finish(dataset, folder, settings, plan, len(shards), split_facts)


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
        **dict.fromkeys(LEAD_FAULTS, pa.list_(pa.string())),
        "num_missing_samples": pa.int64(),
        "size_mv": pa.float32(),
        "limb_residual": pa.float32(),
        "limb_mend": pa.string(),
        "suspected_swap": pa.string(),
        "signal_hash": pa.binary(NUM_HASH_BYTES),
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


def _write_shard(folder: Path, position: int, results: list[Result], schema: pa.Schema, settings: Settings) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    packed = [result for result in results if isinstance(result, Packed)]
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
    skipped = [(result.source, result.reason) for result in results if isinstance(result, Skipped)]
    facts = {"shard": json.dumps(shard), "skipped": json.dumps(skipped)}
    table = pa.Table.from_pylist(rows, schema=schema).replace_schema_metadata(facts)
    with replacing(_part(folder, position)) as path:
        pq.write_table(table, path)


def _finish(
    dataset: Dataset,
    folder: Path,
    settings: Settings,
    plan: dict[str, Any],
    num_shards: int,
    split_facts: dict[str, Any],
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    shards, skipped, hours, num_records = [], [], 0.0, 0
    label_names: dict[str, set[str]] = {task: set() for task in dataset.tasks}
    with replacing(folder / INDEX) as path, pq.ParquetWriter(path, _schema(dataset)) as writer:
        for first in range(0, num_shards, _INDEX_SHARDS):
            some = range(first, min(first + _INDEX_SHARDS, num_shards))
            parts = [pq.read_table(_part(folder, position)) for position in some]
            shards += [json.loads(part.schema.metadata[b"shard"]) for part in parts]
            skipped += [item for part in parts for item in json.loads(part.schema.metadata[b"skipped"])]
            table = pa.concat_tables([part.replace_schema_metadata(None) for part in parts])
            num_records += table.num_rows
            hours += sum(table["duration_s"].to_pylist()) / 3600
            for task, names in label_names.items():
                if dataset.problem_of(task) == "regression":
                    names.add(task)
                else:
                    names.update(table[label_column(task)].combine_chunks().flatten().unique().to_pylist())
            writer.write_table(table)
        if not num_records:
            source, reason = skipped[0] if skipped else (str(folder), "it is empty")
            which = f"none of {len(skipped)} records can be read; the first, {source}"
            raise UserError(f"{dataset.name}: {which}: {reason}")
    index_hash = file_hash(folder / INDEX)
    manifest = {
        "format_version": FORMAT_VERSION,
        "dataset": dataset.name,
        "num_records": num_records,
        "hours": round(hours, 4),
        "sampling_rate_hz": settings.sampling_rate_hz,
        "stored_rate_hz": settings.stored_rate_hz,
        "leads": list(LEADS),
        "settings": dataclasses.asdict(settings),
        **split_facts,
        "splits_hash": _write_splits(folder),
        "problem": dataset.problem,
        "tasks": list(dataset.tasks),
        "label_names": {task: sorted(names) for task, names in label_names.items()},
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


def _write_splits(folder: Path) -> str:
    """Which record of the index is in which split, as ``--splits_from`` reads it. Returns the hash of the file."""
    import pyarrow.parquet as pq

    frame = pq.read_table(folder / INDEX, columns=["record_id", "patient_id", "fold"]).to_pandas()
    frame["split"] = frame["fold"].map(split_name)
    with replacing(folder / SPLITS_TABLE) as temporary:
        frame.to_csv(temporary, index=False)
    return file_hash(folder / SPLITS_TABLE)


def _tell(store: Store) -> None:
    """Says what was packed, and names what was not."""
    say = functools.partial(_console().print, highlight=False, markup=False, soft_wrap=True)
    say(f"{len(store)} records in {store.path}" + (f", {len(store.skipped)} skipped:" if store.skipped else ""))
    for source, reason in store.skipped[:_SKIPPED_SHOWN]:
        say(f"  {source}: {reason}")
    if len(store.skipped) > _SKIPPED_SHOWN:
        say(f"  and {len(store.skipped) - _SKIPPED_SHOWN} more in {store.path / MANIFEST}")
    for task, labels in store.manifest["dropped_labels"].items():
        say(f"{task}: labels of one patient alone are left out: {', '.join(labels)}")


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
