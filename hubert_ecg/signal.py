"""From a raw recording to what the model reads: gaps, base line, band, sampling rate, scale, length.

Two behaviours, chosen by ``compat``. Both compute in float64 as long as offsets, noise beyond the band or the phases of
long records need it, give float32, and run on the device that holds the recording: a batch at once on a GPU, a record
to each of torch's threads on a CPU, where it gives the same bits in any batch and on any number of threads.

**corrected**, the default. Per lead, over the whole record:

1. Samples that are NaN or infinite are bridged by straight lines, the ends are held; a lead without any sample is 0.
2. One pass in the frequency domain applies a zero-phase band-pass and evaluates the result on the output's grid, so
   that any sampling rate, 257 or 499.97 Hz too, is resampled exactly and without aliases. The gain rises from 0 at
   0.3 Hz over 1/2 at 0.5 Hz to 1 at 0.7 Hz (zero-phase filters may cut up to 0.67 Hz before they bend ST segments:
   AHA/ACC/HRS recommendations for the standardization of the electrocardiogram, part I, 2007). It falls from 1 at
   44 Hz to 0 at 50 Hz, or at the same shares of the Nyquist frequency of input or output where that is lower.

   An FFT closes a record to a ring, so what is put between its ends shapes the base line there. Mirroring about the
   end sample, the usual choice, moves the base line by a whole R wave when a record ends on one. Here the slow part
   next to an end, a ridge fit of a line and of waves up to 0.3 Hz to 10 s, is continued, and only the rest is mirrored.

   The high-pass would smear a jump as a false base line over seconds, so artefacts do not reach it. What a calm beat
   spans says what they are: the lower quartile of windows that hold a beat (a quarter of the record, from 1 s to 2 s),
   so that one artefact leaves a quarter of them alone. Where a lead rises or falls by more than 2 calm beats in 20 ms,
   its levels before and after, medians of up to 1 s, are compared; if they too are 2 calm beats apart, or the lead
   returns from such a step, the step is taken out. Samples still further than 4 calm beats from the local median skip
   the high-pass.
3. The typical peak, the median over windows of 1 s (hop 0.25 s) of max ``|x|``, is scaled to 0.5, and the result is
   limited to [-1, 1]. Ectopic beats reach about twice the typical peak and stay unclipped. Windows without signal
   (gaps, flat stretches) do not count, nor do those beyond 8 times a calm beat: an artefact of 2 s in 10 s, or of
   half a second in 5 s, moves the scale by no more than beats differ. A lead without signal is exactly 0.
4. Crop, or zeros at the end.

**published**, what the published weights were trained on, faults included: a window-designed FIR band-pass of
0.05-47 Hz forward and backward, FFT resampling to 500 Hz, min-max to [-1, 1] per lead, crop, and decimation of the
*flattened* crop.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import scipy.fft
import scipy.signal
import torch

from hubert_ecg import native
from hubert_ecg.ops._op import takes_arrays

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
NATIVE_RATE_HZ = 500

# Corrected: the high-pass rises between these, the low-pass falls over the last 12 % below its stop edge.
_HIGH_PASS_HZ = (0.3, 0.7)
_LOW_PASS_STOP_HZ = 50.0
_LOW_PASS_FULL = 0.88
_PAD_S = 5.0
_TREND_S = 10.0
_TREND_HZ = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
_TREND_RIDGE = 5e-5
_STEP_RANGES = 2.0
_SPIKE_RANGES = 4.0
_ARTEFACT_PEAKS = 8.0
_EDGE_S = 0.02
_STEP_LEVEL_S = 1.0
_LEVEL_S = 6.0
_TYPICAL_PEAK = 0.5
# A lead whose band-passed signal is below this share of its largest raw sample holds rounding errors, not signal.
_SILENCE = 1e-6

_PUBLISHED_BAND_HZ = (0.05, 47.0)

_native_ring, _native_scale = (native.find(name, "cpu") for name in ("published_ring", "published_scale"))


@takes_arrays("raw")
def prepare_ecg_for_inference(
    raw: Any,
    sampling_rate: float = 500,
    target_length: int | None = 5000,
    downsampling_factor: int = 5,
    normalize: bool = True,
    compat: str = "corrected",
    return_length: bool = False,
) -> Any:
    """Filters, resamples, scales and cuts raw 12-lead ECGs to what the model reads.

    Args:
        raw: ``[12, n]`` or ``[B, 12, n]``, leads in the order of :data:`LEADS`, any real dtype and any unit (scaling
            removes it); a NumPy, CuPy or torch array on any device. NaN and infinite samples count as missing.
        sampling_rate: Sampling rate of ``raw`` in Hz, whole or not.
        target_length: Length of the result, counted in samples at 500 Hz: longer records are cropped to their
            beginning, shorter ones get zeros at the end. None keeps the whole record.
        downsampling_factor: The result runs at 500 Hz divided by this.
        normalize: Scale each lead to [-1, 1]; False keeps the unit of ``raw``.
        compat: "corrected", or "published" for the preprocessing of the published weights (see the module's text).
            Published reads records longer than 0.9 s at more than 94 Hz, and a lead with a missing sample becomes the
            mean of the others.
        return_length: Also return how many samples of each record are signal and not padding.

    Returns:
        ``[12, target_length // downsampling_factor]`` or ``[B, 12, ...]`` float32, the kind of array and the device
        that were given; with ``return_length``, a tuple of it and the valid length: an int, or ``[B]`` int64.

    Raises:
        ValueError: an argument is out of its range; the message names it and says what to do.

    >>> prepare_ecg_for_inference(np.zeros((12, 3600)), sampling_rate=360).shape
    (12, 1000)
    """
    name = "prepare_ecg_for_inference"
    _check_leads(raw, name, "raw")
    rate_hz = _check_rate(sampling_rate, name)
    factor = _check_count(downsampling_factor, f"{name}: downsampling_factor")
    if compat not in ("corrected", "published"):
        raise ValueError(f"{name}: compat must be 'corrected' or 'published', got {compat!r}")
    num_native = int(raw.shape[-1] * NATIVE_RATE_HZ / rate_hz)
    if num_native < factor:
        raise ValueError(
            f"{name}: raw must hold at least one sample of the output ({factor / NATIVE_RATE_HZ:g} s), "
            f"got {raw.shape[-1]} samples at {rate_hz:g} Hz; is sampling_rate in Hz?"
        )
    target = num_native if target_length is None else _check_count(target_length, f"{name}: target_length")
    if target < factor:
        raise ValueError(f"{name}: target_length must be at least downsampling_factor ({factor}), got {target}")
    num_out, num_valid = target // factor, min(target, num_native) // factor

    records = raw.detach().reshape(-1, len(LEADS), raw.shape[-1])
    out = torch.empty(records.shape[0], len(LEADS), num_out, dtype=torch.float32, device=raw.device)
    # One record at a time on a CPU: it stays in cache, and batched transforms may round otherwise than single ones.
    on_cpu = raw.device.type == "cpu"
    step = 1 if on_cpu else max(1, 2**22 // records[:1].numel())

    def prepare(first: int) -> None:
        part = records[first : first + step]
        if compat == "corrected":
            done = _corrected(part, rate_hz, NATIVE_RATE_HZ / factor, num_native // factor, normalize)[..., :num_out]
        else:
            done = _published(part, rate_hz, num_native, target // factor * factor, factor, normalize)
        out[first : first + step, :, : done.shape[-1]] = done
        out[first : first + step, :, done.shape[-1] :] = 0

    _share(prepare, range(0, records.shape[0], step), torch.get_num_threads() if on_cpu else 1)
    out = out.reshape(*raw.shape[:-1], num_out)
    if not return_length:
        return out
    if raw.ndim == 2:
        return out, num_valid
    return out, torch.full((raw.shape[0],), num_valid, dtype=torch.int64, device=raw.device)


def _share(work: Callable[[int], None], items: Sequence[int], num_threads: int) -> None:
    """``work`` of each item, in threads that share the items, and not the work of one, which is too short for that."""
    num_threads = min(num_threads, len(items))
    if num_threads <= 1:
        for item in items:
            work(item)
        return

    inference = torch.is_inference_mode_enabled()

    def turn(thread: int) -> None:
        torch.set_num_threads(1)
        # A thread does not inherit it, and may not write into what was made in it.
        with torch.inference_mode(inference):
            for item in items[thread::num_threads]:
                work(item)

    own = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(num_threads) as pool:
            for _ in pool.map(turn, range(num_threads)):
                pass
    finally:
        # What is set holds for the thread that sets it, and for all that begin later.
        torch.set_num_threads(own)


@takes_arrays("ecg")
def decimate_flattened(ecg: Any, factor: int) -> Any:
    """Decimates 12 leads laid end to end, as the published weights saw them: the filter runs across lead boundaries.

    An 8th-order Chebyshev-I low-pass forward and backward, then every ``factor``-th sample (``scipy.signal.decimate``).

    Args:
        ecg: ``[12, n]`` or ``[B, 12, n]`` at 500 Hz, already cropped; of each lead the last ``n % factor`` samples are
            dropped.
        factor: Decimation factor; 1 returns the leads as they are.

    Returns:
        ``[..., 12, n // factor]`` float32, the kind of array and the device that were given.

    Raises:
        ValueError: another shape, or fewer than 3 or ``factor`` samples in a lead.
    """
    factor = _check_decimation(ecg, factor, "decimate_flattened", 3)
    return _decimate_flattened(ecg.detach(), factor).to(torch.float32)


@takes_arrays("ecg")
def decimate_leads(ecg: Any, factor: int) -> Any:
    """Decimates each lead by itself, as the published features saw them.

    Args:
        ecg: ``[12, n]`` or ``[B, 12, n]`` at 500 Hz, already cropped; of each lead the last ``n % factor`` samples are
            dropped.
        factor: Decimation factor; 1 returns the leads as they are.

    Returns:
        ``[..., 12, n // factor]`` float32, the kind of array and the device that were given.

    Raises:
        ValueError: another shape, or fewer than 28 or ``factor`` samples in a lead.
    """
    factor = _check_decimation(ecg, factor, "decimate_leads", 28)
    num = ecg.shape[-1] // factor * factor
    return _decimate(ecg.detach()[..., :num], factor).to(torch.float32)


def _check_decimation(ecg: torch.Tensor, factor: Any, function: str, fewest: int) -> int:
    _check_leads(ecg, function, "ecg")
    factor = _check_count(factor, f"{function}: factor")
    if ecg.shape[-1] < max(fewest, factor):
        raise ValueError(
            f"{function}: ecg must hold at least {max(fewest, factor)} samples in a lead, got {ecg.shape[-1]}"
        )
    return factor


def _check_leads(x: torch.Tensor, function: str, argument: str) -> None:
    given = f"{function}: {argument} must be [{len(LEADS)}, samples] or [B, {len(LEADS)}, samples]"
    if x.ndim not in (2, 3) or x.shape[-2] != len(LEADS):
        hint = "; transpose it" if x.ndim in (2, 3) and x.shape[-1] == len(LEADS) else ""
        raise ValueError(f"{given}, got {list(x.shape)}{hint}")
    if x.shape[-1] == 0:
        raise ValueError(f"{given} with at least one sample, got {list(x.shape)}")
    if x.is_complex():
        raise ValueError(f"{function}: {argument} must be real, got {x.dtype}")


def _check_rate(sampling_rate: Any, function: str) -> float:
    want = f"{function}: sampling_rate must be a positive number of Hz"
    if isinstance(sampling_rate, (bool, str)):
        raise ValueError(f"{want}, got {sampling_rate!r}")
    try:
        rate_hz = float(sampling_rate)
    except (TypeError, ValueError):
        raise ValueError(f"{want}, got {sampling_rate!r}") from None
    if not (math.isfinite(rate_hz) and rate_hz > 0):
        raise ValueError(f"{want}, got {sampling_rate!r}")
    return rate_hz


def _check_count(value: Any, what: str) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        count = 0
    if count < 1 or isinstance(value, bool):
        raise ValueError(f"{what} must be a positive whole number, got {value!r}")
    return count


# Corrected


def _corrected(x: torch.Tensor, rate_hz: float, out_rate_hz: float, num_out: int, normalize: bool) -> torch.Tensor:
    """``[B, 12, n]`` -> ``[B, 12, num_out]``: band-passed, resampled and, if asked, scaled."""
    low_pass_hz = min(_LOW_PASS_STOP_HZ, out_rate_hz / 2, rate_hz / 2)
    if low_pass_hz * _LOW_PASS_FULL <= _HIGH_PASS_HZ[1]:
        raise ValueError(
            f"prepare_ecg_for_inference: sampling_rate and 500 / downsampling_factor must leave a band above "
            f"{_HIGH_PASS_HZ[1]} Hz, got {rate_hz:g} Hz and {out_rate_hz:g} Hz; is sampling_rate in Hz?"
        )
    x = x.to(torch.float64)
    seen = _seen(x)
    if seen is not None:
        x = _bridge(x, seen)
    largest = x.abs().amax(-1, keepdim=True)
    y = _band_pass(x, seen, rate_hz, out_rate_hz, num_out, low_pass_hz)
    if not normalize:
        return y
    weigh = y.abs()
    if seen is not None:
        at = torch.arange(num_out, device=x.device, dtype=torch.float64) * (rate_hz / out_rate_hz)
        weigh = weigh * seen[..., at.round().long().clamp(max=x.shape[-1] - 1)]
    scale = _typical_peak(weigh, out_rate_hz, _SILENCE * largest) / _TYPICAL_PEAK
    return torch.where(scale > 0, y / scale.clamp(min=torch.finfo(y.dtype).tiny), 0.0).clamp(-1, 1)


def _seen(x: torch.Tensor) -> torch.Tensor | None:
    """Which samples are finite; None where all are."""
    # One pass over the samples in the usual case: a sum is finite only of finite samples.
    if bool(torch.isfinite(x.sum())):
        return None
    return torch.isfinite(x)


def _bridge(x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Straight lines over the samples that were not seen; held ends; 0 where a lead has none."""
    n = x.shape[-1]
    at = torch.arange(n, device=x.device).expand(x.shape)
    before = torch.where(seen, at, -1).cummax(-1).values
    after = torch.where(seen, at, n).flip(-1).cummin(-1).values.flip(-1)
    left = torch.where(before < 0, after, before).clamp(max=n - 1)
    right = torch.where(after == n, before, after).clamp(min=0)
    known = torch.where(seen, x, 0.0)
    weight = (at - left).to(x.dtype) / (right - left).clamp(min=1)
    return torch.lerp(known.gather(-1, left), known.gather(-1, right), weight)


def _windows(x: torch.Tensor, rate_hz: float, window_s: float) -> torch.Tensor:
    """Windows, hop 0.25 s: ``[B, 12, n] -> [B, 12, W, window]``; a shorter record is one window."""
    size = min(x.shape[-1], max(1, round(window_s * rate_hz)))
    return x.unfold(-1, size, max(1, round(rate_hz / 4)))


def _beat_window_s(num_samples: int, rate_hz: float) -> float:
    """Long enough for a beat at a slow rate, short enough that one artefact leaves a quarter of the windows alone."""
    return min(max(num_samples / rate_hz / 4, 1.0), 2.0)


def _quantile(values: torch.Tensor, wanted: torch.Tensor, q: float) -> torch.Tensor:
    """The lower ``q`` quantile over the last axis of the ``wanted`` values, 0 where there are none: ``[..., 1]``."""
    found = torch.where(wanted, values, torch.nan).nanquantile(q, dim=-1, keepdim=True, interpolation="lower")
    return found.nan_to_num(nan=0.0)


def _typical_peak(magnitude: torch.Tensor, rate_hz: float, floor: torch.Tensor) -> torch.Tensor:
    """The median peak of the seconds that are neither silent nor an artefact: ``[B, 12, n] -> [B, 12, 1]``."""
    beats = _windows(magnitude, rate_hz, _beat_window_s(magnitude.shape[-1], rate_hz)).amax(-1)
    limit = _ARTEFACT_PEAKS * _quantile(beats, beats > floor, 0.25)
    peaks = _windows(magnitude, rate_hz, 1.0).amax(-1)
    return _quantile(peaks, (peaks > floor) & (peaks <= limit), 0.5)


def _band_pass(
    x: torch.Tensor, seen: torch.Tensor | None, rate_hz: float, out_rate_hz: float, num_out: int, low_pass_hz: float
) -> torch.Tensor:
    """The zero-phase band-pass of ``x`` at the times ``m / out_rate_hz``, m < ``num_out``."""
    n, pad = x.shape[-1], math.ceil(_PAD_S * rate_hz)
    size = scipy.fft.next_fast_len(n + 2 * pad, real=True)
    high_pass, low_pass = (gain.to(x.device) for gain in _gains(size, rate_hz, low_pass_hz))
    calm = _calm_range(x, seen, rate_hz)
    x = _less_steps(x, _STEP_RANGES * calm, rate_hz)
    spikes = _spikes(x, _SPIKE_RANGES * calm, rate_hz)
    if spikes is not None:
        x = x - spikes
    spectrum = torch.fft.rfft(_continued(x, rate_hz, pad, size), norm="forward")[..., : len(high_pass)] * high_pass
    if spikes is not None:
        spectrum += torch.fft.rfft(spikes, size, norm="forward")[..., : len(high_pass)]
    return _evaluate(spectrum * low_pass, rate_hz / (size * out_rate_hz), num_out)


@functools.lru_cache(maxsize=16)
def _gains(size: int, rate_hz: float, low_pass_hz: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The high-pass and the low-pass at the frequencies below ``low_pass_hz`` of a ring of ``size`` samples."""
    f_hz = torch.arange(math.ceil(low_pass_hz * size / rate_hz), dtype=torch.float64) * (rate_hz / size)
    return _rise(f_hz, *_HIGH_PASS_HZ), 1 - _rise(f_hz, _LOW_PASS_FULL * low_pass_hz, low_pass_hz)


def _rise(x: torch.Tensor, start: float, stop: float) -> torch.Tensor:
    """Rises from 0 at ``start`` to 1 at ``stop`` along a squared sine."""
    return torch.sin(math.pi / 2 * ((x - start) / (stop - start)).clamp(0, 1)) ** 2


def _evaluate(spectrum: torch.Tensor, step: float, num_out: int) -> torch.Tensor:
    """``y[m] = Re(s[0] + 2 sum_k s[k] exp(2 pi i k m step))``, k > 0, m < ``num_out``, for any ``step``.

    An inverse FFT where the steps divide the ring, else Bluestein's chirp-z.
    """
    ring = round(1 / step)
    if abs(ring * step - 1) < 1e-15 and spectrum.shape[-1] <= ring // 2 + 1:
        return torch.fft.irfft(spectrum, ring, norm="forward")[..., :num_out]
    num = spectrum.shape[-1]
    before, kernel, after = (part.to(spectrum.device) for part in _chirps(num, step, num_out))
    product = torch.fft.fft(spectrum * before, kernel.shape[-1]) * kernel
    return (torch.fft.ifft(product)[..., :num_out] * after).real


@functools.lru_cache(maxsize=16)
def _chirps(num: int, step: float, num_out: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What Bluestein's transform multiplies by: before, ``[num]``; between its FFTs; and after, ``[num_out]``."""
    size = scipy.fft.next_fast_len(num + num_out - 1)
    at = torch.arange(max(num, num_out), dtype=torch.float64)
    chirp = torch.polar(torch.ones_like(at), math.pi * torch.remainder(at * at * step, 2.0))
    kernel = chirp.new_zeros(size)
    kernel[:num_out] = chirp[:num_out].conj()
    kernel[size - num + 1 :] = chirp[1:num].conj().flip(-1)
    before = 2 * chirp[:num]
    before[0] = 1
    return before, torch.fft.fft(kernel), chirp[:num_out]


def _calm_range(x: torch.Tensor, seen: torch.Tensor | None, rate_hz: float) -> torch.Tensor:
    """From the lowest to the highest sample of a calm beat: ``[B, 12, n] -> [B, 12, 1]``, 0 where none is known."""
    window_s = _beat_window_s(x.shape[-1], rate_hz)
    windows = _windows(x, rate_hz, window_s)
    ranges = windows.amax(-1) - windows.amin(-1)
    known = ranges > _SILENCE * x.abs().amax(-1, keepdim=True)
    if seen is not None:
        known &= _windows(seen, rate_hz, window_s).all(-1)
    return _quantile(ranges, known, 0.25)


def _wide(x: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Leads with samples further apart than ``limit``, ``[B, 12] bool``; the others need no closer look."""
    return ((x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True) > limit) & (limit > 0)).squeeze(-1)


def _less_steps(x: torch.Tensor, limit: torch.Tensor, rate_hz: float) -> torch.Tensor:
    """``x`` without jumps between levels further apart than ``limit``, and without the ways back from there."""
    rise, near = max(1, round(_EDGE_S * rate_hz)), max(1, round(_STEP_LEVEL_S * rate_hz))
    if x.shape[-1] <= rise or not bool(_wide(x, limit).any()):
        return x
    edges = (x[..., rise:] - x[..., :-rise]).abs()
    hit = ((edges.amax(-1, keepdim=True) > limit) & (limit > 0)).squeeze(-1)
    if not bool(hit.any()):
        return x
    leads = x[hit].cpu().numpy()
    for lead, edge, far in zip(leads, edges[hit].cpu().numpy(), limit[hit].flatten().tolist(), strict=True):
        at = scipy.signal.find_peaks(np.pad(edge, 1), height=far / 2, distance=max(1, near // 4))[0] - 1
        steps, level = np.zeros_like(lead), 0.0
        at = [-rise, *at, len(lead) - 1]
        for before, first, after in zip(at, at[1:], at[2:], strict=False):
            left = np.median(lead[max(first + 1 - near, before + rise) : first + 1])
            right = np.median(lead[first + rise : min(first + rise + near, after + 1)])
            jump = right - left
            if abs(jump) > far or abs(level + jump) < abs(level) / 2:
                steps[first + 1 + np.abs(np.diff(lead[first : first + rise + 1])).argmax()] = jump
                level += jump
        lead -= steps.cumsum()
    out = x.clone()
    out[hit] = torch.from_numpy(leads).to(x)
    return out


def _spikes(x: torch.Tensor, limit: torch.Tensor, rate_hz: float) -> torch.Tensor | None:
    """What stands out of a lead by more than ``limit``, as its height above the local median."""
    hit = _wide(x, limit)
    if not bool(hit.any()):
        return None
    # About 100 Hz is enough to know the level of seconds.
    stride = max(1, int(rate_hz / 100))
    leads, coarse_hz = x[hit], rate_hz / stride
    coarse = leads[:, ::stride]
    width = max(1, min(coarse.shape[-1] // 2, round(_LEVEL_S * coarse_hz)))
    hop = max(1, round(coarse_hz / 2))
    medians = coarse.unfold(-1, width, hop).median(-1).values
    nearest = (torch.arange(x.shape[-1], device=x.device) / stride - width / 2) / hop
    above = leads - medians[..., nearest.round().long().clamp(0, medians.shape[-1] - 1)]
    out = above.abs() > limit[hit]
    if not bool(out.any()):
        return None
    spikes = torch.zeros_like(x)
    spikes[hit] = torch.where(out, above, 0.0)
    return spikes


def _continued(x: torch.Tensor, rate_hz: float, pad: int, size: int) -> torch.Tensor:
    """``x`` less a straight line on a ring of ``size`` samples: what follows fades over ``pad`` samples, and so does,
    at the ring's end, what comes before."""
    n = x.shape[-1]
    at = torch.arange(n, device=x.device, dtype=x.dtype) - (n - 1) / 2
    x = x - x.mean(-1, keepdim=True)
    x -= at * ((x @ at) / (at @ at).clamp(min=1))[..., None]
    width = min(n, math.ceil(_TREND_S * rate_hz))
    fit, beyond, mirror, fade = (part.to(x.device) for part in _trend(width, rate_hz, pad))
    head, tail = (
        (end @ fit @ beyond + (end[..., :pad] if pad <= width else end[..., mirror])) * fade
        for end in (x[..., :width], x[..., n - width :].flip(-1))
    )
    return torch.cat([x, tail, x.new_zeros(*x.shape[:-1], size - n - 2 * pad), head.flip(-1)], -1)


@functools.lru_cache(maxsize=16)
def _trend(width: int, rate_hz: float, pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The ridge fit of a line and slow waves to ``width`` samples, read from the end inwards.

    Returns:
        ``[width, K]`` from samples to coefficients; ``[K, pad]`` from coefficients to the slow part beyond the end,
        less what the mirrored samples hold of it; ``[pad]`` the places of the mirrored samples; ``[pad]`` the fade.
    """
    t = (np.arange(-pad, width) - (width - 1) / 2) / rate_hz
    waves = 2 * math.pi * np.asarray(_TREND_HZ)[:, None] * t
    basis = np.concatenate([np.ones_like(t)[None], t[None], np.sin(waves), np.cos(waves)])
    inside, beyond = basis[:, pad:], basis[:, :pad][:, ::-1]
    ridge = math.sqrt(_TREND_RIDGE * width) * np.eye(len(basis))[2:]
    fit = np.linalg.pinv(np.concatenate([inside.T, ridge]))[:, :width].T
    mirror = np.arange(pad) % (2 * width)
    mirror = np.minimum(mirror, 2 * width - 1 - mirror)
    fade = _rise(pad - 0.5 - torch.arange(pad, dtype=torch.float64), 0, pad / 2)
    # Few columns: a product reads them one after the other.
    fit = np.asfortranarray(fit)
    return torch.from_numpy(fit), torch.from_numpy(beyond - inside[:, mirror]), torch.from_numpy(mirror), fade


# Published


def _published(
    x: torch.Tensor, rate_hz: float, num_native: int, target: int, factor: int, normalize: bool
) -> torch.Tensor:
    """``[B, 12, n]`` -> ``[B, 12, target // factor]``: the published chain."""
    if rate_hz <= 2 * _PUBLISHED_BAND_HZ[1]:
        raise ValueError(
            f"prepare_ecg_for_inference: sampling_rate must be above {2 * _PUBLISHED_BAND_HZ[1]:g} Hz with "
            f"compat='published', got {rate_hz:g}; use compat='corrected'"
        )
    taps = _published_taps(rate_hz)
    if x.shape[-1] <= 3 * len(taps):
        raise ValueError(
            f"prepare_ecg_for_inference: raw must be longer than {3 * len(taps)} samples at {rate_hz:g} Hz with "
            f"compat='published', got {x.shape[-1]}; use compat='corrected', or pad the record"
        )
    # A missing sample spoils its whole lead in an FFT; what is left of the record gives the mean that replaces it.
    ring, low, extent = _published_ring(x, len(taps) - 1)
    # A sum is finite only of finite numbers.
    if not (all_seen := math.isfinite(extent.sum())):
        seen = torch.isfinite(extent)
        low, extent = torch.where(seen, low, 0.0), torch.where(seen, extent, 0.0)
    # A lead without its unit, its level and what the filter takes away loses nothing that counts in float32.
    gain, steady = _published_gain(rate_hz, ring.shape[-1])
    spectrum = torch.fft.rfft(ring, norm="forward").to(torch.complex64).mul_(gain.to(x.device))
    y = torch.fft.irfft(spectrum, ring.shape[-1], norm="forward")[..., : x.shape[-1]]
    y = _resample(y, num_native)
    if normalize:
        y = _published_scale(y, extent, min(target, num_native))
    else:
        y = (y * extent + steady * (low + extent * ring.mean(-1, keepdim=True)))[..., :target]
    if not all_seen:
        others = torch.where(seen, y, 0.0).mean(-1).sum(-1) / seen.sum((1, 2)).clamp(min=1)
        y = torch.where(seen, y, others[:, None, None])
    if y.shape[-1] < target:
        y = torch.nn.functional.pad(y, (0, target - y.shape[-1]))
    return _decimate_flattened(y, factor)


@functools.lru_cache(maxsize=16)
def _published_taps(rate_hz: float) -> np.ndarray:
    return scipy.signal.firwin(int(0.3 * rate_hz) | 1, _PUBLISHED_BAND_HZ, pass_zero=False, fs=rate_hz)


@functools.lru_cache(maxsize=16)
def _published_gain(rate_hz: float, size: int) -> tuple[torch.Tensor, float]:
    """``|H|^2`` of the taps on a ring of ``size`` samples, but 0 for what does not change; and that one."""
    gain = np.abs(scipy.fft.rfft(_published_taps(rate_hz), size)) ** 2
    steady, gain[0] = float(gain[0]), 0
    return torch.from_numpy(gain.astype(np.float32)), steady


def _published_ring(x: torch.Tensor, memory: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A ring on which a product with ``|H|^2`` is ``scipy.signal.filtfilt(taps, 1, x)`` of ``memory + 1`` taps.

    Its odd padding is longer than both passes remember, so no sample of the record knows how they start. The record is
    followed by what comes after it, and at the end of the ring by what comes before it.

    Returns:
        The ring of each lead less its lowest sample and divided by its extent, float64; the lowest sample; and the
        extent, from there to the highest, which is not finite where a sample is not: there the ring is 0.
    """
    n = x.shape[-1]
    size = scipy.fft.next_fast_len(n + 2 * memory, real=True)
    if x.device.type == "cpu" and _native_ring is not None:
        x = (x if x.dtype == torch.float32 else x.to(torch.float64)).contiguous()
        ring = x.new_empty((*x.shape[:-1], size), dtype=torch.float64)
        low, extent = x.new_empty((2, *x.shape[:-1], 1), dtype=torch.float64)
        _native_ring(x.flatten(0, 1), memory, ring.flatten(0, 1), low.flatten(), extent.flatten())
        return ring, low, extent
    x = x.to(torch.float64)
    low = x.amin(-1, keepdim=True)
    extent = x.amax(-1, keepdim=True) - low
    x = torch.where(torch.isfinite(extent), (x - low) / extent.clamp(min=torch.finfo(x.dtype).tiny), 0.0)
    first, last = x[..., :1], x[..., -1:]
    before, after = 2 * first - x[..., 1 : memory + 1].flip(-1), 2 * last - x[..., n - memory - 1 : n - 1].flip(-1)
    return torch.cat([x, after, first.expand(*x.shape[:-1], size - n - 2 * memory), before], -1), low, extent


def _published_scale(y: torch.Tensor, extent: torch.Tensor, num: int) -> torch.Tensor:
    """The first ``num`` samples of each lead, scaled so that all of ``y`` lies in [-1, 1]; float32 as ``y`` is.

    ``extent`` is the unit of ``y``, in which the published 1e-8 is no part of a lead's range.
    """
    if y.device.type == "cpu" and _native_scale is not None:
        out = y.new_empty((*y.shape[:-1], num))
        _native_scale(y.flatten(0, 1), extent.flatten(), out.flatten(0, 1))
        return out
    low, high = y.amin(-1, keepdim=True), y.amax(-1, keepdim=True)
    unit = extent.clamp(min=torch.finfo(extent.dtype).tiny)
    return (y[..., :num] - low) * (2 * unit / ((high - low) * unit + 1e-8)).to(y.dtype) - 1


def _forward_backward(x: torch.Tensor, response: torch.Tensor, pad: int) -> torch.Tensor:
    """``scipy.signal.filtfilt`` for an impulse response: odd padding, and each pass starts in its steady state."""
    n, memory = x.shape[-1], len(response) - 1
    head = 2 * x[..., :1] - x[..., 1 : pad + 1].flip(-1)
    tail = 2 * x[..., -1:] - x[..., n - pad - 1 : n - 1].flip(-1)
    x = torch.cat([head, x, tail], -1)
    # The steady state of a first sample is that of a signal that always had its value.
    size = scipy.fft.next_fast_len(x.shape[-1] + memory, real=True)
    gain = torch.fft.rfft(response.to(x), size)
    for _ in range(2):
        held = torch.cat([x[..., :1].expand(*x.shape[:-1], memory), x], -1)
        x = torch.fft.irfft(torch.fft.rfft(held, size) * gain, size)[..., memory : held.shape[-1]].flip(-1)
    return x[..., pad : pad + n]


def _resample(x: torch.Tensor, num: int) -> torch.Tensor:
    """``scipy.signal.resample`` along the last axis."""
    n = x.shape[-1]
    if num == n:
        return x
    shared = min(num, n)
    spectrum = torch.fft.rfft(x, norm="forward")[..., : shared // 2 + 1]
    if shared % 2 == 0:
        # The bin at the lower Nyquist frequency stands for two bins on one side of the change, for one on the other.
        spectrum[..., -1] *= 2 if num < n else 0.5
    return torch.fft.irfft(spectrum, num, norm="forward")


def _decimate_flattened(x: torch.Tensor, factor: int) -> torch.Tensor:
    if factor == 1:
        return x
    num = x.shape[-1] // factor
    return _decimate(x[..., : num * factor].flatten(-2), factor).unflatten(-1, (len(LEADS), num))


def _decimate(x: torch.Tensor, factor: int) -> torch.Tensor:
    if factor == 1:
        return x
    x = x.to(torch.float64)
    if x.device.type == "cpu":
        return torch.from_numpy(scipy.signal.decimate(x.numpy(), factor).copy())
    return _forward_backward(x, *_anti_alias(factor))[..., ::factor]


@functools.lru_cache(maxsize=16)
def _anti_alias(factor: int) -> tuple[torch.Tensor, int]:
    """Impulse response of the decimation filter, as long as float64 can tell it from 0, and the padding of its run."""
    sos = scipy.signal.cheby1(8, 0.05, 0.8 / factor, output="sos")
    slowest = np.abs(scipy.signal.sos2zpk(sos)[1]).max()
    impulse = np.zeros(math.ceil(math.log(1e-15) / math.log(slowest)))
    impulse[0] = 1
    return torch.from_numpy(scipy.signal.sosfilt(sos, impulse)), 3 * (2 * len(sos) + 1)
