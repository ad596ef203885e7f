"""The embedded default: 12-lead ECGs from a rotating dipole, with labels that follow from how each was made.

In the order in which a recording comes about: ``dipole`` (the model and its waves), ``patient`` (a body and a heart),
``plan`` (rhythm, beats, facts and labels), ``render`` (leads and noise), ``generate`` (one ECG), ``cohort`` (many).
"""

from __future__ import annotations

from hubert_ecg.data.synthetic.cohort import Cohort
from hubert_ecg.data.synthetic.generate import generate_ecg
from hubert_ecg.data.synthetic.plan import LABELS

__all__ = ["LABELS", "Cohort", "generate_ecg"]
