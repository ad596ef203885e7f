"""One synthetic ECG from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hubert_ecg.data.synthetic.patient import draw_patient
from hubert_ecg.data.synthetic.plan import Findings, draw_plan
from hubert_ecg.data.synthetic.render import render

# Shares of twenty. A cohort deals them out, so that even a small one holds every label.
RHYTHM_SHARES = ("SR",) * 8 + ("SBRAD",) * 4 + ("STACH",) * 4 + ("AFIB",) * 4
CONDUCTION_SHARES = ("normal",) * 14 + ("CRBBB",) * 3 + ("CLBBB",) * 3
PREMATURE_SHARES = (True,) * 4 + (False,) * 16
ELEVATED_SHARES = (True,) * 5 + (False,) * 15


def draw_findings(rng: np.random.Generator) -> Findings:
    """Draws what a recording shows, as often as the cohort shows it."""
    conduction = str(rng.choice(CONDUCTION_SHARES))
    return Findings(
        rhythm=str(rng.choice(RHYTHM_SHARES)),
        conduction=conduction,
        premature=bool(rng.choice(PREMATURE_SHARES)),
        elevated=bool(rng.choice(ELEVATED_SHARES)) and conduction != "CLBBB",
    )


def generate_ecg(
    seed: int | np.random.Generator = 0,
    labels: Sequence[str] | None = None,
    duration_s: float = 10.0,
    sampling_rate_hz: float = 500.0,
    noise: bool = True,
) -> tuple[np.ndarray, tuple[str, ...], dict[str, Any]]:
    """Makes one 12-lead ECG.

    Args:
        seed: Seed of at least 0, or a generator to draw one from. The same seed gives the same bits.
        labels: Some of ``LABELS`` that go together, for example ("AFIB", "PVC"). None draws them.
        duration_s: Length, at least 5 s: a rate must be countable.
        sampling_rate_hz: Sampling rate, at least 100 Hz.
        noise: False leaves out what amplifier, muscles, base line and mains add; the heart stays the same.

    Returns:
        Signal ``[12, T] float32`` in mV with leads in the order of ``LEADS``, its labels, and the facts behind them:
        rhythm, heart_rate_bpm, r_times_s, qrs_ms, st_levels_mv, axis_deg, age, sex and others.

    Raises:
        ValueError: An argument is out of range, or labels contradict each other.
    """
    if not 5 <= duration_s < np.inf:
        raise ValueError(f"generate_ecg: duration_s must be at least 5, got {duration_s}")
    if not 100 <= sampling_rate_hz < np.inf:
        raise ValueError(f"generate_ecg: sampling_rate_hz must be at least 100, got {sampling_rate_hz}")
    if isinstance(seed, np.random.Generator):
        seed = int(seed.integers(2**63))
    if seed < 0:
        raise ValueError(f"generate_ecg: seed must be at least 0, got {seed}")
    finding_rng, patient_rng, plan_rng, render_rng = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(4))
    findings = draw_findings(finding_rng) if labels is None else Findings.of(labels)
    patient = draw_patient(patient_rng, findings.conduction)
    plan = draw_plan(plan_rng, patient, findings, duration_s)
    return render(plan, render_rng, sampling_rate_hz, noise), plan.findings.labels, plan.facts
