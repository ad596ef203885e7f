"""The packed store: recordings after preprocessing, memory-mapped, with an index.

A store is a folder that may be moved::

    store.json          settings, tasks, label names, shard sizes and hashes, skipped files; written last
    index.parquet       one row per record
    splits.csv          fold and split of each record
    shards/00000.bin    samples, int16 or float16; record after record, each [12, num_samples] in row order
    doctor.html, .json  what is in the store and what somebody should look at, see hubert_ecg.data.doctor
    labels/NAME.npy     precomputed labels of tokens, where there are any; see hubert_ecg.data.label_sets

A sample, in the units of the preprocessing, is its stored number times the scale of its record and lead.
"""

from __future__ import annotations

import functools
import hashlib
import json
import operator
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch

from hubert_ecg.config import UserError
from hubert_ecg.data import label_sets
from hubert_ecg.data.dataset import BUILDING, MANIFEST
from hubert_ecg.data.folds import NO_FOLD, TEST_FOLD, VALIDATION_FOLD
from hubert_ecg.data.gather import Gather, open_shards
from hubert_ecg.data.label_sets import LabelSet, LabelWriter
from hubert_ecg.data.record import Record
from hubert_ecg.signal import LEADS

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

FORMAT_VERSION = 1
INDEX, SHARDS = "index.parquet", "shards"
SPLITS = ("train", "validation", "test", "all")
# Columns of the index that say where samples lie, and those that a record carries.
_PLACES = {"shard", "offset", "scale", "present"}
_FACTS = ("record_id", "source", "patient_id", "fold", "age", "sex")


def shard_name(position: int) -> str:
    return f"{position:05d}"


def is_store(path: str | Path) -> bool:
    """Whether a folder is a packed store, finished or not."""
    return any((Path(path) / name).is_file() for name in (MANIFEST, BUILDING))


def label_column(task: str) -> str:
    return f"labels_{task}"


def value_column(task: str) -> str:
    return f"value_{task}"


class Store:
    """A packed store, opened for reading. Nothing is read before it is asked for; opening costs milliseconds.

    Stores may be shared: between processes (a pickled store is its path) and between threads.

    Args:
        path: The store's folder.
        folds: Other folds than those it was packed with, ``[N]``; 0 is a record of no split.

    Attributes:
        sampling_rate_hz: Rate of model input from this store.
        stored_rate_hz: Rate of the samples in the store: 500 with ``compat="published"``, where the loader decimates
            each crop, else the same as sampling_rate_hz.
        downsampling_factor: 500 / sampling_rate_hz.
        compat: "corrected" or "published".
        dataset: Name of the data set; of several, with commas between them.
        tasks: Its tasks.
        problem: "multilabel"; :meth:`problem_of` says it task by task.
        skipped: Files that could not be read, each with the reason.
        read_share: Of the work of packing it, the share that was reading files; None where this process packed nothing.

    Raises:
        UserError: The folder is no store, or one that is unfinished, damaged, or of another version.
    """

    def __init__(self, path: str | Path, folds: np.ndarray | None = None):
        self.path = Path(path)
        self._given_folds = folds
        manifest = _read_manifest(self.path)
        self.manifest = manifest
        settings = manifest["settings"]
        self.downsampling_factor = int(settings["downsampling_factor"])
        self.compat: str = settings["compat"]
        self.stored_rate_hz = float(manifest["stored_rate_hz"])
        self.sampling_rate_hz = float(manifest["sampling_rate_hz"])
        self.dataset: str = manifest["dataset"]
        self.tasks: tuple[str, ...] = tuple(manifest["tasks"])
        self.problem: str = manifest["problem"]
        self.skipped: list[tuple[str, str]] = [(source, reason) for source, reason in manifest["skipped"]]
        self.read_share: float | None = None
        self._dtype = np.dtype(settings["signal_dtype"])
        self._check()

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.path, self._given_folds)

    def __len__(self) -> int:
        return int(self.manifest["num_records"])

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}: {len(self)} records of {self.dataset} at {self.sampling_rate_hz:g} Hz)"

    @overload
    def __getitem__(self, position: int) -> Record: ...

    @overload
    def __getitem__(self, position: slice) -> list[Record]: ...

    def __getitem__(self, position: int | slice) -> Record | list[Record]:
        """The record at a position, with its preprocessed twelve leads at ``stored_rate_hz``; a list for a slice."""
        if isinstance(position, slice):
            return [self[place] for place in range(*position.indices(len(self)))]
        try:
            position = operator.index(position)
        except TypeError:
            raise TypeError(f"Store: index must be a whole number or a slice, got {position!r}") from None
        if not -len(self) <= position < len(self):
            raise IndexError(f"Store: index must be below {len(self)}, got {position}")
        position %= len(self)
        signal, _ = self.gather(np.array([position]), None, int(self.num_samples[position]))
        row = self._facts.slice(position, 1).to_pylist()[0]
        return Record(
            signal[0],
            self.stored_rate_hz,
            LEADS,
            labels={task: tuple(row[name]) for task in self.tasks if row.get(name := label_column(task)) is not None},
            **{key: row[key] for key in _FACTS},
        )

    def __iter__(self) -> Iterator[Record]:
        return (self[position] for position in range(len(self)))

    @functools.cached_property
    def index(self) -> pd.DataFrame:
        """One row per record: record_id, dataset, source, source_rate_hz, leads (names of the file), num_samples
        (stored), duration_s, patient_id, fold, age, sex, what :func:`hubert_ecg.data.quality.facts` says of it,
        signal_hash, and for each task ``labels_<task>`` (lists; None where its data set does not have the task) or
        ``value_<task>``."""
        table = self._read(*self.columns)
        frame = table.select([name for name in table.column_names if not _is_list(table, name)]).to_pandas()
        for name in table.column_names:
            if name not in frame:
                frame[name] = table[name].to_pylist()
        return frame[table.column_names]

    def column(self, name: str) -> np.ndarray:
        """One column of :attr:`index`, ``[N]``, without reading the others: of a large store, they fill the memory."""
        return self._read(name)[name].to_numpy()

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of :attr:`index`."""
        return tuple(name for name in self._names if name not in _PLACES)

    def batches(self, *columns: str) -> Iterator[pa.RecordBatch]:
        """Columns of :attr:`index`, many rows at a time, in order."""
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.path / INDEX) as file:
            yield from file.iter_batches(columns=list(columns))

    def rows(self, positions: np.ndarray, *columns: str) -> list[dict[str, Any]]:
        """Columns of :attr:`index` for some records, in their order."""
        return self._read(*columns).take(np.asarray(positions, dtype=np.int64)).to_pylist() if len(positions) else []

    @property
    def splits(self) -> str:
        """Where the folds come from: "official", "by patient, ..." or "given"."""
        return self.manifest["folds"] if self._given_folds is None else "given"

    @functools.cached_property
    def datasets(self) -> np.ndarray:
        """Name of the data set of each record, ``[N]``."""
        if "dataset" in self._names:
            return self.column("dataset")
        return np.full(len(self), self.dataset, dtype=object)

    @functools.cached_property
    def num_samples(self) -> np.ndarray:
        """Length of each record at ``stored_rate_hz``, ``[N] int64``."""
        return self.column("num_samples").astype(np.int64)

    @functools.cached_property
    def folds(self) -> np.ndarray:
        """Fold 1 to 10 of each record, ``[N] int64``; 0 for one that given splits leave out."""
        folds = self.column("fold") if self._given_folds is None else self._given_folds
        return np.asarray(folds, dtype=np.int64)

    def gather(
        self,
        indices: np.ndarray,
        starts: np.ndarray | None,
        num_samples: int,
        *,
        out: np.ndarray | None = None,
        num_threads: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cut the same length out of many records, straight from the memory maps.

        Args:
            indices: ``[B] int64`` records.
            starts: ``[B] int64`` first sample of each cut, in stored samples; None is the beginning.
            num_samples: Length T of the cuts, in stored samples.
            out: Where to write the cuts, ``[B, 12, T] float32``.
            num_threads: Threads that cut; None for as many as torch has.

        Returns:
            ``[B, 12, T] float32``, zero after the end of a record, and the number of valid samples, ``[B] int64``.

        Raises:
            IndexError: A record is not in the store.
            ValueError: A start lies outside its record.
            UserError: The index names samples that its shard does not have.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"gather: indices must be 0 to {len(self) - 1}, got {indices.min()} to {indices.max()}")
        lengths = self.num_samples[indices]
        starts = np.zeros_like(lengths) if starts is None else np.array(starts, dtype=np.int64)
        if starts.shape != indices.shape or (starts < 0).any() or (starts >= lengths).any():
            raise ValueError(f"gather: starts must lie inside each record, got {starts} for lengths {lengths}")
        if out is None:
            out = np.empty((len(indices), len(LEADS), num_samples), dtype=np.float32)
        places = self._shard[indices], self._offset[indices], lengths, starts, self._scale[indices]
        try:
            self._gather(*places, out, num_threads or torch.get_num_threads())
        except ValueError as error:
            raise _damaged(self.path, str(error)) from error
        return out, np.minimum(num_samples, lengths - starts)

    def present(self, indices: np.ndarray) -> np.ndarray:
        """Which leads of the records were measured or derived, ``[B, 12] bool``; the others are zero."""
        return self._present[np.asarray(indices, dtype=np.int64)]

    def split(self, name: str) -> np.ndarray:
        """Positions of a split, ascending ``int64``: train is folds 1 to 8, validation 9, test 10, or all.

        Raises:
            UserError: There is no such split.
        """
        if name not in SPLITS:
            raise UserError(f"unknown split {name!r}; known: {', '.join(SPLITS)}")
        if name == "all":
            return np.arange(len(self), dtype=np.int64)
        if name == "train":
            return np.flatnonzero((self.folds != NO_FOLD) & (self.folds < VALIDATION_FOLD))
        return np.flatnonzero(self.folds == (VALIDATION_FOLD if name == "validation" else TEST_FOLD))

    def problem_of(self, task: str) -> str:
        """ "multilabel" or "regression"."""
        self._require(task)
        return "regression" if value_column(task) in self._names else self.problem

    def label_names(self, task: str) -> tuple[str, ...]:
        """The labels of a task: those that occur in the store's records, in any fold, sorted. For a regression task,
        its own name.

        Raises:
            UserError: There is no such task.
        """
        self._require(task)
        return tuple(self.manifest["label_names"][task])

    def targets(self, task: str) -> np.ndarray:
        """What a model of the task should say, ``[N, C] float32`` in the order of :meth:`label_names`.

        0 and 1 for labels; the value for regression. NaN where a record says nothing of the task: its data set does
        not have it, or it has no value.

        Raises:
            UserError: There is no such task.
        """
        names = self.label_names(task)
        if self.problem_of(task) == "regression":
            return self.column(value_column(task)).astype(np.float32)[:, None]
        column = self._read(label_column(task))[label_column(task)].combine_chunks()
        counts = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        rows = np.repeat(np.arange(len(self)), counts)
        targets = np.zeros((len(self), len(names)), dtype=np.float32)
        labels = column.flatten().to_numpy(zero_copy_only=False)
        if len(labels):
            targets[rows, np.searchsorted(np.array(names, dtype=object), labels)] = 1.0
        targets[column.is_null().to_numpy(zero_copy_only=False)] = np.nan
        return targets

    @property
    def label_sets(self) -> tuple[str, ...]:
        """Names of the precomputed labels of tokens that lie beside the shards, sorted."""
        return label_sets.names_of(self)

    def labels(self, name: str) -> LabelSet:
        """Precomputed labels of the tokens of every record, and what they are.

        Raises:
            UserError: There are none of this name, or they are damaged or of other records.
        """
        return label_sets.read_labels(self, name)

    def write_labels(
        self,
        name: str,
        labels: np.ndarray,
        *,
        num_clusters: int,
        crop_s: float,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Keep labels ``[E, N, tokens]`` of the first crop_s seconds of every record under a name.

        :class:`hubert_ecg.data.LabelWriter`, whose arguments these are, writes what is larger than memory.

        Raises:
            UserError: The name is none for a file.
            ValueError: Labels of another number of records, or that no cluster has.
        """
        sizes = {"num_models": labels.shape[0], "num_tokens": labels.shape[2], "num_clusters": num_clusters}
        if labels.shape[1] != len(self):
            raise ValueError(f"labels: labels must be of {len(self)} records, got {list(labels.shape)}")
        writer = LabelWriter(self, name, **sizes, crop_s=crop_s, facts=facts)
        writer.write(0, labels)
        writer.finish()

    def verify(self) -> None:
        """Read every shard and compare it with its hash.

        Raises:
            UserError: A shard is not as it was written.
        """
        for shard in self.manifest["shards"]:
            if file_hash(self._shard_path(shard["name"])) != shard["hash"]:
                raise _damaged(self.path, f"{SHARDS}/{shard['name']}.bin is not as it was written")

    def _require(self, task: str) -> None:
        if task not in self.tasks:
            known = ", ".join(self.tasks) or "none: its records have no labels"
            raise UserError(f"data set {self.dataset} has no task {task!r}; its tasks: {known}")

    def _check(self) -> None:
        for shard in self.manifest["shards"]:
            path = self._shard_path(shard["name"])
            size = path.stat().st_size if path.is_file() else None
            if size != shard["num_bytes"]:
                found = "missing" if size is None else f"{size} bytes long and not {shard['num_bytes']}"
                raise _damaged(self.path, f"{SHARDS}/{path.name} is {found}")
        index = self.path / INDEX
        if not index.is_file() or file_hash(index) != self.manifest["index_hash"]:
            raise _damaged(self.path, f"{INDEX} is missing or not as it was written")

    def _shard_path(self, name: str) -> Path:
        return self.path / SHARDS / f"{name}.bin"

    @functools.cached_property
    def _gather(self) -> Gather:
        shards, size = self.manifest["shards"], self._dtype.itemsize
        paths = [self._shard_path(shard["name"]) for shard in shards]
        return open_shards(paths, [shard["num_bytes"] // size for shard in shards], self._dtype)

    @functools.cached_property
    def _names(self) -> list[str]:
        """Columns of the index."""
        import pyarrow.parquet as pq

        return pq.read_schema(self.path / INDEX).names

    def _read(self, *names: str) -> pa.Table:
        import pyarrow.parquet as pq

        return pq.ParquetFile(self.path / INDEX).read(columns=list(names))

    @functools.cached_property
    def _facts(self) -> pa.Table:
        """What records say beside their samples."""
        return self._read(*(name for name in self._names if name in _FACTS or name.startswith(label_column(""))))

    @functools.cached_property
    def _shard(self) -> np.ndarray:
        return self.column("shard").astype(np.int64)

    @functools.cached_property
    def _offset(self) -> np.ndarray:
        return self.column("offset").astype(np.int64)

    @functools.cached_property
    def _scale(self) -> np.ndarray:
        return self._lead_matrix("scale").astype(np.float32)

    @functools.cached_property
    def _present(self) -> np.ndarray:
        return self._lead_matrix("present").astype(bool)

    def _lead_matrix(self, name: str) -> np.ndarray:
        values = self._read(name)[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return values.reshape(len(self), len(LEADS))


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return stream_hash(iter(lambda: file.read(1 << 20), b""))


def stream_hash(blocks: Iterator[bytes] | Sequence[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def _is_list(table: pa.Table, name: str) -> bool:
    import pyarrow.types

    return bool(pyarrow.types.is_list(table.schema.field(name).type))


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"store {path} is damaged: {what}; delete the folder and prepare it again")


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.is_file():
        if is_store(path):
            raise UserError(f"store {path} is unfinished: run the command that makes it again, and it goes on")
        raise UserError(f"{path} is not a packed store: no {MANIFEST} in it")
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"{MANIFEST} cannot be read") from error
    if version != FORMAT_VERSION:
        raise UserError(f"store {path} has format {version}, and this version reads {FORMAT_VERSION}: prepare it again")
    return manifest
