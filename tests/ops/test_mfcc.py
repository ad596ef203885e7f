"""Coefficients are Kaldi's: as stored from torchaudio, and as torchaudio and kaldi-native-fbank give them here.

The stored ones are made by running this file: pip install --no-deps torchaudio && python tests/ops/test_mfcc.py
"""

from __future__ import annotations

import json
import math
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

from hubert_ecg import ops
from hubert_ecg.ops import mfcc_reference, use_backend
from hubert_ecg.testing import assert_close, torchaudio_mfcc, torchaudio_parts

BACKENDS = ["native", "reference"]
GOLDEN = Path(__file__).with_name("mfcc_golden.json")
# S, then the arguments of ops.mfcc after the frames.
CASES = [
    (64, 100.0, 20.0, 0.0, 23, 13),
    (64, 100.0, 0.5, 50.0, 23, 13),
    (32, 50.0, 20.0, 0.0, 23, 13),
    (322, 500.0, 20.0, -50.0, 26, 20),
    (33, 100.0, 1.0, 40.0, 12, 12),
]


def golden_frames(num_samples):
    """Three frames [3, S] float64 of float32 numbers: a rough wave, a spike on a slope, a constant."""
    i = torch.arange(num_samples, dtype=torch.float64)
    frames = torch.stack([torch.sin(0.37 * i) + (7919 * i % 101) / 101, 0.01 * i + 2.0 * (i == 7), 0 * i + 0.7])
    return frames.float().double()


def write_golden():
    kaldi, rows = torchaudio_parts().kaldi, []
    for num_samples, rate, low, high, num_mel, num_mfcc in CASES:
        options = {"low_freq": low, "high_freq": high, "num_mel_bins": num_mel, "num_ceps": num_mfcc}
        rows.append(torchaudio_mfcc(kaldi, golden_frames(num_samples), rate, **options).tolist())
    golden = {"made_by": f"torchaudio {version('torchaudio')}, float64", "coefficients": rows}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


@pytest.fixture(scope="module")
def kaldi():
    try:
        return torchaudio_parts().kaldi
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", range(len(CASES)), ids=[str(case) for case in CASES])
def test_equals_stored_coefficients_of_torchaudio(case, backend):
    num_samples, *options = CASES[case]
    want = torch.tensor(json.loads(GOLDEN.read_text())["coefficients"][case], dtype=torch.float64)
    frames = golden_frames(num_samples)
    with use_backend(backend):
        assert_close(ops.mfcc(frames, *options), want, rtol=0, atol=1e-6, name="float64")
        assert_close(ops.mfcc(frames.float(), *options), want, rtol=0, atol=1e-3, name="float32")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_samples", [2, 3, 31, 32, 33, 64, 65, 100, 322, 1000])
@pytest.mark.parametrize("band", [(20.0, 0.0), (0.5, 50.0), (0.0, -3.0)], ids=str)
def test_equals_torchaudio(kaldi, num_samples, band, backend):
    frames = torch.randn(40, num_samples, dtype=torch.float64, generator=torch.Generator().manual_seed(num_samples))
    want = torchaudio_mfcc(kaldi, frames, low_freq=band[0], high_freq=band[1])
    with use_backend(backend):
        assert_close(ops.mfcc(frames, 100, *band), want, rtol=0, atol=1e-6, name="float64")
        assert_close(ops.mfcc(frames.float(), 100, *band), want, rtol=0, atol=1e-3, name="float32")


def smooth_frames(num_samples):
    """Frames [400, S] float32 with next to nothing where the filters are: slow waves, ramps, single beats."""
    random = torch.Generator().manual_seed(num_samples)
    t = torch.arange(num_samples, dtype=torch.float64) / 100

    def draw(low, high):
        return low + (high - low) * torch.rand(100, 1, generator=random, dtype=torch.float64)

    waves = torch.sin(draw(0.1, 20) * t + draw(0, 6))
    ramps = draw(-1, 1) * t + draw(-1, 1) * t**2
    beats = torch.exp(-(((t - draw(0, num_samples / 100)) / draw(0.02, 0.2)) ** 2))
    smooth = torch.cat([waves, ramps, beats, waves + beats])
    return smooth.float()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_samples", [32, 64, 101, 322])
@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 1e3, 1e12, 1e30])
def test_smooth_frames_and_any_unit_keep_their_digits_in_float32(kaldi, num_samples, scale, backend):
    frames = smooth_frames(num_samples) * scale
    for low_hz in (0.5, 20.0):
        want = torchaudio_mfcc(kaldi, frames.double(), low_freq=low_hz)
        with use_backend(backend):
            assert_close(ops.mfcc(frames, 100, low_hz), want, rtol=0, atol=1e-3, name="float32")
            assert_close(ops.mfcc(frames.double(), 100, low_hz), want, rtol=0, atol=1e-6, name="float64")


def test_equals_kaldi_native_fbank():
    fbank = pytest.importorskip("kaldi_native_fbank")
    options = fbank.MfccOptions()
    options.frame_opts.samp_freq, options.frame_opts.dither = 100.0, 0.0
    options.frame_opts.frame_length_ms = options.frame_opts.frame_shift_ms = 640.1
    options.use_energy, options.mel_opts.low_freq, options.num_ceps = False, 0.5, 13
    frames = torch.randn(30, 64, generator=torch.Generator().manual_seed(0))
    for frame, got in zip(frames, ops.mfcc(frames, 100, 0.5), strict=True):
        mfcc = fbank.OnlineMfcc(options)
        mfcc.accept_waveform(100.0, frame.tolist())
        mfcc.input_finished()
        # It builds its filters in float32 in another order of operations.
        np.testing.assert_allclose(mfcc.get_frame(0), got, atol=5e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("num_samples", [32, 33, 64, 322])
def test_a_constant_frame_is_the_floor_at_any_level(num_samples, dtype, backend):
    levels = torch.tensor([0.0, 1e-30, 0.1, -3.7, 1e6], dtype=dtype)
    with use_backend(backend):
        got = ops.mfcc(levels[:, None].expand(5, num_samples), 500)
    assert_close(got[:, 0], torch.full((5,), -76.45698, dtype=dtype), rtol=0, atol=1e-4, name="c0")
    assert_close(got[:, 1:], torch.zeros(5, 12, dtype=dtype), rtol=0, atol=2e-4, name="c1 ..")


@pytest.mark.parametrize("num_samples", [32, 64, 322])
@pytest.mark.parametrize("level", [100.0, 1e3, 1e4])
def test_float32_keeps_its_digits_at_any_level(num_samples, level):
    """What float32 stores of a frame far from zero is coarse, but all of it is used."""
    random = torch.Generator().manual_seed(0)
    frames = smooth_frames(num_samples) + 0.01 * torch.randn(1, num_samples, generator=random) + level
    for low_hz in (0.5, 20.0):
        want = ops.mfcc(frames.double(), 100, low_hz)
        assert_close(ops.mfcc(frames, 100, low_hz), want, rtol=0, atol=1e-3, name="float32")


@pytest.mark.parametrize("num_samples", [32, 64, 320, 322])
def test_tones_in_a_little_noise_keep_their_digits_in_float32(num_samples):
    random = torch.Generator().manual_seed(0)
    hz, phase, noise = (torch.rand(12000, 1, dtype=torch.float64, generator=random) for _ in range(3))
    tones = torch.sin(2 * torch.pi * (50 * hz * torch.arange(num_samples) / 100 + phase))
    waves = torch.randn(12000, num_samples, dtype=torch.float64, generator=random)
    frames = (tones + 10 ** (4 * noise - 5) * waves).float()
    for low_hz in (0.5, 20.0):
        want = ops.mfcc(frames.double(), 100, low_hz)
        assert_close(ops.mfcc(frames, 100, low_hz), want, rtol=0, atol=1e-3, name="float32")


def test_does_not_see_the_base_line():
    frames = torch.randn(50, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_close(ops.mfcc(frames + 1e3), ops.mfcc(frames), rtol=0, atol=1e-8, name="base line")


def test_a_frame_does_not_depend_on_its_neighbours():
    frames = torch.randn(67, 64, generator=torch.Generator().manual_seed(2))
    alone = torch.cat([ops.mfcc(frame[None]) for frame in frames])
    assert_close(ops.mfcc(frames), alone, rtol=0, atol=0, name="frames")
    frames[5] = torch.nan
    got = ops.mfcc(frames)
    assert got[5].isnan().all()
    assert_close(got[torch.arange(67) != 5], alone[torch.arange(67) != 5], rtol=0, atol=0, name="neighbours of NaN")


def test_counts_empty_filters():
    _, bank, _ = mfcc_reference.tables(32, 50.0, 20.0, 0.0, 23, 13, torch.float64, torch.device("cpu"))
    assert int((bank.sum(1) == 0).sum()) == 17
    _, bank, _ = mfcc_reference.tables(64, 100.0, 0.5, 50.0, 23, 13, torch.float64, torch.device("cpu"))
    assert int((bank.sum(1) == 0).sum()) == 0


if __name__ == "__main__":
    write_golden()


@pytest.mark.parametrize("backend", list(ops.OPS["mfcc"].backends["cpu"]))
@pytest.mark.parametrize(("samples", "rate_hz"), [(16, 100), (33, 50), (64, 100), (322, 500)])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_frame_with_a_bad_sample_is_nan_throughout(bad, samples, rate_hz, backend):
    frames = torch.randn(2 * samples + 1, samples, generator=torch.Generator().manual_seed(0))
    for i in range(samples):
        frames[2 * i, i] = bad
    with use_backend(backend):
        rows = ops.mfcc(frames, rate_hz)
    assert rows[:-1:2].isnan().all()
    assert rows[1::2].isfinite().all()
    assert rows[-1].isfinite().all()
