"""Dropout in Triton; see ``_dropout.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from hubert_ecg.ops import _dropout


@triton.jit
def mix(h):
    h = (h ^ (h >> 16)) * 0x21F0AAAD
    h = (h ^ (h >> 15)) * 0xD35A2D97
    return h ^ (h >> 15)


@triton.jit
def keys(seed_ptr):
    """The two keys of the int64 seed at ``seed_ptr``."""
    seed = tl.load(seed_ptr).to(tl.uint64, bitcast=True)
    k0 = mix((seed & 0xFFFFFFFF).to(tl.uint32) ^ 0x9E3779B9)
    return k0, mix((seed >> 32).to(tl.uint32) + mix(k0 ^ 0x85EBCA6B))


@triton.jit
def bits(k0, k1, index):
    """32 random bits for each int64 ``index``."""
    index = index.to(tl.uint64)
    high = (index >> 32).to(tl.uint32) * 0x9E3779B9
    return mix(mix((index & 0xFFFFFFFF).to(tl.uint32) ^ k0) + (k1 ^ high))


@triton.jit
def kept(x, index, seed_ptr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr):
    """``x``, whose elements have the flat indices ``index``, after dropout."""
    if THRESHOLD > 0:
        k0, k1 = keys(seed_ptr)
        x = tl.where(bits(k0, k1, index) >= THRESHOLD, x * SCALE, 0.0)
    return x


def dropout_options(dropout_p: float) -> dict[str, float]:
    """Constants of a kernel: as arguments, Triton would round them to float32."""
    return {"THRESHOLD": _dropout.threshold(dropout_p), "SCALE": 1 / (1 - dropout_p) if dropout_p < 1 else 0.0}
