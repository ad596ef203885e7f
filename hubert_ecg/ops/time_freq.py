"""Statistics of a frame in time and frequency: the other features that pseudo-labels can be made of."""

from __future__ import annotations

from hubert_ecg.ops import time_freq_reference as reference
from hubert_ecg.ops._op import Array, Op, as_floating, takes_arrays
from hubert_ecg.ops._tables import unit_circle

#: What the columns of :func:`time_freq` hold, in order.
TIME_FREQ_NAMES = (
    "min",
    "max",
    "mean",
    "rms",
    "variance",
    "std",
    "power",
    "peak",
    "peak_to_peak",
    "crest",
    "skewness",
    "kurtosis",
    "spectrum_max",
    "spectrum_sum",
    "spectrum_mean",
    "spectrum_variance",
)

_time_freq = Op("time_freq(Tensor frames) -> Tensor", reference.time_freq)


@takes_arrays("frames")
def time_freq(frames: Array) -> Array:
    """Sixteen statistics of each frame: twelve in time, four of its power spectrum.

    In the order of :data:`TIME_FREQ_NAMES`: min, max, mean, rms, variance, std, power (mean square), peak (largest
    magnitude), peak to peak, crest (peak / (rms + 1e-9)), skewness, kurtosis; then max, sum, mean and variance of the
    two-sided power spectrum ``|X_k|^2 / S`` over all S bins. Variances divide by S. Skewness and kurtosis are those of
    ``scipy.stats`` (biased; kurtosis by Fisher, 0 for a normal distribution).

    A frame is flat when its standard deviation is at most 1e-6 of its peak (1e-15 in float64), a few roundings: what
    varies there is noise of the arithmetic, and skewness and kurtosis are 0. A frame with NaN or infinity gives NaN
    throughout.

    >>> time_freq(torch.tensor([3.0, -1.0, 3.0, -1.0]))[:8]
    tensor([-1.0000,  3.0000,  1.0000,  2.2361,  4.0000,  2.0000,  5.0000,  3.0000])

    Args:
        frames: [..., S] of any floating dtype. Half precision is computed in float32.

    Returns:
        statistics, [..., 16] float32, or float64 where ``frames`` is.

    Raises:
        ValueError: a wrong shape or dtype, named with what was given.
    """
    return _time_freq.call(as_floating("time_freq: frames", frames, min_samples=1).detach())


@_time_freq.fake
def _(frames):
    return frames.new_empty(*frames.shape[:-1], len(TIME_FREQ_NAMES))


@_time_freq.native
def _(kernel, frames):
    S, D = frames.shape[-1], len(TIME_FREQ_NAMES)
    out = frames.new_empty(*frames.shape[:-1], D)
    if out.numel():
        kernel(frames.reshape(-1, S).contiguous(), unit_circle(S, frames.dtype, frames.device), out.view(-1, D))
    return out
