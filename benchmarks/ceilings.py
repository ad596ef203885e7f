"""What a device does at most, measured: the bytes that a copy moves, and the operations of a matrix product.

Whatever a kernel does, it reads its input and writes its output once, and does its operations: its floor is the longer
of the two times.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from hubert_ecg.ops.linear import product_dtype

COPIED_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
WIDTH = {"cpu": 2048, "cuda": 8192}


def finished(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """``run``, which does not return before the device has done its work."""
    if device.type != "cuda":
        return run

    def wait() -> Any:
        result = run()
        torch.cuda.synchronize(device)
        return result

    return wait


def best_of_a_turn(run: Callable[[], Any], turn_s: float = 0.2) -> float:
    """Seconds of the fastest run: what ran before leaves other data in the caches, and threads that still spin."""
    found: list[float] = []
    while sum(found) < turn_s:
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


def precisions(device: torch.device) -> list[torch.dtype]:
    """Dtypes of products that the device has; a CPU without bfloat16 emulates it, many times slower than float32."""
    if device.type == "cuda":
        return [torch.float32, torch.bfloat16, torch.float16]
    return [torch.float32, *[torch.bfloat16] * (product_dtype(device, torch.bfloat16) == torch.bfloat16)]


@functools.cache
def copy(device: torch.device) -> tuple[Callable[[], torch.Tensor], int]:
    """A copy within the device, and the bytes that it reads and writes."""
    source = torch.randint(256, (COPIED_BYTES[device.type],), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return finished(lambda: target.copy_(source), device), 2 * source.nbytes


@functools.cache
def product(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], torch.Tensor], int]:
    """A product of square matrices, and its multiplications and additions."""
    width = WIDTH[device.type]
    a, b, c = (torch.randn(width, width, device=device).to(dtype) for _ in range(3))
    return finished(lambda: torch.mm(a, b, out=c), device), 2 * width**3


def floor_s(device: torch.device, moved: float, operations: float, dtype: torch.dtype) -> float:
    """Seconds that so many bytes, and so many operations in this dtype, take at least, by the speed of this moment.

    Where the device has no products in this dtype, those of float32 take their place, and ours may take less.
    """
    dtype = dtype if dtype in precisions(device) else torch.float32

    def seconds(count: float, run: Callable[[], Any], of_one: int) -> float:
        return count / of_one * best_of_a_turn(run)

    # What nobody asks about is not even made.
    return max(
        seconds(moved, *copy(device)) if moved else 0.0,
        seconds(operations, *product(device, dtype)) if operations else 0.0,
    )
