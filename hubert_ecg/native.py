"""The only door to the compiled module: tensors cross it as borrowed DLPack views, with the CUDA stream last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.dlpack import to_dlpack

try:
    from hubert_ecg import _C
except ImportError as error:  # a source tree that was never built: every op still has its reference
    _C, why_missing = None, f"the native module is not built ({error})"
else:
    why_missing = ""


def find(op: str, device: str) -> Callable[..., None] | None:
    """``_C.<op>_<device>`` as a function of tensors and numbers, or None: a backend exists when its symbol does."""
    entry = getattr(_C, f"{op}_{device}", None)
    if entry is None:
        return None
    if device == "cpu":
        return lambda *args: entry(*map(_view, args))

    def on_cuda(*args: Any) -> None:
        where = args[0].device
        with torch.cuda.device(where):
            entry(*map(_view, args), torch.cuda.current_stream(where).cuda_stream)

    return on_cuda


def _view(arg: Any) -> Any:
    return to_dlpack(arg) if isinstance(arg, torch.Tensor) else arg
