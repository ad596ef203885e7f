"""Hefei: the ECGs of the Tianchi challenge "Hefei Hi-tech Cup" (competition 231754), rounds 1 and 2.

Each recording is a text file with the header ``I II V1 V2 V3 V4 V5 V6`` and 5000 lines, 10 s at 500 Hz, in steps of
4.88 uV; the four missing limb leads follow from I and II. ``*_label.txt`` has a line per recording, split by tabs: the
file, age, sex, then its findings. ``*_arrythmia.txt`` (the organisers' spelling) lists the findings.
"""

from __future__ import annotations

import csv
import functools
import re
from importlib import resources
from pathlib import Path
from typing import ClassVar

from hubert_ecg.config import UserError
from hubert_ecg.data.dataset import Dataset, Entry, number, walk
from hubert_ecg.data.datasets.challenge import Challenge
from hubert_ecg.data.readers import ReadError, read_record
from hubert_ecg.data.record import Record, sex_of
from hubert_ecg.data.tables import read_text

_MV_PER_STEP = 4.88e-3
_NUM_SAMPLES = 5000


@functools.cache
def finding_labels() -> dict[str, str]:
    """Finding to label: the abbreviation that the Challenge's tables (``snomed.csv``) have for it.

    RVR (rapid ventricular rate) alone is not in them: it is not ventricular tachycardia.
    """
    table = resources.files(__package__).joinpath("hefei.csv").read_text(encoding="utf-8")
    return {row["finding"]: row["label"] for row in csv.DictReader(table.splitlines())}


class Hefei(Dataset):
    """Hefei with the tasks ``all`` and ``findings``, which has the findings in the words of the label table.

    ``all`` has them as abbreviations (:func:`finding_labels`), and a block that is a kind of another as that one:
    complete, incomplete or not said to be either is RBBB; LBBB is any block of the left bundle, its anterior fascicle
    included. With that, the 34 findings of round 2 are 27 labels, as in published tables, which do not say how they
    were joined. Findings that only round 1 has and the Challenge has no abbreviation for keep their words.

    Where a list of findings (``*_arrythmia.txt``) is beside the tables, a finding outside of all lists is an error.
    Recordings without a line in a label table (the challenge's test sets) are left out. Patients are not published.
    """

    name = "hefei"
    tasks = ("all", "findings")
    synonyms: ClassVar = {**Challenge.synonyms, "IRBBB": "RBBB", "LAnFB": "LBBB"}
    spread, gathers = ".txt", True

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        return any(folder.glob("hf_round*_label.txt"))

    def entries(self) -> list[Entry]:
        texts = list(walk(self.data_path, {".txt"}))
        tables = [path for path in texts if path.stem.endswith("_label")]
        if not tables:
            raise UserError(f"hefei: no label table (hf_round1_label.txt, ...) in {self.data_path}")
        lists = [path for path in texts if path.stem.endswith("_arrythmia")]
        findings = {line.strip() for path in lists for _, line in _lines(path)}
        recordings: dict[str, list[Path]] = {}
        for path in texts:
            recordings.setdefault(path.name, []).append(path)

        # Both rounds number their files anew, so the round is part of the name where there are several.
        entries = []
        for table in tables:
            prefix = table.stem.removesuffix("_label")
            for line_number, line in _lines(table):
                name, age, sex, *labels = (field.strip() for field in [*line.split("\t"), "", ""])
                labels = [label for label in labels if label]
                if findings and (unknown := set(labels) - findings):
                    raise UserError(f"hefei: {table}, line {line_number}: {', '.join(sorted(unknown))} is in no list")
                path = _nearest(recordings.get(name, []), prefix) or self.data_path / name
                entries.append(
                    Entry(
                        record_id=f"{prefix}/{Path(name).stem}" if len(tables) > 1 else Path(name).stem,
                        path=path,
                        source=path.relative_to(self.data_path).as_posix(),
                        age=number(age),
                        sex=sex_of(sex),
                        labels={
                            "all": tuple(sorted({finding_labels().get(label, label) for label in labels})),
                            "findings": tuple(sorted(set(labels))),
                        },
                    )
                )
        return entries

    def read(self, entry: Entry) -> Record:
        assert entry.path is not None
        record = read_record(entry.path, sampling_rate_hz=500.0)
        if record.signal.shape[1] != _NUM_SAMPLES:
            raise ReadError(f"{entry.path}: must hold {_NUM_SAMPLES} lines of samples, got {record.signal.shape[1]}")
        return record.replace(signal=record.signal * _MV_PER_STEP)


def _lines(path: Path) -> list[tuple[int, str]]:
    """The lines that say something, each with its number."""
    lines = read_text("hefei", path, "gb18030").splitlines()
    return [(line_number, line) for line_number, line in enumerate(lines, start=1) if line.strip()]


def _nearest(paths: list[Path], prefix: str) -> Path | None:
    """The file in a folder of the table's round, best one of training (hf_round1_train, ...); never another round's.

    Rounds number their files alike, and test sets beside them have files of the same names.
    """
    rounds = {path: "/".join(path.parts[:-1]) for path in paths}
    mine = [path for path in paths if prefix in rounds[path]]
    mine = mine or [path for path in paths if not re.search(r"hf_round\d", rounds[path])]
    return next((path for path in mine if "train" in rounds[path].rsplit("/", 1)[-1]), mine[0] if mine else None)
