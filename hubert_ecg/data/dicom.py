"""DICOM waveforms (12-lead, general and ambulatory ECG), read by pydicom. Needs the extra ``formats``.

Source: DICOM PS3.3, C.10.9 (Waveform Module: sample values times sensitivity times correction factor, plus baseline, in
the channel's sensitivity units; padding values are missing samples) and PS3.16, CID 3001 (ECG leads).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hubert_ecg.config import UserError
from hubert_ecg.data.record import Record, age_of, lead_name, sex_of, voltages
from hubert_ecg.signal import LEADS

# The last number of a lead's code in CID 3001, "2:61" (MDC) or "5.6.3-9-61" (SCPECG); EN 1064 numbers leads alike.
_LEAD_CODES = {1: "I", 2: "II", 61: "III", 62: "aVR", 63: "aVL", 64: "aVF"}
_LEAD_CODES |= {number + 2: f"V{number}" for number in range(1, 7)}
_NUMBER = re.compile(r"\d+$")
_YEARS_PER_UNIT = {"Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}


def read(path: Path, sampling_rate_hz: float, lead_names: Sequence[str] = ()) -> Record:
    """Read the ECG of a DICOM file: its multiplex group of original samples with the most standard leads.

    Raises:
        ValueError: The file is damaged or holds no ECG.
        UserError: pydicom is not installed.
    """
    try:
        import pydicom
    except ImportError as error:
        raise UserError("reading DICOM needs pydicom: pip install 'hubert-ecg[formats]'") from error

    dataset = pydicom.dcmread(path)
    if "WaveformSequence" not in dataset:
        raise ValueError("dicom.read: file must hold a waveform, got none")
    groups = list(enumerate(dataset.WaveformSequence))
    # Median beats and other derived waveforms are no recordings.
    groups = [item for item in groups if item[1].get("WaveformOriginality") != "DERIVED"]
    if not groups:
        raise ValueError("dicom.read: file must hold original samples, got derived ones alone")
    position, group = max(groups, key=lambda item: len(set(map(_lead, _channels(item[1]))) & {*LEADS}))
    channels = _channels(group)
    wanted = group.NumberOfWaveformChannels * group.NumberOfWaveformSamples * group.WaveformBitsAllocated // 8
    if len(group.WaveformData) != wanted + wanted % 2:
        raise ValueError(f"dicom.read: samples must fill {wanted} bytes, got {len(group.WaveformData)}")
    raw = pydicom.waveforms.multiplex_array(dataset, position).T
    if len(raw) != len(channels):
        raise ValueError(f"dicom.read: file must define {len(raw)} channels, got {len(channels)}")
    samples = raw.astype(np.float64)
    for row, channel in zip(samples, channels, strict=True):
        row *= float(channel.get("ChannelSensitivity", 1)) * float(channel.get("ChannelSensitivityCorrectionFactor", 1))
        row += float(channel.get("ChannelBaseline", 0))
    if padding := group.get("WaveformPaddingValue"):
        samples[raw == np.frombuffer(padding, dtype=raw.dtype, count=1)[0]] = np.nan
    signal, names = voltages(samples, list(map(_lead, channels)), list(map(_unit, channels)))
    return Record(
        signal,
        float(group.SamplingFrequency),
        names,
        record_id=path.stem,
        source=path.name,
        age=_age(str(dataset.get("PatientAge", ""))),
        sex=sex_of(dataset.get("PatientSex", "")),
    )


def _channels(group: Any) -> list[Any]:
    return list(group.get("ChannelDefinitionSequence", []))


def _lead(channel: Any) -> str:
    """The lead by its code, else by what the code means, else by the channel's label."""
    source = (channel.get("ChannelSourceSequence") or [{}])[0]
    code = str(source.get("CodeValue", ""))
    if str(source.get("CodingSchemeDesignator", "")).upper() in ("MDC", "SCPECG") and (number := _NUMBER.search(code)):
        return _LEAD_CODES.get(int(number[0]), code)
    names = [str(source.get("CodeMeaning", "")), code, str(channel.get("ChannelLabel", ""))]
    return next(filter(lead_name, names), next(filter(None, names), "unnamed"))


def _unit(channel: Any) -> str:
    """Without a sensitivity the samples are in no unit."""
    stated = channel.get("ChannelSensitivityUnitsSequence") or [{}]
    return str(stated[0].get("CodeValue", "")) or "none"


def _age(text: str) -> float | None:
    """Of an age string: ``067Y``, ``018M``, ``003W`` or ``002D``."""
    years = _YEARS_PER_UNIT.get(text[-1:])
    age = age_of(text[:-1])
    return None if years is None or age is None else age * years
