"""MFCC of many records: ours, Kaldi's definition in torchaudio and C++, librosa, plain torch, and a memory copy."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from hubert_ecg import ops
from hubert_ecg.ops import OPS, mfcc_reference
from hubert_ecg.testing import assert_close, torchaudio_mfcc

NUM_TOKENS, NUM_MFCC = 93, 13
NUM_RECORDS = {"cpu": 1000, "cuda": 50_000}
# Samples in a frame and Hz: the three rates that models run at.
SHAPES = [(64, 100.0), (32, 50.0), (322, 500.0)]


def frames_of(num_samples: int, dtype: torch.dtype, num_records: int, device: torch.device) -> torch.Tensor:
    random = torch.Generator(device).manual_seed(0)
    return torch.randn(num_records * NUM_TOKENS, num_samples, generator=random, device=device).to(dtype)


def matrix_form(num_samples: int, sample_rate_hz: float, dtype: torch.dtype, device: torch.device):
    """Mean, pre-emphasis, window and transform as one matrix: three products and a logarithm."""
    window, bank, dct = mfcc_reference.tables(num_samples, sample_rate_hz, 20.0, 0.0, 23, NUM_MFCC, dtype, device)
    bins = bank.shape[1]
    centred = torch.eye(num_samples, dtype=torch.float64, device=device) - 1 / num_samples
    before = torch.cat([centred[:, :1], centred[:, :-1]], 1)
    spectrum = torch.fft.rfft((centred - 0.97 * before) * window.double(), 2 * bins)[:, :bins]
    front = torch.cat([spectrum.real, spectrum.imag], 1).to(dtype)
    floor = mfcc_reference.ENERGY_FLOOR

    def run(frames: torch.Tensor) -> torch.Tensor:
        parts = (frames @ front).square_()
        return ((parts[:, :bins] + parts[:, bins:]) @ bank.T).clamp_(min=floor).log_() @ dct

    return run


def kaldi_native(fbank, frames: torch.Tensor, sample_rate_hz: float) -> np.ndarray:
    options = fbank.MfccOptions()
    options.frame_opts.samp_freq, options.frame_opts.dither = sample_rate_hz, 0.0
    length_ms = (frames.shape[-1] + 0.01) / sample_rate_hz * 1000
    options.frame_opts.frame_length_ms = options.frame_opts.frame_shift_ms = length_ms
    options.use_energy, options.num_ceps = False, NUM_MFCC
    mfcc = fbank.OnlineMfcc(options)
    mfcc.accept_waveform(sample_rate_hz, frames.numpy().reshape(-1))
    mfcc.input_finished()
    return np.stack([mfcc.get_frame(i) for i in range(mfcc.num_frames_ready)])


def librosa_mfcc(librosa, frames: torch.Tensor, sample_rate_hz: float) -> np.ndarray:
    """The same sizes by another definition: decibels, triangles in Hz, no mean removal and no pre-emphasis."""
    n = frames.shape[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that some filters are empty
        return librosa.feature.mfcc(
            y=frames.numpy().reshape(-1),
            sr=sample_rate_hz,
            n_mfcc=NUM_MFCC,
            lifter=22,
            n_fft=1 << (n - 1).bit_length(),
            win_length=n,
            hop_length=n,
            center=False,
            n_mels=23,
            fmin=20,
            htk=True,
        ).T


@pytest.mark.benchmark(group="mfcc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("num_samples", "sample_rate_hz"), SHAPES, ids=[f"S{s}" for s, _ in SHAPES])
def test_mfcc(race, peer, torchaudio, device, num_samples, sample_rate_hz, dtype):
    num_records = NUM_RECORDS[device.type]
    frames = frames_of(num_samples, dtype, num_records, device)
    product, copied = matrix_form(num_samples, sample_rate_hz, dtype, device), torch.empty_like(frames)
    peers = {
        "torchaudio, one batched call": lambda: torchaudio_mfcc(torchaudio.kaldi, frames, sample_rate_hz),
        "torch, matrix form": lambda: product(frames),
        "torch, reference": lambda: OPS["mfcc"].reference(frames, sample_rate_hz),
        "a memory copy of the frames": lambda: copied.copy_(frames),
    }
    few = frames[:500]
    exact = torchaudio_mfcc(torchaudio.kaldi, few.double(), sample_rate_hz)
    atol = 1e-6 if dtype == torch.float64 else 1e-3
    assert_close(ops.mfcc(few, sample_rate_hz), exact, rtol=0, atol=atol, name="ours")
    assert_close(product(few), exact, rtol=0, atol=10 * atol, name="matrix form")
    # The others take no float64, no empty filters and no GPU.
    if dtype == torch.float32 and num_samples == 64 and device.type == "cpu":

        def kaldi(fbank):
            found = torch.from_numpy(kaldi_native(fbank, few, sample_rate_hz))
            # It builds its filters in float32 in another order of operations, which an almost empty one shows most.
            assert (found - exact).abs().median() < 1e-3
            return lambda: kaldi_native(fbank, frames, sample_rate_hz)

        def in_librosa(librosa):
            assert librosa_mfcc(librosa, few, sample_rate_hz).shape == exact.shape
            return lambda: librosa_mfcc(librosa, frames, sample_rate_hz)

        peers["kaldi-native-fbank"] = peer("kaldi-native-fbank", kaldi)
        peers["librosa, another definition"] = peer("librosa", in_librosa)
    moved = frames.nbytes * (num_samples + NUM_MFCC) // num_samples
    race(lambda: ops.mfcc(frames, sample_rate_hz), peers, "records", num_records, moved=moved)


@pytest.mark.benchmark(group="mfcc, batch")
@pytest.mark.parametrize("num_records", [1, 4, 16, 64, 256, 1024, 4096])
def test_mfcc_batch(race, torchaudio, device, num_records):
    frames = frames_of(64, torch.float32, num_records, device)
    product = matrix_form(64, 100.0, torch.float32, device)
    exact = torchaudio_mfcc(torchaudio.kaldi, frames[-93:].double())
    assert_close(ops.mfcc(frames)[-93:], exact, rtol=0, atol=1e-3, name="ours")
    peers = {
        "torchaudio, one batched call": lambda: torchaudio_mfcc(torchaudio.kaldi, frames),
        "torch, matrix form": lambda: product(frames),
    }
    curve = ("MFCC against records in a batch", num_records)
    race(lambda: ops.mfcc(frames), peers, "records", num_records, curve=curve)


@pytest.mark.benchmark(group="mfcc")
def test_mfcc_smooth(race, torchaudio, device):
    """Slow waves, whose filters hold so little that every frame is computed again in float64."""
    num_records = NUM_RECORDS[device.type]
    random = torch.Generator(device).manual_seed(0)
    hz = 0.2 + 3 * torch.rand(num_records * NUM_TOKENS, 1, generator=random, device=device, dtype=torch.float64)
    frames = torch.sin(2 * torch.pi * hz * torch.arange(64, device=device) / 100).float()
    few = frames[:500]
    exact = torchaudio_mfcc(torchaudio.kaldi, few.double())
    assert_close(ops.mfcc(few), exact, rtol=0, atol=1e-3, name="ours")
    peers = {
        "torchaudio float64, as exact": lambda: torchaudio_mfcc(torchaudio.kaldi, frames.double()),
        "torchaudio float32": lambda: torchaudio_mfcc(torchaudio.kaldi, frames),
    }
    race(lambda: ops.mfcc(frames), peers, "records", num_records)
