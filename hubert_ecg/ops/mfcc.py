"""Mel-frequency cepstral coefficients: the features of the first iteration's pseudo-labels."""

from __future__ import annotations

import math

import torch

from hubert_ecg.ops import mfcc_reference as reference
from hubert_ecg.ops._op import Array, Op, as_floating, check_real, check_whole, takes_arrays
from hubert_ecg.ops._tables import unit_circle

_mfcc = Op(
    "mfcc(Tensor frames, float sample_rate_hz=100., float low_hz=20., float high_hz=0., "
    "int num_mel=23, int num_mfcc=13) -> Tensor",
    reference.mfcc,
)


@takes_arrays("frames")
def mfcc(
    frames: Array,
    sample_rate_hz: float = 100,
    low_hz: float = 20.0,
    high_hz: float = 0.0,
    num_mel: int = 23,
    num_mfcc: int = 13,
) -> Array:
    """Mel-frequency cepstral coefficients of each frame, as Kaldi defines them.

    Each frame loses its mean, is pre-emphasised (``x[i] - 0.97 x[i - 1]``), weighted by the Povey window (Hann to the
    power 0.85), padded with zeros to a power of two and Fourier-transformed. The power spectrum is summed under
    ``num_mel`` triangles, equally spaced on the mel scale ``1127 ln(1 + f / 700)`` from ``low_hz`` to ``high_hz``; the
    coefficients are the cosine transform of the logarithms, floored at ``ln(1.19e-7)``, times the lifter
    ``1 + 11 sin(pi c / 22)``. Equal to Kaldi's ``compute-mfcc-feats`` and to ``torchaudio.compliance.kaldi.mfcc`` with
    ``use_energy=False, dither=0`` and one frame to a call.

    Coefficients are those of float64 arithmetic to 1e-3, and most to 1e-4: a float32 frame so smooth that a filter
    holds less than a few millionths of its energy is computed in float64.

    At low sampling rates a triangle can be narrower than an FFT bin and stay empty: from 20 Hz at 50 Hz, 17 of 23 do.
    A frame with NaN or infinity gives NaN throughout, as long as one triangle is not empty.

    >>> mfcc(torch.zeros(64), num_mfcc=1)
    tensor([-76.4570])

    Args:
        frames: [..., S] of any floating dtype, S >= 2 samples to a frame. Half precision is computed in float32.
        sample_rate_hz: sampling rate in Hz.
        low_hz: where the lowest triangle begins, in Hz.
        high_hz: where the highest triangle ends, in Hz; at most 0 counts from the Nyquist frequency.
        num_mel: number of triangles M.
        num_mfcc: number of coefficients C, at most M.

    Returns:
        coefficients, [..., C] float32, or float64 where ``frames`` is.

    Raises:
        ValueError: a wrong shape, dtype or band, named with what was given.
    """
    frames = as_floating("mfcc: frames", frames, min_samples=2)
    check_band("mfcc", sample_rate_hz, low_hz, high_hz)
    for name, value in (("num_mel", num_mel), ("num_mfcc", num_mfcc)):
        check_whole(f"mfcc: {name}", value)
    if num_mel < 4:
        raise ValueError(f"mfcc: num_mel must be at least 4, got {num_mel}")
    if not 1 <= num_mfcc <= num_mel:
        raise ValueError(f"mfcc: num_mfcc must be in 1 .. num_mel ({num_mel}), got {num_mfcc}")
    return _mfcc.call(frames.detach(), sample_rate_hz, low_hz, high_hz, num_mel, num_mfcc)


def check_band(op: str, sample_rate_hz: float, low_hz: float, high_hz: float) -> None:
    """Raises ValueError, in the words of ``op``, where mel filters cannot cover the band."""
    for name, value in (("sample_rate_hz", sample_rate_hz), ("low_hz", low_hz), ("high_hz", high_hz)):
        check_real(f"{op}: {name}", value)
    if not 0 < sample_rate_hz < math.inf:
        raise ValueError(f"{op}: sample_rate_hz must be positive and finite, got {sample_rate_hz}")
    nyquist_hz = sample_rate_hz / 2
    if not 0 <= low_hz < nyquist_hz:
        raise ValueError(f"{op}: low_hz must be in [0, {nyquist_hz:g}) at this sampling rate, got {low_hz}")
    if not low_hz < (high_hz if high_hz > 0 else nyquist_hz + high_hz) <= nyquist_hz:
        want = f"above low_hz ({low_hz:g} Hz) and at most half the sampling rate ({nyquist_hz:g} Hz)"
        raise ValueError(f"{op}: high_hz must be {want}, or at most 0 to count from there, got {high_hz}")


@_mfcc.fake
def _(frames, sample_rate_hz=100.0, low_hz=20.0, high_hz=0.0, num_mel=23, num_mfcc=13):
    return frames.new_empty(*frames.shape[:-1], num_mfcc)


@_mfcc.native
def _(kernel, frames, sample_rate_hz=100.0, low_hz=20.0, high_hz=0.0, num_mel=23, num_mfcc=13):
    S = frames.shape[-1]
    place = (torch.float64, frames.device)
    window, bank, dct = reference.tables(S, sample_rate_hz, low_hz, high_hz, num_mel, num_mfcc, *place)
    out = frames.new_empty(*frames.shape[:-1], num_mfcc)
    if out.numel():
        kernel(
            frames.reshape(-1, S).contiguous(),
            window,
            unit_circle(2 * bank.shape[1], *place),
            bank,
            dct,
            out.view(-1, num_mfcc),
        )
    return out
