"""From a plan to twelve leads: beats, fibrillatory waves, breathing, and the noise of the electrodes.

All is float32 but for the facts: the converter's step is far coarser than what float32 rounds away.
"""

from __future__ import annotations

import numpy as np

from hubert_ecg.data.synthetic import dipole
from hubert_ecg.data.synthetic.patient import spread
from hubert_ecg.data.synthetic.plan import Beats, Plan

# The converter's step, about 1 uV: a power of two, so that sums and halves of potentials are exact in float32.
STEP_MV = 2.0**-10
# What a beat covers, from the onset of its QRS.
_BEAT_START_S, _BEAT_END_S = -0.32, 0.68
_TURN = np.float32(2 * np.pi)


def _add_beats(dipole_mv: np.ndarray, beats: Beats, rate_hz: float) -> None:
    """Adds beats to ``[3, T]``, cut off where the recording begins and ends."""
    num_samples = dipole_mv.shape[1]
    first = np.ceil((beats.onset_s + _BEAT_START_S) * rate_hz).astype(int)
    width = int((_BEAT_END_S - _BEAT_START_S) * rate_hz)
    times = (first[:, None] + np.arange(width)) / rate_hz - beats.onset_s[:, None]
    values = beats.waves.at(times.astype(np.float32), beats.stretch) * beats.gain[:, None, None].astype(np.float32)
    for start, value in zip(first.tolist(), values, strict=True):
        begin, end = max(start, 0), min(start + width, num_samples)
        if begin < end:
            dipole_mv[:, begin:end] += value[:, begin - start : end - start]


def _wave(rng: np.random.Generator, time: np.ndarray, frequency_hz: float) -> np.ndarray:
    """A sine of any phase, ``[T] float32``."""
    return np.sin(_TURN * np.float32(frequency_hz) * time + np.float32(rng.uniform(0, 2 * np.pi)))


def _fibrillation(rng: np.random.Generator, time: np.ndarray) -> np.ndarray:
    """Fibrillatory waves at 4 to 9 Hz, ``[3, T]``: a turning dipole, strongest towards V1, with a wandering rate."""
    phase = _TURN * np.float32(rng.uniform(4.8, 8.2)) * time
    phase += 1.2 * _wave(rng, time, rng.uniform(0.1, 0.4)) + 0.4 * _wave(rng, time, rng.uniform(0.8, 1.8))
    size = np.float32(rng.uniform(0.04, 0.13)) * (1 + 0.4 * _wave(rng, time, rng.uniform(0.2, 0.7)))
    towards = np.array([-0.30, 0.45, -0.75]) + rng.normal(0, 0.12, 3)
    across = np.array([0.30, 0.35, 0.10]) + rng.normal(0, 0.12, 3)
    saw = np.sin(phase) + 0.3 * np.sin(2 * phase)
    return np.stack([towards, across], axis=1).astype(np.float32) @ np.stack([size * saw, size * np.cos(phase)])


def _electrode_noise(rng: np.random.Generator, time: np.ndarray, breathing: np.ndarray, rate_hz: float) -> np.ndarray:
    """What each electrode adds, ``[9, T]`` in mV: amplifier, muscle, base line, mains, and now and then a jolt."""
    num_electrodes, num_samples = len(dipole.ELECTRODES), len(time)
    duration_s = num_samples / rate_hz

    def sizes(scale: float, sigma: float) -> np.ndarray:
        return (scale * spread(rng, sigma, num_electrodes)).astype(np.float32)[:, None]

    noise = rng.standard_normal((num_electrodes, num_samples), dtype=np.float32)
    noise *= sizes(0.006, 0.5)
    if rng.random() < 0.6:
        # Muscle: differencing takes out what is slow; it comes in bursts over a floor.
        burst = np.exp(-0.5 * ((time - rng.uniform(0, duration_s)) / rng.uniform(0.3, 1.5)) ** 2)
        muscle = np.diff(rng.standard_normal((num_electrodes, num_samples + 1), dtype=np.float32), axis=1)
        muscle *= np.float32(0.3) + np.float32(rng.uniform(0, 3)) * burst
        muscle *= sizes(0.007 * spread(rng, 0.5), 0.4)
        noise += muscle
    drift = [_wave(rng, time, frequency) for frequency in rng.uniform(0.03, 0.6, 3)]
    wander = np.stack([*drift, breathing, time / np.float32(duration_s) - np.float32(0.5)])
    noise += rng.normal(0, 0.05 * spread(rng, 0.6), (num_electrodes, len(wander))).astype(np.float32) @ wander
    if rng.random() < 0.3:
        mains_hz = 50.0 if rng.random() < 0.6 else 60.0
        hum = 0.012 * spread(rng, 0.6) * rng.normal(0, 1, (num_electrodes, 1))
        if mains_hz < rate_hz / 2:
            noise += hum.astype(np.float32) * _wave(rng, time, mains_hz)
    if rng.random() < 0.06:
        late = time - np.float32(rng.uniform(0, duration_s))
        jolt = np.where(late > 0, np.exp(-np.maximum(late, 0) / rng.uniform(0.2, 0.8)), 0.0)
        noise[rng.integers(num_electrodes)] += rng.choice([-1, 1]) * rng.uniform(0.3, 1.2) * jolt
    return noise


def render(plan: Plan, rng: np.random.Generator, sampling_rate_hz: float, noise: bool = True) -> np.ndarray:
    """Renders a plan.

    Args:
        plan: What happens in the recording.
        rng: Source of chance for fibrillatory waves, the depth of breathing, and noise.
        sampling_rate_hz: Sampling rate.
        noise: False leaves the electrodes silent; the heart stays the same.

    Returns:
        ``[12, T] float32`` in mV, leads in the order of ``LEADS``; Einthoven's and Goldberger's laws hold unrounded.
    """
    time = (np.arange(round(plan.duration_s * sampling_rate_hz)) / sampling_rate_hz).astype(np.float32)
    vector = np.zeros((3, len(time)), np.float32)
    for beats in plan.beats:
        _add_beats(vector, beats, sampling_rate_hz)
    if plan.findings.rhythm == "AFIB":
        vector += _fibrillation(rng, time)

    # The diaphragm turns the heart by a few degrees, and air in the lungs changes what reaches the skin.
    breathing = np.sin(_TURN * np.float32(plan.breath[0]) * time + np.float32(plan.breath[1]))
    frontal, horizontal = (np.float32(np.radians(rng.uniform(0, most))) * breathing for most in (6, 4))
    x, y, z = vector * (1 + np.float32(rng.uniform(0, 0.06)) * breathing)
    x, y = x * np.cos(frontal) - y * np.sin(frontal), x * np.sin(frontal) + y * np.cos(frontal)
    x, z = x * np.cos(horizontal) - z * np.sin(horizontal), x * np.sin(horizontal) + z * np.cos(horizontal)
    potentials = plan.patient.electrodes.astype(np.float32) @ np.stack([x, y, z])
    if noise:
        potentials += _electrode_noise(rng, time, breathing, sampling_rate_hz)
    potentials = np.rint(potentials / np.float32(STEP_MV)) * np.float32(STEP_MV)
    return dipole.LEADS_FROM_ELECTRODES.astype(np.float32) @ potentials
