"""Where and how precisely to compute."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from hubert_ecg.config import RunError, UserError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def device(name: str = "auto") -> torch.device:
    """The device of this name; "auto" is the first of CUDA, MPS and the CPU that is there.

    Raises:
        UserError: If there is no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device: must be auto, cpu, cuda, cuda:1, ... or mps, got {name!r}") from error
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(found.type)
    if count is None:
        raise UserError(f"device: must be auto, cpu, cuda, cuda:1, ... or mps, got {name!r}")
    if (found.index or 0) >= count:
        there = f"there are {count} of its kind" if count else f"this machine or this torch has no {found.type}"
        raise UserError(f"device: {name} is not available ({there}); use --device auto or --device cpu")
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return found


def dtype(precision: str, device: torch.device) -> torch.dtype:
    """What matrix products run in: weights and optimiser stay float32.

    Args:
        precision: auto (float32 on a CPU, bfloat16 on a GPU), float32, bfloat16 or float16.
        device: Where the model runs.

    Raises:
        UserError: If the device cannot train in this precision.
    """
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if precision not in _DTYPES:
        raise UserError(f"precision: must be auto, {', '.join(_DTYPES)}, got {precision!r}")
    if precision == "float16" and device.type != "cuda":
        raise UserError(f"precision: float16 needs a CUDA device, got {device.type}; use bfloat16 or float32")
    return _DTYPES[precision]


@contextlib.contextmanager
def same_bits(wanted: bool) -> Iterator[None]:
    """Inside the block, where it is wanted, torch computes only in ways that give the same bits every time.

    Raises:
        RunError: Something is computed for which torch has no such way; it is named.
    """
    if not wanted:
        yield
        return
    # cuBLAS looks at it when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    memory, mode = torch.utils.deterministic, torch.get_deterministic_debug_mode()
    fill = memory.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    # That is for finding what was never written.
    memory.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        raise RunError(f"deterministic: {str(error).split(',')[0]}; leave --deterministic out") from error
    finally:
        # Not by setting the mode, which would leave the compiler's own switch on.
        torch.use_deterministic_algorithms(mode > 0, warn_only=mode == 1)
        memory.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The autocast context for this precision, which does nothing in float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
