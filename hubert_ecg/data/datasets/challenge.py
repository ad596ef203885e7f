"""The sources of the PhysioNet/CinC Challenges 2020 and 2021: WFDB records with SNOMED-CT codes in ``# Dx:`` comments.

The same headers are found in the Challenge's own folders, whatever their nesting, and in PhysioNet's
ecg-arrhythmia (``WFDBRecords/01/010/JS00001.hea``), so a data set here is a rule on record names, and any
folder above the records will do.
"""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import ClassVar, NamedTuple

from hubert_ecg.config import UserError
from hubert_ecg.data.dataset import Dataset, Entry, files_in, walk
from hubert_ecg.data.wfdb_files import read_header

# Headers that "auto" looks into before it decides.
_LOOK_AT = 5


class Snomed(NamedTuple):
    """One diagnosis of the Challenge's mapping."""

    abbreviation: str
    name: str
    rhythm: bool


@functools.cache
def snomed() -> dict[str, Snomed]:
    """SNOMED-CT code to abbreviation and name.

    Codes, abbreviations and names are those of the Challenge's public tables dx_mapping_scored.csv and
    dx_mapping_unscored.csv (github.com/physionetchallenges/evaluation-2021); what is a rhythm is marked here.
    """
    table = resources.files(__package__).joinpath("snomed.csv").read_text(encoding="utf-8")
    return {
        row["code"]: Snomed(row["abbreviation"], row["name"], row["rhythm"] == "1")
        for row in csv.DictReader(table.splitlines())
    }


class Challenge(Dataset):
    """Records of any Challenge source.

    Labels are abbreviations (AF, NSR, ...); a code outside the Challenge's tables stays a number. Diagnoses that the
    Challenge of 2021 scored as one are learnt as one: CRBBB is RBBB, CLBBB is LBBB, SVPB is PAC and VPB is PVC. With
    that, and without labels of a single record, complete downloads have 52 labels (Chapman), 76 (Ningbo), 9 (CPSC) and
    62 (Georgia). ``rhythm`` keeps the rhythms. Patients are not published: each record counts as a patient.
    """

    name = "challenge"
    tasks = ("all", "rhythm")
    synonyms: ClassVar = {"CRBBB": "RBBB", "CLBBB": "LBBB", "SVPB": "PAC", "VPB": "PVC"}
    record_name: ClassVar[str] = r".+"
    records_are: ClassVar[str] = "WFDB headers with # Dx: codes"
    spread = ".hea"

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        headers = files_in(folder, ".hea", _LOOK_AT) if cls is Challenge else []
        return any("dx" in read_header(path).comments for path in headers)

    @classmethod
    def takes(cls, record: str) -> bool:
        """Whether a record of this name belongs to the source."""
        return re.fullmatch(cls.record_name, record) is not None

    def entries(self) -> list[Entry]:
        paths = [path for path in walk(self.data_path, {".hea"}) if self.takes(path.stem)]
        if not paths:
            raise UserError(f"{self.name}: no records ({self.records_are}) in {self.data_path}")
        sources = [path.relative_to(self.data_path).with_suffix("").as_posix() for path in paths]
        names = [path.stem for path in paths]
        unique = len(set(names)) == len(names)
        entries = []
        for path, name, source in zip(paths, names, sources, strict=True):
            header = read_header(path)
            entries.append(
                Entry(
                    record_id=name if unique else source,
                    path=path,
                    source=source,
                    age=header.age,
                    sex=header.sex,
                    labels={task: _labels(header.diagnoses, task == "rhythm") for task in self.tasks},
                )
            )
        return entries


def _labels(codes: Iterable[str], rhythms_alone: bool) -> tuple[str, ...]:
    known = ((snomed().get(code), code) for code in codes)
    names = (dx.abbreviation if dx else code for dx, code in known if not rhythms_alone or (dx and dx.rhythm))
    return tuple(sorted(set(names)))


class Chapman(Challenge):
    """Chapman-Shaoxing: records JS00001 to JS10646, of the Challenge or of ecg-arrhythmia."""

    name = "chapman"
    record_name = r"JS\d{5}"
    records_are = "JS00001 to JS10646"
    last = 10646

    @classmethod
    def takes(cls, record: str) -> bool:
        return super().takes(record) and int(record[2:]) <= cls.last


class Ningbo(Challenge):
    """Ningbo First Hospital: records JS10647 onwards, of the Challenge or of ecg-arrhythmia."""

    name = "ningbo"
    record_name = r"JS\d{5}"
    records_are = "JS10647 onwards"

    @classmethod
    def takes(cls, record: str) -> bool:
        return super().takes(record) and int(record[2:]) > Chapman.last


class Cpsc(Challenge):
    """CPSC 2018, as the Challenge has it: records A0001 onwards."""

    name = "cpsc"
    record_name = r"A\d{4}"
    records_are = "A0001 onwards"


class CpscExtra(Challenge):
    """The part of CPSC 2018 that its own challenge did not use: records Q0001 onwards."""

    name = "cpsc_extra"
    record_name = r"Q\d{4}"
    records_are = "Q0001 onwards"


class Georgia(Challenge):
    """Georgia: records E00001 onwards."""

    name = "georgia"
    record_name = r"E\d{5}"
    records_are = "E00001 onwards"


class Ptb(Challenge):
    """PTB, as the Challenge has it: records S0001 onwards."""

    name = "ptb"
    record_name = r"S\d{4}"
    records_are = "S0001 onwards"
