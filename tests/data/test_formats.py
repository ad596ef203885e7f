from __future__ import annotations

import re
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pydicom
import pytest
import scipy.io
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hubert_ecg.data import READERS, ReadError, open_dataset, read_record
from hubert_ecg.data.record import lead_name
from hubert_ecg.signal import LEADS, prepare_ecg_for_inference

DOCS = Path(__file__).parents[2] / "docs" / "formats.md"

# Formats that say nothing of their leads or rate: the caller does.
UNNAMED = ("npy", "mat", "hdf5")
UNITS = dict.fromkeys(("csv", "parquet", "wfdb", "wfdb_fixed", "wfdb_variable"), ("mV", "uV", "V"))
UNITS |= dict.fromkeys(("edf", "bdf", "dicom", "muse", "aecg"), ("mV", "uV", "V"))
FORMATS = (*UNITS, *UNNAMED, "npz", "txt", "philips", "scp")
STATES_PATIENT = ("wfdb", "wfdb_fixed", "wfdb_variable", "edf", "bdf", "dicom", "muse", "aecg", "philips", "scp")
SPELLINGS = (str, str.lower, str.upper, "ECG {}".format, "Lead {}".format)


def twelve(rate, seconds=10, seed=0):
    """Band-limited leads that obey Einthoven and Goldberger, within 3 mV, ``[12, rate * seconds]`` in mV."""
    rng = np.random.default_rng(seed)
    hz, mv = rng.uniform(0.8, 15, (8, 5, 1)), rng.uniform(0.05, 0.4, (8, 5, 1))
    phase, time = rng.uniform(0, 2 * np.pi, (8, 5, 1)), np.arange(round(rate * seconds)) / rate
    one, two, *chest = (mv * np.sin(2 * np.pi * hz * time + phase)).sum(1)
    return np.stack([one, two, two - one, -(one + two) / 2, one - two / 2, two - one / 2, *chest])


def test_every_reader_is_written_here(save, tmp_path):
    suffixes = {save(name, tmp_path / name, twelve(500, 1), 500, LEADS).suffix for name in FORMATS}
    assert suffixes | {".hdf5"} == READERS.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_leads_units_rate_and_patient(save, tmp_path, name):
    signal = twelve(400, 4)
    for unit in UNITS.get(name, ("mV",)):
        record = read_record(save(name, tmp_path / f"r{unit}", signal, 400, LEADS, unit), 400)
        assert (record.sampling_rate_hz, record.lead_names[:12], record.record_id) == (400, LEADS, f"r{unit}")
        np.testing.assert_allclose(record.standard_leads()[0], signal, atol=5.1e-4)
        patient = (61, "female") if name in STATES_PATIENT else (None, None)
        assert (record.age, record.sex) == patient
        assert "Nobody" not in repr(record)


@pytest.mark.parametrize("name", ["npy", "npz", "csv", "parquet", "wfdb", "wfdb_fixed", "wfdb_variable", "dicom"])
def test_missing_samples(save, tmp_path, name):
    signal = twelve(500, 2)
    signal[7, 100:200] = np.nan
    record = read_record(save(name, tmp_path / "r", signal, 500, LEADS))
    np.testing.assert_array_equal(np.isnan(record.standard_leads()[0]), np.isnan(signal))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shuffled")


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_order_rate_and_units_do_not_matter(save, folder, data):
    name = data.draw(st.sampled_from(FORMATS))
    rate = data.draw(st.sampled_from([250, 400, 500, 1000]))
    unit = data.draw(st.sampled_from(UNITS.get(name, ("mV",))))
    # Philips keeps the twelve leads in one order.
    leads = LEADS if name == "philips" else tuple(data.draw(st.permutations(LEADS)))
    kept = 12 if name == "philips" else data.draw(st.integers(2, 12))
    spelled = data.draw(st.sampled_from(SPELLINGS)) if name not in (*UNNAMED, "txt", "philips") else str
    leads = tuple(lead for lead in leads[:kept])
    signal = twelve(rate, 5)[[LEADS.index(lead) for lead in leads]]
    written = tuple(spelled(lead) for lead in leads)

    path = save(name, folder / f"{name}{rate}", signal, rate, written, unit)
    record = read_record(path, rate, leads)
    found, present = record.standard_leads()

    limb = len({*leads} & {*LEADS[:6]})
    derived = {*LEADS[:6]} if limb >= 2 else set()
    np.testing.assert_array_equal(present, [lead in {*leads} | derived for lead in LEADS])
    prepared = prepare_ecg_for_inference(found, record.sampling_rate_hz, None)
    expected = prepare_ecg_for_inference(twelve(500, 5) * present[:, None], 500, None)
    # The first and last half second depend on what lies beyond, which rates see differently.
    calm = slice(50, -50)
    np.testing.assert_allclose(prepared[..., calm], expected[..., calm], atol=0.02)


@pytest.mark.parametrize(
    ("name", "suffix", "module"),
    [
        ("edf", ".edf", "edfio"),
        ("dicom", ".dcm", "pydicom"),
        ("muse", ".xml", "ecgdatakit"),
        ("scp", ".scp", "ecgdatakit"),
    ],
)
def test_a_missing_library_is_named(save, tmp_path, monkeypatch, name, suffix, module):
    path = save(name, tmp_path / "r", twelve(500, 1), 500, LEADS)
    for loaded in [key for key in sys.modules if key.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ReadError, match=rf"needs {module}: pip install 'hubert-ecg\[formats\]'"):
        read_record(path)


def changed(path, old, new):
    content = path.read_bytes()
    assert content.count(old)
    path.write_bytes(content.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"<LeadSampleCountTotal>500<", b"<LeadSampleCountTotal>499<", "499"),
        (b"<LeadDataCRC32>", b"<LeadDataCRC32>1", "CRC32"),
        (b"MILLIVOLTS", b"OHMS", "MILLIVOLTS|must be a voltage"),
        (b'SYSTEM "restecg.dtd"', b'[<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]', "ntit"),
        (b"RestingECG>", b"RestingEEG>", "Resting|mismatched|must be one of"),
    ],
)
def test_damaged_muse(save, tmp_path, old, new, message):
    path = save("muse", tmp_path / "r", twelve(500, 1), 500, LEADS)
    # The rhythm is the second waveform.
    content = path.read_bytes()
    head, rhythm = content[: content.index(b"Rhythm")], content[content.index(b"Rhythm") :]
    changes = (head.replace(old, new), rhythm.replace(old, new))
    path.write_bytes(b"".join(changes))
    assert path.read_bytes() != content
    with pytest.raises(ReadError, match=message):
        read_record(path)


def test_an_electrode_that_was_off(save, tmp_path):
    path = save("muse", tmp_path / "r", twelve(500, 1), 500, LEADS)
    head, rhythm = path.read_text().split("Rhythm")
    before, after = rhythm.split("<LeadID>V3<")
    path.write_text(f"{head}Rhythm{before}<LeadID>V3<{after.replace('>FALSE<', '>TRUE<', 1)}")
    assert read_record(path).standard_leads()[1].tolist() == [lead != "V3" for lead in LEADS]


def test_scp_with_a_wrong_checksum(save, tmp_path):
    path = save("scp", tmp_path / "r", twelve(500, 1), 500, LEADS)
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(ReadError, match="CRC mismatch"):
        read_record(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda item: item.ChannelDefinitionSequence.pop(), "must define 12 channels, got 11"),
        (lambda item: setattr(item, "NumberOfWaveformSamples", 499), "must fill 11976 bytes, got 12000"),
        (lambda item: setattr(item, "WaveformOriginality", "DERIVED"), "derived ones alone"),
        (
            lambda item: delattr(item.ChannelDefinitionSequence[0], "ChannelSensitivityUnitsSequence"),
            "unit of lead I must be a voltage, got none",
        ),
    ],
)
def test_damaged_dicom(save, tmp_path, change, message):
    path = save("dicom", tmp_path / "r", twelve(500, 1), 500, LEADS)
    dataset = pydicom.dcmread(path)
    change(dataset.WaveformSequence[1])
    dataset.save_as(path)
    with pytest.raises(ReadError, match=message):
        read_record(path)


@pytest.mark.parametrize(("text", "years"), [("018M", 1.5), ("000D", 0), ("abcY", None), ("", None)])
def test_dicom_ages(save, tmp_path, text, years):
    path = save("dicom", tmp_path / "r", twelve(500, 1), 500, LEADS)
    dataset = pydicom.dcmread(path)
    dataset.add_new("PatientAge", "SH", text)
    dataset.save_as(path)
    assert read_record(path).age == years


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"EDF+C", b"EDF+D", "EDF"),
        (b"mV      ", b"Ohm     ", "unit of lead II must be a voltage, got Ohm"),
        (b"II    ", b"EKG2  ", "must hold leads named I, II, V1, ..., got EKG2"),
        (b"5000    ", b"5001    ", "r.edf"),
    ],
)
def test_damaged_edf(save, tmp_path, old, new, message):
    path = save("edf", tmp_path / "r", twelve(500, 3)[1:2], 500, ("II",))
    if old in path.read_bytes():
        changed(path, old, new)
    else:
        path.write_bytes(path.read_bytes()[:-700])
    if old == b"EDF+C":
        # The second data record begins a second late.
        changed(path, b"+1\x14\x14", b"+2\x14\x14")
    with pytest.raises(ReadError, match=message):
        read_record(path)


def test_checksums_of_wfdb(save, tmp_path):
    path = save("wfdb", tmp_path / "r", twelve(500, 1), 500, LEADS)
    samples = path.with_suffix(".dat")
    content = bytearray(samples.read_bytes())
    content[2 * 4] ^= 4
    samples.write_bytes(content)
    with pytest.raises(ReadError, match=r"must have the header's checksums, got others in \['aVL'\]"):
        read_record(path)
    # A writer that knows no checksum writes 0.
    lines = [re.sub(r" (-?\d+) 0 aVL$", " 0 0 aVL", line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines) + "\n")
    assert read_record(path).num_samples == 500


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("r_2 334", "r_2 335", "segments must have 500 samples, got 501"),
        ("r/3", "r/4", "must list 4 segments, got 3"),
        ("r_2 334", "../r_2 334", "files beside it"),
        ("r_2 334", "r 334", "r"),
        (" 500\n", "\n", "r_2 must have"),
    ],
)
def test_damaged_segments(save, tmp_path, old, new, message):
    path = save("wfdb_variable", tmp_path / "r", twelve(500, 1), 500, LEADS)
    text = path.read_text().replace(old, new, 1)
    path.write_text(text.replace("r_2 334", "r_2 335") if old == " 500\n" else text)
    with pytest.raises(ReadError, match=message):
        read_record(path)


def test_a_gap_between_segments(save, tmp_path):
    signal = twelve(500, 2)
    save("wfdb", tmp_path / "a", signal[:, :300], 500, LEADS)
    save("wfdb", tmp_path / "b", signal[:, 400:], 500, LEADS)
    (tmp_path / "r.hea").write_text("r/3 12 500 1000\na 300\n~ 100\nb 600\n")
    found = read_record(tmp_path / "r.hea").signal
    assert np.isnan(found[:, 300:400]).all()
    np.testing.assert_allclose(found[:, 400:], signal[:, 400:], atol=5.1e-4)
    (tmp_path / "r.hea").write_text("r/3 12 500\na 300\n~ 100000000000\nb 600\n")
    with pytest.raises(ReadError, match="must hold its arrays"):
        read_record(tmp_path / "r.hea")


def test_wfdb_headers_that_describe_less_than_there_is(save, tmp_path):
    path = save("wfdb", tmp_path / "r", twelve(500, 2), 500, LEADS)
    # Without checksums, which would tell.
    first, *lines = re.sub(r" (-?\d+) 0 (\S+)$", r" 0 0 \2", path.read_text(), flags=re.MULTILINE).splitlines()
    path.write_text("\n".join((first.replace("1000", "900"), *lines)))
    with pytest.raises(ReadError, match=r"r\.dat must have 21600 bytes, as the header says, got 24000"):
        read_record(path)
    path.write_text("\n".join((first.replace(" 12 ", " 11 "), *lines[:11])))
    with pytest.raises(ReadError, match=r"r\.dat must have 22000 bytes"):
        read_record(path)
    path.write_text("\n".join((first, *lines)))
    assert read_record(path).signal.shape == (12, 1000)


def test_segments_are_no_recordings_of_their_own(save, tmp_path):
    save("wfdb_variable", tmp_path / "r", twelve(500, 1), 500, LEADS)
    save("wfdb", tmp_path / "s", twelve(500, 1), 500, LEADS)
    assert [entry.record_id for entry in open_dataset("folder", tmp_path).entries()] == ["r", "s"]


def test_a_header_names_files_beside_it_alone(save, tmp_path):
    path = save("wfdb", tmp_path / "r", twelve(500, 1), 500, LEADS)
    for name in ("/dev/zero", "../r.dat", "s3://bucket/r.dat", "-"):
        path.write_text(re.sub(r"^\S+\.dat|^/\S+|^\.\.\S+|^s3\S+", name, path.read_text(), flags=re.MULTILINE))
        with pytest.raises(ReadError, match="must name files beside it"):
            read_record(path)


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("time,I", "0,1\n1,2\n1,3", "must grow in even steps"),
        ("time,I", "0,1\n2,2\n4,3", r"20 Hz or more, got steps of 2 s; name another unit: time \(ms\)"),
        ("I,II", "1,2\n3", "columns"),
        ("I [Ohm],II", "1,2\n3,4", "unit of lead I must be a voltage"),
        ("time,t", "0,0\n1,1", "first line must name the leads"),
        ("I,pulse", "0,0\n1,1", "first line must name the leads"),
        ("I,II,time [h]", "1,1,1\n2,2,2", r"time must be in s, ms or us, got 'time \[h\]'"),
        ("I,II,note", "1,1,x\n2,2", "columns"),
    ],
)
def test_damaged_csv(tmp_path, header, rows, message):
    (tmp_path / "r.csv").write_text(f"{header}\n{rows}\n")
    with pytest.raises(ReadError, match=message):
        read_record(tmp_path / "r.csv")


@pytest.mark.parametrize("delimiter", [",", ";", "\t", " "])
def test_csv_delimiters(tmp_path, delimiter):
    cell = "" if delimiter != " " else "nan"
    lines = ["time I V2 [uV]", f"0.000 1 {cell}", "0.003 2 5000", "0.005 3 6000", "0.008 4 7000"]
    (tmp_path / "r.csv").write_text(
        "\n".join(line.replace(" [", "@").replace(" ", delimiter) for line in lines).replace(
            "@", " [" if delimiter != " " else "["
        )
    )
    record = read_record(tmp_path / "r.csv")
    np.testing.assert_array_equal(record.signal, [[1, 2, 3, 4], [np.nan, 5, 6, 7]])
    np.testing.assert_allclose(record.sampling_rate_hz, 375)
    assert record.lead_names == ("I", "V2")


def test_parquet_states_its_rate_or_the_caller_does(tmp_path):
    table = pd.DataFrame({"II": [1.0, 2.0, None], "V1": [4, 5, 6]})
    table.to_parquet(tmp_path / "r.parquet")
    record = read_record(tmp_path / "r.parquet", 360)
    assert record.sampling_rate_hz == 360
    np.testing.assert_array_equal(record.signal, np.float32([[1, 2, np.nan], [4, 5, 6]]))
    table.assign(note="x").to_parquet(tmp_path / "r.parquet")
    assert read_record(tmp_path / "r.parquet").lead_names == ("II", "V1")
    table.assign(I="x").to_parquet(tmp_path / "r.parquet")
    with pytest.raises(ReadError, match=r"columns must be numbers, got other values in \['I'\]"):
        read_record(tmp_path / "r.parquet")


@pytest.mark.parametrize(
    "head",
    [",I_mV,II_mV", "index,I,II", "Time_s,I,II", "sample;I [mV];II [mV]", "name\tI (mV)\tII (mV)", "\tI\tII"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_columns_that_are_no_leads_are_left_out(tmp_path, head, encoding):
    mark = next(mark for mark in ",;\t" if mark in head)
    first = "abc" if head.startswith("name") else None
    lines = [head, *(mark.join((first or f"{i / 400}", f"{i}", f"{-i}")) for i in range(8))]
    (tmp_path / "r.csv").write_text("\n".join(lines), encoding=encoding)
    record = read_record(tmp_path / "r.csv", 500)
    assert record.lead_names == ("I", "II")
    assert record.sampling_rate_hz == (400 if head.startswith("Time") else 500)
    np.testing.assert_array_equal(record.signal, [np.arange(8), -np.arange(8)])
    assert [entry.record_id for entry in open_dataset("folder", tmp_path).entries()] == ["r"]


@pytest.mark.parametrize(
    "name",
    ["fs", "Fs", "sfreq", "samplingRate", "sampling_rate_hz", "Sampling_Frequency", "frequency", "rate", "fs_hz"],
)
def test_a_rate_beside_the_signal_is_seen_however_it_is_spelled(tmp_path, name):
    signal = twelve(250, 2).astype(np.float32)
    np.savez(tmp_path / "a.npz", ecg=signal, **{name: 250})
    scipy.io.savemat(tmp_path / "b.mat", {"val": signal, name: 250})
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file.create_dataset("ecg", data=signal).attrs[name] = 250
    assert {path.name: read_record(path).sampling_rate_hz for path in tmp_path.iterdir()} == dict.fromkeys(
        ("a.npz", "b.mat", "c.h5"), 250
    )


def test_names_of_leads_state_units(tmp_path):
    np.savez(tmp_path / "a.npz", ecg=np.ones((2, 600)), lead_names=["I (uV)", "V2_mV"])
    record = read_record(tmp_path / "a.npz")
    assert record.lead_names == ("I", "V2")
    np.testing.assert_allclose(record.signal[:, 0], [1e-3, 1])


def test_files_that_claim_more_than_they_hold(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("ecg", shape=(12, 10**10), chunks=(12, 1000), dtype="f4")
    with open(tmp_path / "a.npy", "wb") as out:
        np.lib.format.write_array_header_1_0(out, {"descr": "<f8", "fortran_order": False, "shape": (12, 10**9)})
    for name in ("a.h5", "a.npy"):
        with pytest.raises(ReadError, match="must hold its arrays"):
            read_record(tmp_path / name)


def test_npz_that_could_run_code(tmp_path):
    np.savez(tmp_path / "a.npz", ecg=np.array([[{}] * 5] * 12, dtype=object))
    with pytest.raises(ReadError, match="allow_pickle=False"):
        read_record(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("name", "lead"),
    [
        ("Lead I (Einthoven)", "I"),
        ("MDC_ECG_LEAD_AVR", "aVR"),
        ("ECG V1", "V1"),
        ("aVR, augmented voltage, right", None),
    ],
)
def test_names_that_standards_use(name, lead):
    assert lead_name(name) == lead


def test_the_list_of_formats_is_complete():
    text = DOCS.read_text(encoding="utf-8")
    listed = {suffix for line in text.splitlines() if line.startswith("|") for suffix in re.findall(r"`(\.\w+)`", line)}
    assert listed - {".dat"} == READERS.keys()
