"""Checkpoints that no rank ever holds whole: a folder to which each writes its part, for any number of ranks to read.

``state.json`` holds what is no tensor, and names the folder of the .safetensors files and their checksums; it is
replaced last, and at once, so that the last good checkpoint stays until the new one is whole. The files are those of
``torch.distributed.checkpoint`` in its safetensors format, which has no pickle in it, as its own format does. They say
where in the whole each tensor belongs, so that whoever reads them may be cut in other parts.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hubert_ecg.config import RunError, UserError
from hubert_ecg.files import sync_folder, write_json
from hubert_ecg.train import checkpoint, distributed
from hubert_ecg.train.parallel import laid_out, layout

_STATE = "state.json"
_VERSION = 2
_CHUNK = 1 << 24


def find(folder: Path) -> Path | None:
    """The last checkpoint in the folder of a run, sharded or not."""
    found = [path for path in (folder / "checkpoint.safetensors", folder / "checkpoint" / _STATE) if path.is_file()]
    last = max(found, key=lambda path: path.stat().st_mtime_ns, default=None)
    return last.parent if last is not None and last.name == _STATE else last


def put_away(path: Path) -> Path:
    """Keep the checkpoint of an earlier run under another name, which is returned. Does so on rank 0."""
    old = path.with_name(f"checkpoint.old{path.suffix}")
    if distributed.rank() == 0:
        if old.is_dir():
            shutil.rmtree(old)
        path.replace(old)
    return old


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state: into one file, by rank 0, or into a folder, by all ranks. Either replaces the other.

    Args:
        path: ``checkpoint.safetensors`` or ``checkpoint``; what it was before stays until the new one is whole.
        state: As :func:`checkpoint.save` takes it; of what is no DTensor, that of rank 0 counts.

    Raises:
        RunError: If a rank cannot write.
    """
    if path.suffix:
        if distributed.rank() == 0:
            checkpoint.save(path, state)
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
        return
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    rank, alone = distributed.rank(), distributed.num_ranks() == 1
    tensors: dict[str, Tensor] = {}
    skeleton = checkpoint.pack(state, "", tensors)
    if rank > 0:
        tensors = {name: tensor for name, tensor in tensors.items() if layout(tensor) is not None}
    elif (path / _STATE).is_file():
        name = "shards-0" if _read(path)["shards"] == "shards-1" else "shards-1"
    else:
        name = "shards-0"
    shards = distributed.agreed(path / name if rank == 0 else None)
    assert shards is not None
    if rank == 0:
        shutil.rmtree(shards, ignore_errors=True)
        shards.mkdir(parents=True)
    distributed.agreed(None)
    writer = dcp.HuggingFaceStorageWriter(str(shards), save_distributed=True)
    try:
        with distributed.answering(), _quiet():
            # Written to the disk before it returns.
            group = None if alone else distributed.host_group()
            dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=alone)
    except CheckpointException as error:
        raise RunError(f"checkpoint: {shards} could not be written: {error}") from error
    mine = {file.name: _crc32(file) for file in shards.glob(f"shard-{rank + 1:05d}-*")}
    files = {name: crc for found in distributed.gather(mine) for name, crc in found.items()}
    if rank == 0:
        sync_folder(shards)
        write_json(path / _STATE, {"version": _VERSION, "shards": shards.name, "crc32": files, "state": skeleton})
        for other in path.glob("shards-*"):
            if other != shards:
                shutil.rmtree(other, ignore_errors=True)
        path.with_suffix(".safetensors").unlink(missing_ok=True)


def load(path: Path, like: Mapping[str, Tensor] | None = None, only: str | None = None) -> dict[str, Any]:
    """Read a state back, on all ranks together, each its part.

    Args:
        path: What :func:`find` found.
        like: Tensors laid out as those of the same path shall be. The others are whole, on the CPU.
        only: Read this entry of the state alone, and return it.

    Raises:
        UserError: If a file is missing, cut short, damaged or not of a checkpoint.
    """
    like = like or {}
    if path.is_file():
        state = checkpoint.load(path)
        tensors: dict[str, Tensor] = {}
        skeleton = checkpoint.pack(state, "", tensors)
        tensors |= {name: laid_out(tensors[name], like[name]) for name in tensors.keys() & like.keys()}
    else:
        header = _read(path)
        _check(path, header)
        skeleton, tensors = header["state"], _read_tensors(path / header["shards"], like, only)
    return checkpoint.unpack(skeleton[only] if only else skeleton, tensors)


def _read_tensors(shards: Path, like: Mapping[str, Tensor], only: str | None) -> dict[str, Tensor]:
    from torch.distributed import checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(shards))
    tensors = {}
    metadata: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
    for name, found in metadata.items():
        if only is None or name.split("/")[0] == only:
            dtype = found.properties.dtype
            shared = layout(like.get(name)) is not None
            tensors[name] = (
                torch.zeros_like(like[name], dtype=dtype) if shared else torch.empty(found.size, dtype=dtype)
            )
    if tensors:
        with _quiet():
            # Each rank reads what it needs, by itself.
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warning that a rank works by itself where it is told to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _read(path: Path) -> dict[str, Any]:
    try:
        header = json.loads((path / _STATE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"checkpoint: {path / _STATE} is damaged; delete {path}, or start without --resume") from error
    if header.get("version") != _VERSION:
        raise UserError(f"checkpoint: {path} must have format version {_VERSION}, got {header.get('version')}")
    return header


def _check(path: Path, header: Mapping[str, Any]) -> None:
    """Each rank looks at some of the files."""
    files = sorted(header["crc32"].items())[distributed.rank() :: distributed.num_ranks()]
    shards = path / header["shards"]
    mine = [name for name, crc in files if not (shards / name).is_file() or _crc32(shards / name) != crc]
    damaged = [name for found in distributed.gather(mine) for name in found]
    if damaged:
        raise UserError(
            f"checkpoint: {shards / damaged[0]} is missing or damaged; delete {path}, or start without --resume"
        )


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc
