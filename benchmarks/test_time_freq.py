"""Statistics of the frames of many records: ours, NumPy and SciPy over all frames at once, and plain torch."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.fft
import scipy.stats
import torch

from hubert_ecg import ops
from hubert_ecg.ops import OPS
from hubert_ecg.testing import assert_close

NUM_TOKENS, NUM_FEATURES = 93, 16
NUM_RECORDS = {"cpu": 1000, "cuda": 50_000}


def by_scipy(x: np.ndarray) -> np.ndarray:
    """The sixteen statistics of each row, as one writes them in NumPy and SciPy, in the dtype of ``x``."""
    n = x.shape[-1]
    half = scipy.fft.rfft(x)
    half = (half.real**2 + half.imag**2) / n
    spectrum = np.concatenate([half, half[:, 1 : (n + 1) // 2]], -1)  # the mirror images, in any order
    low, high, mean, variance, power = x.min(-1), x.max(-1), x.mean(-1), x.var(-1), np.mean(x * x, -1)
    rms, peak = np.sqrt(power), np.maximum(high, -low)
    columns = [low, high, mean, rms, variance, np.sqrt(variance), power, peak, high - low, peak / (rms + 1e-9)]
    columns += [scipy.stats.skew(x, axis=-1), scipy.stats.kurtosis(x, axis=-1)]
    columns += [spectrum.max(-1), spectrum.sum(-1), spectrum.mean(-1), spectrum.var(-1)]
    return np.stack(columns, -1)


@pytest.mark.benchmark(group="time_freq")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("num_samples", [64, 32, 322], ids=lambda s: f"S{s}")
def test_time_freq(race, device, num_samples, dtype):
    num_records = NUM_RECORDS[device.type]
    random = torch.Generator(device).manual_seed(0)
    frames = torch.randn(num_records * NUM_TOKENS, num_samples, generator=random, device=device).to(dtype)
    reference, few = OPS["time_freq"].reference, frames[:500]
    rtol, atol = OPS["time_freq"].tolerance[dtype]
    exact = torch.from_numpy(by_scipy(few.cpu().double().numpy()))
    assert_close(ops.time_freq(few), exact, rtol=rtol, atol=atol, name="ours")
    assert_close(torch.from_numpy(by_scipy(few.cpu().numpy())), exact, rtol=10 * rtol, atol=10 * atol, name="SciPy")
    peers = {"torch, reference": lambda: reference(frames)}
    if device.type == "cpu":
        peers["NumPy and SciPy"] = lambda: by_scipy(frames.numpy())
    moved = frames.nbytes * (num_samples + NUM_FEATURES) // num_samples
    race(lambda: ops.time_freq(frames), peers, "records", num_records, moved=moved)
