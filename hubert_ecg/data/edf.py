"""EDF, EDF+ and BDF files, read by edfio. Needs the extra ``formats``.

Fields are those of Kemp et al., "A simple format for exchange of digitized polygraphic recordings" (1992), of EDF+
(Kemp and Olivan, 2003: sex and birth date in the patient identification) and of BioSemi's 24-bit variant.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hubert_ecg.config import UserError
from hubert_ecg.data.record import Record, age_of, lead_name, sex_of, voltages


def read(path: Path, sampling_rate_hz: float, lead_names: Sequence[str] = ()) -> Record:
    """Read an EDF or BDF file; its own rate, lead names, ranges and units hold.

    Signals that are no standard leads (respiration, EEG, ...) are left out.

    Raises:
        ValueError: The file is damaged or interrupted, its leads are sampled at different rates, or no lead is there.
        UserError: edfio is not installed.
    """
    try:
        import edfio
    except ImportError as error:
        raise UserError("reading EDF needs edfio: pip install 'hubert-ecg[formats]'") from error

    reader = edfio.read_bdf if path.suffix.lower() == ".bdf" else edfio.read_edf
    with warnings.catch_warnings():
        # The library warns and goes on where header and samples disagree.
        warnings.simplefilter("error")
        file = reader(path, header_encoding="latin-1")
        leads = [item for item in file.signals if lead_name(item.label)]
        if not leads:
            held = ", ".join(item.label for item in file.signals)
            raise ValueError(f"edf.read: file must hold leads named I, II, V1, ..., got {held}")
        if len(rates := {item.sampling_frequency for item in leads}) != 1:
            held = ", ".join(item.label for item in leads)
            raise ValueError(f"edf.read: leads must be sampled at one rate, got {sorted(rates)} Hz in {held}")
        if not file.is_continuous:
            raise ValueError("edf.read: recording must be continuous, got EDF+D with gaps")
        signal, names = voltages(
            [item.data for item in leads], [item.label for item in leads], [item.physical_dimension for item in leads]
        )
    return Record(signal, rates.pop(), names, record_id=path.stem, source=path.name, **_patient(file))


def _patient(file: Any) -> dict[str, Any]:
    """Sex, and age at the recording's start; plain EDF states neither."""
    facts: dict[str, Any] = {}
    with contextlib.suppress(ValueError, IndexError):
        facts["sex"] = sex_of(file.patient.sex)
        born, start = file.patient.birthdate, file.startdate
        facts["age"] = age_of(start.year - born.year - ((start.month, start.day) < (born.month, born.day)))
    return facts
