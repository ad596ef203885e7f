"""The only door to the compiled module: tensors cross it as borrowed DLPack views, with the CUDA stream last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.dlpack import to_dlpack

try:
    from hubert_ecg import _C
except ImportError as error:  # a source tree that was never built: every op still has its reference
    _C, why_missing = None, f"the native module is not built ({error})"  # type: ignore[assignment]
else:
    why_missing = ""


def find(op: str, device: str) -> Callable[..., None] | None:
    """``_C.<op>_<device>`` as a function of tensors and numbers, or None: a backend exists when its symbol does."""
    entry = getattr(_C, f"{op}_{device}", None)
    if entry is None:
        return None

    def on_cpu(*args: Any) -> None:
        # torch's own setting: a loader's worker process, where torch runs one thread, must not start more.
        _C.set_num_threads(torch.get_num_threads())
        entry(*map(_view, args))

    def on_cuda(*args: Any) -> None:
        where = args[0].device
        with torch.cuda.device(where):
            entry(*map(_view, args), torch.cuda.current_stream(where).cuda_stream)

    return on_cpu if device == "cpu" else on_cuda


def map_shards(paths: Sequence[str], sizes: Sequence[int], half: bool) -> Callable[..., None] | None:
    """``gather(shard, offset, length, start, scale, out, num_threads)`` of these files, see csrc/gather.h; None where
    it is not built.

    Raises:
        ValueError: A file is of another size.
        RuntimeError: A file cannot be mapped.
    """
    if not hasattr(_C, "Shards"):
        return None
    gather = _C.Shards(list(paths), list(sizes), half).gather
    return lambda *args: gather(*map(_view, args))


def _view(arg: Any) -> Any:
    return to_dlpack(arg) if isinstance(arg, torch.Tensor) else arg
