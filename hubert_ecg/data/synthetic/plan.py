"""What happens in a synthetic recording: its rhythm, its beats, and the labels that follow from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from hubert_ecg.data.synthetic import dipole
from hubert_ecg.data.synthetic.dipole import Waves
from hubert_ecg.data.synthetic.patient import Patient, conducted_beat, ectopic_beat
from hubert_ecg.signal import LEADS

LABELS = ("AFIB", "CLBBB", "CRBBB", "NORM", "PVC", "SBRAD", "SR", "STACH", "STE")
RHYTHMS = ("AFIB", "SBRAD", "SR", "STACH")
CONDUCTIONS = ("CLBBB", "CRBBB")

# Mean rates are drawn from these; what counts is the rate of the beats that then fall into the recording.
_DRAWN_RATE_BPM = {"SR": (60.5, 99.5), "SBRAD": (38.0, 59.5), "STACH": (100.5, 150.0), "AFIB": (62.0, 155.0)}
_MAX_ECTOPIC_RATE_BPM = 125.0
# Coefficients of variation of RR that keep fibrillation and sinus rhythm apart.
_AFIB_MIN_CV, _SINUS_MAX_CV = 0.11, 0.085
_WIDE_QRS_S = 0.120
_MAX_DRAWS = 1000


@dataclasses.dataclass(frozen=True)
class Findings:
    """What a recording shows.

    Args:
        rhythm: One of ``RHYTHMS``.
        conduction: "normal", "CRBBB" or "CLBBB".
        premature: Whether there are ventricular premature beats.
        elevated: Whether ST is elevated, in other than left bundle branch block.
    """

    rhythm: str = "SR"
    conduction: str = "normal"
    premature: bool = False
    elevated: bool = False

    @classmethod
    def of(cls, labels: Sequence[str]) -> Findings:
        """Reads labels; without a rhythm, sinus rhythm at an ordinary rate is meant.

        Raises:
            ValueError: A label is not known, or two cannot stand together.
        """
        given = ", ".join(map(str, labels))
        unknown = [str(label) for label in labels if label not in LABELS]
        if unknown:
            raise ValueError(f"generate_ecg: labels must be among {', '.join(LABELS)}, got {', '.join(unknown)}")
        rhythms = [label for label in RHYTHMS if label in labels] or ["SR"]
        conductions = [label for label in CONDUCTIONS if label in labels] or ["normal"]
        if len(rhythms) > 1 or len(conductions) > 1:
            raise ValueError(f"generate_ecg: labels must hold one rhythm and at most one block, got {given}")
        if {"CLBBB", "STE"} <= set(labels):
            raise ValueError(
                f"generate_ecg: labels must not join STE with CLBBB, which elevates ST itself, got {given}"
            )
        if "NORM" in labels and set(labels) - {"NORM", "SR"}:
            raise ValueError(f"generate_ecg: labels must not join NORM with a finding, got {given}")
        return cls(rhythms[0], conductions[0], "PVC" in labels, "STE" in labels)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels in the order of ``LABELS``. NORM is sinus rhythm at 60 to 100 bpm with no finding."""
        found = {self.rhythm, self.conduction}
        found |= {"PVC"} if self.premature else set()
        found |= {"STE"} if self.elevated else set()
        found |= {"NORM"} if self == Findings() else set()
        return tuple(label for label in LABELS if label in found)


@dataclasses.dataclass(frozen=True)
class Beats:
    """All beats of one kind: their waves, and of each the onset of QRS in s, QT relative to the mean, and amplitude."""

    waves: Waves
    onset_s: np.ndarray
    stretch: np.ndarray
    gain: np.ndarray


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known of a recording before it is rendered.

    Args:
        findings: What it shows, read from the facts.
        facts: What can be measured in it, as plain numbers, strings and lists.
        patient: Whose heart it is.
        beats: The beats of each kind.
        breath: Rate of breathing in Hz, and its phase.
        duration_s: Length of the recording.
    """

    findings: Findings
    facts: dict[str, Any]
    patient: Patient
    beats: tuple[Beats, ...]
    breath: tuple[float, float]
    duration_s: float


@dataclasses.dataclass(frozen=True)
class _Rhythm:
    """R peaks in s of beats that are conducted, of those lost behind a premature one, and of premature ones.

    Rate and coefficient of variation are those of the rhythm itself, as if no beat were premature.
    """

    conducted: np.ndarray
    lost: np.ndarray
    premature: np.ndarray
    rate_bpm: float
    cv: float


def _rr_intervals(
    rng: np.random.Generator, rhythm: str, mean_s: float, count: int, breath: tuple[float, float]
) -> np.ndarray:
    if rhythm == "AFIB":
        # The node lets through what comes after it has recovered: a floor, then no memory.
        floor = max(0.28, 0.5 * mean_s)
        shape = rng.uniform(2.0, 5.0)
        return floor + (mean_s - floor) * rng.gamma(shape, 1 / shape, count)
    time = mean_s * np.arange(count)
    breathing = rng.uniform(0.0, 0.015) if rhythm == "STACH" else rng.uniform(0.005, 0.075)
    swing = breathing * np.sin(2 * np.pi * breath[0] * time + breath[1])
    # Besides breathing, the pressure reflex at 0.1 Hz.
    swing += rng.uniform(0.002, 0.02) * np.sin(0.2 * np.pi * time + rng.uniform(0, 2 * np.pi))
    return mean_s * (1 + swing + rng.normal(0, 0.006, count))


def _choose_premature(rng: np.random.Generator, times: np.ndarray, duration_s: float) -> np.ndarray:
    """Chooses the beats that a premature one follows: every second, every third, or now and then."""
    usable = np.flatnonzero((times[:-1] > 0.3) & (times[1:] < duration_s - 0.3))
    pattern = int(rng.choice(3, p=[0.2, 0.2, 0.6]))
    if pattern < 2:
        step = 2 + pattern
        return usable[rng.integers(step) :: step]
    usable = usable[rng.integers(2) :: 2]
    return np.sort(rng.choice(usable, min(len(usable), int(rng.integers(1, 6))), replace=False))


def _draw_rhythm(
    rng: np.random.Generator, findings: Findings, qtc_s: float, duration_s: float, breath: tuple[float, float]
) -> _Rhythm:
    low, high = _DRAWN_RATE_BPM[findings.rhythm]
    mean_s = 60 / rng.uniform(low, min(high, _MAX_ECTOPIC_RATE_BPM) if findings.premature else high)
    margin_s = 1.5
    count = int((duration_s + 2 * margin_s) / mean_s * 1.6) + 8
    intervals = _rr_intervals(rng, findings.rhythm, mean_s, count, breath)
    times = -margin_s - mean_s * rng.random() + np.cumsum(intervals)
    times = times[times < duration_s + margin_s]
    rr = np.diff(times[(times >= 0) & (times < duration_s)])
    rate, cv = float(60 / rr.mean()), float(rr.std() / rr.mean())
    if not findings.premature:
        return _Rhythm(times, times[:0], times[:0], rate, cv)

    before = _choose_premature(rng, times, duration_s)
    gap = np.minimum(np.diff(times)[before], mean_s)
    # Not earlier than the ventricles have recovered.
    coupling = max(rng.uniform(0.50, 0.66), 0.95 * qtc_s * np.cbrt(mean_s) / mean_s)
    early = times[before] + gap * min(coupling, 0.74)
    # The sinus node keeps its time, and its next beat finds the ventricles refractory: a compensatory pause.
    lost = np.zeros(len(times), dtype=bool)
    lost[before + 1] = True
    if findings.rhythm == "AFIB":
        since = times[:, None] - early
        lost |= ((since > 0) & (since < 0.9 * mean_s)).any(axis=1)
    return _Rhythm(times[~lost], times[lost], early, rate, cv)


def _rhythm_name(drawn: _Rhythm, fibrillating: bool) -> str | None:
    """The rhythm that the beats show, or None where it could be taken for another."""
    if fibrillating:
        return "AFIB" if drawn.cv >= _AFIB_MIN_CV else None
    if drawn.cv > _SINUS_MAX_CV:
        return None
    return "SBRAD" if drawn.rate_bpm < 60 else "STACH" if drawn.rate_bpm > 100 else "SR"


def _peak_s(waves: Waves) -> float:
    """When the dipole of a beat is largest after the onset of QRS, which is where its R peak is."""
    time = np.arange(0.0, 0.2, 0.001)
    return float(time[np.argmax(np.linalg.norm(waves.at(time[None])[0], axis=0))])


def draw_plan(rng: np.random.Generator, patient: Patient, wanted: Findings, duration_s: float) -> Plan:
    """Draws what happens in a recording, until its facts show what is wanted.

    Args:
        rng: Source of chance.
        patient: Whose heart it is; its conduction is the wanted one.
        wanted: What the recording is to show.
        duration_s: Length of the recording.
    """
    fibrillating = wanted.rhythm == "AFIB"
    breath = (float(rng.uniform(0.2, 0.35)), float(rng.uniform(0, 2 * np.pi)))
    for _ in range(_MAX_DRAWS):
        drawn = _draw_rhythm(rng, wanted, patient.qtc_s, duration_s, breath)
        if _rhythm_name(drawn, fibrillating) == wanted.rhythm and wanted.premature == (len(drawn.premature) > 0):
            break

    mean_rr = 60 / drawn.rate_bpm
    qt_s = float(patient.qtc_s * np.cbrt(mean_rr))
    pr_s = max(patient.pr_s * mean_rr**0.2, 0.122)
    territory = str(rng.choice(list(dipole.INJURY))) if wanted.elevated else None
    conducted = conducted_beat(rng, patient, qt_s, territory)
    r_delay = _peak_s(patient.qrs)
    # QT follows the interval before the beat, but slowly.
    before = np.diff(drawn.conducted, prepend=drawn.conducted[0] - mean_rr)
    kinds = [(conducted, drawn.conducted - r_delay, np.clip((before / mean_rr) ** 0.15, 0.85, 1.1))]
    if not fibrillating:
        atria = dataclasses.replace(patient.p_wave, centre=patient.p_wave.centre - pr_s)
        onsets = np.concatenate([drawn.conducted, drawn.lost]) - r_delay
        kinds.append((atria, onsets, np.ones(len(onsets))))
    ectopic_s, origin = None, None
    if wanted.premature:
        ectopic, ectopic_s, origin = ectopic_beat(rng, patient, qt_s)
        kinds.append((ectopic, drawn.premature - _peak_s(ectopic), np.ones(len(drawn.premature))))
    beats = tuple(Beats(*kind, gain=1 + rng.normal(0, 0.02, len(kind[1]))) for kind in kinds)

    st_levels = patient.st_levels_mv(conducted)
    findings = Findings(
        rhythm=str(_rhythm_name(drawn, fibrillating)),
        conduction=patient.conduction if patient.qrs_s > _WIDE_QRS_S else "normal",
        premature=len(drawn.premature) > 0,
        elevated=patient.conduction != "CLBBB" and bool(dipole.st_ratio(st_levels) >= 1),
    )
    assert findings == wanted, f"{wanted} became {findings}"

    def within(times: np.ndarray) -> list[float]:
        return [float(time) for time in np.sort(times) if 0 <= time < duration_s]

    facts = {
        "rhythm": findings.rhythm,
        "heart_rate_bpm": drawn.rate_bpm,
        "rr_cv": drawn.cv,
        "r_times_s": within(np.concatenate([drawn.conducted, drawn.premature])),
        "premature_times_s": within(drawn.premature),
        "premature_origin": origin,
        "premature_qrs_ms": None if ectopic_s is None else 1000 * ectopic_s,
        "conduction": patient.conduction,
        "qrs_ms": 1000 * patient.qrs_s,
        "qrs_onset_to_r_ms": 1000 * r_delay,
        "pr_ms": None if fibrillating else 1000 * pr_s,
        "qt_ms": 1000 * qt_s,
        "axis_deg": patient.axis_deg,
        "st_territory": territory,
        "st_levels_mv": dict(zip(LEADS, st_levels.tolist(), strict=True)),
        "age": patient.age,
        "sex": patient.sex,
    }
    return Plan(findings, facts, patient, beats, breath, duration_s)
