"""Where the beats of a recording are, from all its leads together."""

from __future__ import annotations

import numpy as np
import scipy.signal

# Where QRS complexes are stronger than P and T waves, drift and muscles.
_BAND_HZ = (8.0, 20.0)
# Half of a QRS complex, to smooth over its notches; the heart's refractory time; how far R is from the steepest part.
_SMOOTH_S, _REFRACTORY_S = 0.05, 0.28
# A peak is a beat above this share of what beats up to so many seconds away reach; at least one in so many is there.
_SHARE, _NEIGHBOURHOOD_S, _SLOW_BEAT_S = 0.45, 2.0, 1.5


def r_peaks(ecg: np.ndarray, rate_hz: float) -> list[np.ndarray]:
    """Samples at which the QRS complexes of each record are strongest: its R peaks, to a sample or two.

    All leads vote: each is filtered to 8-20 Hz and scaled to the strength that its own strongest parts have, so that
    neither polarity nor unit matters and one noisy lead does not decide; their squares are averaged and smoothed over
    50 ms. A beat is a peak of that (``scipy.signal.find_peaks``) above 0.45 of the height of the beats up to 2 s away,
    0.28 s or more from a higher one. Of a heart slower than 40 beats a minute, T waves may be taken for beats.

    Args:
        ecg: ``[B, L, T]``; a lead of zeros is not heard.
        rate_hz: Sampling rate, at least 50 Hz.

    Returns:
        For each record its peaks in order, ``int64``; none for a record without leads or shorter than 0.5 s.
    """
    num_samples = ecg.shape[-1]
    if num_samples < 0.5 * rate_hz or not len(ecg):
        return [np.empty(0, np.int64) for _ in ecg]
    sos = scipy.signal.butter(2, _BAND_HZ, "bandpass", fs=rate_hz, output="sos")
    x = scipy.signal.sosfiltfilt(sos, ecg.astype(np.float64), padlen=min(num_samples - 1, round(rate_hz)))
    strong = np.quantile(np.abs(x), 0.98, -1, keepdims=True)
    heard = strong > 1e-6 * np.abs(ecg).max(-1, keepdims=True)
    x = np.where(heard, x / np.where(heard, strong, 1), 0)
    # A beat is in all leads at once; an artefact of one lead is limited to what its beats could be.
    energy = np.clip(np.square(x), 0, 4).sum(1) / np.maximum(heard.sum(1), 1)
    width = max(3, round(_SMOOTH_S * rate_hz) | 1)
    window = scipy.signal.windows.hann(width + 2)[1:-1]
    energy = np.sqrt(np.maximum(scipy.signal.oaconvolve(energy, window[None] / window.sum(), "same", axes=-1), 0))
    distance = max(1, round(_REFRACTORY_S * rate_hz))
    return [_peaks(row, distance, rate_hz) for row in energy]


def _peaks(energy: np.ndarray, distance: int, rate_hz: float) -> np.ndarray:
    # Padded, so that a beat at the very edge is a peak too.
    at = scipy.signal.find_peaks(np.pad(energy, 1), distance=distance)[0] - 1
    if not len(at) or not energy.max() > 0:
        return np.empty(0, np.int64)
    # Of the peaks around each, as many of the highest are beats as a slow heart has: the lowest of these.
    reach = _NEIGHBOURHOOD_S * rate_hz
    near = np.where(np.abs(at[:, None] - at) <= reach, energy[at], 0)
    span_s = (np.minimum(at + reach, len(energy)) - np.maximum(at - reach, 0)) / rate_hz
    num_beats = np.clip((span_s / _SLOW_BEAT_S).astype(int), 1, len(at))
    level = -np.sort(-near, 1)[np.arange(len(at)), num_beats - 1]
    return at[energy[at] > _SHARE * level].astype(np.int64)


def beat_phase(samples: np.ndarray, peaks: np.ndarray, longest: float = np.inf) -> np.ndarray:
    """Where samples lie in their beat: 0 at an R peak, rising to 1 at the next.

    Args:
        samples: Any shape.
        peaks: Ascending R peaks.
        longest: Longest interval, in samples, that is taken for one beat.

    Returns:
        Of the shape of ``samples``; NaN before the first peak, from the last on, and in a longer interval.

    >>> beat_phase(np.array([5, 10, 15, 40]), np.array([10, 30]))
    array([ nan, 0.  , 0.25,  nan])
    """
    after = np.searchsorted(peaks, samples, side="right")
    known = (after > 0) & (after < len(peaks))
    bounds = np.concatenate([[np.nan], peaks, [np.nan]])
    begin, length = bounds[after], bounds[np.minimum(after + 1, len(peaks) + 1)] - bounds[after]
    with np.errstate(invalid="ignore"):
        return np.where(known & (length <= longest), (samples - begin) / length, np.nan)
