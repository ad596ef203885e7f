"""The convolution that tells tokens where they are: grouped, with so many taps that a Fourier transform pays."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hubert_ecg.ops._op import Array, autocast_dtype, check_device, check_whole, describe, takes_arrays
from hubert_ecg.ops.linear import product_dtype


@takes_arrays("x", "weight", "bias")
def positional_conv(x: Array, weight: Array, bias: Array, groups: int, residual: bool = True) -> Array:
    """``x + gelu(conv(x))``, in each group of channels ``conv(x)[t] = bias + sum_j weight[:, :, j] x[t + j - k // 2]``.

    What is before the first token and after the last is zero. Plain differentiable PyTorch, in one of two forms:

    * direct, torch's convolution: on a GPU, where no form has been timed yet, and wherever it takes fewer operations;
    * by Fourier transforms that are matrix products over the shortest period that keeps tokens apart: on a CPU, at 93
      tokens and 128 taps from two records on. They run in float32 where x is of half precision, as the direct form does
      on a CPU that only emulates products of it.

    On a CPU, products of blocks of a Toeplitz matrix (polyphase) were slower than either; products of overlapping rows
    have rows closer than they are long, which BLAS refuses and torch would copy.

    Args:
        x: [B, T, D] floating point.
        weight: [D, D / groups, k].
        bias: [D].
        groups: of channels, each convolved by itself.
        residual: whether x is added.

    Returns:
        [B, T, D] of the dtype of x.

    Raises:
        ValueError: a wrong shape, named with what was given.
    """
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"positional_conv: x must be floating point [B, T, D], got {describe(x)}")
    width = x.shape[2]
    check_whole("positional_conv: groups", groups)
    if groups < 1 or width % groups:
        raise ValueError(f"positional_conv: groups must divide {width}, got {groups}")
    fits = weight.ndim == 3 and weight.shape[:2] == (width, width // groups) and weight.shape[2]
    if not fits or not weight.is_floating_point():
        want = f"floating point [{width}, {width // groups}, k]"
        raise ValueError(f"positional_conv: weight must be {want}, got {describe(weight)}")
    if bias.shape != (width,) or not bias.is_floating_point():
        raise ValueError(f"positional_conv: bias must be floating point [{width}], got {describe(bias)}")
    check_device("positional_conv", x, weight=weight, bias=bias)
    dtype = autocast_dtype(x) or x.dtype
    if _fourier_pays(x, weight):
        y = _by_fourier(x, weight, bias)
    elif product_dtype(x.device, dtype) != dtype:
        y = _in_float32(_direct, x, weight, bias)
    else:
        y = _direct(x, weight, bias)
    y = F.gelu(y).to(x.dtype)
    return x + y if residual else y


def _in_float32(form: Callable[[Tensor, Tensor, Tensor], Tensor], *given: Tensor) -> Tensor:
    """``form`` of the given in float32 at least, whatever autocast says."""
    with torch.autocast(given[0].device.type, enabled=False):
        return form(*(part.to(torch.promote_types(part.dtype, torch.float32)) for part in given))


def _fourier_pays(x: Tensor, weight: Tensor) -> bool:
    if x.device.type != "cpu" or not x.numel():
        return False
    per_tap = x.shape[0] * x.shape[1] * weight.shape[1]
    period = _period(x.shape[1], weight.shape[2])
    by_fourier = period * (weight.shape[1] * weight.shape[2] + x.shape[0] * (2 * x.shape[1] + 2 * weight.shape[1]))
    return by_fourier < per_tap * weight.shape[2]


def _period(tokens: int, taps: int) -> int:
    """The shortest period for which nothing that wraps around reaches a token."""
    return tokens + max(taps // 2, taps - 1 - taps // 2)


def _direct(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    groups, taps = x.shape[2] // weight.shape[1], weight.shape[2]
    y = F.conv1d(x.transpose(1, 2), weight, bias, padding=taps // 2, groups=groups)
    # An even number of taps gives one output too many: the last one goes.
    return y[..., : x.shape[1]].transpose(1, 2)


def _by_fourier(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # Fourier coefficients in half precision would spread the rounding of the largest token over all of them.
    return _in_float32(_spectral, x, weight, bias)


def _spectral(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    batch, tokens, width = x.shape
    per_group, taps = weight.shape[1:]
    groups, period = width // per_group, _period(tokens, taps)
    bins = period // 2 + 1
    # Frequency and group side by side, so that every product below is over whole blocks of memory.
    rows = x.unflatten(2, (groups, per_group)).permute(1, 2, 0, 3).reshape(tokens, -1)
    x_cos, x_sin = (_basis(bins, period, 0, tokens, x) @ rows).view(2, bins * groups, batch, per_group)
    w_cos, w_sin = (_basis(bins, period, 0, taps, x) @ weight.reshape(-1, taps).T).view(
        2, bins * groups, per_group, per_group
    )
    # (x_cos - i x_sin) times the conjugate of (w_cos - i w_sin).
    real = torch.baddbmm(x_cos @ w_cos.mT, x_sin, w_sin.mT)
    imaginary = torch.baddbmm(x_sin @ w_cos.mT, x_cos, w_sin.mT, beta=-1)
    # Every frequency stands for its mirror image, too, but for the first and, of an even period, the last.
    share = torch.full((bins, 1), 2 / period, dtype=torch.float64)
    share[0] = 1 / period
    if period % 2 == 0:
        share[-1] = 1 / period
    back = _basis(bins, period, -(taps // 2), tokens, x, share)
    spectrum = torch.cat([real.view(bins, -1), -imaginary.view(bins, -1)])
    y = (back.T @ spectrum).view(tokens, groups, batch, per_group)
    return y.permute(2, 0, 1, 3).reshape(batch, tokens, width) + bias


def _basis(bins: int, period: int, start: int, count: int, like: Tensor, share: Tensor | float = 1.0) -> Tensor:
    """``[2 bins, count]``: cosines, then sines, of ``2 pi f t / period`` for t from ``start`` on, times ``share``."""
    turns = torch.arange(bins)[:, None] * torch.arange(start, start + count) % period
    angle = turns.double() * (2 * math.pi / period)
    return torch.cat([angle.cos() * share, angle.sin() * share]).to(like)
