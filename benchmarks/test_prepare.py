"""Preparing recordings: ours against the published chain, a record at a time; and a store out of WFDB files."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import wfdb

from hubert_ecg import prepare_ecg_for_inference
from hubert_ecg.config import PrepareConfig
from hubert_ecg.data import prepare
from hubert_ecg.data.synthetic import generate_ecg
from hubert_ecg.signal import LEADS

# Records that differ; they are laid one after another as often as it takes.
NUM_TILED = 32
NUM_FILES = 1000


def published_chain(rate_hz):
    """The published preprocessing of one record in NumPy and SciPy, up to what is kept of it on disk."""
    num_taps = int(0.3 * rate_hz)
    num_taps += num_taps % 2 == 0
    taps = scipy.signal.firwin(num_taps, [0.05, 47], pass_zero=False, fs=rate_hz)

    def chain(record):
        leads = scipy.signal.filtfilt(taps, 1, record.astype(np.float64))
        leads = scipy.signal.resample(leads, int(leads.shape[1] * 500 / rate_hz), axis=1)
        low, high = leads.min(1, keepdims=True), leads.max(1, keepdims=True)
        return (2 * (leads - low) / (high - low + 1e-8) - 1).astype(np.float32)

    return chain


def recordings(num_records, rate_hz):
    """Of 10 s."""
    some = np.stack([generate_ecg(seed, sampling_rate_hz=rate_hz)[0] for seed in range(min(num_records, NUM_TILED))])
    return np.tile(some, (-(-num_records // len(some)), 1, 1))[:num_records]


@pytest.mark.benchmark(group="prepare")
@pytest.mark.parametrize(
    ("compat", "rate_hz", "num_records"),
    [("published", 500, 1000), ("published", 400, 250), ("published", 1000, 250), ("corrected", 500, 1000)],
)
def test_prepare(race, benchmark, compat, rate_hz, num_records):
    """What ``hubert-ecg prepare`` does with recordings in memory."""
    raw, chain = recordings(4 if benchmark.disabled else num_records, rate_hz), published_chain(rate_hz)

    def ours(compat=compat):
        return prepare_ecg_for_inference(raw, rate_hz, None, 1 if compat == "published" else 5, compat=compat)

    np.testing.assert_allclose(ours("published")[:4], [chain(record) for record in raw[:4]], rtol=0, atol=2e-6)
    peers = {"the published chain in SciPy": lambda: [chain(record) for record in raw]}
    race(ours, peers, "records", len(raw), rounds=3)


@pytest.mark.benchmark(group="prepare")
@pytest.mark.parametrize("compat", ["published", "corrected"])
def test_prepare_from_files(benchmark, capsys, tmp_path, compat):
    """WFDB files of 16 bits into a store, by 2 processes; what ``prepare`` says of the share of reading."""
    raw = recordings(8 if benchmark.disabled else NUM_FILES, 500)
    (folder := tmp_path / "files").mkdir()
    for i, record in enumerate(raw):
        if i < NUM_TILED:
            write_wfdb(folder / f"r{i:04}", record)
        else:
            write_again(folder / f"r{i % NUM_TILED:04}", folder / f"r{i:04}")

    def pack():
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        return prepare(PrepareConfig(folder, output_dir=tmp_path / "store", compat=compat, num_workers=2))

    store = benchmark.pedantic(pack, rounds=1 if benchmark.disabled else 3)
    said = capsys.readouterr().err
    share = re.findall(r"(\d+)% of the work was reading files", said)[-1]
    if compat == "published":
        signal, _ = wfdb.rdsamp(str(folder / "r0003"))
        np.testing.assert_allclose(store[3].signal, published_chain(500)(signal.T), rtol=0, atol=1e-4)
    benchmark.extra_info.update(unit="records", count=len(raw), read_percent=int(share))
    if not benchmark.disabled:
        seconds = benchmark.stats.stats.median
        with capsys.disabled():
            print(f"\n{compat}: {len(raw)} WFDB files in {seconds:.1f} s, {share} % of the work was reading them")


def write_wfdb(stem: Path, record: np.ndarray) -> None:
    wfdb.wrsamp(
        stem.name,
        fs=500,
        units=["mV"] * len(LEADS),
        sig_name=list(LEADS),
        p_signal=record.T.astype(np.float64),
        fmt=["16"] * len(LEADS),
        adc_gain=[1000.0] * len(LEADS),
        baseline=[0] * len(LEADS),
        write_dir=str(stem.parent),
    )


def write_again(written: Path, stem: Path) -> None:
    """The same samples under another name, which the header holds."""
    shutil.copy(written.with_suffix(".dat"), stem.with_suffix(".dat"))
    stem.with_suffix(".hea").write_text(written.with_suffix(".hea").read_text().replace(written.name, stem.name))
