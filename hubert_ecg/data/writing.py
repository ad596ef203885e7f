"""Writing packed stores: a shard and its part of the index at a time, then the index and the manifest."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hubert_ecg.config import UserError
from hubert_ecg.data.dataset import Dataset, Entry
from hubert_ecg.data.folds import split_entries, split_name
from hubert_ecg.data.packing import Packed, Result, Settings, Skipped, as_utf8
from hubert_ecg.data.quality import LEAD_FAULTS, NUM_HASH_BYTES
from hubert_ecg.data.store import (
    BUILDING,
    FORMAT_VERSION,
    INDEX,
    MANIFEST,
    SHARDS,
    file_hash,
    label_column,
    shard_name,
    stream_hash,
    value_column,
)
from hubert_ecg.files import replacing, write_text
from hubert_ecg.signal import LEADS

if TYPE_CHECKING:
    import pyarrow as pa

SPLITS_TABLE = "splits.csv"
# Shards whose rows are in memory together while the index is put together.
_INDEX_SHARDS = 256


def schema_of(dataset: Dataset) -> pa.Schema:
    """The columns of the index."""
    import pyarrow as pa

    fields = {
        "record_id": pa.string(),
        "dataset": pa.string(),
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


def part_of(folder: Path, position: int) -> Path:
    """The index of one shard; where it is, the shard is finished."""
    return folder / SHARDS / f"{shard_name(position)}.parquet"


def write_shard(
    folder: Path, position: int, results: list[Result], dataset: Dataset, schema: pa.Schema, settings: Settings
) -> None:
    """The samples of a shard, then its part of the index."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    packed = [result for result in results if isinstance(result, Packed)]
    offset, rows = 0, []
    for item in packed:
        rows.append({"dataset": dataset.name, **item.row, "shard": position, "offset": offset})
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
    with replacing(part_of(folder, position)) as path:
        pq.write_table(table, path)


def finish(
    dataset: Dataset,
    folder: Path,
    settings: Settings,
    plan: dict[str, Any],
    num_shards: int,
    split_facts: dict[str, Any],
) -> None:
    """Put the index together out of its parts, and write what makes the folder a store.

    Raises:
        UserError: No record could be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    readable = _readable(folder, num_shards)
    dealt: dict[str, Entry] = {}
    if readable is not None and plan.get("splits") is None:
        # Labels were spread over records that were not read yet.
        entries, split_facts = split_entries(dataset, readable=lambda entry: as_utf8(entry.record_id) in readable)
        dealt = {as_utf8(entry.record_id): entry for entry in entries}
    shards, skipped, hours, num_records = [], [], 0.0, 0
    counts = dict.fromkeys(dataset.parts, 0)
    label_names: dict[str, set[str]] = {task: set() for task in dataset.tasks}
    with replacing(folder / INDEX) as path, pq.ParquetWriter(path, schema_of(dataset)) as writer:
        for first in range(0, num_shards, _INDEX_SHARDS):
            some = range(first, min(first + _INDEX_SHARDS, num_shards))
            parts = [pq.read_table(part_of(folder, position)) for position in some]
            shards += [json.loads(part.schema.metadata[b"shard"]) for part in parts]
            skipped += [item for part in parts for item in json.loads(part.schema.metadata[b"skipped"])]
            table = pa.concat_tables([part.replace_schema_metadata(None) for part in parts])
            if dealt:
                table = _dealt(table, dealt, dataset)
            num_records += table.num_rows
            for pair in table["dataset"].value_counts().to_pylist():
                counts[pair["values"]] += pair["counts"]
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
        "datasets": {name: {"num_records": counts[name], **_facts(part)} for name, part in dataset.parts.items()},
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
        part_of(folder, position).unlink()
    (folder / BUILDING).unlink()


def _facts(part: Dataset) -> dict[str, Any]:
    left_out = getattr(part, "left_out", {})
    return {"tasks": part.tasks, **({"left_out_columns": left_out} if left_out else {})}


def _readable(folder: Path, num_shards: int) -> set[str] | None:
    """Ids of the records of a store whose index is still in parts; None where all could be read."""
    import pyarrow.parquet as pq

    parts = [part_of(folder, position) for position in range(num_shards)]
    if all(pq.read_schema(part).metadata[b"skipped"] == b"[]" for part in parts):
        return None
    return {name for part in parts for name in pq.read_table(part, columns=["record_id"])["record_id"].to_pylist()}


def _dealt(table: pa.Table, entries: Mapping[str, Entry], dataset: Dataset) -> pa.Table:
    """Rows of the index with the folds and the labels of these entries."""
    import pyarrow as pa

    rows = [entries[name] for name in table["record_id"].to_pylist()]
    columns: dict[str, list[Any]] = {"fold": [entry.fold for entry in rows]}
    for task in dataset.tasks:
        if dataset.problem_of(task) != "regression":
            columns[label_column(task)] = [entry.labels.get(task) for entry in rows]
    for name, values in columns.items():
        place, field = table.schema.get_field_index(name), table.schema.field(name)
        table = table.set_column(place, field, pa.array(values, field.type))
    return table


def _write_splits(folder: Path) -> str:
    """Which record of the index is in which split, as ``--splits_from`` reads it. Returns the hash of the file."""
    import pyarrow.parquet as pq

    frame = pq.read_table(folder / INDEX, columns=["record_id", "patient_id", "fold"]).to_pandas()
    frame["split"] = frame["fold"].map(split_name)
    with replacing(folder / SPLITS_TABLE) as temporary:
        frame.to_csv(temporary, index=False)
    return file_hash(folder / SPLITS_TABLE)
