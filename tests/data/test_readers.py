from __future__ import annotations

import csv
import pickle
import sys

import h5py
import numpy as np
import pytest
import scipy.io
import wfdb

from hubert_ecg.config import UserError
from hubert_ecg.data import ReadError, read_record
from hubert_ecg.data.record import age_of, lead_list
from hubert_ecg.data.wfdb_files import read_header
from hubert_ecg.signal import LEADS, prepare_ecg_for_inference

SIGNAL = np.random.default_rng(0).normal(size=(12, 700)).round(3)


def write_wfdb(folder, name="rec", signal=SIGNAL, leads=LEADS, units="mV", gain=1000.0, baseline=0, rate=500, **extra):
    wfdb.wrsamp(
        name,
        fs=rate,
        units=[units] * len(leads),
        sig_name=list(leads),
        p_signal=np.ascontiguousarray(signal.T, dtype=np.float64),
        fmt=["16"] * len(leads),
        adc_gain=[gain] * len(leads),
        baseline=[baseline] * len(leads),
        write_dir=str(folder),
        **extra,
    )
    return folder / f"{name}.hea"


def test_npy(tmp_path):
    np.save(tmp_path / "a.npy", SIGNAL)
    np.save(tmp_path / "t.npy", SIGNAL.T)
    record = read_record(tmp_path / "a.npy", 250)
    np.testing.assert_array_equal(record.signal, SIGNAL.astype(np.float32))
    np.testing.assert_array_equal(read_record(tmp_path / "t.npy").signal, record.signal)
    assert (record.sampling_rate_hz, record.lead_names, record.record_id) == (250, LEADS, "a")


@pytest.mark.parametrize(
    ("names", "present"),
    [
        ("V2", "V2"),
        ("i, c5", "I V5"),
        ("II,I,-,V1", "I II III aVR aVL aVF V1"),
        (None, " ".join(LEADS)),
    ],
)
def test_rows_that_the_caller_names(tmp_path, names, present):
    leads = lead_list(names)
    signal = np.stack([SIGNAL[LEADS.index(name)] if name in LEADS else SIGNAL[3] for name in leads])
    for kind, array in (("rows", signal), ("columns", signal.T), ("vector", signal[0])):
        if kind == "vector" and len(leads) > 1:
            continue
        np.save(tmp_path / f"{kind}.npy", array)
        found, measured = read_record(tmp_path / f"{kind}.npy", 500, leads).standard_leads()
        assert " ".join(name for name, there in zip(LEADS, measured, strict=True) if there) == present
        for name in set(leads) - {"-"}:
            np.testing.assert_array_equal(found[LEADS.index(name)], SIGNAL[LEADS.index(name)].astype(np.float32))


@pytest.mark.parametrize("names", ["", "I,I", "I,II,V9", "-", "I;II"])
def test_rows_that_are_no_leads(names):
    with pytest.raises(UserError, match="--lead_names must be different leads of I, II, "):
        lead_list(names)


def test_npy_of_twelve_samples_has_leads_first(tmp_path):
    np.save(tmp_path / "a.npy", SIGNAL[:, :12])
    np.testing.assert_array_equal(read_record(tmp_path / "a.npy").signal, SIGNAL[:, :12].astype(np.float32))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (SIGNAL[:8], r"array must be .* got \[8, 700\]"),
        (SIGNAL[0], r"got \[700\]"),
        (SIGNAL[None], r"got \[1, 12, 700\]"),
        (np.zeros((12, 0)), "not empty"),
        (np.array([[{}] * 5] * 12), "allow_pickle=False"),
    ],
)
def test_npy_of_another_kind(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(ReadError, match=message):
        read_record(tmp_path / "a.npy")


@pytest.mark.parametrize("content", [b"", b"no array", pickle.dumps([1]), b"PK\x03\x04"])
def test_npy_that_is_none(tmp_path, content):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(ReadError, match=r"must be in NumPy's \.npy format"):
        read_record(tmp_path / "a.npy")


@pytest.mark.parametrize(("units", "factor"), [("mV", 1.0), ("uV", 1e-3), ("V", 1e3), ("MV", 1.0)])
def test_wfdb_units_gains_and_baselines(tmp_path, units, factor):
    path = write_wfdb(tmp_path, units=units, gain=812.5, baseline=-37, rate=360)
    record = read_record(path)
    np.testing.assert_allclose(record.signal, SIGNAL * factor, atol=0.6 / 812.5 * factor)
    assert record.sampling_rate_hz == 360


def test_wfdb_names_its_leads_in_any_case_and_order(tmp_path):
    order = np.random.default_rng(3).permutation(12)
    path = write_wfdb(tmp_path, signal=SIGNAL[order], leads=[LEADS[lead].lower() for lead in order])
    leads, present = read_record(path).standard_leads()
    np.testing.assert_allclose(leads, SIGNAL, atol=6e-4)
    assert present.all()


def test_wfdb_may_be_named_by_header_signal_or_stem(tmp_path):
    path = write_wfdb(tmp_path, comments=["Age: 67", "Sex: Female", "Dx: 426783006,164889003"])
    for name in ("rec.hea", "rec.dat", "rec"):
        record = read_record(tmp_path / name)
        assert (record.record_id, record.age, record.sex) == ("rec", 67, "female")
    assert read_header(path).diagnoses == ("426783006", "164889003")


@pytest.mark.parametrize(
    ("comments", "age", "sex", "diagnoses"),
    [
        (["#Age: NaN", "#Sex: Unknown", "#Dx: Unknown"], None, None, ()),
        (["# <age>: 69", "# <sex>: M", "#Dx:1, 2,,1"], 69, "male", ("1", "2")),
        (["#", "##", "#no colon here"], None, None, ()),
    ],
)
def test_header_comments(tmp_path, comments, age, sex, diagnoses):
    path = tmp_path / "a.hea"
    path.write_text("\n".join(["a 1 500 10", "a.dat 16 200 16 0 0 0 0 I", *comments]))
    header = read_header(path)
    np.testing.assert_equal(header.age, age)
    assert (header.sex, header.diagnoses) == (sex, diagnoses)


def test_wfdb_leaves_out_what_is_no_voltage(tmp_path):
    path = write_wfdb(tmp_path, signal=SIGNAL[:2], leads=("II", "RESP"))
    text = path.read_text().splitlines()
    text[2] = text[2].replace("/mV", "/Ohm")
    path.write_text("\n".join(text) + "\n")
    assert read_record(path).lead_names == ("II",)
    text[1] = text[1].replace("/mV", "/Ohm")
    path.write_text("\n".join(text) + "\n")
    with pytest.raises(ReadError, match="unit of lead II must be a voltage, got Ohm"):
        read_record(path)


def corrupt_rate(text):
    return text.replace(".dat 16 ", ".dat 16x4 ", 1)


def corrupt_count(text):
    return text.replace("rec 12 ", "rec 13 ", 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (corrupt_rate, "one rate, got several samples a frame"),
        (corrupt_count, "rec.hea"),
        (lambda text: text.replace(" 500 700", " 500 70000"), "rec.hea"),
        (lambda text: text.replace("rec.dat", "other.dat"), "other.dat"),
        (lambda text: text.replace(" 500 ", " 0 "), "rec.hea"),
        (lambda text: "", "rec.hea"),
        (lambda text: "\0\0\0", "rec.hea"),
    ],
)
def test_damaged_wfdb_headers(tmp_path, change, message):
    path = write_wfdb(tmp_path)
    path.write_text(change(path.read_text()))
    with pytest.raises(ReadError, match=message):
        read_record(path)


def test_truncated_wfdb_signal(tmp_path):
    path = write_wfdb(tmp_path)
    signal = path.with_suffix(".dat")
    signal.write_bytes(signal.read_bytes()[:-600])
    with pytest.raises(ReadError, match=r"rec\.hea"):
        read_record(path)


def test_wfdb_marks_missing_samples(tmp_path):
    signal = SIGNAL.copy()
    signal[4, 10:20] = np.nan
    record = read_record(write_wfdb(tmp_path, signal=signal))
    np.testing.assert_array_equal(np.isnan(record.signal), np.isnan(signal))


HEADER = """X1.mat 2 500 700 05-May-2020 09:49:17
X1.mat 16+24 1000(7)/mV 16 0 0 -17494 0 I
X1.mat 16+24 500/uV 16 3 700 13754 0 II
#Age: 50
"""


def test_an_empty_header(tmp_path):
    (tmp_path / "X1.hea").touch()
    with pytest.raises(ReadError, match="header must be in WFDB form, got no line of it"):
        read_record(tmp_path / "X1.hea")


def test_headers_that_wfdb_refuses(tmp_path):
    val = np.arange(1400, dtype=np.int16).reshape(2, 700)
    scipy.io.savemat(tmp_path / "X1.mat", {"val": val})
    (tmp_path / "X1.hea").write_text(HEADER)
    record = read_record(tmp_path / "X1.hea")
    np.testing.assert_allclose(record.signal[0], (val[0] - 7) / 1000, rtol=1e-6)
    np.testing.assert_allclose(record.signal[1], (val[1] - 3.0) / 500 / 1000, rtol=1e-6)
    assert (record.sampling_rate_hz, record.lead_names, record.age) == (500, ("I", "II"), 50)


@pytest.mark.parametrize(
    "change",
    [
        ("2 500 700", "2 500 701"),
        ("2 500 700", "3 500 700"),
        ("1000(7)/mV", "gain"),
        ("1000(7)/mV", "0/mV"),
        ("II\n", "\n"),
        ("X1.mat 16+24 500", "../X1.mat 16+24 500"),
    ],
)
def test_headers_that_nobody_reads(tmp_path, change):
    scipy.io.savemat(tmp_path / "X1.mat", {"val": np.ones((2, 700), dtype=np.int16)})
    (tmp_path / "X1.hea").write_text(HEADER.replace(*change))
    with pytest.raises(ValueError, match=r"X1|mV"):
        read_record(tmp_path / "X1.hea").standard_leads()


def test_mat(tmp_path):
    scipy.io.savemat(tmp_path / "val.mat", {"val": (SIGNAL * 1000).round().astype(np.int16)})
    struct = {"sex": "Female", "age": 61, "data": SIGNAL}
    scipy.io.savemat(tmp_path / "cpsc.mat", {"ECG": struct})
    scipy.io.savemat(tmp_path / "plain.mat", {"feats": SIGNAL, "curr_sample_rate": 400})
    for name in ("val", "cpsc", "plain"):
        record = read_record(tmp_path / f"{name}.mat")
        np.testing.assert_allclose(record.signal, SIGNAL, atol=1e-6)
        assert record.sampling_rate_hz == (400 if name == "plain" else 500)
    record = read_record(tmp_path / "cpsc.mat")
    assert (record.age, record.sex) == (61, "female")


def test_mat_without_or_with_many_arrays(tmp_path):
    scipy.io.savemat(tmp_path / "a.mat", {"x": SIGNAL, "y": SIGNAL})
    scipy.io.savemat(tmp_path / "b.mat", {"x": 3})
    for name in ("a", "b"):
        with pytest.raises(ReadError, match=r"must hold val, ECG\.data or one 2-D array"):
            read_record(tmp_path / f"{name}.mat")


def write_beside(path, array, beside):
    """An array, and what is said of it."""
    if path.suffix == ".npz":
        np.savez(path, ecg=array, **beside)
    elif path.suffix == ".mat":
        cells = {
            key: np.array(value, dtype=object) if isinstance(value, list) else value for key, value in beside.items()
        }
        scipy.io.savemat(path, {"ecg": array, **cells})
    else:
        with h5py.File(path, "w") as file:
            file["ecg"] = array
            for place, (key, value) in enumerate(beside.items()):
                # Half of it as attributes, half as datasets.
                where = file.attrs if place % 2 else file
                where[key] = value


@pytest.mark.parametrize("suffix", [".npz", ".mat", ".h5"])
@pytest.mark.parametrize(
    ("beside", "scale", "rate_hz"),
    [
        ({"fs": 250, "lead_names": ["V2", "avr", "II"], "units": "uV"}, 1e-3, 250),
        ({"units": ["mV", "uV", "V"], "Fs": 400.0, "Leads": "v2, AVR, Lead II"}, [[1], [1e-3], [1e3]], 400),
        ({"unit": "millivolts", "sig_name": ["V2", "aVR", "II"], "channels": 3}, 1, 500),
    ],
)
def test_what_stands_beside_an_array_holds(tmp_path, suffix, beside, scale, rate_hz):
    write_beside(tmp_path / f"a{suffix}", SIGNAL[:3].T, beside)
    record = read_record(tmp_path / f"a{suffix}")
    leads, present = record.standard_leads()
    assert record.sampling_rate_hz == rate_hz
    np.testing.assert_allclose(leads[[7, 3, 1]], SIGNAL[:3] * scale, rtol=1e-5)
    assert present.sum() == 7


@pytest.mark.parametrize("suffix", [".npz", ".mat", ".h5"])
def test_what_an_array_is_not_told_by(tmp_path, suffix):
    """Names of no lead, and a unit of no voltage."""
    write_beside(tmp_path / f"a{suffix}", SIGNAL, {"channels": [f"ch{i}" for i in range(12)]})
    np.testing.assert_allclose(read_record(tmp_path / f"a{suffix}").standard_leads()[0], SIGNAL, rtol=1e-6)
    write_beside(tmp_path / f"b{suffix}", SIGNAL, {"units": "ohm"})
    with pytest.raises(ReadError, match="unit of lead I must be a voltage, got ohm"):
        read_record(tmp_path / f"b{suffix}")
    write_beside(tmp_path / f"c{suffix}", SIGNAL, {"units": ["mV", "uV"]})
    with pytest.raises(ReadError, match="units must be one or 12, one of each lead, got 2"):
        read_record(tmp_path / f"c{suffix}")


def test_other_things_beside_an_array_are_not_looked_at(tmp_path):
    """Objects, which a pickle would hold, and what is no text and no number."""
    np.savez(tmp_path / "a.npz", ecg=SIGNAL, notes=np.array([{"a": 1}], dtype=object), fs=250)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["ecg"], file["fs"] = SIGNAL, [250.0]
        file["leads"] = np.zeros((100, 3))
        file["units"] = h5py.Empty("f4")
        file.create_group("channels")
        file.attrs["notes"] = file["ecg"].ref
    for name in ("a.npz", "b.h5"):
        record = read_record(tmp_path / name)
        np.testing.assert_allclose(record.signal, SIGNAL, rtol=1e-6)
        assert record.sampling_rate_hz == 250


@pytest.mark.parametrize("shape", [(1, 700), (700, 1)])
def test_mat_of_one_lead(tmp_path, shape):
    scipy.io.savemat(tmp_path / "a.mat", {"x": SIGNAL[0].reshape(shape), "fs": 250})
    record = read_record(tmp_path / "a.mat", lead_names=["V2"])
    assert (record.lead_names, record.sampling_rate_hz) == (("V2",), 250)
    np.testing.assert_allclose(record.signal, SIGNAL[:1], rtol=1e-6)


def test_hdf5(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["ecg"] = SIGNAL.astype(np.float16)
        file["ecg"].attrs["fs"] = 400
    record = read_record(tmp_path / "a.h5")
    np.testing.assert_allclose(record.signal, SIGNAL, atol=2e-3)
    assert record.sampling_rate_hz == 400
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["tracings"] = np.zeros((5, 400, 12))
    with pytest.raises(ReadError, match="must hold one recording, got 5"):
        read_record(tmp_path / "b.h5")


def test_hdf5_without_h5py(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "a.h5").write_bytes(b"")
    with pytest.raises(ReadError, match=r"pip install 'hubert-ecg\[formats\]'"):
        read_record(tmp_path / "a.h5")


def test_text(tmp_path):
    rows = "\n".join(" ".join(f"{value:g}" for value in row) for row in SIGNAL[:3].T)
    (tmp_path / "a.txt").write_text("I II V1\n" + rows + "\n")
    record = read_record(tmp_path / "a.txt")
    np.testing.assert_allclose(record.signal, SIGNAL[:3], atol=1e-5)
    assert record.lead_names == ("I", "II", "V1")


@pytest.mark.parametrize("text", ["", "hello world\n1 2\n", "I II\n1 2\n3\n", "I II\n1 x\n", "I II\n", "I II\n1 2 3\n"])
@pytest.mark.filterwarnings("ignore:loadtxt. input contained no data:UserWarning")
def test_text_of_another_kind(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(ReadError, match=r"a\.txt"):
        read_record(tmp_path / "a.txt")


def test_no_reader_and_no_file(tmp_path):
    (tmp_path / "a.xyz").write_text("")
    with pytest.raises(ReadError, match=r"no reader for \.xyz; known: \.hea, \.npy"):
        read_record(tmp_path / "a.xyz")
    with pytest.raises(ReadError, match="no such file"):
        read_record(tmp_path / "a.npy")


def index_of(shared_data, source):
    with open(shared_data / "index.csv", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["source"].startswith(source)]


NUM_INDEXED = {"cinc2021": 143, "ptbxl": 78, "ludb": 120, "code15": 143, "cpsc2018_raw": 2, "ptbdb": 1, "sph": 6}


@pytest.mark.parametrize("source", NUM_INDEXED)
def test_real_recordings_are_as_indexed(shared_data, source):
    rows = index_of(shared_data, source)
    assert len(rows) == NUM_INDEXED[source]
    for row in rows:
        path = shared_data / row["path"]
        suffix = next(s for s in ("", ".hea", ".mat", ".h5") if path.with_name(path.name + s).is_file())
        record = read_record(path.with_name(path.name + suffix), float(row["fs"]))
        leads, present = record.standard_leads()
        assert present.all(), row["path"]
        assert record.num_samples == int(row["n_samples"])
        assert record.sampling_rate_hz == float(row["fs"])
        assert np.isfinite(leads).all()
        if source == "cinc2021":
            np.testing.assert_equal((record.age, record.sex), (age_of(row["age"]), row["sex"].lower()))


def test_the_georgia_headers_that_wfdb_refuses(shared_data):
    folder = shared_data / "cinc2021" / "georgia"
    refused = [path for path in sorted(folder.glob("*.hea")) if path.read_text().split()[0].endswith(".mat")]
    assert len(refused) == 26
    for path in refused:
        record = read_record(path)
        val = scipy.io.loadmat(path.with_suffix(".mat"))["val"]
        np.testing.assert_allclose(record.signal, val / 1000, atol=1e-6)
        assert record.lead_names == LEADS


def test_one_recording_in_two_data_sets(shared_data):
    challenge = read_record(shared_data / "cinc2021/ptb/S0001").standard_leads()[0]
    original = read_record(shared_data / "ptbdb/s0010_re").standard_leads()[0]
    np.testing.assert_allclose(challenge, original, atol=5.1e-4)


def test_one_recording_at_two_rates(shared_data):
    low = sorted((shared_data / "ptbxl/records100").glob("*/*.hea"))[:4]
    for path in low:
        twin = shared_data / "ptbxl/records500" / path.parent.name / path.name.replace("_lr", "_hr")
        prepared = [
            prepare_ecg_for_inference(record.standard_leads()[0], record.sampling_rate_hz, None, normalize=False)
            for record in (read_record(path), read_record(twin))
        ]
        assert np.corrcoef(prepared[0].ravel(), prepared[1].ravel())[0, 1] > 0.98


def test_limb_leads_of_real_recordings_follow_from_two(shared_data):
    record = read_record(shared_data / "cinc2021/chapman_ningbo/JS00001")
    kept = [record.lead_names.index(name) for name in ("I", "II", "V1")]
    derived, present = record.replace(signal=record.signal[kept], lead_names=("I", "II", "V1")).standard_leads()
    np.testing.assert_allclose(derived[:6], record.standard_leads()[0][:6], atol=5e-3)
    assert present.tolist() == [True] * 7 + [False] * 5
