"""Preparing recordings: ours in a batch against the published chain, one lead and one record at a time."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.signal

from hubert_ecg import prepare_ecg_for_inference

NUM_RECORDS = 64


def published_chain(record):
    """The published preprocessing of one 500 Hz record in NumPy and SciPy, as it is written for one lead at a time."""
    taps = scipy.signal.firwin(151, [0.05, 47], pass_zero=False, fs=500)
    leads = [scipy.signal.filtfilt(taps, 1, lead) for lead in record.astype(np.float64)]
    leads = [scipy.signal.resample(lead, 5000) for lead in leads]
    leads = [2 * (lead - lead.min()) / (lead.max() - lead.min() + 1e-8) - 1 for lead in leads]
    return scipy.signal.decimate(np.concatenate(leads), 5).reshape(12, 1000).astype(np.float32)


@pytest.mark.benchmark(group="preprocess")
def test_preprocess(race):
    recordings = np.random.default_rng(0).standard_normal((NUM_RECORDS, 12, 5000)).cumsum(-1).astype(np.float32)

    def published():
        return prepare_ecg_for_inference(recordings, compat="published")

    def chain():
        return np.stack([published_chain(record) for record in recordings])

    np.testing.assert_allclose(published()[:4], [published_chain(record) for record in recordings[:4]], atol=1e-5)
    peers = {"the published chain in SciPy": chain, "ours, corrected": lambda: prepare_ecg_for_inference(recordings)}
    race(published, peers, "records", NUM_RECORDS, rounds=3)
