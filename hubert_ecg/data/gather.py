"""Crops of many records at once, out of the shards of a store."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from hubert_ecg import native

#: ``gather(shard, offset, length, start, scale, out, num_threads)``, see :func:`gather_reference`.
Gather = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, int], None]


def open_shards(paths: Sequence[Path], sizes: Sequence[int], dtype: np.dtype) -> Gather:
    """Map shards for reading.

    Args:
        paths: Files of samples.
        sizes: Samples of each file.
        dtype: int16 or float16.

    Returns:
        :func:`gather_reference` on these shards, without any Python for each record where the native module is built.
        Threads may call it at the same time.

    Raises:
        ValueError: A file is of another size.
    """
    fast = native.map_shards([str(path) for path in paths], sizes, dtype == np.float16)
    if fast is None:
        maps = [np.memmap(path, dtype, mode="r", shape=(size,)) for path, size in zip(paths, sizes, strict=True)]
        return functools.partial(gather_reference, maps)
    gather = fast

    def run(*args: np.ndarray | int) -> None:
        gather(*(torch.from_numpy(arg) if isinstance(arg, np.ndarray) else arg for arg in args))

    return run


def gather_reference(
    shards: Sequence[np.ndarray],
    shard: np.ndarray,
    offset: np.ndarray,
    length: np.ndarray,
    start: np.ndarray,
    scale: np.ndarray,
    out: np.ndarray,
    num_threads: int = 1,
) -> None:
    """``out[b, l, t] = scale[b, l] * sample[start[b] + t]`` of lead l of record b, and zero after the record's end.

    Args:
        shards: Samples ``int16`` or ``float16`` of each shard; record after record, each ``[L, length]`` in row order.
        shard: Shard of each record, ``[B] int64``.
        offset: Samples before the record in its shard, ``[B] int64``.
        length: Samples of a lead of the record, ``[B] int64``.
        start: First sample that is wanted, ``[B] int64``.
        scale: What a stored sample is multiplied by, ``[B, L] float32``.
        out: Written, ``[B, L, T] float32``.
        num_threads: Threads that work on it.

    Raises:
        ValueError: A record does not lie within its shard, or a start not within its record; nothing was read then.
    """
    num_leads = out.shape[1]
    samples = np.array([len(values) for values in shards], dtype=np.int64)
    room = np.where((shard >= 0) & (shard < len(shards)), samples[np.clip(shard, 0, len(shards) - 1)], -1)
    outside = (offset < 0) | (offset > room) | (length < 0) | (length > (room - offset) // num_leads)
    for b in np.flatnonzero(outside):
        raise ValueError(
            f"gather: record {b} must lie within its shard, got shard {shard[b]} of {len(shards)}, "
            f"offset {offset[b]} and length {length[b]}"
        )
    for b in np.flatnonzero((start < 0) | (start > length)):
        raise ValueError(f"gather: start of record {b} must be 0 to {length[b]}, got {start[b]}")
    for row, s, first, n, t, factor in zip(out, shard, offset, length, start, scale, strict=True):
        record = shards[s][first : first + num_leads * n].reshape(num_leads, n)[:, t : t + out.shape[2]]
        row[:, : record.shape[1]] = record * factor[:, None]
        row[:, record.shape[1] :] = 0
