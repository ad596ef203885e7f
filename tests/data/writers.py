"""Writers of every format that is read, by the formats' own libraries where they write, else from the standards."""

from __future__ import annotations

import base64
import binascii
import struct
import zlib
from datetime import datetime
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pydicom
import pyedflib
import scipy.io
import wfdb
from pydicom.uid import ExplicitVRLittleEndian, TwelveLeadECGWaveformStorage

# How many of a unit are one mV.
PER_MV = {"mV": 1.0, "uV": 1e3, "V": 1e-3, "nV": 1e6}


def digital(signal, step_mv=1e-3):
    """Samples in steps; what is missing is the lowest number."""
    return np.where(np.isnan(signal), -(2**15), np.rint(np.nan_to_num(signal) / step_mv)).astype(np.int16)


def npy(stem, signal, rate, leads, unit="mV"):
    np.save(path := stem.with_suffix(".npy"), signal)
    return path


def npz(stem, signal, rate, leads, unit="mV"):
    np.savez_compressed(path := stem.with_suffix(".npz"), ecg=signal.T, fs=rate, lead_names=list(leads))
    return path


def mat(stem, signal, rate, leads, unit="mV"):
    scipy.io.savemat(path := stem.with_suffix(".mat"), {"ecg": signal, "fs": rate}, do_compression=True)
    return path


def hdf5(stem, signal, rate, leads, unit="mV"):
    with h5py.File(path := stem.with_suffix(".h5"), "w") as file:
        file.create_dataset("ecg", data=signal, compression="gzip").attrs["fs"] = rate
    return path


def txt(stem, signal, rate, leads, unit="mV"):
    np.savetxt(path := stem.with_suffix(".txt"), signal.T, fmt="%.6f", header=" ".join(leads), comments="")
    return path


def _table(signal, rate, leads, unit):
    columns = {"time (ms)": np.arange(signal.shape[1]) * 1e3 / rate}
    columns |= {f"{lead} [{unit}]": row * PER_MV[unit] for lead, row in zip(leads, signal, strict=True)}
    return pd.DataFrame(columns)


def csv(stem, signal, rate, leads, unit="mV"):
    _table(signal, rate, leads, unit).to_csv(path := stem.with_suffix(".csv"), index=False)
    return path


def parquet(stem, signal, rate, leads, unit="mV"):
    _table(signal, rate, leads, unit).to_parquet(path := stem.with_suffix(".parquet"), index=False)
    return path


def wfdb_record(stem, signal, rate, leads, unit="mV", baseline=0):
    wfdb.wrsamp(
        stem.name,
        fs=rate,
        units=[unit] * len(leads),
        sig_name=list(leads),
        p_signal=np.ascontiguousarray(signal.T * PER_MV[unit], dtype=np.float64),
        fmt=["16"] * len(leads),
        adc_gain=[1e3 / PER_MV[unit]] * len(leads),
        baseline=[baseline] * len(leads),
        comments=["Age: 61", "Sex: Female"],
        write_dir=str(stem.parent),
    )
    return stem.with_suffix(".hea")


def wfdb_fixed(stem, signal, rate, leads, unit="mV"):
    """Two segments of all leads, each in a unit of its own."""
    middle, total = signal.shape[1] // 3, signal.shape[1]
    wfdb_record(stem.with_name(f"{stem.name}a"), signal[:, :middle], rate, leads, unit)
    wfdb_record(stem.with_name(f"{stem.name}b"), signal[:, middle:], rate, leads, "mV", baseline=40)
    lines = [f"{stem.name}/2 {len(leads)} {rate} {total}", f"{stem.name}a {middle}", f"{stem.name}b {total - middle}"]
    (path := stem.with_suffix(".hea")).write_text("\n".join([*lines, "#Age: 61", "#Sex: F"]) + "\n")
    return path


def wfdb_variable(stem, signal, rate, leads, unit="mV"):
    """A layout and two segments, whose signals are in opposite order."""
    middle, total = signal.shape[1] // 3, signal.shape[1]
    wfdb_record(stem.with_name(f"{stem.name}_1"), signal[:, :middle], rate, leads, unit)
    wfdb_record(stem.with_name(f"{stem.name}_2"), signal[::-1, middle:], rate, leads[::-1], unit)
    layout = [f"{stem.name}_layout {len(leads)} {rate} 0"]
    layout += [f"~ 0 1000/{unit} 0 0 0 0 0 {lead}" for lead in leads]
    stem.with_name(f"{stem.name}_layout.hea").write_text("\n".join(layout) + "\n")
    lines = [f"{stem.name}/3 {len(leads)} {rate} {total}", f"{stem.name}_layout 0"]
    lines += [f"{stem.name}_1 {middle}", f"{stem.name}_2 {total - middle}", "#Age: 61", "#Sex: F"]
    (path := stem.with_suffix(".hea")).write_text("\n".join(lines) + "\n")
    return path


def edf(stem, signal, rate, leads, unit="mV", suffix=".edf"):
    path = stem.with_suffix(suffix)
    kind, bits = (pyedflib.FILETYPE_BDFPLUS, 24) if suffix == ".bdf" else (pyedflib.FILETYPE_EDFPLUS, 16)
    with pyedflib.EdfWriter(str(path), len(leads) + 1, file_type=kind) as file:
        file.setSex(0)
        file.setBirthdate(datetime(1960, 6, 1))
        file.setStartdatetime(datetime(2021, 6, 2))
        top = 2 ** (bits - 1)
        limits = {"digital_max": top - 1, "digital_min": -top, "sample_frequency": rate}
        span = 10 * PER_MV[unit]
        headers = [
            {"label": lead, "dimension": unit, "physical_max": span, "physical_min": -span, **limits} for lead in leads
        ]
        headers.append({"label": "Resp", "dimension": "l/s", "physical_max": 1, "physical_min": -1, **limits})
        file.setSignalHeaders([{"transducer": "", "prefilter": "", **header} for header in headers])
        file.writeSamples([*np.ascontiguousarray(signal * PER_MV[unit]), np.zeros(signal.shape[1])])
    return path


def bdf(stem, signal, rate, leads, unit="mV"):
    return edf(stem, signal, rate, leads, unit, ".bdf")


LEAD_CODES = {"I": 1, "II": 2, "III": 61, "AVR": 62, "AVL": 63, "AVF": 64} | {f"V{n}": n + 2 for n in range(1, 7)}


def dicom(stem, signal, rate, leads, unit="mV"):
    """A median beat before the rhythm; missing samples are padding."""
    from pydicom.dataset import Dataset, FileMetaDataset

    def channel(lead, baseline):
        source, units, item = Dataset(), Dataset(), Dataset()
        number = LEAD_CODES[lead.upper().split()[-1]]
        source.CodeValue, source.CodingSchemeDesignator, source.CodeMeaning = f"2:{number}", "MDC", f"Lead {lead}"
        units.CodeValue, units.CodingSchemeDesignator, units.CodeMeaning = unit, "UCUM", unit
        item.ChannelSourceSequence, item.ChannelSensitivityUnitsSequence = [source], [units]
        item.ChannelSensitivity = 2e-3 * PER_MV[unit]
        item.ChannelSensitivityCorrectionFactor, item.ChannelBaseline = 0.5, baseline * PER_MV[unit]
        item.WaveformBitsStored = 16
        return item

    def group(samples, originality, baseline):
        item = Dataset()
        item.WaveformOriginality = originality
        item.NumberOfWaveformChannels, item.NumberOfWaveformSamples = samples.shape
        item.SamplingFrequency = rate
        item.ChannelDefinitionSequence = [channel(lead, baseline) for lead in leads]
        item.WaveformBitsAllocated, item.WaveformSampleInterpretation = 16, "SS"
        item.WaveformPaddingValue = struct.pack("<h", -(2**15))
        item.WaveformData = digital(samples - baseline).T.tobytes()
        return item

    dataset = Dataset()
    dataset.SOPClassUID = TwelveLeadECGWaveformStorage
    dataset.SOPInstanceUID = pydicom.uid.generate_uid(entropy_srcs=["test"])
    dataset.PatientName, dataset.PatientAge, dataset.PatientSex = "Nobody^Known", "061Y", "F"
    dataset.WaveformSequence = [group(signal[:, :100] * 2, "DERIVED", 0.0), group(signal, "ORIGINAL", 0.25)]
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.save_as(path := stem.with_suffix(".dcm"), enforce_file_format=True)
    return path


def muse(stem, signal, rate, leads, unit="mV"):
    def waveform(kind, samples):
        data = []
        for lead, row in zip(leads, digital(samples), strict=True):
            payload = row.astype("<i2").tobytes()
            data.append(
                f"<LeadData><LeadByteCountTotal>{len(payload)}</LeadByteCountTotal><LeadTimeOffset>0</LeadTimeOffset>"
                f"<LeadSampleCountTotal>{len(row)}</LeadSampleCountTotal>"
                f"<LeadAmplitudeUnitsPerBit>{PER_MV[unit] * 1e-3}</LeadAmplitudeUnitsPerBit>"
                f"<LeadAmplitudeUnits>{MUSE_UNITS[unit]}</LeadAmplitudeUnits><LeadID>{lead}</LeadID>"
                f"<LeadSampleSize>2</LeadSampleSize><LeadOff>FALSE</LeadOff>"
                f"<LeadDataCRC32>{zlib.crc32(payload)}</LeadDataCRC32>"
                f"<WaveFormData>{base64.b64encode(payload).decode()}</WaveFormData></LeadData>"
            )
        return (
            f"<Waveform><WaveformType>{kind}</WaveformType><SampleBase>{rate}</SampleBase>"
            f"<SampleExponent>0</SampleExponent>{''.join(data)}</Waveform>"
        )

    (path := stem.with_suffix(".xml")).write_text(
        '<?xml version="1.0" encoding="ISO-8859-1"?>\n<!DOCTYPE RestingECG SYSTEM "restecg.dtd">\n<RestingECG>'
        "<PatientDemographics><PatientLastName>Nobody</PatientLastName><PatientAge>61</PatientAge>"
        "<AgeUnits>YEARS</AgeUnits><Gender>FEMALE</Gender></PatientDemographics>"
        f"{waveform('Median', signal[:, :100] * 2)}{waveform('Rhythm', signal)}</RestingECG>",
        encoding="latin-1",
    )
    return path


MUSE_UNITS = {"mV": "MILLIVOLTS", "uV": "MICROVOLTS", "V": "VOLTS", "nV": "NANOVOLTS"}


def aecg(stem, signal, rate, leads, unit="mV"):
    scale = f'<origin value="{0.25 * PER_MV[unit]}" unit="{unit}"/><scale value="{1e-3 * PER_MV[unit]}" unit="{unit}"/>'
    sequences = [
        '<component><sequence><code code="TIME_RELATIVE"/><value xsi:type="GLIST_PQ">'
        f'<head value="0" unit="s"/><increment value="{1 / rate!r}" unit="s"/></value></sequence></component>'
    ]
    for lead, row in zip(leads, digital(signal - 0.25), strict=True):
        sequences.append(
            f'<component><sequence><code code="MDC_ECG_LEAD_{lead.upper().split()[-1]}"/>'
            f'<value xsi:type="SLIST_PQ">{scale}<digits>{" ".join(map(str, row))}</digits></value></sequence>'
            "</component>"
        )
    (path := stem.with_suffix(".xml")).write_text(
        '<?xml version="1.0" encoding="UTF-8"?>\n<AnnotatedECG xmlns="urn:hl7-org:v3" '
        'xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"><effectiveTime><low value="20210602"/></effectiveTime>'
        "<componentOf><timepointEvent><componentOf><subjectAssignment><subject><trialSubject>"
        '<subjectDemographicPerson><name>Nobody</name><administrativeGenderCode code="F"/><birthTime value="19600601"/>'
        "</subjectDemographicPerson></trialSubject></subject></subjectAssignment></componentOf></timepointEvent>"
        '</componentOf><component><series><effectiveTime><low value="20210602120000"/></effectiveTime>'
        '<code code="RHYTHM"/><component><sequenceSet>'
        f"{''.join(sequences)}</sequenceSet></component></series></component></AnnotatedECG>"
    )
    return path


def philips(stem, signal, rate, leads, unit="mV"):
    """The twelve leads in standard order, packed as XLI: second differences, high bytes first, LZW of 10 bits."""
    one, two, three, avr, avl, avf, *chest = digital(signal).astype(np.int64)
    rows = [one, two, two - one - three, -avr - (one + two) // 2, (one - three) // 2 - avl, (two + three) // 2 - avf]
    packed = b""
    for row in [*rows, *chest]:
        second = 2 * row[1:-1] - row[:-2] - row[2:]
        deltas = np.concatenate([row[:2], second[1:] + 64, [64]]).astype(">i2").view(np.uint8).reshape(-1, 2)
        chunk = _lzw(deltas.T.tobytes())
        packed += struct.pack("<ihh", len(chunk), 0, second[0]) + chunk
    (path := stem.with_suffix(".xml")).write_text(
        '<?xml version="1.0" encoding="UTF-8"?>\n<restingecgdata xmlns="http://www3.medical.philips.com"><documentinfo>'
        "<documenttype>SierraECG</documenttype><documentversion>1.03</documentversion></documentinfo><dataacquisition>"
        f"<signalcharacteristics><samplingrate>{rate}</samplingrate><signalresolution>1</signalresolution>"
        "<acquisitiontype>STD-12</acquisitiontype><bitspersample>16</bitspersample><signaloffset>0</signaloffset>"
        "<signalsigned>True</signalsigned><numberchannelsallocated>12</numberchannelsallocated>"
        "<numberchannelsvalid>12</numberchannelsvalid></signalcharacteristics></dataacquisition><patient>"
        "<generalpatientdata><name><lastname>Nobody</lastname></name><age><years>61</years></age><sex>Female</sex>"
        f'</generalpatientdata></patient><waveforms><parsedwaveforms dataencoding="Base64" compressmethod="XLI" '
        f'durationperchannel="{round(signal.shape[1] / rate * 1000)}" numberofleads="12" '
        f'leadlabels="{" ".join(leads)}">{base64.b64encode(packed).decode()}</parsedwaveforms></waveforms>'
        "</restingecgdata>"
    )
    return path


def _lzw(data):
    codes, known, bits = [], {bytes([value]): value for value in range(256)}, ""
    word = b""
    for value in data:
        longer = word + bytes([value])
        if longer not in known:
            codes.append(known[word])
            if len(known) <= 1022:
                known[longer] = len(known)
            longer = bytes([value])
        word = longer
    bits = "".join(f"{code:010b}" for code in [*codes, known[word]])
    return int(bits + "0" * (-len(bits) % 8), 2).to_bytes(-(-len(bits) // 8), "big")


def scp(stem, signal, rate, leads, unit="mV"):
    """Sections 0, 1, 2 (default Huffman table), 3 and 6 (second differences), with their checksums."""
    samples = digital(signal).astype(np.int64)
    encoded = []
    for row in samples:
        values = np.concatenate([row[:2], row[2:] - 2 * row[1:-1] + row[:-2]])
        bits = "".join(map(_huffman, values))
        encoded.append(int(bits + "0" * (-len(bits) % 16), 2).to_bytes(-(-len(bits) // 16) * 2, "big"))
    sizes = [len(chunk) for chunk in encoded]
    patient = struct.pack("<BHHB", 4, 3, 61, 1) + struct.pack("<BHB", 8, 1, 2) + struct.pack("<BH", 255, 0)
    definitions = [struct.pack("<IIB", 1, samples.shape[1], LEAD_CODES[lead.upper().split()[-1]]) for lead in leads]
    bodies = {
        1: patient + b"\0" * (len(patient) % 2),
        2: struct.pack("<H", 19999),
        3: struct.pack("<BB", len(leads), 0b100 | len(leads) << 3 & 0xFF) + b"".join(definitions),
        6: struct.pack("<HHBB", 1000, round(1e6 / rate), 2, 0)
        + struct.pack(f"<{len(sizes)}H", *sizes)
        + b"".join(encoded),
    }
    bodies = {number: body + b"\0" * (len(body) % 2) for number, body in bodies.items()}
    start, sections, pointers = 7 + 16 + 120, b"", {0: (16 + 120, 7)}
    for number, body in bodies.items():
        section = _section(number, body)
        pointers[number] = len(section), start + len(sections)
        sections += section
    table = b"".join(struct.pack("<HII", number, *pointers.get(number, (0, 0))) for number in range(12))
    content = _section(0, table) + sections
    sized = struct.pack("<I", 6 + len(content)) + content
    (path := stem.with_suffix(".scp")).write_bytes(struct.pack("<H", binascii.crc_hqx(sized, 0xFFFF)) + sized)
    return path


def _section(number, body):
    content = struct.pack("<HIBB6s", number, 16 + len(body), 20, 20, b"SCPECG" if not number else b"\0" * 6) + body
    return struct.pack("<H", binascii.crc_hqx(content, 0xFFFF)) + content


def _huffman(value):
    """EN 1064, C.3.7.6: the default table."""
    value = int(value)
    if value == 0:
        return "0"
    if abs(value) <= 8:
        return "1" * abs(value) + "0" + "01"[value < 0]
    if -128 <= value < 128:
        return f"1111111110{value & 0xFF:08b}"
    return f"1111111111{value & 0xFFFF:016b}"


WRITERS = {
    "npy": npy,
    "npz": npz,
    "mat": mat,
    "hdf5": hdf5,
    "txt": txt,
    "csv": csv,
    "parquet": parquet,
    "wfdb": wfdb_record,
    "wfdb_fixed": wfdb_fixed,
    "wfdb_variable": wfdb_variable,
    "edf": edf,
    "bdf": bdf,
    "dicom": dicom,
    "muse": muse,
    "aecg": aecg,
    "philips": philips,
    "scp": scp,
}


def save(name: str, stem: Path, signal, rate, leads, unit="mV") -> Path:
    return WRITERS[name](stem, np.asarray(signal, dtype=np.float64), rate, tuple(leads), unit)
