"""MFCC of 1,000 records: ours, one batched torchaudio call, the matrix form and the reference in plain torch."""

from __future__ import annotations

import pytest
import torch

from hubert_ecg import ops
from hubert_ecg.ops import OPS, mfcc_reference
from hubert_ecg.testing import assert_close, torchaudio_mfcc

NUM_RECORDS, NUM_TOKENS = 1000, 93
# Samples in a frame and Hz: the three rates that models run at.
SHAPES = [(64, 100.0), (32, 50.0), (322, 500.0)]


def frames_of(num_samples: int, dtype: torch.dtype) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randn(NUM_RECORDS * NUM_TOKENS, num_samples, generator=random).to(dtype)


def matrix_form(num_samples: int, sample_rate_hz: float, dtype: torch.dtype):
    """Mean, pre-emphasis, window and transform as one matrix: three products and a logarithm."""
    place = (dtype, torch.device("cpu"))
    window, bank, dct = mfcc_reference.tables(num_samples, sample_rate_hz, 20.0, 0.0, 23, 13, *place)
    bins = bank.shape[1]
    centred = torch.eye(num_samples, dtype=torch.float64) - 1 / num_samples
    before = torch.cat([centred[:, :1], centred[:, :-1]], 1)
    spectrum = torch.fft.rfft((centred - 0.97 * before) * window.double(), 2 * bins)[:, :bins]
    front = torch.cat([spectrum.real, spectrum.imag], 1).to(dtype)
    floor = mfcc_reference.ENERGY_FLOOR

    def run(frames: torch.Tensor) -> torch.Tensor:
        parts = (frames @ front).square_()
        return ((parts[:, :bins] + parts[:, bins:]) @ bank.T).clamp_(min=floor).log_() @ dct

    return run


@pytest.mark.benchmark(group="mfcc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("num_samples", "sample_rate_hz"), SHAPES, ids=[f"S{s}" for s, _ in SHAPES])
def test_mfcc(race, torchaudio, num_samples, sample_rate_hz, dtype):
    frames = frames_of(num_samples, dtype)
    product = matrix_form(num_samples, sample_rate_hz, dtype)
    peers = {
        "torchaudio, one batched call": lambda: torchaudio_mfcc(torchaudio.kaldi, frames, sample_rate_hz),
        "torch, matrix form": lambda: product(frames),
        "torch, reference": lambda: OPS["mfcc"].reference(frames, sample_rate_hz),
    }
    few = frames[:500]
    exact = torchaudio_mfcc(torchaudio.kaldi, few.double(), sample_rate_hz)
    atol = 1e-6 if dtype == torch.float64 else 1e-3
    assert_close(ops.mfcc(few, sample_rate_hz), exact, rtol=0, atol=atol, name="ours")
    assert_close(product(few), exact, rtol=0, atol=10 * atol, name="matrix form")

    race(lambda: ops.mfcc(frames, sample_rate_hz), peers, "records", NUM_RECORDS, rounds=11 if num_samples <= 64 else 3)
