"""Kaldi's mel-frequency cepstral coefficients in plain PyTorch, and the tables that every backend of the op reads."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

PREEMPHASIS = 0.97
LIFTER = 22.0
# Kaldi floors mel energies at the epsilon of float32, whatever the dtype.
ENERGY_FLOOR = torch.finfo(torch.float32).eps


def mfcc(
    frames: Tensor,
    sample_rate_hz: float = 100.0,
    low_hz: float = 20.0,
    high_hz: float = 0.0,
    num_mel: int = 23,
    num_mfcc: int = 13,
) -> Tensor:
    S = frames.shape[-1]
    if not frames.numel():  # some builds of torch.fft refuse an empty batch
        return frames.new_empty(*frames.shape[:-1], num_mfcc)
    # In float32, a smooth frame whose filters hold a millionth of its energy has no third digit.
    dtype, frames = frames.dtype, frames.double()
    window, bank, dct = tables(S, sample_rate_hz, low_hz, high_hz, num_mel, num_mfcc, frames.dtype, frames.device)
    # The mean is formed less the first sample, so that a constant frame is exactly zero at any level. Pre-emphasis is
    # written as a difference of neighbours, small and exact in a smooth signal: it rounds the result, not the samples.
    mean = frames[..., :1] + (frames - frames[..., :1]).mean(-1, keepdim=True)
    before = torch.cat([frames[..., :1], frames[..., :-1]], -1)
    emphasised = (frames - before) + (1 - PREEMPHASIS) * (before - mean)
    spectrum = torch.fft.rfft(emphasised * window, 2 * bank.shape[1])[..., :-1]
    energies = (spectrum.real**2 + spectrum.imag**2) @ bank.T
    return (torch.where(energies < ENERGY_FLOOR, ENERGY_FLOOR, energies).log() @ dct).to(dtype)


@functools.lru_cache(maxsize=64)
def tables(
    num_samples: int,
    sample_rate_hz: float,
    low_hz: float,
    high_hz: float,
    num_mel: int,
    num_mfcc: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Window [S], mel filters [M, N / 2] over the bins of a transform of N >= S samples, cosines times lifter [M, C].

    The filters and the cosines are float32 numbers, operation by operation those of torchaudio: filters built in
    float64 move coefficients by more than 1e-3.
    """
    window = torch.hann_window(num_samples, periodic=False, dtype=torch.float64).pow(0.85)

    padded = 1 << (num_samples - 1).bit_length()
    high_hz = high_hz if high_hz > 0 else sample_rate_hz / 2 + high_hz
    low_mel, high_mel = (1127.0 * math.log(1.0 + hz / 700.0) for hz in (low_hz, high_hz))
    edges = low_mel + torch.arange(num_mel + 2.0, dtype=torch.float32)[:, None] * ((high_mel - low_mel) / (num_mel + 1))
    hz = sample_rate_hz / padded * torch.arange(padded // 2, dtype=torch.float32)
    mel = 1127.0 * (1.0 + hz / 700.0).log()
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    bank = torch.minimum((mel - left) / (centre - left), (right - mel) / (right - centre)).clamp(min=0)

    m, c = torch.arange(num_mel, dtype=torch.float32)[:, None], torch.arange(num_mfcc, dtype=torch.float32)
    dct = torch.cos(math.pi / num_mel * (m + 0.5) * c) * math.sqrt(2.0 / num_mel)
    dct[:, 0] = math.sqrt(1.0 / num_mel)
    lifter = 1.0 + LIFTER / 2 * torch.sin(math.pi * c / LIFTER)

    return window.to(device, dtype), bank.to(device, dtype), (dct.double() * lifter.double()).to(device, dtype)


def mfcc_samples(device: str) -> Iterator[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(0)
    for shape in [
        (93, 64),
        (1, 32),
        (5, 322),
        (0, 64),
        (3, 0, 64),
        (2, 3, 33),
        (64,),
        (17, 65),
        (19, 3),
        (7, 2),
        (2, 1000),
    ]:
        yield (torch.randn(shape, generator=random).to(device),)
    time = torch.arange(93 * 64) / 100
    beat = 1.2 * torch.exp(-(((time % 0.8) - 0.4) ** 2) / 2e-4) + 0.2 * torch.sin(2 * math.pi * 1.25 * time)
    ecg = (beat + 0.02 * torch.randn(len(time), generator=random)).reshape(93, 64).to(device)
    yield (ecg,)
    yield ecg, 100.0, 0.5, 50.0
    yield ecg, 100.0, 0.0, -5.0, 12, 12
    yield ecg, 50.0, 20.0, 0.0  # 17 of 23 filters are empty
    yield ecg.reshape(-1, 32), 100.0, 1.0, 40.0, 40, 20
    yield torch.randn(9, 322, generator=random).to(device), 500.0, 0.5, 150.0, 30, 13
    # Constant frames at any level, a frame far from zero, and frames with a value that is none.
    level = torch.tensor([0.0, 0.1, -1.0, 1000.0, 1e-20])[:, None]
    yield (level.expand(5, 64).to(device),)
    yield (level.expand(5, 322).to(device),)
    yield (ecg + 64,)
    broken = torch.randn(20, 64, generator=random)
    broken[3, 5], broken[7, 0], broken[8, 20] = torch.nan, torch.nan, torch.inf
    yield (broken.to(device),)


mfcc_tolerance = {torch.float32: (1e-4, 1e-3), torch.float64: (1e-9, 1e-9)}


def mfcc_errors() -> Iterator[tuple[tuple[Any, ...], str]]:
    x = torch.zeros(4, 64)
    yield (x.long(),), r"mfcc: frames must be floating point \[\.\.\., S\] with S >= 2, got int64\[4, 64\]"
    yield (x[:, :1],), r"mfcc: frames must be .*S >= 2, got float32\[4, 1\]"
    yield (torch.tensor(1.0),), r"mfcc: frames must be .*, got float32\[\]"
    yield (x.to(torch.complex64),), r"mfcc: frames must be floating point .*, got complex64\[4, 64\]"
    yield ([1.0, 2.0],), r"mfcc: frames must be a NumPy, CuPy or torch array, got list"
    for rate in (0, -100.0, math.nan, math.inf):
        yield (x, rate), rf"mfcc: sample_rate_hz must be positive and finite, got {rate}"
    yield (x, 100, 50), r"mfcc: low_hz must be in \[0, 50\).*, got 50"
    yield (x, 100, -1), r"mfcc: low_hz must be in \[0, 50\).*, got -1"
    yield (x, 100, math.nan), r"mfcc: low_hz must be in \[0, 50\).*, got nan"
    yield (x, 100, 20, math.nan), r"mfcc: high_hz must be above low_hz .*, got nan"
    yield (
        (x, 100, 20, 51),
        r"mfcc: high_hz must be above low_hz \(20 Hz\) and at most half the sampling rate \(50 Hz\).*, got 51",
    )
    yield (x, 100, 20, 20), r"mfcc: high_hz must be above low_hz .*, got 20"
    yield (x, 100, 20, -40), r"mfcc: high_hz must be above low_hz .*, got -40"
    yield (None,), r"mfcc: frames must be a NumPy, CuPy or torch array, got None"
    yield (x, "100"), r"mfcc: sample_rate_hz must be a number, got '100'"
    yield (x, 100, None), r"mfcc: low_hz must be a number, got None"
    yield (x, 100, 20, True), r"mfcc: high_hz must be a number, got True"
    yield (x, 100, 20, 0, 23.0), r"mfcc: num_mel must be a whole number, got 23\.0"
    yield (x, 100, 20, 0, 23, "13"), r"mfcc: num_mfcc must be a whole number, got '13'"
    yield (x, 100, 20, 0, 3), r"mfcc: num_mel must be at least 4, got 3"
    yield (x, 100, 20, 0, 23, 24), r"mfcc: num_mfcc must be in 1 \.\. num_mel \(23\), got 24"
