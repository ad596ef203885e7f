"""How the ops that work row by row see their tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> torch.dtype:
    """What such an op computes in: float64 for float64, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


def as_rows(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[..., D] as the CPU's kernels take it: [N, D] in the dtype, by default the one they compute in."""
    return x.to(dtype or wide(x)).reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()
