"""The synthetic cohort: the data set that needs no file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from hubert_ecg.config import UserError
from hubert_ecg.data.dataset import Dataset, Entry
from hubert_ecg.data.record import Record
from hubert_ecg.data.synthetic.generate import CONDUCTION_SHARES, ELEVATED_SHARES, PREMATURE_SHARES, RHYTHM_SHARES
from hubert_ecg.data.synthetic.patient import draw_patient, draw_person
from hubert_ecg.data.synthetic.plan import LABELS, RHYTHMS, Findings, draw_plan
from hubert_ecg.data.synthetic.render import render
from hubert_ecg.signal import LEADS

_DURATION_S = 10.0
_SAMPLING_RATE_HZ = 500.0
_NUM_FOLDS = 10
# One in five pairs of neighbours is one person seen twice.
_SAME_PATIENT = 0.2


class Cohort(Dataset):
    """Generated 12-lead ECGs of 10 s at 500 Hz with labels, patients and folds.

    Record i and its fold depend on the seed and i alone: a longer cohort begins with the shorter one.

    Args:
        data_path: Ignored, there are no files.
        num_records: Length of the cohort.
        sampling_rate_hz: Ignored, the cohort has a rate.
        seed: Seed, at least 0.

    Raises:
        UserError: num_records or seed is out of range.
    """

    name = "synthetic"
    tasks = ("all", "rhythm")

    def __init__(
        self,
        data_path: Path | None = None,
        *,
        num_records: int = 2000,
        sampling_rate_hz: float = _SAMPLING_RATE_HZ,
        seed: int = 0,
    ):
        if num_records < 1:
            raise UserError(f"synthetic: num_records must be at least 1, got {num_records}")
        if seed < 0:
            raise UserError(f"synthetic: seed must be at least 0, got {seed}")
        self.num_records = num_records
        self.seed = seed
        self._entries: list[Entry] | None = None

    def __len__(self) -> int:
        return self.num_records

    def _rng(self, purpose: str, index: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, index, *purpose.encode()])

    def _dealt(self, purpose: str, shares: tuple[Any, ...], index: int) -> Any:
        """Deals shares like cards, a shuffled deck for every ``len(shares)`` records."""
        deck, place = divmod(index, len(shares))
        return shares[self._rng(purpose, deck).permutation(len(shares))[place]]

    def _patient(self, index: int) -> int:
        first = index - index % 2
        return first if self._rng("pair", first).random() < _SAME_PATIENT else index

    def _findings(self, index: int) -> Findings:
        conduction = self._dealt("conduction", CONDUCTION_SHARES, self._patient(index))
        return Findings(
            rhythm=self._dealt("rhythm", RHYTHM_SHARES, index),
            conduction=conduction,
            premature=self._dealt("premature", PREMATURE_SHARES, index),
            elevated=self._dealt("elevated", ELEVATED_SHARES, index) and conduction != "CLBBB",
        )

    def entries(self) -> list[Entry]:
        """All recordings in order; none is rendered."""
        if self._entries is None:
            findings = [self._findings(index) for index in range(self.num_records)]
            patients = [self._patient(index) for index in range(self.num_records)]
            folds = _folds([found.labels for found in findings], patients)
            self._entries = [
                self._entry(index, found, patient, fold)
                for index, (found, patient, fold) in enumerate(zip(findings, patients, folds, strict=True))
            ]
        return self._entries

    def _entry(self, index: int, findings: Findings, patient: int, fold: int) -> Entry:
        age, sex = draw_person(self._rng("patient", patient), findings.conduction)
        labels = findings.labels
        return Entry(
            record_id=f"{index:06d}",
            source=f"synthetic/{self.seed}/{index:06d}",
            patient_id=f"{patient:06d}",
            fold=fold,
            age=float(age),
            sex=sex,
            labels={"all": labels, "rhythm": tuple(label for label in labels if label in RHYTHMS)},
        )

    def read(self, entry: Entry) -> Record:
        """Generates the recording of an entry."""
        index = int(entry.record_id)
        findings = self._findings(index)
        patient = draw_patient(self._rng("patient", self._patient(index)), findings.conduction)
        plan = draw_plan(self._rng("plan", index), patient, findings, _DURATION_S)
        signal = render(plan, self._rng("render", index), _SAMPLING_RATE_HZ)
        return Record(signal, _SAMPLING_RATE_HZ, LEADS, record_id=entry.record_id, source=entry.source)

    def fingerprint(self) -> str:
        """Changes with length and seed, and with the code that generates the recordings."""
        digest = hashlib.blake2b(f"{self.num_records} {self.seed}\n".encode(), digest_size=16)
        for path in sorted(Path(__file__).parent.glob("*.py")):
            digest.update(path.read_bytes())
        return digest.hexdigest()


def _folds(labels: list[tuple[str, ...]], patients: list[int]) -> list[int]:
    """Folds 1 to 10, patient by patient: each goes where its labels are scarcest so far."""
    counts = np.zeros((_NUM_FOLDS, len(LABELS)))
    fold_of: dict[int, int] = {}
    folds = []
    for patient, names in zip(patients, labels, strict=True):
        columns = [LABELS.index(name) for name in names]
        if patient not in fold_of:
            # A rare label weighs more; among equals the smallest fold is filled.
            scarcity = (counts[:, columns] / (1 + counts[:, columns].sum(axis=0))).sum(axis=1)
            fold_of[patient] = int(np.lexsort((counts.sum(axis=1), scarcity.round(9)))[0])
        counts[fold_of[patient], columns] += 1
        folds.append(fold_of[patient] + 1)
    return folds
