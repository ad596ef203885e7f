"""Features of 1,000 records at 100 Hz: ours against one Kaldi-style call for each frame."""

from __future__ import annotations

import math
import time

import pytest
import torch

from hubert_ecg import features

NUM_RECORDS = 1000
LEAST_RATIO = 50


@pytest.fixture(scope="module")
def ecg():
    return torch.randn(NUM_RECORDS, 12, 500, generator=torch.Generator().manual_seed(0))


def kaldi_call(frame):
    """13 coefficients of one frame of 64 samples at 100 Hz; tables are made in each call, as in torchaudio's."""
    window = torch.hann_window(64, periodic=False) ** 0.85
    mel_step = (1127 * math.log(1 + 50 / 700) - 1127 * math.log(1 + 20 / 700)) / 24
    left = 1127 * math.log(1 + 20 / 700) + torch.arange(23)[:, None] * mel_step
    mel = 1127 * (1 + 100 / 64 * torch.arange(32) / 700).log()
    bank = torch.minimum((mel - left) / mel_step, (left + 2 * mel_step - mel) / mel_step).clamp(min=0)
    cosines = torch.cos(math.pi / 23 * (torch.arange(23)[:, None] + 0.5) * torch.arange(13)) * math.sqrt(2 / 23)
    cosines[:, 0] = math.sqrt(1 / 23)
    lifter = 1 + 11 * torch.sin(math.pi * torch.arange(13) / 22)
    centred = frame - frame.mean()
    emphasised = (centred - 0.97 * torch.cat([centred[:1], centred[:-1]])) * window
    energies = bank @ torch.fft.rfft(emphasised)[:-1].abs().square()
    return energies.clamp(min=torch.finfo(torch.float32).eps).log() @ cosines * lifter


@pytest.mark.benchmark(group="extract")
def test_extract(benchmark, ecg):
    few = 10
    frames = ecg[:few, :, 2:-2].reshape(few, 93, 64)
    start = time.perf_counter()
    expected = torch.stack([torch.stack([kaldi_call(frame) for frame in record]) for record in frames])
    peer_s = (time.perf_counter() - start) * NUM_RECORDS / few
    ours = features.extract(ecg[:few], "mfcc", compat="published")
    torch.testing.assert_close(ours[..., :13], expected, rtol=0, atol=2e-3)

    assert benchmark.pedantic(features.extract, (ecg, "mfcc"), rounds=5, warmup_rounds=1).shape == (NUM_RECORDS, 93, 39)
    benchmark.extra_info["records"] = NUM_RECORDS
    if benchmark.stats is not None:
        ratio = peer_s / benchmark.stats.stats.median
        benchmark.extra_info["times_faster_than_one_call_per_frame"] = round(ratio, 1)
        assert ratio >= LEAST_RATIO


@pytest.mark.benchmark(group="extract")
@pytest.mark.parametrize("compat", ["corrected", "published"])
@pytest.mark.parametrize("feature_type", features.FEATURE_TYPES)
def test_every_type(benchmark, ecg, feature_type, compat):
    benchmark.pedantic(features.extract, (ecg, feature_type, compat), rounds=3, warmup_rounds=1)
    benchmark.extra_info["records"] = NUM_RECORDS
