"""A thousand damaged files: each is read in its right shape, or listed with a reason; none ends the run."""

from __future__ import annotations

import resource
import shutil

import numpy as np
import pytest

from hubert_ecg.data.build import build
from hubert_ecg.data.datasets import open_dataset
from hubert_ecg.data.readers import read_record
from hubert_ecg.data.record import lead_name
from hubert_ecg.signal import LEADS

NUM_VARIANTS = 1000
WRITTEN = ("npy", "npz", "mat", "hdf5", "txt", "csv", "parquet", "wfdb", "wfdb_fixed", "wfdb_variable")
WRITTEN += ("edf", "bdf", "dicom", "muse", "aecg", "philips", "scp")
REAL = (
    "cinc2021/georgia/E07520.hea",
    "cinc2021/chapman_ningbo/JS00001.hea",
    "ludb/data/103.hea",
    "sph/SPH00001.h5",
)
HOSTILE = (
    b"../../../etc/passwd",
    b"/dev/zero",
    b"A" * 5000,
    b"%s%n\x00",
    b"\xff\xfe<!ENTITY x 'y'>",
    b"nan",
    b"1e309",
    b"-1",
)
HOSTILE_FILES = ("a b;rm -rf ~", "$(reboot)", "Ü" * 100, "-rf", "%00", "'\"", "~", "x" * 200)


def cut(content, rng):
    return content[: rng.integers(len(content))]


def zeroed(content, rng):
    start = rng.integers(len(content))
    return content[:start] + bytes(len(content[start : start + 400])) + content[start + 400 :]


def emptied(content, rng):
    return b""


def nans(content, rng):
    start = rng.integers(len(content))
    return content[:start] + b"\xff" * len(content[start : start + 64]) + content[start + 64 :]


def flipped(content, rng):
    changed = np.frombuffer(content, dtype=np.uint8).copy()
    changed[rng.integers(len(changed), size=rng.integers(1, 9))] ^= np.uint8(rng.integers(1, 256))
    return changed.tobytes()


def flipped_early(content, rng):
    """Headers are at the beginning."""
    return flipped(content[:300], rng) + content[300:]


def repeated(content, rng):
    start = rng.integers(len(content))
    return content[:start] + content[start // 2 :]


def miscounted(content, rng):
    """A number in the first lines is another."""
    digits = [place for place, byte in enumerate(content[:2000]) if chr(byte).isdigit()]
    if not digits:
        return flipped_early(content, rng)
    place = rng.choice(digits)
    number = rng.choice([b"0", b"1", b"7", b"99", b"1234567890123", b"-5"])
    return content[:place] + number + content[place + 1 :]


def hugely_gained(content, rng):
    for gain in (b"1000.0", b"1000/", b"1000(", b"MICROVOLTS", b"MILLIVOLTS", b'value="0.001"', b"<signalresolution>1"):
        if gain in content:
            return content.replace(gain, rng.choice([b"1e-300/", b"1e300(", b"0/", b"inf/", b"-1e9/"]))
    return flipped_early(content, rng)


def hostile(content, rng):
    place = rng.integers(min(len(content), 500))
    return content[:place] + HOSTILE[rng.integers(len(HOSTILE))] + content[place + 8 :]


DAMAGE = (cut, zeroed, emptied, nans, flipped, flipped_early, repeated, miscounted, hugely_gained, hostile)


@pytest.fixture(scope="module")
def originals(save, shared_data, tmp_path_factory):
    """Folders of one record each: its own file, and those that it needs."""
    folder, found = tmp_path_factory.mktemp("originals"), []
    rng = np.random.default_rng(0)
    signal = np.cumsum(rng.normal(0, 0.02, (12, 600)), axis=1)
    for name in WRITTEN:
        (folder / name).mkdir()
        path = save(name, folder / name / "r", signal, 400, LEADS)
        found.append((path, sorted(path.parent.iterdir())))
    for source in REAL:
        path = shared_data / source
        found.append(
            (path, [path, *(path.with_suffix(end) for end in (".mat", ".dat") if path.with_suffix(end).is_file())])
        )
    return found


@pytest.fixture(scope="module")
def variants(originals, tmp_path_factory):
    """The record that each damaged file was made of, by the name of its folder."""
    folder, made = tmp_path_factory.mktemp("damaged"), {}
    for number in range(NUM_VARIANTS):
        rng = np.random.default_rng(number)
        path, files = originals[number % len(originals)]
        damage = DAMAGE[number // len(originals) % len(DAMAGE)]
        place = folder / f"{number:04d} {damage.__name__}"
        place.mkdir()
        for file in files:
            shutil.copyfile(file, place / file.name)
        victim = place / files[rng.integers(len(files))].name
        victim.write_bytes(damage(victim.read_bytes(), rng))
        if damage is hostile and len(files) == 1:
            victim.rename(place / (HOSTILE_FILES[rng.integers(len(HOSTILE_FILES))] + path.suffix))
        made[place.name] = path, files
    return folder, made


@pytest.mark.slow
def test_a_thousand_damaged_files(variants, tmp_path):
    folder, made = variants
    shapes = {path: read_record(path, 400) for path in {path for path, _ in made.values()}}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    dataset = open_dataset("folder", folder, sampling_rate_hz=400)
    store = build(dataset, tmp_path / "store")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20, "1 GiB"

    listed = dict(store.skipped)
    rows = {row["source"]: row for row in store.index.to_dict("records")}
    assert listed.keys() | rows.keys() == {entry.source for entry in dataset.entries()}
    assert not listed.keys() & rows.keys()
    assert all(reason and "Traceback" not in reason and str(folder) not in reason for reason in listed.values())
    # Text whose first line no longer names leads is not taken for a recording; all else is there.
    there = {source.split("/")[0] for source in listed.keys() | rows.keys()}
    assert all(made[name][0].suffix in (".txt", ".csv") for name in made.keys() - there)
    assert len(listed) > NUM_VARIANTS / 3
    assert len(rows) > NUM_VARIANTS / 10

    for source, row in rows.items():
        path, files = made[source.split("/")[0]]
        if source.split("/")[-1] in {file.name for file in files if file != path}:
            # A segment that is whole, of a damaged record.
            continue
        original = shapes[path]
        num_samples = round(row["duration_s"] * row["source_rate_hz"])
        # Text states no count: one cut at a line's end is a shorter recording.
        if path.suffix not in (".txt", ".csv"):
            assert num_samples == original.num_samples, source
        assert {*map(lead_name, row["leads"])} <= {*map(lead_name, original.lead_names)} | {None}, source
