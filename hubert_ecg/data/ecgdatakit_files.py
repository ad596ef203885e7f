"""GE MUSE XML, HL7 aECG, Philips XML and SCP-ECG, read by ecgdatakit. Needs the extra ``formats``.

Their sources, as far as they are public: GE's restecg.dtd; HL7 aECG Implementation Guide (2005), which the FDA takes;
Philips Sierra ECG schema 1.03 to 1.04 (samples packed as "XLI"); EN 1064 / ISO 11073-91064 (SCP-ECG: Huffman tables,
differences and reference beats are undone). The library parses XML by defusedxml: declared entities are refused, and
nothing outside the file is fetched. Of what a file says about its patient only age and sex are kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hubert_ecg.config import UserError
from hubert_ecg.data.record import Record, age_of, sex_of, voltages

_FORMATS = ("GE MUSE XML", "HL7 aECG", "Philips Sierra XML", "SCP-ECG")


def read(path: Path, sampling_rate_hz: float, lead_names: Sequence[str] = ()) -> Record:
    """Read an .xml or .scp file; its content tells which format it is in.

    A lead whose electrode was off, as the file says, is missing.

    Raises:
        ValueError: The file is of another format, its checksum is wrong, or its leads are not of one recording.
        ecgdatakit.exceptions.ECGDataKitError: The file is damaged.
        UserError: ecgdatakit is not installed.
    """
    try:
        from ecgdatakit.exceptions import ChecksumWarning
        from ecgdatakit.parsing.parser import FileParser
    except ImportError as error:
        raise UserError(f"reading {path.suffix} needs ecgdatakit: pip install 'hubert-ecg[formats]'") from error

    found = FileParser.detect_format(path)
    if found is None or found["name"] not in _FORMATS:
        raise ValueError(f"ecgdatakit_files.read: file must be one of {', '.join(_FORMATS)}, got another kind")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", ChecksumWarning)
        file = FileParser.parse(path)
    facts = file.raw_metadata
    if len(rates := {lead.sampling_rate for lead in file.leads}) != 1:
        raise ValueError(f"ecgdatakit_files.read: leads must be sampled at one rate, got {sorted(rates)} Hz")
    starts = {(lead.annotations.get("start_sample"), lead.annotations.get("LeadTimeOffset")) for lead in file.leads}
    if len(starts) > 1:
        raise ValueError("ecgdatakit_files.read: leads must start together, got several beginnings")
    samples = [
        np.full_like(lead.samples, np.nan) if "LeadOff" in lead.annotations else lead.samples for lead in file.leads
    ]
    units = [lead.units or "none" for lead in file.leads]
    signal, names = voltages(samples, [lead.label for lead in file.leads], units)
    return Record(
        signal,
        _exact_rate_hz(facts) or rates.pop(),
        names,
        record_id=path.stem,
        source=path.name,
        age=age_of(file.patient.age),
        sex=sex_of(file.patient.sex),
    )


def _exact_rate_hz(facts: Mapping[str, Any]) -> float | None:
    """The library rounds rates to whole numbers; what the file states is beside it."""
    if interval_us := facts.get("rhythm_sample_interval_us"):
        return 1e6 / float(interval_us)
    exact = facts.get("rhythm_time", {}).get("sampling_rate_exact")
    return None if exact is None else round(float(exact), 6)
