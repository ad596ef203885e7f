"""Tables that kernels of several ops read."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


@functools.lru_cache(maxsize=64)
def unit_circle(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Cosine and sine of ``2 pi j / n`` for ``j`` in ``0 .. n - 1``: [n, 2]."""
    angle = torch.arange(n, dtype=torch.float64) * (2 * math.pi / n)
    return torch.stack([angle.cos(), angle.sin()], 1).to(device, dtype)
