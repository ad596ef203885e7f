"""Dropout's random bits: a function of seed and place, so that every backend and device drops the same elements.

Nothing is stored between forward and backward but the seed, and an element's fate does not depend on how a kernel cuts
its work. ``bits(i)`` hashes the flat index ``i`` with two keys from the seed, twice through a 32-bit finaliser
(multipliers of the hash-prospector project); all arithmetic is modulo 2^32.
"""

from __future__ import annotations

import numbers
import operator

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def mix(h: Tensor) -> Tensor:
    """The finaliser: int64 numbers below 2^32 to the same range, one to one."""
    h = ((h ^ (h >> 16)) * 0x21F0AAAD) & _LOW
    h = ((h ^ (h >> 15)) * 0xD35A2D97) & _LOW
    return h ^ (h >> 15)


def keys(seed: Tensor) -> tuple[Tensor, Tensor]:
    """The two keys of an int64 seed."""
    k0 = mix((seed & _LOW) ^ 0x9E3779B9)
    return k0, mix((((seed >> 32) & _LOW) + mix(k0 ^ 0x85EBCA6B)) & _LOW)


def bits(seed: Tensor, index: Tensor) -> Tensor:
    """32 random bits for each index.

    Args:
        seed: [] int64.
        index: int64, any shape, not negative.

    Returns:
        int64 of the shape of ``index``, from 0 to 2^32 - 1.
    """
    k0, k1 = keys(seed)
    high = ((index >> 32) * 0x9E3779B9) & _LOW
    return mix((mix((index & _LOW) ^ k0) + (k1 ^ high)) & _LOW)


def threshold(dropout_p: float) -> int:
    """An element whose bits lie below this is dropped."""
    return min(_LOW, int(dropout_p * 2**32 + 0.5))


def dropout(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """``x``, where kept over ``1 - dropout_p``, elsewhere 0; the index of an element is its place in ``x``."""
    if dropout_p == 0 or seed is None:
        return x.clone()
    if dropout_p == 1:
        return x * 0
    index = torch.arange(x.numel(), device=x.device).view(x.shape)
    return torch.where(bits(seed, index) >= threshold(dropout_p), x / (1 - dropout_p), 0)


def check(op: str, dropout_p: float, seed: Tensor | int | None, device: torch.device) -> Tensor | None:
    """The seed as kernels take it: None where nothing is dropped, drawn from torch's generator where none is given.

    Raises:
        ValueError: a probability outside 0 to 1, or a seed that is no whole number.
    """
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, numbers.Real) or not 0 <= dropout_p <= 1:
        raise ValueError(f"{op}: dropout_p must be from 0 to 1, got {dropout_p!r}")
    want = f"{op}: seed must be int64 [], a whole number or None"
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.ndim:
            raise ValueError(f"{want}, got {str(seed.dtype).removeprefix('torch.')}{list(seed.shape)}")
        seed = seed.to(device)
    elif seed is not None:
        try:
            # As two's complement: a seed of 64 bits may come unsigned.
            number = (operator.index(seed) + 2**63) % 2**64 - 2**63
        except TypeError:
            raise ValueError(f"{want}, got {seed!r}") from None
        # Not torch.tensor: copied to a GPU, the number would make the host wait.
        seed = torch.full((), number, dtype=torch.int64, device=device)
    if dropout_p == 0:
        return None
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device) if seed is None else seed


def stored(seed: Tensor | None, like: Tensor) -> Tensor:
    """The seed for a kernel that takes one in any case."""
    return torch.zeros((), dtype=torch.int64, device=like.device) if seed is None else seed
