"""Statistics are those of NumPy and SciPy, and finite on flat frames."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.fft
import scipy.stats
import torch

from hubert_ecg import ops
from hubert_ecg.ops import TIME_FREQ_NAMES, use_backend

BACKENDS = ["native", "reference"]


def by_scipy(x):
    spectrum = np.abs(scipy.fft.fft(x)) ** 2 / x.shape[-1]
    rms, peak = np.sqrt(np.mean(x**2, -1)), np.abs(x).max(-1)
    columns = [x.min(-1), x.max(-1), x.mean(-1), rms, x.var(-1), x.std(-1), np.mean(x**2, -1), peak, np.ptp(x, -1)]
    columns += [peak / (rms + 1e-9), scipy.stats.skew(x, axis=-1), scipy.stats.kurtosis(x, axis=-1)]
    columns += [spectrum.max(-1), spectrum.sum(-1), spectrum.mean(-1), spectrum.var(-1)]
    return np.stack(columns, -1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_samples", [3, 4, 5, 8, 12, 31, 32, 33, 45, 64, 96, 97, 128, 225, 320, 322, 343, 500, 930])
def test_equals_scipy(num_samples, backend):
    frames = 0.3 + np.random.default_rng(num_samples).standard_normal((40, num_samples)) ** 3
    with use_backend(backend):
        got, got32 = ops.time_freq(frames), ops.time_freq(frames.astype(np.float32))
    for i, name in enumerate(TIME_FREQ_NAMES):
        want = by_scipy(frames)[:, i]
        np.testing.assert_allclose(got[:, i], want, rtol=1e-10, atol=1e-10, err_msg=name)
        np.testing.assert_allclose(got32[:, i], want, rtol=1e-4, atol=1e-4, err_msg=f"{name} in float32")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("num_samples", [1, 2, 63, 64, 322])
def test_is_finite_on_flat_frames(num_samples, dtype, backend):
    level = np.array([0.0, 0.1, -1.0, 1e4, 1e-20], dtype)
    frames = np.repeat(level[:, None], num_samples, 1)
    # Rounding on top of a level is no signal either.
    rounding = frames * (1 + np.finfo(dtype).eps * (np.arange(num_samples) % 3 - 1)).astype(dtype)
    with use_backend(backend):
        got = ops.time_freq(np.concatenate([frames, rounding]))
    assert np.isfinite(got).all()
    skewness, kurtosis = TIME_FREQ_NAMES.index("skewness"), TIME_FREQ_NAMES.index("kurtosis")
    assert (got[:, [skewness, kurtosis]] == 0).all()
    np.testing.assert_allclose(got[:5, TIME_FREQ_NAMES.index("mean")], level, rtol=1e-6)
    np.testing.assert_allclose(
        got[:5, TIME_FREQ_NAMES.index("spectrum_max")], num_samples * level.astype(float) ** 2, rtol=1e-5
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_skewness_and_kurtosis_do_not_depend_on_the_unit(dtype, backend):
    frames = np.random.default_rng(0).standard_normal((20, 64)) ** 3
    with use_backend(backend):
        for exponent in (-30, -20, -10, 0, 10, 18):
            got = ops.time_freq((frames * 10.0**exponent).astype(dtype))
            np.testing.assert_allclose(got[:, 10:12], by_scipy(frames)[:, 10:12], rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(got[:, 5], 10.0**exponent * frames.std(-1), rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_small_signal_on_a_high_level_is_not_flat(backend):
    signal = np.random.default_rng(0).standard_normal((20, 64)) ** 3
    frames = (1000 + signal).astype(np.float32)
    with use_backend(backend):
        got = ops.time_freq(frames)
        exact = ops.time_freq(1e9 + signal)
    np.testing.assert_allclose(got[:, 10:12], by_scipy(frames.astype(np.float64))[:, 10:12], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(exact[:, 10:12], by_scipy(signal)[:, 10:12], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 7, 62])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_value_that_is_none_spoils_its_own_frame_only(value, at, backend):
    frames = torch.randn(21, 63, generator=torch.Generator().manual_seed(0))
    with use_backend(backend):
        clean = ops.time_freq(frames)
        frames[4, at] = value
        got = ops.time_freq(frames)
    assert got[4].isnan().all()
    torch.testing.assert_close(got[5:], clean[5:], rtol=0, atol=0)
    torch.testing.assert_close(got[:4], clean[:4], rtol=0, atol=0)
