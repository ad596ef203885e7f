"""Building packed stores: every recording is packed once, resumable at each shard."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import hubert_ecg.signal
from hubert_ecg.config import Compat, PrepareConfig, UserError, cache_root
from hubert_ecg.data.dataset import Dataset
from hubert_ecg.data.datasets import open_dataset
from hubert_ecg.data.folds import check_given, given_folds, read_splits, split_entries
from hubert_ecg.data.packing import BASE_RATE_HZ, Result, Settings, packed_chunks
from hubert_ecg.data.progress import Progress, say
from hubert_ecg.data.record import lead_list
from hubert_ecg.data.store import BUILDING, FORMAT_VERSION, INDEX, MANIFEST, SHARDS, Store, is_store, stream_hash
from hubert_ecg.data.writing import finish, part_of, schema_of, write_shard
from hubert_ecg.files import write_text

SHARD_RECORDS = 1024
# Records that go to a worker at once.
_CHUNK_RECORDS = 32
# Below this many records, starting worker processes costs more than it saves.
_POOL_FROM_RECORDS = 256
_SKIPPED_SHOWN = 10
# Another process may be creating these while this one looks.
_OWN_FILES = {SHARDS, BUILDING, INDEX, MANIFEST}
# What one machine writes into a shared folder, others may see later.
_SEEN_WITHIN_S = 60.0


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The processes that build a store together, each the same function with the same arguments.

    Args:
        rank: Number of this one.
        num_ranks: How many there are.
        gather: Gives the values of all ranks in their order, on every rank, and waits for all of them.
    """

    rank: int = 0
    num_ranks: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]

    def first(self, work: Callable[[], Any]) -> Any:
        """What rank 0 gets from the work, on every rank; where it raises a UserError, all do."""
        result: Any = None
        if self.rank == 0:
            try:
                result = work()
            except UserError as error:
                result = error
        result = self.gather(result)[0]
        if isinstance(result, UserError):
            raise result
        return result


def prepare(config: PrepareConfig, progress: bool = True, ranks: Ranks | None = None) -> Store:
    """Pack recordings into a store at ``config.output_dir``.

    Run again after it was stopped, it goes on where it was; run again when it is finished, it opens the store.

    Args:
        config: The recordings and the settings.
        progress: Show a progress bar on stderr, then how many records there are and which were skipped, and why.
        ranks: The processes that share the work; None for this one alone.

    Raises:
        UserError: A data set is unknown or missing, no record can be read, or output_dir holds something else.
    """
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
        ranks=ranks,
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
        data_path: A packed store, or a folder of recordings; by default where the data set is found. Several folders
            with commas between them are several data sets.
        dataset: Name of the data set, or "auto"; several with commas between them.
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
        for line in check_given(folds, store.column("patient_id"), str(splits_from)) if progress else ():
            say(line)
        return Store(store.path, np.array(folds))

    if data_path is not None and is_store(data_path):
        return with_splits(_matching(Store(data_path), dataset, settings))
    source = open_dataset(dataset, data_path, sampling_rate_hz=sampling_rate, lead_names=lead_list(lead_names))
    folder = cache_root(None if cache_dir is None else Path(cache_dir)) / "stores"
    kind = source.name if len(source.parts) == 1 else "several"
    folder /= f"{kind}-{_plan(source, settings)['hash'][:16]}"
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
        known = f"its tasks: {', '.join(source.tasks) or 'none'}"
        raise UserError("; ".join([f"{name} has no task {task!r}", known, *_left_out(source)]))


def build(
    dataset: Dataset,
    folder: str | Path,
    settings: Settings | None = None,
    *,
    num_workers: int = 0,
    progress: bool = False,
    shard_records: int = SHARD_RECORDS,
    splits_from: str | Path | None = None,
    ranks: Ranks | None = None,
) -> Store:
    """Pack a data set into a folder, or finish what an earlier run began there; a finished store is opened.

    Several processes may ask for the same folder: one builds, the others wait. Ranks build it together: each packs a
    share of the shards, and the first one finishes. The store is the same whatever the number of processes and ranks.

    Raises:
        UserError: The folder holds something else, no record can be read, or ranks do not see the same files.
    """
    folder, settings, ranks = Path(folder), settings or Settings(), ranks or Ranks()
    plan = _plan(dataset, settings) | {"shard_records": shard_records}
    if splits_from is not None:
        plan["splits"] = read_splits(splits_from)
    if len(set(ranks.gather(plan["hash"]))) > 1:
        raise UserError(f"{dataset.name}: ranks see other recordings or run other code than rank 0: a shared folder?")
    if ranks.first(lambda: (folder / MANIFEST).is_file()):
        return _finished(folder, plan)
    ranks.first(lambda: _make_folder(folder))
    with _locked(folder / ".lock", progress) if ranks.rank == 0 else contextlib.nullcontext():
        if ranks.first(lambda: _begun(folder, plan)):
            return _finished(folder, plan)
        _see_the_same(folder, ranks)
        read_share = _pack(dataset, folder, settings, plan, num_workers, progress, splits_from, ranks)
    _appears(folder / MANIFEST)
    store = Store(folder)
    store.read_share = read_share
    if progress:
        _tell(store)
    return store


def _make_folder(folder: Path) -> None:
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


def _begun(folder: Path, plan: dict[str, Any]) -> bool:
    """Begins a store, or goes on with the one that was begun here. Returns whether it is finished already."""
    if (folder / MANIFEST).is_file():
        return True
    begun, text = folder / BUILDING, json.dumps(plan, indent=1)
    if begun.is_file() and begun.read_text(encoding="utf-8") != text:
        raise UserError(f"{folder} holds an unfinished store of other data or settings: delete it, or choose a new one")
    write_text(begun, text)
    (folder / SHARDS).mkdir(exist_ok=True)
    return False


def _see_the_same(folder: Path, ranks: Ranks) -> None:
    """Raises UserError where a rank has not the folder that rank 0 has: what it packs would be lost."""
    if ranks.num_ranks == 1:
        return
    blind = [rank for rank, sees in enumerate(ranks.gather(_appears(folder / BUILDING))) if not sees]
    if blind:
        raise UserError(
            f"rank {blind[0]} does not see what rank 0 writes into {folder}: ranks pack into one folder, on a file "
            "system that all machines share"
        )


def _appears(path: Path) -> bool:
    end = time.monotonic() + _SEEN_WITHIN_S
    while not path.is_file():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


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
    _appears(folder / MANIFEST)
    store = Store(folder)
    if any(store.manifest["plan"].get(key) != plan.get(key) for key in ("hash", "splits")):
        raise UserError(f"{folder} holds a store of other data or settings: delete it, or choose another folder")
    return store


def _matching(store: Store, dataset: str, settings: Settings) -> Store:
    named, held = (sorted(name.strip() for name in names.split(",")) for names in (dataset, store.dataset))
    if dataset != "auto" and named != held:
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
            say(f"another process is packing {path.parent}: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _pack(
    dataset: Dataset,
    folder: Path,
    settings: Settings,
    plan: dict[str, Any],
    num_workers: int,
    progress: bool,
    splits_from: str | Path | None,
    ranks: Ranks,
) -> float | None:
    """Packs what is not packed yet. Returns which share of this rank's work was reading files, None without any."""
    entries, split_facts = split_entries(dataset, plan.get("splits"), str(splits_from))
    if progress and splits_from is not None:
        folds, patients = [entry.fold or 0 for entry in entries], [entry.patient_id for entry in entries]
        for line in check_given(folds, patients, str(splits_from)):
            say(line)
    size = plan["shard_records"]
    shards = [entries[start : start + size] for start in range(0, len(entries), size)]
    todo = ranks.first(lambda: [position for position in range(len(shards)) if not part_of(folder, position).is_file()])
    mine = todo[ranks.rank :: ranks.num_ranks]
    chunks = [
        (position, shards[position][start : start + _CHUNK_RECORDS])
        for position in mine
        for start in range(0, len(shards[position]), _CHUNK_RECORDS)
    ]
    remaining = sum(len(chunk) for _, chunk in chunks)
    total, title = len(entries), f"packing {dataset.name}"
    if ranks.num_ranks > 1:
        total, title = remaining, f"{title}, the share of one of {ranks.num_ranks} ranks"
    schema = schema_of(dataset)
    processes = num_workers if remaining >= _POOL_FROM_RECORDS else 0
    with (
        Progress(title, total, total - remaining, progress) as bar,
        contextlib.closing(packed_chunks(dataset, settings, chunks, processes)) as packed,
    ):
        results: list[Result] = []
        read_s = prepare_s = 0.0
        for position, chunk in packed:
            results += chunk
            read_s += sum(result.read_s for result in chunk)
            prepare_s += sum(result.prepare_s for result in chunk)
            bar.advance(len(chunk))
            if len(results) == len(shards[position]):
                write_shard(folder, position, results, dataset, schema, settings)
                results = []
    ranks.gather(None)
    ranks.first(lambda: _see_parts(folder, len(shards)))
    ranks.first(lambda: finish(dataset, folder, settings, plan, len(shards), split_facts))
    return read_s / (read_s + prepare_s) if read_s else None


def _see_parts(folder: Path, num_shards: int) -> None:
    """Raises UserError where the rank that finishes the store does not see what the others packed."""
    for position in range(num_shards):
        if not _appears(part_of(folder, position)):
            raise UserError(
                f"{part_of(folder, position)} is not to be seen where the store is finished: run again to go on; ranks "
                "on several machines need a file system that all of them share"
            )


def _tell(store: Store) -> None:
    """Says what was packed, and names what was not."""
    say(f"{len(store)} records in {store.path}" + (f", {len(store.skipped)} skipped:" if store.skipped else ""))
    for source, reason in store.skipped[:_SKIPPED_SHOWN]:
        say(f"  {source}: {reason}")
    if len(store.skipped) > _SKIPPED_SHOWN:
        say(f"  and {len(store.skipped) - _SKIPPED_SHOWN} more in {store.path / MANIFEST}")
    counts = store.manifest["datasets"]
    if len(counts) > 1:
        say("of them " + ", ".join(f"{name} {facts['num_records']}" for name, facts in counts.items()))
    for line in _left_out(store):
        say(line)
    for task, labels in store.manifest["dropped_labels"].items():
        say(f"{task}: labels of one patient alone are left out: {', '.join(labels)}")
    if store.read_share is not None:
        say(f"{store.read_share:.0%} of the work was reading files, the rest preparing what they hold")


def _left_out(source: Store | Dataset) -> list[str]:
    """Of each table with columns that are neither labels nor numbers, which these are and why."""
    if isinstance(source, Store):
        tables = {name: facts.get("left_out_columns", {}) for name, facts in source.manifest["datasets"].items()}
    else:
        tables = {name: getattr(part, "left_out", {}) for name, part in source.parts.items()}
    return [
        f"{name}: columns left out, because they are neither of labels (1 and 0, true and false, yes and no, y and n) "
        f"nor of numbers: {', '.join(f'{column} ({why})' for column, why in columns.items())}"
        for name, columns in tables.items()
        if columns
    ]
