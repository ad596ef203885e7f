"""Preparing recordings: ours in a batch against the published chain, one lead and one record at a time."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.signal

from hubert_ecg import prepare_ecg_for_inference

NUM_RECORDS = 64


@pytest.fixture(scope="module")
def recordings():
    random = np.random.default_rng(0)
    return random.standard_normal((NUM_RECORDS, 12, 5000)).cumsum(-1).astype(np.float32)


def published_chain(record):
    """The published preprocessing of one 500 Hz record in NumPy and SciPy, as it is written for one lead at a time."""
    taps = scipy.signal.firwin(151, [0.05, 47], pass_zero=False, fs=500)
    leads = [scipy.signal.filtfilt(taps, 1, lead) for lead in record.astype(np.float64)]
    leads = [scipy.signal.resample(lead, 5000) for lead in leads]
    leads = [2 * (lead - lead.min()) / (lead.max() - lead.min() + 1e-8) - 1 for lead in leads]
    return scipy.signal.decimate(np.concatenate(leads), 5).reshape(12, 1000).astype(np.float32)


@pytest.mark.benchmark(group="preprocess")
@pytest.mark.parametrize("who", ["published chain", "ours, published", "ours, corrected"])
def test_preprocess(benchmark, recordings, who):
    run = {
        "published chain": lambda: np.stack([published_chain(record) for record in recordings]),
        "ours, published": lambda: prepare_ecg_for_inference(recordings, compat="published"),
        "ours, corrected": lambda: prepare_ecg_for_inference(recordings),
    }[who]
    if who == "ours, published":
        expected = np.stack([published_chain(record) for record in recordings[:4]])
        np.testing.assert_allclose(run()[:4], expected, rtol=0, atol=1e-5)
    benchmark.extra_info["records"] = NUM_RECORDS
    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
