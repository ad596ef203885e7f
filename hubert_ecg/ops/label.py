"""Pseudo-labels in one pass over the signal: features of each frame, normalised, and the nearest centroid."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from hubert_ecg.ops import label_reference as reference
from hubert_ecg.ops import mfcc_reference
from hubert_ecg.ops._frames import NUM_LEADS, FramePlan, frame_plan
from hubert_ecg.ops._op import Array, Op, check_flag, check_whole, describe, takes_arrays
from hubert_ecg.ops._tables import unit_circle
from hubert_ecg.ops.mfcc import check_band

_NUM_MEL, _NUM_MFCC = 23, 13
# Bytes of a signal that are copied at a time where it cannot be read in place.
_COPY_BYTES = {"cpu": 3 << 20, "cuda": 256 << 20}

_frame_assign = Op(
    "frame_assign(Tensor ecg, Tensor? scale, Tensor centroids, str feature_type, int start, int num_frames, "
    "int frame_length, int[]? frames_per_lead, float sample_rate_hz, float low_hz, float high_hz, bool normalize) "
    "-> Tensor",
    reference.frame_assign,
)


@takes_arrays("ecg", "centroids", "scale")
def mfcc_assign(
    ecg: Array,
    centroids: Array,
    sample_rate_hz: float = 100,
    *,
    compat: str = "corrected",
    normalize: bool = True,
    scale: Array | None = None,
) -> Array:
    """The cluster of each token by its cepstral coefficients: signal in, labels out, no features in between.

    ``labels[b, t] = argmin_k |f_bt / |f_bt| - centroids[k]|^2`` with the 39 features f that
    ``hubert_ecg.features.extract(ecg, "mfcc", compat, sample_rate_hz)`` computes: 13 coefficients, their slopes and
    the slopes of these, in ``"corrected"`` form over the frames of a lead, in ``"published"`` form 0. Beyond its
    arguments and labels it takes the memory of a few records' features to a thread, whatever B is.

    Labels are those of the separate steps but where two centroids are equally far within the rounding of float32
    features. The lowest ``k`` wins a tie. A token whose features are not finite, as with NaN in its frame or, in
    corrected form, in a frame up to 4 beside it in the lead, gets label 0: look for NaN first where it may occur.
    Frames of padding get labels like any other.

    >>> mfcc_assign(torch.zeros(12, 500), torch.zeros(3, 39)).shape
    torch.Size([93])

    Args:
        ecg: ``[12, T]`` or ``[B, 12, T]``, preprocessed, at ``sample_rate_hz``: any floating dtype, computed in
            float32, or int16 with ``scale``. T is free, and 5 s with ``compat="published"``. Read in place where it is
            contiguous and ``compat`` is "corrected", else copied some records at a time.
        centroids: ``[K, 39]`` of any floating dtype, on the device of ``ecg``; rounded to float32.
        sample_rate_hz: 100, 50 or 500.
        compat: "corrected" or "published", as in ``features.extract``.
        normalize: scale features to Euclidean length 1 first, as ``KMeans(normalize=True)`` does; zeros stay.
        scale: units per step of an int16 ``ecg``, of each lead: ``[12]`` or ``[B, 12]`` floating point. The signal is
            ``ecg * scale`` in float32: this is how the packed store holds it.

    Returns:
        labels, ``[N]`` or ``[B, N]`` int64, N the number of tokens.

    Raises:
        ValueError: a wrong shape, dtype, device or rate, named with what was given.
    """
    return _assign("mfcc", ecg, centroids, sample_rate_hz, compat, normalize, scale)


@takes_arrays("ecg", "centroids", "scale")
def time_freq_assign(
    ecg: Array,
    centroids: Array,
    sample_rate_hz: float = 100,
    *,
    compat: str = "corrected",
    normalize: bool = True,
    scale: Array | None = None,
) -> Array:
    """The cluster of each token by its 16 time-frequency features: :func:`mfcc_assign` with :func:`time_freq`.

    >>> time_freq_assign(torch.zeros(2, 12, 500), torch.eye(16)[:3]).shape
    torch.Size([2, 93])

    Args:
        ecg: as in :func:`mfcc_assign`.
        centroids: ``[K, 16]`` of any floating dtype.
        sample_rate_hz: 100, 50 or 500.
        compat: "corrected" or "published".
        normalize: scale features to Euclidean length 1 first.
        scale: units per step of an int16 ``ecg``.

    Returns:
        labels, ``[N]`` or ``[B, N]`` int64.

    Raises:
        ValueError: a wrong shape, dtype, device or rate, named with what was given.
    """
    return _assign("time_freq", ecg, centroids, sample_rate_hz, compat, normalize, scale)


@takes_arrays("ecg", "centroids", "scale")
def mixed_assign(
    ecg: Array,
    centroids: Array,
    sample_rate_hz: float = 100,
    *,
    compat: str = "corrected",
    normalize: bool = True,
    scale: Array | None = None,
) -> Array:
    """The cluster of each token by 16 time-frequency features and 13 cepstral coefficients, as :func:`mfcc_assign`.

    >>> mixed_assign(torch.zeros(12, 50), torch.eye(29)[:3]).shape
    torch.Size([9])

    Args:
        ecg: as in :func:`mfcc_assign`.
        centroids: ``[K, 29]`` of any floating dtype.
        sample_rate_hz: 100, 50 or 500.
        compat: "corrected" or "published".
        normalize: scale features to Euclidean length 1 first.
        scale: units per step of an int16 ``ecg``.

    Returns:
        labels, ``[N]`` or ``[B, N]`` int64.

    Raises:
        ValueError: a wrong shape, dtype, device or rate, named with what was given.
    """
    return _assign("mixed", ecg, centroids, sample_rate_hz, compat, normalize, scale)


@takes_arrays("ecg", "scale", "centroids")
def frame_assign(
    ecg: Array,
    scale: Array | None,
    centroids: Array,
    feature_type: str,
    start: int,
    num_frames: int,
    frame_length: int,
    frames_per_lead: Sequence[int] | None,
    sample_rate_hz: float,
    low_hz: float,
    high_hz: float,
    normalize: bool,
) -> Array:
    """The nearest centroid to the features of each frame; :func:`mfcc_assign` and its like choose the frames.

    Frame t of a record are the samples ``ecg[start + t frame_length :][:frame_length]``.

    >>> frame_assign(torch.zeros(1, 300), None, torch.eye(16), "time_freq", 20, 4, 64, None, 100.0, 0.5, 50.0, True)
    tensor([[0, 0, 0, 0]])

    Args:
        ecg: ``[B, n]``, leads end to end: any floating dtype, computed in float32, or int16 with ``scale``.
        scale: units per step of an int16 ``ecg``, of each of L equally long leads: ``[B, L]``; else None.
        centroids: ``[K, D]`` of any floating dtype, rounded to float32; D is 39 for "mfcc", 16 for "time_freq" and 29
            for "mixed".
        feature_type: "mfcc", "time_freq" or "mixed".
        start: samples before the first frame.
        num_frames: N.
        frame_length: samples of a frame, at least 2.
        frames_per_lead: how many frames belong to each lead, in order, for the slopes of "mfcc"; None for slopes of 0.
        sample_rate_hz: sampling rate in Hz.
        low_hz: where the lowest mel filter begins, in Hz.
        high_hz: where the highest ends, in Hz; at most 0 counts from the Nyquist frequency.
        normalize: scale features to Euclidean length 1 first.

    Returns:
        labels, ``[B, N]`` int64.

    Raises:
        ValueError: a wrong shape, dtype, device or band, named with what was given.
    """
    op = "frame_assign"
    if feature_type not in reference.WIDTHS:
        raise ValueError(f"{op}: feature_type must be one of {sorted(reference.WIDTHS)}, got {feature_type!r}")
    if ecg.ndim != 2:
        raise ValueError(f"{op}: ecg must be leads end to end, [B, n], got {describe(ecg)}")
    _check_numbers(op, feature_type, ecg, centroids, scale)
    if scale is not None and (scale.ndim != 2 or len(scale) != len(ecg) or _leaves_rest(ecg.shape[1], scale.shape[1])):
        want = f"floating point [{len(ecg)}, L] with an L that divides {ecg.shape[1]}"
        raise ValueError(f"{op}: scale must be {want}, got {describe(scale)}")
    for name, value in (("start", start), ("num_frames", num_frames), ("frame_length", frame_length)):
        check_whole(f"{op}: {name}", value)
    check_flag(f"{op}: normalize", normalize)
    if frame_length < 2:
        raise ValueError(f"{op}: frame_length must be at least 2, got {frame_length}")
    if start < 0 or num_frames < 0 or start + num_frames * frame_length > ecg.shape[1]:
        given = f"{start} + {num_frames} x {frame_length}"
        raise ValueError(f"{op}: frames must lie in the {ecg.shape[1]} samples of a record, got {given}")
    lengths = None if frames_per_lead is None else [int(length) for length in frames_per_lead]
    if lengths is not None and (sum(lengths) != num_frames or min(lengths, default=0) < 0):
        raise ValueError(f"{op}: frames_per_lead must be 0 or more and add up to {num_frames}, got {lengths}")
    check_band(op, sample_rate_hz, low_hz, high_hz)
    how = (feature_type, start, num_frames, frame_length, lengths, sample_rate_hz, low_hz, high_hz, normalize)
    return _frame_assign.call(ecg.detach(), scale, centroids.detach().float(), *how)


def _assign(
    feature_type: str,
    ecg: Tensor,
    centroids: Tensor,
    sample_rate_hz: float,
    compat: str,
    normalize: bool,
    scale: Tensor | None,
) -> Tensor:
    op = f"{feature_type}_assign"
    plan = frame_plan(op, ecg, compat, sample_rate_hz)
    check_flag(f"{op}: normalize", normalize)
    _check_numbers(op, feature_type, ecg, centroids, scale)
    if scale is not None and scale.shape != ecg.shape[:-1]:
        raise ValueError(f"{op}: scale must be floating point {list(ecg.shape[:-1])}, got {describe(scale)}")
    records, units, centroids = ecg.detach(), None if scale is None else scale.detach(), centroids.detach().float()
    if ecg.ndim == 2:
        records, units = records[None], None if units is None else units[None]
    if plan.trims is None and records.is_contiguous():
        labels = _labels(feature_type, plan, records.flatten(1), units, centroids, normalize)
    else:
        labels = ecg.new_empty(len(records), plan.num_frames, dtype=torch.int64)
        step = max(1, _COPY_BYTES[ecg.device.type] // (max(4, ecg.element_size()) * NUM_LEADS * ecg.shape[-1]))
        for first in range(0, len(records), step):
            some = slice(first, first + step)
            part, per_lead = records[some], None if units is None else units[some]
            if plan.trims is not None and per_lead is not None:
                # Trimmed leads need not be equally long.
                part, per_lead = part * per_lead.float()[..., None], None
            labels[some] = _labels(feature_type, plan, plan.joined(part), per_lead, centroids, normalize)
    return labels[0] if ecg.ndim == 2 else labels


def _labels(
    feature_type: str, plan: FramePlan, ecg: Tensor, scale: Tensor | None, centroids: Tensor, normalize: bool
) -> Tensor:
    frames = (plan.start, plan.num_frames, plan.frame_length, plan.frames_per_lead)
    band = (float(plan.sample_rate_hz), *plan.band_hz)
    return _frame_assign.call(ecg, scale, centroids, feature_type, *frames, *band, normalize)


def _check_numbers(op: str, feature_type: str, ecg: Tensor, centroids: Tensor, scale: Tensor | None) -> None:
    """What the dtypes, the devices and the width of the centroids must be."""
    if not ecg.is_floating_point() and ecg.dtype != torch.int16:
        raise ValueError(f"{op}: ecg must be floating point or int16 with scale, got {describe(ecg)}")
    if (scale is None) != ecg.is_floating_point():
        if scale is None:
            rows = list(ecg.shape[:-1]) if ecg.ndim != 2 or op != "frame_assign" else f"[{len(ecg)}, L]"
            raise ValueError(f"{op}: scale must be floating point {rows} for an ecg of int16, got None")
        dtype = str(ecg.dtype).removeprefix("torch.")
        raise ValueError(f"{op}: scale must be None for an ecg of {dtype}, got {describe(scale)}")
    if scale is not None and not scale.is_floating_point():
        raise ValueError(f"{op}: scale must be floating point, got {describe(scale)}")
    width = reference.WIDTHS[feature_type]
    if not centroids.is_floating_point() or centroids.ndim != 2 or not len(centroids) or centroids.shape[1] != width:
        want = f"floating point [K, {width}] with K > 0 for {feature_type} features"
        raise ValueError(f"{op}: centroids must be {want}, got {describe(centroids)}")
    for name, given in (("centroids", centroids), ("scale", scale)):
        if given is not None and given.device != ecg.device:
            raise ValueError(f"{op}: {name} must be on the device of ecg ({ecg.device}), got {given.device}")


def _leaves_rest(num_samples: int, num_leads: int) -> bool:
    return not num_leads or num_samples % num_leads != 0


@functools.lru_cache(maxsize=64)
def _lead_ends(frames_per_lead: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each lead ends among the frames: [L] int64."""
    return torch.tensor(frames_per_lead, dtype=torch.int64).cumsum(0).to(device)


@_frame_assign.fake
def _(ecg, scale, centroids, feature_type, start, num_frames, *how):
    return ecg.new_empty(ecg.shape[0], num_frames, dtype=torch.int64)


@_frame_assign.native
def _(
    kernel,
    ecg,
    scale,
    centroids,
    feature_type,
    start,
    num_frames,
    frame_length,
    frames_per_lead,
    sample_rate_hz,
    low_hz,
    high_hz,
    normalize,
):
    labels = ecg.new_empty(ecg.shape[0], num_frames, dtype=torch.int64)
    if not labels.numel():
        return labels
    place = (torch.float64, ecg.device)
    none = torch.empty(0, dtype=torch.float64, device=ecg.device)
    window = circle = bank = dct = frame_circle = none
    if feature_type != "time_freq":
        band = (sample_rate_hz, low_hz, high_hz, _NUM_MEL, _NUM_MFCC)
        window, bank, dct = mfcc_reference.tables(frame_length, *band, *place)
        circle = unit_circle(2 * bank.shape[1], *place)
    if feature_type != "mfcc":
        frame_circle = unit_circle(frame_length, *place)
    kernel(
        ecg.contiguous(),
        torch.empty(0, dtype=torch.float32, device=ecg.device) if scale is None else scale.float().contiguous(),
        centroids.float().contiguous(),
        window,
        circle,
        bank,
        dct,
        frame_circle,
        _lead_ends(tuple(frames_per_lead or ()), ecg.device),
        labels,
        list(reference.WIDTHS).index(feature_type),
        start,
        frame_length,
        normalize,
    )
    return labels
