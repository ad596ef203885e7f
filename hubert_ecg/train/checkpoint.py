"""One file that holds all a run needs to continue bit for bit: a .safetensors with JSON beside the tensors.

A state is a nested dict (and list) of tensors, NumPy arrays and JSON values. Tensors and arrays go into the file under
the path of their keys (``model/encoder.layers.0...``), all else into its metadata. Nothing in it is ever executed.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from hubert_ecg.config import UserError
from hubert_ecg.files import replacing

_KEY = "hubert_ecg_checkpoint"
_VERSION = 3


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state so that the file is, at every moment, either the old one or the new one, whole.

    Args:
        path: The .safetensors file.
        state: Nested dicts and lists of tensors (any device), NumPy arrays and JSON values.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = pack(state, "", tensors)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    header = {"version": _VERSION, "crc32": _crc32(tensors), "state": skeleton}
    with replacing(Path(path)) as temporary:
        save_file(_separate(tensors), temporary, metadata={_KEY: json.dumps(header)})


def load(path: Path) -> dict[str, Any]:
    """Read a state back, tensors on the CPU.

    Raises:
        UserError: If the file is missing, cut short, damaged or not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint: {path} does not exist")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no iterator of its own)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"checkpoint: {path} is damaged ({error}); delete it, or start without --resume") from error
    if _KEY not in metadata:
        raise UserError(f"checkpoint: {path} must be a training checkpoint, got another .safetensors file")
    header = json.loads(metadata[_KEY])
    if header["version"] != _VERSION:
        raise UserError(f"checkpoint: {path} must have format version {_VERSION}, got {header['version']}")
    if header["crc32"] != _crc32(tensors):
        raise UserError(f"checkpoint: {path} is damaged (checksum differs); delete it, or start without --resume")
    return unpack(header["state"], tensors)


def check_same(saved: Mapping[str, Any], given: Mapping[str, Any], may_differ: frozenset[str], path: Path) -> None:
    """Refuse to continue a run under other settings.

    Raises:
        UserError: Naming the first field that differs, with both values.
    """
    for field in given:
        if field not in may_differ and saved.get(field) != given[field]:
            raise UserError(
                f"resume: {field} must be {saved.get(field)!r} as in {path}, got {given[field]!r}; "
                "give the same value, or start anew without --resume"
            )


def pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """A state as JSON values, and its tensors and arrays under the path of their keys."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach()
        return {"$tensor": path}
    if isinstance(value, np.ndarray):
        tensors[path] = torch.from_numpy(np.ascontiguousarray(value))
        return {"$array": path}
    if isinstance(value, Mapping):
        return {str(key): pack(item, f"{path}/{key}".lstrip("/"), tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [pack(item, f"{path}/{i}".lstrip("/"), tensors) for i, item in enumerate(value)]
    if isinstance(value, np.generic):
        return value.item()
    return value


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The format refuses two tensors in one storage, as tied weights are: each gets its own."""
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return separate


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The state of what :func:`pack` gave."""
    if isinstance(value, dict):
        if value.keys() == {"$tensor"}:
            return tensors[value["$tensor"]]
        if value.keys() == {"$array"}:
            return tensors[value["$array"]].numpy()
        return {key: unpack(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    return value


def _crc32(tensors: Mapping[str, Tensor]) -> int:
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc
