"""One recording as it was published: leads, rate, units, and what is known about the patient."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hubert_ecg.config import UserError
from hubert_ecg.signal import LEADS

# Each limb lead in terms of leads I and II (Einthoven: III = II - I; Goldberger: aVR, aVL, aVF).
LIMB = {
    "I": (1.0, 0.0),
    "II": (0.0, 1.0),
    "III": (-1.0, 1.0),
    "aVR": (-0.5, -0.5),
    "aVL": (1.0, -0.5),
    "aVF": (-0.5, 1.0),
}
_ALIASES = {name.upper(): name for name in LEADS}
_ALIASES |= {f"D{name}": name for name in ("I", "II", "III")}
_ALIASES |= {f"D{number}": name for number, name in enumerate(("I", "II", "III"), start=1)}
_ALIASES |= {f"C{number}": f"V{number}" for number in range(1, 7)}
_AROUND = re.compile(r"^(?:(?:MDC_)?(?:ECG|EKG))?[ _]*(?:LEAD)?[ _]*|[ ,]*\(.*\)$|[ -]*REF$", re.IGNORECASE)

# mV in one unit; "mV" is what a file without a unit means.
_MV_PER_UNIT = {"": 1.0, "mv": 1.0, "millivolt": 1.0, "v": 1e3, "volt": 1e3, "nv": 1e-6, "nanovolt": 1e-6}
_MV_PER_UNIT |= dict.fromkeys(("uv", "µv", "μv", "microvolt"), 1e-3)

_UNITS = "|".join((*filter(None, _MV_PER_UNIT), "s", "sec", "seconds", "ms", "us"))
_WITH_UNIT = re.compile(
    rf"(?P<name>.+?)(?:\s*\[(?P<square>[^\]]+)\]|\s*\((?P<round>{_UNITS})s?\)|[ _](?P<plain>{_UNITS}))", re.IGNORECASE
)

# No electrode sees this much (mV); a signal beyond it has a wrong gain or damaged samples.
LARGEST_MV = 1e9

# Below this rate no QRS complex can be seen: what says so means another unit, or counts samples.
SLOWEST_HZ = 20.0


def lead_name(name: str) -> str | None:
    """The standard name of a lead, or None for one outside the twelve (Frank leads, respiration, ...).

    >>> lead_name("avr"), lead_name("ECG Lead II"), lead_name("Lead I (Einthoven)"), lead_name("EKG V4-Ref")
    ('aVR', 'II', 'I', 'V4')
    >>> lead_name("c3"), lead_name("vx")
    ('V3', None)
    """
    return _ALIASES.get(_AROUND.sub("", name.strip()).upper())


def split_unit(name: str) -> tuple[str, str]:
    """The name of a channel and the unit that stands behind it, in brackets or after a blank or an underscore.

    >>> split_unit("II [uV]"), split_unit("V1_mV"), split_unit("Time (ms)"), split_unit("Lead I (Einthoven)")
    (('II', 'uV'), ('V1', 'mV'), ('Time', 'ms'), ('Lead I (Einthoven)', ''))
    """
    match = _WITH_UNIT.fullmatch(name.strip())
    return (match["name"], match["square"] or match["round"] or match["plain"]) if match else (name.strip(), "")


def mv_per_unit(unit: object) -> float | None:
    """How many mV one unit is, or None for what is no voltage; no unit means mV.

    >>> mv_per_unit("uV"), mv_per_unit("MILLIVOLTS"), mv_per_unit(None), mv_per_unit("Ohm")
    (0.001, 1.0, 1.0, None)
    """
    name = str(unit or "").strip().lower()
    return _MV_PER_UNIT.get(name, _MV_PER_UNIT.get(name.removesuffix("s")))


def sex_of(text: object) -> str | None:
    """ "female" or "male", as headers and tables spell them; None for anything else.

    >>> sex_of("F"), sex_of("MALE"), sex_of("missing")
    ('female', 'male', None)
    """
    return {"f": "female", "female": "female", "m": "male", "male": "male"}.get(str(text).strip().lower())


def age_of(text: object) -> float | None:
    """An age in years, or None for what cannot be one.

    >>> age_of("67"), age_of("NaN"), age_of(-1)
    (67.0, None, None)
    """
    try:
        age = float(str(text))
    except ValueError:
        return None
    return age if 0 <= age < 200 else None


def voltages(
    signal: Sequence[np.ndarray] | np.ndarray, names: Sequence[object], units: Sequence[object]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The channels of a file that are leads or other voltages, in mV; the rest (respiration, ...) is left out.

    Args:
        signal: One array ``[n]`` a channel, in its own unit.
        names: The channels' names.
        units: The channels' units.

    Returns:
        ``[L, n] float32``, and the L names.

    Raises:
        ValueError: A lead is in no unit of voltage or of another length, or no channel is a voltage.
    """
    rows, kept = [], []
    for channel, name, unit in zip(signal, map(str, names), units, strict=True):
        factor = mv_per_unit(unit)
        if factor is None and lead_name(name):
            raise ValueError(f"voltages: unit of lead {name} must be a voltage, got {unit}")
        if factor is not None:
            rows.append((np.asarray(channel) * np.float64(factor)).astype(np.float32))
            kept.append(name)
    if not rows:
        raise ValueError(f"voltages: record must hold an ECG lead, got {list(map(str, names))}")
    if len({row.shape for row in rows}) > 1:
        lengths = ", ".join(f"{name} {len(row)}" for name, row in zip(kept, rows, strict=True))
        raise ValueError(f"voltages: leads must be of one length, got {lengths}")
    return np.stack(rows), tuple(kept)


def lead_list(names: str | None) -> tuple[str, ...]:
    """The leads that a user names, in the order of a file's rows; ``-`` is a row to leave out, None the twelve leads.

    >>> lead_list("i, v2, -, C5")
    ('I', 'V2', '-', 'V5')

    Raises:
        UserError: A name is none of the twelve leads, occurs twice, or none is left.
    """
    if names is None:
        return LEADS
    found = tuple("-" if name.strip() == "-" else lead_name(name) for name in names.split(","))
    known = [name for name in found if name != "-"]
    if None in known or not known or len(set(known)) < len(known):
        raise UserError(
            f"--lead_names must be different leads of {', '.join(LEADS)}, split by commas (- for a row to leave out), "
            f"got {names!r}"
        )
    return tuple(name for name in found if name is not None)


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """One recording.

    Args:
        signal: ``[L, n] float32`` in mV; samples that the file marks as missing are NaN.
        sampling_rate_hz: Samples per second of the signal.
        lead_names: The L names as the file spells them.
        record_id: Name of the record, unique in its data set.
        source: The file, relative to its data set.
        patient_id: Patient, where the source says.
        fold: Fold 1 to 10, where the data set has official ones: 1-8 train, 9 validation, 10 test.
        age: Age in years.
        sex: ``"female"`` or ``"male"``.
        labels: The labels of each task.

    Raises:
        ValueError: The signal is empty or does not fit its lead names or rate.
    """

    signal: np.ndarray
    sampling_rate_hz: float
    lead_names: tuple[str, ...]
    record_id: str = ""
    source: str = ""
    patient_id: str | None = None
    fold: int | None = None
    age: float | None = None
    sex: str | None = None
    labels: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        signal = np.asarray(self.signal)
        if signal.ndim != 2 or 0 in signal.shape:
            raise ValueError(f"Record: signal must be [num_leads, num_samples] and not empty, got {list(signal.shape)}")
        if signal.dtype.kind not in "iuf":
            raise ValueError(f"Record: signal must be numbers, got {signal.dtype}")
        if len(self.lead_names) != len(signal):
            raise ValueError(f"Record: lead_names must name {len(signal)} leads, got {len(self.lead_names)}")
        if not 0 < self.sampling_rate_hz < 1e6:
            raise ValueError(f"Record: sampling_rate_hz must be between 0 and 1e6, got {self.sampling_rate_hz}")
        with np.errstate(over="ignore"):
            object.__setattr__(self, "signal", signal.astype(np.float32, copy=False))

    @property
    def num_samples(self) -> int:
        return self.signal.shape[1]

    @property
    def duration_s(self) -> float:
        return self.num_samples / self.sampling_rate_hz

    def replace(self, **changes: Any) -> Record:
        """A copy with other fields."""
        return dataclasses.replace(self, **changes)

    def standard_leads(self) -> tuple[np.ndarray, np.ndarray]:
        """The twelve leads in standard order (:data:`hubert_ecg.signal.LEADS`), ordered by name.

        Where at least two limb leads are there, the missing ones follow from Einthoven's and Goldberger's equations.
        Leads that remain absent, or hold no finite sample, are zero.

        Returns:
            The signal ``[12, n] float32`` in mV, and which of its leads were measured or derived, ``[12] bool``.

        Raises:
            ValueError: A lead occurs twice, no standard lead is there, or a sample is beyond any possible voltage.
        """
        rows: dict[str, np.ndarray] = {}
        names = ", ".join(self.lead_names)
        for name, row in zip(self.lead_names, self.signal, strict=True):
            standard = lead_name(name)
            if standard is None:
                continue
            if standard in rows:
                raise ValueError(f"standard_leads: lead_names must be different leads, got {standard} twice")
            rows[standard] = row
        rows = {name: row for name, row in rows.items() if np.isfinite(row).any()}
        if not rows:
            raise ValueError(f"standard_leads: lead_names must hold a standard lead with samples, got {names}")
        for name, row in rows.items():
            # nanmax ignores missing samples, and catches infinity.
            if np.nanmax(np.abs(row)) > LARGEST_MV:
                raise ValueError(f"standard_leads: signal must be in mV, got more than {LARGEST_MV:g} mV in {name}")

        # A disconnected electrode gives a constant lead: nothing can be derived from it.
        limb = [name for name in LIMB if name in rows and np.nanmax(rows[name]) > np.nanmin(rows[name])][:2]
        if len(limb) == 2:
            basis = np.linalg.inv(np.array([LIMB[name] for name in limb]))
            first, second = rows[limb[0]], rows[limb[1]]
            for name in LIMB.keys() - rows.keys():
                weight = np.array(LIMB[name]) @ basis
                rows[name] = (weight[0] * first + weight[1] * second).astype(np.float32)

        signal = np.zeros((len(LEADS), self.num_samples), dtype=np.float32)
        present = np.array([name in rows for name in LEADS])
        for position, name in enumerate(LEADS):
            if name in rows:
                signal[position] = rows[name]
        return signal, present
