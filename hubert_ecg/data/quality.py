"""What is odd about a recording, from its raw samples: facts for the index of a store, which nothing acts on.

**Flat** is a lead of one value; **partly flat** one that holds a value for 1 s and longer; a lead with **gaps** has
missing samples. A lead is **clipped** where it reaches its highest or lowest value steeply, stays there for 3 samples
and longer, and leaves steeply: twice, or once for 40 ms. A peak of few bits stays as long, but is reached in steps of
few bits. Clipping that was filtered or resampled afterwards is not seen.

**Limb leads** are two numbers seen from six sides: II = I + III (Einthoven), aVR = -(I + II) / 2, aVL = I - II / 2 and
aVF = II - I / 2 (Goldberger). What of them lies outside that plane, as a share of their size, is the limb residual. It
is large where columns have each other's names or a wrong sign; the one exchange or sign that brings the leads back
into the plane is named.

**Electrodes** of the arms and the left leg that are exchanged keep that law, and change the six leads in known ways
(Batchvarov et al., Europace 9, 2007). The chest leads, whose reference is the mean of the three, stay as they are, and
the heart is nearly a dipole, so that they tell what leads I and II should be (Kors and van Herpen, J Electrocardiol
34 suppl., 2001). An exchange is suspected where it explains the limb leads better than none does. The weights were
fitted to 489 recordings of PTB-XL, CPSC, Georgia, Chapman/Ningbo, CODE-15%, SaMi-Trop, LUDB and SPH by
``benchmarks/electrodes.py``, which also says, in five-fold cross-validation on them: 97 % of exchanged arms are found,
97 % of RA with LL, and 9 % of LA with LL, which hardly change a normal ECG; 4 of the 489 are suspected as they were.
How much better an exchange must be was chosen on the same recordings. Dextrocardia looks like exchanged arms. An arm
exchanged with the right leg leaves a lead between both legs, which is nearly flat: II for RA, III for LA, I for both.

All of it is computed from differences over 40 ms, which know no base line, and every 2 s weigh alike, so that an
artefact weighs no more than any other beat.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from typing import Any

import numpy as np

from hubert_ecg.data.record import LIMB, Record, lead_name
from hubert_ecg.signal import LEADS

# A lead that stays at its extreme: samples, share of its range that it moves within two samples before and after,
# steps of its resolution that this must be, and how long a single such stay must be.
_CLIPPED_SAMPLES, _CLIPPED_JUMP, _CLIPPED_STEPS, _CLIPPED_ONCE_S = 3, 0.02, 8, 0.04
_WINDOW_S = 0.5
_LAG_S, _SEGMENT_S = 0.04, 2.0
# Residuals above which columns are tried in other ways, and share of it that the right one must leave, others not.
_RESIDUAL, _MENDED, _OTHERS = 0.1, 0.4, 1.5
# Share of the largest of leads I, II and III below which one lies between both legs.
_BETWEEN_LEGS = {"I": "RA and LA with both legs", "II": "RA-RL", "III": "LA-RL"}
_NEARLY_FLAT = 0.1
# Leads I and II from V1 to V6.
_FROM_CHEST = np.array(
    [[-0.481, 0.206, 0.020, -0.030, 0.043, 0.272], [-0.149, -0.093, 0.106, 0.108, -0.032, 0.341]], np.float64
)
# How many times better than none an exchange of electrodes must explain leads I and II, and what these are, in terms of
# what is recorded, with each.
_SWAPS, _TIMES_BETTER = ("", "RA-LA", "RA-LL", "LA-LL"), (1.0, 1.2, 1.2, 1.5)
_TRUE = np.array([[[1, 0], [0, 1]], [[-1, 0], [-1, 1]], [[1, -1], [0, -1]], [[0, 1], [1, 0]]], np.float64)
_NUM_LIMB, _CHEST = len(LIMB), slice(6, 12)

# Columns of facts() that name leads.
LEAD_FAULTS = ("flat_leads", "partly_flat_leads", "clipped_leads", "gap_leads")
HASH_S, HASH_RATE_HZ = 5.0, 100.0
# Leads that no others give.
HASH_LEADS = (0, 1, 6, 7, 8, 9, 10, 11)
HASH_BITS = 32
NUM_HASH_BYTES = len(HASH_LEADS) * HASH_BITS // 8


def facts(record: Record, leads: np.ndarray, present: np.ndarray) -> dict[str, Any]:
    """Columns of the index.

    Args:
        record: The recording as its file has it.
        leads: ``[12, n]`` float in mV, its standard leads; NaN or infinite where a sample is missing.
        present: ``[12] bool``, which of them were measured or derived.

    Returns:
        ``flat_leads``, ``partly_flat_leads``, ``clipped_leads`` and ``gap_leads``, names of leads;
        ``num_missing_samples``; ``size_mv``, the median over the leads of the range of a beat; ``limb_residual``, None
        for fewer than three limb leads; ``limb_mend`` and ``suspected_swap``, None where there is none.
    """
    rate = record.sampling_rate_hz
    missing = ~np.isfinite(leads)
    gaps = missing.any(1)
    signal = leads if not gaps.any() else np.where(missing, np.float32(0), leads)
    low, high = _extremes(leads, missing, gaps)
    flat = present & (low == high)
    width = max(1, round(_WINDOW_S * rate))
    windows = leads[:, : leads.shape[1] // width * width].reshape(len(leads), -1, width)
    tops, bottoms = windows.max(2), windows.min(2)
    still = tops == bottoms
    partly = (still[:, 1:] & still[:, :-1] & (tops[:, 1:] == tops[:, :-1])).any(1) & present & ~flat
    ranges = (tops - bottoms)[present & ~flat]
    ranges = np.sort(np.where(np.isfinite(ranges), ranges, 0), axis=1)
    size = float(np.median(ranges[:, 3 * ranges.shape[1] // 4])) if ranges.size else 0.0
    clipped = _clipped(leads, low, high, present & ~flat, rate)
    measured = present & _recorded(record.lead_names)
    gram = _gram(signal, missing[present].any(0) if gaps.any() else None, rate)
    residual, mend = _limb_law(gram, measured & ~flat)
    return {
        "flat_leads": _names(flat),
        "partly_flat_leads": _names(partly),
        "clipped_leads": _names(clipped),
        "gap_leads": _names(gaps & present),
        "num_missing_samples": int(missing.sum()),
        "size_mv": size,
        "limb_residual": residual,
        "limb_mend": mend,
        "suspected_swap": None if mend else _suspected_swap(gram, present, flat),
    }


def signal_hash(signal: np.ndarray, rate_hz: float) -> bytes:
    """32 bits for each of :data:`HASH_LEADS`, in which two copies of a recording are nearly alike.

    A bit is the sign of a sum: of the differences over 40 ms in a lead's first 5 s at 100 Hz, each with a sign of its
    own (Charikar, Similarity estimation techniques from rounding algorithms, STOC 2002). It knows nothing of unit,
    offset, bits of a sample, or format, and little of the rate. A lead without signal has zeros.

    Args:
        signal: ``[12, T]`` float, after preprocessing; 0 in leads that are absent.
        rate_hz: Its rate, 100 Hz or a multiple; others are taken as they are.

    Returns:
        32 bytes.
    """
    leads = signal[list(HASH_LEADS)]
    step = max(1, round(rate_hz / HASH_RATE_HZ))
    if step > 1:
        leads = leads[:, : leads.shape[1] // step * step].reshape(len(leads), -1, step).mean(2)
    moves = differences(leads[:, : round(HASH_S * HASH_RATE_HZ)], HASH_RATE_HZ)
    bits = moves.astype(np.float32) @ _hash_signs()[: moves.shape[1]] > 0
    return np.packbits(bits, axis=1).tobytes()


def differences(signal: np.ndarray, rate_hz: float) -> np.ndarray:
    """Of samples ``[..., T]`` that are 40 ms apart: no base line, no mains, and most of a QRS complex."""
    lag = max(1, round(_LAG_S * rate_hz))
    return signal[..., lag:] - signal[..., :-lag]


@functools.cache
def _hash_signs() -> np.ndarray:
    count = round(HASH_S * HASH_RATE_HZ)
    # Of a hash: the same in every version of every library.
    bits = np.frombuffer(hashlib.shake_128(b"signal hash").digest(count * HASH_BITS // 8), np.uint8)
    return (2.0 * np.unpackbits(bits).reshape(count, HASH_BITS) - 1).astype(np.float32)


@functools.lru_cache(maxsize=256)
def _recorded(lead_names: tuple[str, ...]) -> np.ndarray:
    return np.isin(LEADS, [lead_name(name) or "" for name in lead_names])


def _names(which: np.ndarray) -> list[str]:
    return [LEADS[lead] for lead in np.flatnonzero(which)]


def _extremes(leads: np.ndarray, missing: np.ndarray, gaps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if not gaps.any():
        return leads.min(1), leads.max(1)
    return np.where(missing, np.inf, leads).min(1), np.where(missing, -np.inf, leads).max(1)


def _clipped(leads: np.ndarray, low: np.ndarray, high: np.ndarray, usable: np.ndarray, rate: float) -> np.ndarray:
    """Which leads come to an extreme of theirs, stay and leave as clipped ones do."""
    clipped = np.zeros(len(leads), dtype=bool)
    flat, length = leads.reshape(-1), leads.shape[1]
    for extreme in (low, high):
        # Zero is what leads are padded with, and no rail.
        wanted = np.where(usable & (extreme != 0), extreme, np.inf).astype(leads.dtype)
        at = np.flatnonzero((leads == wanted[:, None]).reshape(-1))
        first, last = at[np.diff(at, prepend=-2) > 1], at[np.diff(at, append=flat.size + 1) > 1]
        long = last - first >= _CLIPPED_SAMPLES - 1
        first, last = first[long], last[long]
        # A stay at an end of the record may be padding.
        inside = (first % length >= 2) & (last % length < length - 2) & (first // length == last // length)
        first, last = first[inside], last[inside]
        lead = first // length
        moves = np.minimum(np.abs(flat[first - 2] - extreme[lead]), np.abs(flat[last + 2] - extreme[lead]))
        steep = moves >= _CLIPPED_JUMP * (high - low)[lead]
        enough = steep & (last - first + 1 >= _CLIPPED_ONCE_S * rate)
        for one in np.flatnonzero(np.bincount(lead, 1 * steep + enough, len(leads)) >= 2):
            steps = np.diff(np.unique(leads[one]))
            # Steps of a unit's rounding are none.
            step = steps[steps > 1e-6 * (high - low)[one]].min()
            clear = (lead == one) & (moves >= _CLIPPED_STEPS * step)
            clipped[one] |= bool((clear & steep).sum() >= 2 or (clear & enough).any())
    return clipped


def _gram(signal: np.ndarray, missing: np.ndarray | None, rate: float) -> np.ndarray:
    """Products of the leads' differences, ``[12, 12] float64``; each segment adds up to 1."""
    moves = differences(signal, rate)
    if missing is not None:
        lag = signal.shape[1] - moves.shape[1]
        moves[:, missing[lag:] | missing[:-lag]] = 0
    width = min(moves.shape[1], round(_SEGMENT_S * rate))
    count = moves.shape[1] // width
    segments = moves[:, : count * width].reshape(len(moves), count, width).transpose(1, 0, 2)
    grams = (segments @ segments.transpose(0, 2, 1)).astype(np.float64)
    total = np.trace(grams, axis1=1, axis2=2)
    return (grams / np.where(total > 0, total, 1)[:, None, None]).sum(0)


def _limb_law(gram: np.ndarray, measured: np.ndarray) -> tuple[float | None, str | None]:
    """The share of the limb leads outside their plane, and what would bring them back into it."""
    limb = tuple(np.flatnonzero(measured[:_NUM_LIMB]).tolist())
    if len(limb) < 3:
        return None, None
    outside, names, changes = _limb_plane(limb)
    of_limb = gram[limb, :][:, limb]
    size = np.trace(of_limb)
    if not size > 0:
        return None, None
    residual = float(np.sqrt(max((outside * of_limb).sum(), 0.0) / size))
    if residual < _RESIDUAL:
        return residual, None
    changed = changes @ of_limb @ changes.transpose(0, 2, 1)
    left = np.sqrt(np.maximum((outside * changed).sum((1, 2)), 0) / size)
    best = left.min()
    mends = left <= max(_OTHERS * best, 1e-3 * residual)
    # Of three leads, an exchange and a sign may do the same; more is no answer.
    if best > _MENDED * residual or mends.sum() > 3:
        return residual, None
    return residual, " or ".join(names[place] for place in np.flatnonzero(mends))


@functools.cache
def _limb_plane(limb: tuple[int, ...]) -> tuple[np.ndarray, list[str], np.ndarray]:
    """What projects these limb leads out of their plane; names and matrices of changes that may bring them back."""
    names = [LEADS[lead] for lead in limb]
    basis = np.array([LIMB[name] for name in names])
    outside = np.eye(len(limb)) - basis @ np.linalg.pinv(basis)
    told, changes = [], []
    for place, name in enumerate(names):
        change = np.eye(len(limb))
        change[place, place] = -1
        told.append(f"{name} inverted")
        changes.append(change)
    for one, other in itertools.combinations(range(len(limb)), 2):
        change = np.eye(len(limb))
        change[[one, other]] = change[[other, one]]
        told.append(f"{names[one]} and {names[other]} exchanged")
        changes.append(change)
    return outside, told, np.array(changes)


def _suspected_swap(
    gram: np.ndarray, present: np.ndarray, flat: np.ndarray, from_chest: np.ndarray = _FROM_CHEST
) -> str | None:
    if not (present & ~flat)[[0, 1]].all():
        return None
    of_limb = gram[:2, :2]
    powers = np.array([of_limb[0, 0], of_limb[1, 1], of_limb[0, 0] + of_limb[1, 1] - 2 * of_limb[0, 1]])
    if not powers.max() > 0:
        return None
    for lead, power in zip(("I", "II", "III"), powers, strict=True):
        if power < _NEARLY_FLAT**2 * powers.max():
            return _BETWEEN_LEGS[lead]
    if not (present & ~flat)[_CHEST].all():
        return None
    # Leads I and II as they would be with each exchange undone, less what the chest leads say, of the twelve leads.
    undone = np.concatenate([_TRUE, np.zeros((4, 2, 4)), np.broadcast_to(-from_chest, (4, 2, 6))], axis=2)
    errors = np.sqrt(np.maximum((undone @ gram * undone).sum((1, 2)), 0))
    best = int(errors.argmin())
    return _SWAPS[best] if best and errors[0] > _TIMES_BETTER[best] * errors[best] else None
