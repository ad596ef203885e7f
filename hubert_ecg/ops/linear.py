"""A linear layer: torch's, and float32 products where a processor would only emulate those of half precision."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _products_of_a_cpu() -> frozenset[torch.dtype]:
    found = {torch.float32, torch.float64}
    if torch.backends.mkldnn.is_available():
        half = torch.ops.mkldnn
        found |= {torch.bfloat16} if half._is_mkldnn_bf16_supported() else set()
        found |= {torch.float16} if half._is_mkldnn_fp16_supported() else set()
    return frozenset(found)


# Asked once: the compiler cannot trace the question.
_PRODUCTS_OF_A_CPU = _products_of_a_cpu()


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype to multiply matrices of ``dtype`` in: float32 where a CPU would only emulate it."""
    return dtype if device.type != "cpu" or dtype in _PRODUCTS_OF_A_CPU else torch.float32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias`` as :func:`torch.nn.functional.linear`, under autocast too.

    A CPU without products of half precision takes about ten times as long for them as for those of float32. There the
    numbers are rounded to half precision as ever, multiplied in float32, and the results are rounded.

    Args:
        x: [..., D] floating point.
        weight: [N, D].
        bias: [N]; default: none.

    Returns:
        [..., N] of the dtype of x, or of autocast's.
    """
    device, dtype = x.device, x.dtype
    if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
    wide = product_dtype(device, dtype)
    if wide == dtype:
        return F.linear(x, weight, bias)
    with torch.autocast(device.type, enabled=False):
        rounded = [None if part is None else part.to(dtype).to(wide) for part in (x, weight, bias)]
        return F.linear(*rounded).to(dtype)
