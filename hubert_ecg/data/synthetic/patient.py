"""The people of the synthetic cohort: a body with electrodes, a heart, and the waves of its beats."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from hubert_ecg.data.synthetic import dipole
from hubert_ecg.data.synthetic.dipole import Waves

_QRS_S = {"normal": (0.078, 0.108), "CRBBB": (0.124, 0.165), "CLBBB": (0.128, 0.175)}
# Mean, standard deviation and bounds of the frontal axis; in right block, that of what comes before the late wave.
_AXIS_DEG = {
    "normal": (45.0, 25.0, -20.0, 80.0),
    "CRBBB": (45.0, 28.0, -35.0, 95.0),
    "CLBBB": (5.0, 28.0, -50.0, 60.0),
}
# ST elevation reaches this many times its criterion; what is not labelled so stays below it.
_ST_RATIO, _ST_RATIO_BELOW = (1.2, 3.2), 0.8


@dataclasses.dataclass(frozen=True)
class Patient:
    """What stays the same between two recordings of one person.

    Args:
        age: Years.
        sex: "male" or "female".
        conduction: "normal", "CRBBB" or "CLBBB".
        qrs_s: QRS duration.
        qtc_s: QT interval at 60 bpm.
        pr_s: Onset of P to onset of QRS at 60 bpm.
        electrodes: ``[9, 3] float64`` lead vectors of the electrodes on this body, gain included.
        axis_deg: Frontal axis of the left ventricle's depolarisation.
        qrs: Waves of depolarisation.
        p_wave: Waves of the atria, whose time starts at the onset of P.
        st_vector: ``[3] float64`` ST segment in mV when nothing is wrong.
        t_vector: ``[3] float64`` T wave in mV.
    """

    age: int
    sex: str
    conduction: str
    qrs_s: float
    qtc_s: float
    pr_s: float
    electrodes: np.ndarray
    axis_deg: float
    qrs: Waves
    p_wave: Waves
    st_vector: np.ndarray
    t_vector: np.ndarray

    def st_levels_mv(self, waves: Waves) -> np.ndarray:
        """The ST level at J + 60 ms that the waves make, ``[12] float64`` in the order of ``LEADS``."""
        time = np.array([[self.qrs_s + dipole.ST_DELAY_S]])
        return dipole.LEADS_FROM_ELECTRODES @ (self.electrodes @ waves.at(time)[0, :, 0])


def spread(rng: np.random.Generator, sigma: float, size: int | None = None) -> Any:
    """Draws factors around 1, log-normal and never further than two and a half sigma."""
    return np.exp(sigma * np.clip(rng.standard_normal(size), -2.5, 2.5))


def _individual(rng: np.random.Generator, rows: Sequence[Sequence[float]], duration_s: float) -> Waves:
    """One person's version of a wave table whose times are parts of a duration."""
    table = np.array(rows)
    centre = (table[:, 0] + rng.normal(0, 0.012, len(table))) * duration_s
    width = table[:, 1] * duration_s * spread(rng, 0.07, len(table))
    size = np.linalg.norm(table[:, 2:], axis=1, keepdims=True)
    vector = table[:, 2:] * spread(rng, 0.14, len(table))[:, None] + rng.normal(0, 0.07, (len(table), 3)) * size
    return Waves.of(np.column_stack([centre, width, width, vector]))


def _draw_electrodes(rng: np.random.Generator) -> np.ndarray:
    """Lead vectors of one body: every chest electrode a little towards a neighbour's place, and a gain of its own."""
    vectors = dipole.ELECTRODE_VECTORS.copy()
    chest = np.vstack([vectors[3], vectors[3:], vectors[-1]])
    shift = np.clip(rng.normal(0, 0.12, 6), -0.3, 0.3)[:, None]
    neighbour = np.where(shift > 0, chest[2:], chest[:-2])
    vectors[3:] = ((1 - abs(shift)) * chest[1:-1] + abs(shift) * neighbour) * spread(rng, 0.08, 6)[:, None]
    return vectors * 0.95 * spread(rng, 0.2)


def draw_person(rng: np.random.Generator, conduction: str) -> tuple[int, str]:
    """Draws age and sex; a block is a finding of the old."""
    age = rng.normal(56, 17) if conduction == "normal" else rng.normal(67, 12)
    return int(np.clip(age, 18, 95)), "male" if rng.random() < 0.52 else "female"


def draw_patient(rng: np.random.Generator, conduction: str = "normal") -> Patient:
    """Draws a person, whose age and sex are those of :func:`draw_person`.

    Args:
        rng: Source of chance.
        conduction: "normal", "CRBBB" or "CLBBB".
    """
    age, sex = draw_person(rng, conduction)
    qrs_s = float(rng.uniform(*_QRS_S[conduction]))
    qrs = _individual(rng, dipole.QRS[conduction], qrs_s)
    # What takes longer to depolarise also takes longer to recover.
    qtc_s = np.clip(rng.normal(0.395 if sex == "male" else 0.408, 0.016), 0.355, 0.445) + 0.6 * max(qrs_s - 0.1, 0.0)
    electrodes = _draw_electrodes(rng)

    mean, sigma, low, high = _AXIS_DEG[conduction]
    axis = np.clip(rng.normal(mean - 0.35 * (age - 55), sigma), low, high)
    horizontal = np.radians(np.clip(rng.normal(0, 10), -22, 22))
    # The late wave of right block belongs to the other ventricle: it neither counts for the axis nor turns with it.
    of_axis = qrs.centre < (0.55 if conduction == "CRBBB" else 1.0) * qrs_s
    frontal = 0.0
    # Leads I and aVF are not at right angles in this body, so the angle to turn by is found by correction; in half
    # steps, because the axis turns up to twice as fast as the heart.
    for _ in range(8):
        turn = dipole.rotation(frontal, horizontal)
        axis_deg = dipole.frontal_axis_deg(turn @ qrs.net(of_axis), electrodes)
        frontal += np.radians((axis - axis_deg + 180) % 360 - 180) / 2

    # The rest follows the position of the left ventricle only in part.
    partly = dipole.rotation(0.4 * frontal, horizontal)
    p_wave = np.insert(np.array(dipole.P_WAVE), 2, np.array(dipole.P_WAVE)[:, 1], axis=1)
    p_wave[:, :3] *= spread(rng, 0.08)
    p_wave[:, 3:] *= spread(rng, 0.2)
    st, t = (np.array(vector) for vector in dipole.REPOLARISATION[conduction])
    return Patient(
        age=age,
        sex=sex,
        conduction=conduction,
        qrs_s=qrs_s,
        qtc_s=float(qtc_s),
        pr_s=float(rng.uniform(0.130, 0.185)),
        electrodes=electrodes,
        axis_deg=axis_deg,
        qrs=qrs.turned(turn, of_axis).turned(partly, ~of_axis),
        p_wave=Waves.of(p_wave).turned(partly),
        st_vector=partly @ st + rng.normal(0, 0.012, 3),
        t_vector=partly @ t * spread(rng, 0.25) + rng.normal(0, 0.035, 3),
    )


def _repolarisation(qrs_s: float, qt_s: float, st: np.ndarray, t: np.ndarray) -> Waves:
    """ST rises at the J point and lasts into T; T climbs slowly and falls fast."""
    jt_s = qt_s - qrs_s
    left, right = 0.187 * jt_s, 0.113 * jt_s
    rows = [[qrs_s + 0.012, 0.012, 0.42 * jt_s, *st], [qt_s - 2.2 * right, left, right, *t]]
    return Waves.of(np.array(rows), repolarising=True)


def conducted_beat(rng: np.random.Generator, patient: Patient, qt_s: float, territory: str | None) -> Waves:
    """Draws a beat through the bundles, with or without an injury current.

    Args:
        rng: Source of chance.
        patient: Whose heart it is.
        qt_s: QT interval.
        territory: Where ST is elevated, a key of ``INJURY``. None keeps ST below what counts as elevation, except in
            left bundle branch block, where elevation in V1 to V3 belongs to the block.
    """
    st, t = patient.st_vector, patient.t_vector
    if territory is not None:
        injury = np.array(dipole.INJURY[territory]) * (1 + rng.normal(0, 0.12, 3))
        # Hyperacute T points where the injury current does.
        t = 0.75 * t + rng.uniform(0.3, 1.1) * injury
        target, most = rng.uniform(*_ST_RATIO), 8.0
    else:
        # The foot of a tall T must not count, so the J point sinks away from it.
        injury, target, most = -t, _ST_RATIO_BELOW, 1.0

    def beat(amount: float) -> Waves:
        return patient.qrs + _repolarisation(patient.qrs_s, qt_s, st + amount * injury, t)

    if patient.conduction == "CLBBB":
        return beat(0.0)
    levels = patient.st_levels_mv(beat(0.0))
    amounts = np.linspace(0, most, 400)
    ratios = dipole.st_ratio(levels + amounts[:, None] * (patient.st_levels_mv(beat(1.0)) - levels), territory)
    enough = ratios >= target if territory is not None else ratios <= target
    # Where even the best amount falls short of the target, it must do.
    return beat(amounts[np.argmax(enough) if enough.any() else np.argmin(ratios)])


def ectopic_beat(rng: np.random.Generator, patient: Patient, qt_s: float) -> tuple[Waves, float, str]:
    """Draws a beat from the wall of a ventricle: wide, for it does not travel by the bundles, and with T against QRS.

    Returns:
        Its waves, its QRS duration in s, and where it begins.
    """
    origin = str(rng.choice(list(dipole.ECTOPIC)))
    direction = np.array(dipole.ECTOPIC[origin]) * (1 + rng.normal(0, 0.12, 3))
    direction *= rng.uniform(1.0, 1.7) / np.linalg.norm(direction)
    bend = rng.normal(0, 0.3, 3)
    qrs_s = float(rng.uniform(0.136, 0.185))
    rows = [
        [0.16, 0.075, *(0.3 * direction - 0.5 * bend)],
        [0.42, 0.13, *(direction + bend)],
        [0.70, 0.12, *(0.55 * direction - bend)],
    ]
    t = -rng.uniform(0.35, 0.6) * direction
    return _individual(rng, rows, qrs_s) + _repolarisation(qrs_s, qt_s + 0.06, 0.25 * t, t), qrs_s, origin
