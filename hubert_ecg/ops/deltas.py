"""Differences of features along the frames of a lead."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
import torch

from hubert_ecg.ops import deltas_reference as reference
from hubert_ecg.ops._op import Array, Op, as_floating, check_whole, describe, takes_arrays

_deltas = Op("deltas(Tensor x, Tensor? lengths=None, int window=5) -> Tensor", reference.deltas)


@takes_arrays("x")
def deltas(x: Array, lengths: Array | Sequence[int] | None = None, window: int = 5) -> Array:
    """The slope of each feature along the frames of its lead, by regression over ``window`` frames.

    ``out[f] = sum_k k (x[f + k] - x[f - k]) / (2 sum_k k^2)`` for ``k`` in ``1 .. (window - 1) / 2``, with the
    first and the last frame of a lead repeated beyond its ends: ``torchaudio.functional.compute_deltas`` lead by lead.

    >>> deltas(torch.tensor([[0.0], [1.0], [2.0], [9.0]]), lengths=[3, 1], window=3).flatten()
    tensor([0.5000, 1.0000, 0.5000, 0.0000])

    Args:
        x: features, [..., F, D] of any floating dtype. Half precision is computed in float32.
        lengths: frames of each lead, one lead after another along F; None takes all of F as one lead.
        window: frames that a slope is taken over; odd, at least 3.

    Returns:
        slopes, [..., F, D] float32, or float64 where ``x`` is.

    Raises:
        ValueError: a wrong shape or dtype, or lengths that do not add up to F.
    """
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(f"deltas: x must be floating point [..., F, D], got {describe(x)}")
    check_whole("deltas: window", window)
    if window < 3 or window % 2 == 0:
        raise ValueError(f"deltas: window must be odd and at least 3, got {window}")
    x = as_floating("deltas: x", x).detach()
    if lengths is None:
        return _deltas.call(x, None, window)
    # As numbers of Python: those of a tensor would break a compiled graph.
    given = lengths.tolist() if isinstance(lengths, torch.Tensor | np.ndarray) else lengths
    try:
        frames = [operator.index(length) for length in given]
    except TypeError:
        frames = [-1]
    if min(frames, default=0) < 0 or sum(frames) != x.shape[-2]:
        want = f"frames of each lead that add up to F = {x.shape[-2]}"
        raise ValueError(f"deltas: lengths must be {want}, got {given}")
    return _deltas.call(x, torch.tensor(frames, dtype=torch.int64, device=x.device), window)


@_deltas.fake
def _(x, lengths=None, window=5):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_deltas.native
def _(kernel, x, lengths=None, window=5):
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel():
        ends = torch.full((1,), x.shape[-2], device=x.device) if lengths is None else lengths.cumsum(0)
        shape = (-1, *x.shape[-2:])
        kernel(x.reshape(shape).contiguous(), ends, out.view(shape), window)
    return out
