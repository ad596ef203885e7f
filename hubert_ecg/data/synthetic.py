"""Twelve-lead ECGs that the package makes itself, with labels that follow from how each was made.

A recording is made in two steps. The plan holds all that is known of it: who the patient is, when each beat falls and
with which waves, hence heart rate, QRS duration, ST level and labels; a plan whose facts do not give the labels asked for
is drawn again. Rendering adds up the dipole, lets breathing turn it, and puts the noise on the electrodes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from hubert_ecg.data import synthetic_dipole as dipole
from hubert_ecg.data.synthetic_dipole import Waves
from hubert_ecg.data.synthetic_patient import Patient, conducted_beat, draw_patient, ectopic_beat, spread
from hubert_ecg.signal import LEADS

LABELS = ("AFIB", "CLBBB", "CRBBB", "NORM", "PVC", "SBRAD", "SR", "STACH", "STE")
RHYTHMS = ("AFIB", "SBRAD", "SR", "STACH")
CONDUCTIONS = ("CLBBB", "CRBBB")

# Mean rates are drawn from these; what then counts is the rate of the beats in the recording.
_DRAWN_RATE_BPM = {"SR": (60.5, 99.5), "SBRAD": (38.0, 59.5), "STACH": (100.5, 150.0), "AFIB": (62.0, 155.0)}
_MAX_ECTOPIC_RATE_BPM = 125.0
# Coefficients of variation of RR that keep fibrillation and sinus rhythm apart.
_AFIB_MIN_CV, _SINUS_MAX_CV = 0.11, 0.085
# The converter's step, about 1 uV: a power of two, so that sums and halves of potentials are exact in float32.
_STEP_MV = 2.0**-10
# What a beat covers, from the onset of its QRS.
_BEAT_START_S, _BEAT_END_S = -0.32, 0.68
_MAX_DRAWS = 1000


@dataclasses.dataclass(frozen=True)
class Beats:
    """All beats of one kind: their waves, and for each its onset of QRS in s, QT relative to the mean, and amplitude."""

    waves: Waves
    onset_s: np.ndarray
    stretch: np.ndarray
    gain: np.ndarray


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known of a recording before it is rendered.

    Args:
        labels: In the order of ``LABELS``.
        facts: What can be measured in it, as plain numbers, strings and lists.
        patient: Whose heart it is.
        beats: The beats of each kind.
        breath: Rate of breathing in Hz, and its phase.
        duration_s: Length of the recording.
    """

    labels: tuple[str, ...]
    facts: dict[str, Any]
    patient: Patient
    beats: tuple[Beats, ...]
    breath: tuple[float, float]
    duration_s: float


@dataclasses.dataclass(frozen=True)
class _Rhythm:
    """When beats fall: R peaks in s of those conducted, of those blocked after the atria, and of premature ones."""

    conducted: np.ndarray
    blocked: np.ndarray
    premature: np.ndarray
    rate_bpm: float
    cv: float


def _rr_intervals(rng: np.random.Generator, rhythm: str, mean_s: float, count: int, breath: tuple[float, float]) -> np.ndarray:
    if rhythm == "AFIB":
        # The node lets through what comes after it has recovered: a floor, then no memory.
        floor = max(0.28, 0.5 * mean_s)
        shape = rng.uniform(2.0, 5.0)
        return floor + (mean_s - floor) * rng.gamma(shape, 1 / shape, count)
    time = mean_s * np.arange(count)
    breathing = rng.uniform(0.0, 0.015) if rhythm == "STACH" else rng.uniform(0.005, 0.075)
    # Besides breathing, the pressure reflex at 0.1 Hz.
    swing = breathing * np.sin(2 * np.pi * breath[0] * time + breath[1])
    swing += rng.uniform(0.002, 0.02) * np.sin(0.2 * np.pi * time + rng.uniform(0, 2 * np.pi))
    return mean_s * (1 + swing + rng.normal(0, 0.006, count))


def _choose_premature(rng: np.random.Generator, times: np.ndarray, duration_s: float) -> np.ndarray:
    """Chooses the beats that a premature one follows: every second, every third, or now and then."""
    usable = np.flatnonzero((times[:-1] > 0.3) & (times[1:] < duration_s - 0.3))
    pattern = rng.choice(3, p=[0.2, 0.2, 0.6])
    if pattern < 2:
        step = 2 + int(pattern)
        return usable[rng.integers(step) :: step]
    usable = usable[rng.integers(2) :: 2]
    return np.sort(rng.choice(usable, min(len(usable), int(rng.integers(1, 6))), replace=False))


def _draw_rhythm(
    rng: np.random.Generator, rhythm: str, premature: bool, qtc_s: float, duration_s: float, breath: tuple[float, float]
) -> _Rhythm:
    low, high = _DRAWN_RATE_BPM[rhythm]
    mean_s = 60 / rng.uniform(low, min(high, _MAX_ECTOPIC_RATE_BPM) if premature else high)
    margin_s = 1.5
    count = int((duration_s + 2 * margin_s) / mean_s * 1.6) + 8
    times = -margin_s - mean_s * rng.random() + np.cumsum(_rr_intervals(rng, rhythm, mean_s, count, breath))
    times = times[times < duration_s + margin_s]
    inside = times[(times >= 0) & (times < duration_s)]
    rr = np.diff(inside)
    rate, cv = 60 / rr.mean(), rr.std() / rr.mean()
    if not premature:
        return _Rhythm(times, times[:0], times[:0], float(rate), float(cv))

    before = _choose_premature(rng, times, duration_s)
    gap = np.minimum(np.diff(times)[before], mean_s)
    qt_s = qtc_s * np.cbrt(mean_s)
    early = times[before] + gap * np.clip(max(rng.uniform(0.50, 0.66), 0.95 * qt_s / mean_s), 0.0, 0.74)
    # The sinus node keeps its time: the beat after a premature one finds the ventricles refractory.
    lost = np.zeros(len(times), dtype=bool)
    lost[before + 1] = True
    if rhythm == "AFIB":
        since = times[:, None] - early
        lost |= ((since > 0) & (since < 0.9 * mean_s)).any(axis=1)
    return _Rhythm(times[~lost], times[lost], early, float(rate), float(cv))


def _rhythm_of(rate_bpm: float, fibrillating: bool) -> str:
    if fibrillating:
        return "AFIB"
    return "SBRAD" if rate_bpm < 60 else "STACH" if rate_bpm > 100 else "SR"


def _peak_s(waves: Waves) -> float:
    """When the dipole of a beat is largest after the onset of QRS, which is where its R peak is."""
    time = np.arange(0.0, 0.2, 0.001)
    return float(time[np.argmax(np.linalg.norm(waves.at(time[None])[0], axis=1))])


def check_labels(labels: Sequence[str]) -> tuple[str, str, bool, bool]:
    """Reads a set of labels as rhythm, conduction, premature beats and ST elevation.

    Args:
        labels: Some of ``LABELS``. Without a rhythm, sinus rhythm is meant.

    Raises:
        ValueError: A label is not known, or two cannot stand together.
    """
    name, given = "generate_ecg: labels", ", ".join(labels)
    unknown = sorted(set(labels) - set(LABELS))
    if unknown:
        raise ValueError(f"{name} must be among {', '.join(LABELS)}, got {', '.join(unknown)}")
    rhythms = [label for label in RHYTHMS if label in labels] or ["SR"]
    conductions = [label for label in CONDUCTIONS if label in labels] or ["normal"]
    if len(rhythms) > 1 or len(conductions) > 1:
        raise ValueError(f"{name} must hold one rhythm and one bundle branch block at most, got {given}")
    if {"CLBBB", "STE"} <= set(labels):
        raise ValueError(f"{name} must not hold STE with CLBBB, which elevates ST itself, got {given}")
    if "NORM" in labels and set(labels) - {"NORM", "SR"}:
        raise ValueError(f"{name} must not hold NORM with a finding, got {given}")
    return rhythms[0], conductions[0], "PVC" in labels, "STE" in labels


def draw_plan(
    rng: np.random.Generator, patient: Patient, rhythm: str, premature: bool, elevated: bool, duration_s: float
) -> Plan:
    """Draws what happens in a recording.

    Args:
        rng: Source of chance.
        patient: Whose heart it is, conduction included.
        rhythm: One of ``RHYTHMS``.
        premature: Whether there are ventricular premature beats.
        elevated: Whether ST is elevated.
        duration_s: Length of the recording.
    """
    breath = (float(rng.uniform(0.2, 0.35)), float(rng.uniform(0, 2 * np.pi)))
    for _ in range(_MAX_DRAWS):
        drawn = _draw_rhythm(rng, rhythm, premature, patient.qtc_s, duration_s, breath)
        regular = drawn.cv >= _AFIB_MIN_CV if rhythm == "AFIB" else drawn.cv <= _SINUS_MAX_CV
        if regular and _rhythm_of(drawn.rate_bpm, rhythm == "AFIB") == rhythm and premature == bool(len(drawn.premature)):
            break
    else:
        raise AssertionError(f"no {rhythm} came out of {_MAX_DRAWS} draws")

    mean_rr = 60 / drawn.rate_bpm
    qt_s = patient.qtc_s * np.cbrt(mean_rr)
    pr_s = max(patient.pr_s * mean_rr**0.2, 0.122)
    territory = str(rng.choice(list(dipole.INJURY))) if elevated else None
    conducted = conducted_beat(rng, patient, float(qt_s), territory)
    r_delay = _peak_s(patient.qrs)
    # QT follows the interval before the beat, but slowly.
    before = np.diff(drawn.conducted, prepend=drawn.conducted[0] - mean_rr)
    kinds = [(conducted, drawn.conducted - r_delay, np.clip((before / mean_rr) ** 0.15, 0.85, 1.1))]
    if rhythm != "AFIB":
        atria = dataclasses.replace(patient.p_wave, centre=patient.p_wave.centre - pr_s)
        onsets = np.concatenate([drawn.conducted, drawn.blocked]) - r_delay
        kinds.append((atria, onsets, np.ones(len(onsets))))
    ectopic_s, origin = None, None
    if premature:
        ectopic, ectopic_s, origin = ectopic_beat(rng, patient, float(qt_s))
        kinds.append((ectopic, drawn.premature - _peak_s(ectopic), np.ones(len(drawn.premature))))
    beats = tuple(Beats(*kind, gain=1 + rng.normal(0, 0.02, len(kind[1]))) for kind in kinds)

    st_levels = patient.st_levels_mv(conducted)
    labels = {rhythm}
    labels |= {patient.conduction} if patient.qrs_s > 0.120 else set()
    labels |= {"PVC"} if premature else set()
    labels |= {"STE"} if patient.conduction != "CLBBB" and dipole.st_ratio(st_levels) >= 1 else set()
    labels |= {"NORM"} if labels == {"SR"} else set()

    def within(times: np.ndarray) -> list[float]:
        return [float(time) for time in np.sort(times) if 0 <= time < duration_s]

    facts = {
        "rhythm": rhythm,
        "heart_rate_bpm": drawn.rate_bpm,
        "rr_cv": drawn.cv,
        "r_times_s": within(np.concatenate([drawn.conducted, drawn.premature])),
        "premature_times_s": within(drawn.premature),
        "premature_origin": origin,
        "premature_qrs_ms": None if ectopic_s is None else 1000 * ectopic_s,
        "conduction": patient.conduction,
        "qrs_ms": 1000 * patient.qrs_s,
        "qrs_onset_before_r_ms": 1000 * r_delay,
        "pr_ms": None if rhythm == "AFIB" else 1000 * pr_s,
        "qt_ms": float(1000 * qt_s),
        "axis_deg": dipole.frontal_axis_deg(patient.qrs.net(), patient.electrodes),
        "st_territory": territory,
        "st_levels_mv": dict(zip(LEADS, st_levels.tolist(), strict=True)),
        "age": patient.age,
        "sex": patient.sex,
    }
    return Plan(tuple(label for label in LABELS if label in labels), facts, patient, beats, breath, duration_s)


def _add_beats(dipole_mv: np.ndarray, beats: Beats, rate_hz: float) -> None:
    """Adds beats to ``[T, 3]``, cut off where the recording begins and ends."""
    num_samples = len(dipole_mv)
    first = np.ceil((beats.onset_s + _BEAT_START_S) * rate_hz).astype(int)
    width = int((_BEAT_END_S - _BEAT_START_S) * rate_hz)
    times = (first[:, None] + np.arange(width)) / rate_hz - beats.onset_s[:, None]
    values = beats.waves.at(times, beats.stretch) * beats.gain[:, None, None]
    for start, value in zip(first.tolist(), values, strict=True):
        begin, end = max(start, 0), min(start + width, num_samples)
        if begin < end:
            dipole_mv[begin:end] += value[begin - start : end - start]


def _fibrillation(rng: np.random.Generator, time: np.ndarray) -> np.ndarray:
    """Fibrillatory waves at 4 to 9 Hz, ``[T, 3]``: a turning dipole, strongest towards V1, with a wandering rate."""
    rate = rng.uniform(4.5, 8.5)
    phase = 2 * np.pi * rate * time + 1.2 * np.sin(2 * np.pi * rng.uniform(0.1, 0.4) * time + rng.uniform(0, 6.3))
    size = rng.uniform(0.04, 0.13) * (1 + 0.4 * np.sin(2 * np.pi * rng.uniform(0.2, 0.7) * time + rng.uniform(0, 6.3)))
    towards = np.array([-0.30, 0.45, -0.75]) + rng.normal(0, 0.12, 3)
    across = np.array([0.30, 0.35, 0.10]) + rng.normal(0, 0.12, 3)
    saw, turned = np.sin(phase) + 0.3 * np.sin(2 * phase), np.cos(phase)
    return size[:, None] * (saw[:, None] * towards + turned[:, None] * across)


def _electrode_noise(rng: np.random.Generator, time: np.ndarray, breathing: np.ndarray, rate_hz: float) -> np.ndarray:
    """What each electrode adds, ``[9, T]`` in mV: amplifier, muscle, base line, mains, and now and then a jolt."""
    shape = (len(dipole.ELECTRODES), len(time))
    duration = len(time) / rate_hz
    noise = rng.standard_normal(shape, dtype=np.float32).astype(np.float64)
    noise *= 0.006 * spread(rng, 0.5, shape[0])[:, None]
    if rng.random() < 0.6:
        # Muscle: differencing takes out what is slow; it comes in bursts over a floor.
        burst = np.exp(-0.5 * ((time - rng.uniform(0, duration)) / rng.uniform(0.3, 1.5)) ** 2)
        envelope = 0.007 * spread(rng, 0.5) * (0.3 + rng.uniform(0, 3) * burst)
        muscle = np.diff(rng.standard_normal((shape[0], len(time) + 1), dtype=np.float32), axis=1)
        noise += muscle * envelope * spread(rng, 0.4, shape[0])[:, None]
    drift = np.stack([np.sin(2 * np.pi * f * time + rng.uniform(0, 6.3)) for f in rng.uniform(0.03, 0.6, 3)])
    wander = np.vstack([drift, breathing, time / duration - 0.5])
    noise += rng.normal(0, 0.05 * spread(rng, 0.6), (shape[0], len(wander))) @ wander
    if rng.random() < 0.3:
        mains_hz = 50.0 if rng.random() < 0.6 else 60.0
        if mains_hz < rate_hz / 2:
            hum = np.sin(2 * np.pi * mains_hz * time + rng.uniform(0, 6.3))
            noise += 0.012 * spread(rng, 0.6) * rng.normal(0, 1, shape[0])[:, None] * hum
    if rng.random() < 0.06:
        late = time - rng.uniform(0, duration)
        jolt = np.where(late > 0, np.exp(-np.maximum(late, 0) / rng.uniform(0.2, 0.8)), 0.0)
        noise[rng.integers(shape[0])] += rng.choice([-1, 1]) * rng.uniform(0.3, 1.2) * jolt
    return noise


def render(plan: Plan, rng: np.random.Generator, sampling_rate_hz: float = 500, noise: bool = True) -> np.ndarray:
    """Renders a plan.

    Args:
        plan: What happens in the recording.
        rng: Source of chance for fibrillatory waves, breathing and noise.
        sampling_rate_hz: Sampling rate.
        noise: False leaves the electrodes silent; the heart stays as it is, bit for bit of the converter.

    Returns:
        ``[12, T] float32`` in mV, leads in the order of ``LEADS``. Einthoven's and Goldberger's laws hold without rounding.
    """
    time = np.arange(round(plan.duration_s * sampling_rate_hz)) / sampling_rate_hz
    vector = np.zeros((len(time), 3))
    for beats in plan.beats:
        _add_beats(vector, beats, sampling_rate_hz)
    if plan.facts["rhythm"] == "AFIB":
        vector += _fibrillation(rng, time)

    # The diaphragm turns the heart by a few degrees, and air in the lungs changes what reaches the skin.
    breathing = np.sin(2 * np.pi * plan.breath[0] * time + plan.breath[1])
    frontal, horizontal = (np.radians(rng.uniform(0, most)) * breathing for most in (6, 4))
    x, y, z = vector.T * (1 + rng.uniform(0, 0.06) * breathing)
    x, y = x * np.cos(frontal) - y * np.sin(frontal), x * np.sin(frontal) + y * np.cos(frontal)
    x, z = x * np.cos(horizontal) - z * np.sin(horizontal), x * np.sin(horizontal) + z * np.cos(horizontal)
    potentials = plan.patient.electrodes @ np.stack([x, y, z])
    if noise:
        potentials += _electrode_noise(rng, time, breathing, sampling_rate_hz)
    potentials = np.rint(potentials / _STEP_MV) * _STEP_MV
    return (dipole.LEADS_FROM_ELECTRODES @ potentials).astype(np.float32)


def draw_labels(rng: np.random.Generator) -> tuple[str, ...]:
    """Draws labels as often as the cohort has them, conduction apart from the rest."""
    conduction = str(rng.choice(CONDUCTION_MIX))
    labels = [str(rng.choice(RHYTHM_MIX)), conduction]
    labels += ["PVC"] if rng.choice(PREMATURE_MIX) else []
    labels += ["STE"] if rng.choice(ELEVATION_MIX) and conduction != "CLBBB" else []
    return tuple(label for label in labels if label != "normal")


# Shares of twenty: what a cohort deals out, so that even a small one has every label.
RHYTHM_MIX = ("SR",) * 8 + ("SBRAD",) * 4 + ("STACH",) * 4 + ("AFIB",) * 4
CONDUCTION_MIX = ("normal",) * 14 + ("CRBBB",) * 3 + ("CLBBB",) * 3
PREMATURE_MIX = (True,) * 4 + (False,) * 16
ELEVATION_MIX = (True,) * 5 + (False,) * 15


def generate_ecg(
    seed: int | np.random.Generator = 0,
    labels: Sequence[str] | None = None,
    duration_s: float = 10.0,
    sampling_rate_hz: float = 500.0,
    noise: bool = True,
) -> tuple[np.ndarray, tuple[str, ...], dict[str, Any]]:
    """Makes one 12-lead ECG.

    Args:
        seed: Seed, or a generator to draw one from. The same seed gives the same bits.
        labels: Some of ``LABELS`` that go together, for example ("AFIB", "PVC"). None draws them.
        duration_s: Length, at least 5 s: a rate must be countable.
        sampling_rate_hz: Sampling rate, at least 100 Hz.
        noise: False leaves out what electrodes, muscles, breathing of the base line and mains add; the rest is the same.

    Returns:
        Signal ``[12, T] float32`` in mV with leads in the order of ``LEADS``, its labels, and the facts behind them:
        rhythm, heart_rate_bpm, r_times_s, qrs_ms, st_levels_mv, axis_deg, age, sex and others.

    Raises:
        ValueError: An argument is out of range, or labels contradict each other.
    """
    if not duration_s >= 5:
        raise ValueError(f"generate_ecg: duration_s must be at least 5, got {duration_s}")
    if not sampling_rate_hz >= 100:
        raise ValueError(f"generate_ecg: sampling_rate_hz must be at least 100, got {sampling_rate_hz}")
    if isinstance(seed, np.random.Generator):
        seed = int(seed.integers(2**63))
    mix_rng, patient_rng, plan_rng, render_rng = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(4))
    rhythm, conduction, premature, elevated = check_labels(draw_labels(mix_rng) if labels is None else labels)
    patient = draw_patient(patient_rng, conduction)
    plan = draw_plan(plan_rng, patient, rhythm, premature, elevated, duration_s)
    return render(plan, render_rng, sampling_rate_hz, noise), plan.labels, plan.facts
