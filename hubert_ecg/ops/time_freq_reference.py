"""Statistics of a frame in time and frequency, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# A frame whose standard deviation is at most this share of its peak is flat, as for SciPy: what varies is rounding.
FLAT = {torch.float32: 1e-6, torch.float64: 1e-15}
CREST_EPSILON = 1e-9


def time_freq(frames: Tensor) -> Tensor:
    S = frames.shape[-1]
    if not frames.numel():  # some builds of torch.fft refuse an empty batch
        return frames.new_empty(*frames.shape[:-1], 16)
    low, high = frames.amin(-1), frames.amax(-1)
    # Less the first sample before less the mean: a constant frame then has no variance at any level.
    centred = frames - frames[..., :1]
    offset = centred.mean(-1, keepdim=True)
    mean = frames[..., 0] + offset[..., 0]
    centred = centred - offset
    # In units of the farthest sample's distance, powers up to the fourth neither vanish nor overflow.
    farthest = centred.abs().amax(-1, keepdim=True)
    scale = torch.where(farthest >= torch.finfo(frames.dtype).tiny, 1 / farthest, 1)
    scaled = centred * scale
    scaled_variance = scaled.square().mean(-1)
    power, std = frames.square().mean(-1), scaled_variance.sqrt() / scale[..., 0]
    rms, variance = power.sqrt(), std.square()
    peak = torch.maximum(high, -low)
    flat = std <= FLAT[frames.dtype] * peak
    skewness = torch.where(flat, 0, scaled.pow(3).mean(-1) / scaled_variance.pow(1.5))
    kurtosis = torch.where(flat, 0, scaled.pow(4).mean(-1) / scaled_variance.square() - 3)

    half = torch.fft.rfft(centred)
    half = (half.real.square() + half.imag.square()) / S
    half[..., 0] = S * mean.square()
    # Every bin but the first, and the middle one of an even number, has a mirror image of the same power.
    spectrum = torch.cat([half, half[..., 1 : (S + 1) // 2].flip(-1)], -1)
    features = [low, high, mean, rms, variance, std, power, peak, high - low, peak / (rms + CREST_EPSILON)]
    features += [skewness, kurtosis, spectrum.amax(-1), spectrum.sum(-1), spectrum.mean(-1)]
    features += [spectrum.var(-1, correction=0)]
    finite = frames.isfinite().all(-1, keepdim=True)
    return torch.where(finite, torch.stack(features, -1), torch.nan)


def time_freq_samples(device: str) -> Iterator[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(0)
    for shape in [
        (93, 64),
        (1, 32),
        (5, 322),
        (0, 64),
        (3, 0, 64),
        (2, 3, 33),
        (64,),
        (17, 45),
        (19, 3),
        (7, 2),
        (5, 1),
        (2, 320),
    ]:
        yield (torch.randn(shape, generator=random).to(device),)
    for num_samples in (64, 63, 322):
        # Flat at several levels, and a flat frame with one spike.
        flat = torch.tensor([0.0, 0.1, -1.0, 1000.0, 1e-20])[:, None].repeat(1, num_samples)
        spike = flat.clone()
        spike[:, 3] += 1
        yield (torch.cat([flat, spike]).to(device),)
    yield ((5 + torch.randn(40, 64, generator=random)).to(device),)
    yield (torch.rand(40, 64, generator=random).pow(8).to(device),)
    broken = torch.randn(20, 64, generator=random)
    broken[3, 5], broken[7, 0], broken[8, 20], broken[9, 63] = torch.nan, torch.nan, torch.inf, -torch.inf
    yield (broken.to(device),)
    yield (broken[:, :63].to(device),)


time_freq_tolerance = {torch.float32: (2e-5, 2e-5), torch.float64: (1e-12, 1e-12)}


def time_freq_errors() -> Iterator[tuple[tuple[Any, ...], str]]:
    x = torch.zeros(4, 64)
    yield (x.long(),), r"time_freq: frames must be floating point \[\.\.\., S\] with S >= 1, got int64\[4, 64\]"
    yield (x[:, :0],), r"time_freq: frames must be .*S >= 1, got float32\[4, 0\]"
    yield (torch.tensor(1.0),), r"time_freq: frames must be .*, got float32\[\]"
    yield (x.bool(),), r"time_freq: frames must be .*, got bool\[4, 64\]"
    yield (None,), r"time_freq: frames must be a NumPy, CuPy or torch array, got None"
    yield ([1.0, 2.0],), r"time_freq: frames must be a NumPy, CuPy or torch array, got list"
