"""A rotating heart dipole and the twelve leads it makes.

The heart is one current dipole v(t), a vector in the Frank axes (x to the left, y to the feet, z to the back), written
as a sum of asymmetric Gaussian waves with a direction each::

    v(t) = sum_c vector_c * exp(-((t - centre_c) / width_c(t))^2 / 2)
    width_c(t) = left_c before the centre, right_c after it

This is the Gaussian beat model of McSharry et al. (IEEE Trans Biomed Eng 2003) with the three-dimensional dipole of
Sameni et al. (EURASIP J Adv Signal Process 2007). An electrode sees the dipole along its lead vector; those of Dower's
transform (Edenbrandt and Pahlm, J Electrocardiol 1988) give limb and chest electrodes. Leads are differences of
electrode potentials, so whatever happens at an electrode reaches every lead as it does in a patient. The wave tables
are our own, chosen so that the projections show the textbook pattern of each diagnosis at an ordinary amplitude.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from hubert_ecg.signal import LEADS

ELECTRODES = ("RA", "LA", "LL", "V1", "V2", "V3", "V4", "V5", "V6")

# Dower's lead vectors of I and II, then those of the chest leads, which are electrodes against Wilson's terminal.
_LEAD_I, _LEAD_II = np.array([[0.632, -0.235, 0.059], [0.235, 1.066, -0.132]])
_CHEST = np.array(
    [
        [-0.515, 0.157, -0.917],
        [0.044, 0.164, -1.387],
        [0.882, 0.098, -1.277],
        [1.213, 0.127, -0.601],
        [1.125, 0.127, -0.086],
        [0.831, 0.076, 0.230],
    ]
)
# With Wilson's terminal as zero the limb potentials sum to zero, and I and II fix all three.
ELECTRODE_VECTORS = np.vstack(
    [-(_LEAD_I + _LEAD_II) / 3, (2 * _LEAD_I - _LEAD_II) / 3, (2 * _LEAD_II - _LEAD_I) / 3, _CHEST]
)


def _lead_matrix() -> np.ndarray:
    ra, la, ll = np.eye(len(ELECTRODES))[:3]
    rows = {
        "I": la - ra,
        "II": ll - ra,
        "III": ll - la,
        "aVR": ra - (la + ll) / 2,
        "aVL": la - (ra + ll) / 2,
        "aVF": ll - (ra + la) / 2,
    }
    for i, name in enumerate(ELECTRODES[3:], start=3):
        rows[name] = np.eye(len(ELECTRODES))[i] - (ra + la + ll) / 3
    return np.stack([rows[name] for name in LEADS])


LEADS_FROM_ELECTRODES = _lead_matrix()

# Depolarisation: centre and width as parts of the QRS duration, then the vector in mV.
QRS = {
    # Septum to the right and front, free wall to the left and feet, base to the back and up.
    "normal": (
        (0.13, 0.07, -0.14, -0.03, -0.24),
        (0.39, 0.10, 1.15, 0.78, 0.25),
        (0.59, 0.10, 0.22, -0.05, 0.80),
        (0.80, 0.085, -0.30, -0.20, 0.26),
    ),
    # As normal at first, then the right ventricle alone, late and slow: to the right and front.
    "CRBBB": (
        (0.09, 0.05, -0.14, -0.03, -0.30),
        (0.27, 0.07, 1.10, 0.72, 0.20),
        (0.41, 0.07, 0.15, -0.05, 0.55),
        (0.70, 0.125, -0.53, 0.04, -0.72),
    ),
    # The septum from right to left, then the left ventricle slowly: two humps, no q in I and V6.
    "CLBBB": (
        (0.15, 0.075, 0.16, 0.08, 0.10),
        (0.35, 0.105, 0.80, 0.26, 0.78),
        (0.66, 0.125, 0.84, 0.10, 1.05),
    ),
}
# Repolarisation: the vectors in mV of the ST segment and of the T wave. A block turns them against the late QRS.
REPOLARISATION = {
    "normal": ((0.015, 0.010, -0.020), (0.38, 0.19, -0.17)),
    "CRBBB": ((0.010, 0.000, 0.020), (0.40, 0.20, 0.17)),
    "CLBBB": ((-0.08, -0.02, -0.12), (-0.33, -0.05, -0.40)),
}
# The right atrium, then the left one: centre and width in s from the onset of P, vector in mV.
P_WAVE = ((0.034, 0.016, 0.04, 0.100, -0.060), (0.066, 0.018, 0.085, 0.075, 0.050))
# Injury currents point to the territory; the leads that look from the other side are depressed.
INJURY = {
    "anterior": (0.08, -0.10, -0.22),
    "inferior": (-0.02, 0.25, 0.08),
    "lateral": (0.29, -0.05, 0.10),
}
# Where ventricular ectopic beats begin gives their direction.
ECTOPIC = {
    "right outflow": (0.35, 0.90, 0.70),
    "right apex": (0.80, -0.55, 0.75),
    "left lateral": (-0.80, 0.40, -0.65),
    "left inferior": (0.10, -0.60, -0.80),
}

# Contiguous leads of each territory with the elevation at J + 60 ms that counts, in mV (fourth universal definition).
ST_CRITERIA = {
    "anterior": {"V1": 0.1, "V2": 0.2, "V3": 0.2, "V4": 0.1},
    "inferior": {"II": 0.1, "III": 0.1, "aVF": 0.1},
    "lateral": {"I": 0.1, "aVL": 0.1, "V5": 0.1, "V6": 0.1},
}
ST_DELAY_S = 0.060


@dataclasses.dataclass(frozen=True)
class Waves:
    """The waves of one beat, in seconds from the onset of its QRS.

    Args:
        centre: ``[C] float64`` times of the peaks.
        left: ``[C] float64`` widths (standard deviations) before the peak.
        right: ``[C] float64`` widths after the peak.
        vector: ``[C, 3] float64`` directions and amplitudes in mV.
        repolarising: ``[C] bool``; these waves stretch with the QT interval.
    """

    centre: np.ndarray
    left: np.ndarray
    right: np.ndarray
    vector: np.ndarray
    repolarising: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, repolarising: bool = False) -> Waves:
        """Builds waves from ``[C, 6]`` rows of centre, left width, right width, x, y, z."""
        rows = np.asarray(rows, dtype=np.float64)
        return cls(rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3:], np.full(len(rows), repolarising))

    def __add__(self, other: Waves) -> Waves:
        names = [field.name for field in dataclasses.fields(self)]
        return Waves(*(np.concatenate([getattr(self, name), getattr(other, name)]) for name in names))

    def turned(self, rotation: np.ndarray, where: np.ndarray | bool = True) -> Waves:
        """Turns the waves of the mask ``[C] bool`` by a rotation matrix ``[3, 3]``."""
        turning = np.broadcast_to(where, len(self.centre))[:, None]
        return dataclasses.replace(self, vector=np.where(turning, self.vector @ rotation.T, self.vector))

    def at(self, times: np.ndarray, stretch: np.ndarray | float = 1.0) -> np.ndarray:
        """Computes the dipole.

        Args:
            times: ``[B, W]`` float32 or float64, seconds from each beat's onset of QRS.
            stretch: ``[B]`` or a number, factor on the times of the repolarising waves.

        Returns:
            ``[B, 3, W]`` in mV, of the type of the times.
        """
        dtype = times.dtype
        factor = np.ones((len(times), len(self.centre), 1), dtype)
        factor[:, self.repolarising, 0] = np.reshape(stretch, (-1, 1))
        centre, left, right = (x[:, None].astype(dtype) for x in (self.centre, self.left, self.right))
        distance = times[:, None, :] - centre * factor
        distance /= np.where(distance < 0, left, right) * factor
        np.square(distance, out=distance)
        # Beyond six widths a wave is nothing; the clip keeps exp out of slow denormal numbers.
        np.minimum(distance, 36, out=distance)
        distance *= -0.5
        np.exp(distance, out=distance)
        return self.vector.T.astype(dtype) @ distance

    def net(self, where: np.ndarray | bool = True) -> np.ndarray:
        """The time integral of the dipole over the waves of the mask ``[C] bool``: ``[3] float64`` in mV s.

        Its direction is the mean electrical axis.
        """
        return np.where(where, np.sqrt(np.pi / 2) * (self.left + self.right), 0.0) @ self.vector


def rotation(frontal_rad: float, horizontal_rad: float) -> np.ndarray:
    """Turns from left to feet (clockwise in the frontal plane), then from left to back (in the horizontal plane)."""
    cos_f, sin_f, cos_h, sin_h = (
        np.cos(frontal_rad),
        np.sin(frontal_rad),
        np.cos(horizontal_rad),
        np.sin(horizontal_rad),
    )
    frontal = np.array([[cos_f, -sin_f, 0.0], [sin_f, cos_f, 0.0], [0.0, 0.0, 1.0]])
    horizontal = np.array([[cos_h, 0.0, -sin_h], [0.0, 1.0, 0.0], [sin_h, 0.0, cos_h]])
    return horizontal @ frontal


def frontal_axis_deg(vector: np.ndarray, electrode_vectors: np.ndarray = ELECTRODE_VECTORS) -> float:
    """The electrical axis as read from the nets of leads I and aVF, in degrees; 0 is to the left, 90 to the feet."""
    net = dict(zip(LEADS, LEADS_FROM_ELECTRODES @ (electrode_vectors @ vector), strict=True))
    return float(np.degrees(np.arctan2(2 * net["aVF"] / np.sqrt(3), net["I"])))


def st_ratio(levels_mv: np.ndarray, territory: str | None = None) -> np.ndarray:
    """How far ST elevation goes beyond what counts: at least 1 in two contiguous leads is ST elevation.

    Args:
        levels_mv: ``[..., 12] float64`` ST level at J + 60 ms in the order of ``LEADS``.
        territory: Where to look; None for the strongest of all territories.

    Returns:
        ``[...] float64``, the second highest ratio of level to criterion among the leads of the territory.
    """
    if territory is None:
        return np.max([st_ratio(levels_mv, name) for name in ST_CRITERIA], axis=0)
    criteria = ST_CRITERIA[territory]
    ratios = levels_mv[..., [LEADS.index(lead) for lead in criteria]] / np.array(list(criteria.values()))
    return np.sort(ratios, axis=-1)[..., -2]
