from __future__ import annotations

import itertools

import numpy as np
import pytest

from hubert_ecg.data import Record
from hubert_ecg.data.record import lead_name
from hubert_ecg.signal import LEADS


def twelve(num_samples: int = 64, seed: int = 0) -> np.ndarray:
    """Random leads that obey Einthoven and Goldberger."""
    rng = np.random.default_rng(seed)
    one, two = rng.normal(size=(2, num_samples))
    limb = [one, two, two - one, -(one + two) / 2, one - two / 2, two - one / 2]
    return np.concatenate([np.stack(limb), rng.normal(size=(6, num_samples))]).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "standard"),
    [
        ("i", "I"),
        ("AVR", "aVR"),
        (" avl ", "aVL"),
        ("V6", "V6"),
        ("Lead II", "II"),
        ("ECG_III", "III"),
        ("MDC_ECG_LEAD_V1", "V1"),
        ("ECG Lead aVF", "aVF"),
        ("DII", "II"),
        ("D3", "III"),
        ("C4", "V4"),
        # The inverse of a lead is not the lead, and Frank leads are none of the twelve.
        ("-aVR", None),
        ("vx", None),
        ("V7", None),
        ("RESP", None),
        ("", None),
    ],
)
def test_lead_names(name, standard):
    assert lead_name(name) == standard


def test_leads_are_ordered_by_name():
    signal = twelve()
    order = np.random.default_rng(1).permutation(12)
    record = Record(signal[order], 500, tuple(LEADS[lead].lower() for lead in order))
    ordered, present = record.standard_leads()
    np.testing.assert_array_equal(ordered, signal)
    assert present.all()


PAIRS = list(itertools.combinations(range(6), 2))


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{LEADS[pair[0]]}-{LEADS[pair[1]]}")
def test_any_two_limb_leads_give_the_others(pair):
    signal = twelve(seed=2)
    kept = [*pair, 6, 9]
    derived, present = Record(signal[kept], 500, tuple(LEADS[lead] for lead in kept)).standard_leads()
    np.testing.assert_allclose(derived[:6], signal[:6], atol=2e-6)
    assert present.tolist() == [True] * 6 + [True, False, False, True, False, False]
    assert not derived[~present].any()


def test_one_limb_lead_gives_nothing_else():
    derived, present = Record(np.ones((1, 5)), 500, ("II",)).standard_leads()
    assert present.tolist() == [False, True] + [False] * 10
    np.testing.assert_array_equal(derived[1], np.ones(5))


def test_nothing_is_derived_from_a_disconnected_lead():
    signal = twelve()
    signal[0] = 0.5
    _, present = Record(signal[:2], 500, ("I", "II")).standard_leads()
    assert present.tolist() == [True, True] + [False] * 10
    derived, present = Record(signal[[0, 1, 3]], 500, ("I", "II", "aVR")).standard_leads()
    assert present[:6].all()
    np.testing.assert_allclose(derived[2], twelve()[2], atol=2e-6)


def test_missing_samples_stay_missing_and_an_empty_lead_is_absent():
    signal = twelve()
    signal[0, 3] = np.nan
    signal[8] = np.nan
    leads, present = Record(signal[[0, 1, 8]], 500, ("I", "II", "V3")).standard_leads()
    assert np.isnan(leads[:1, 3]).all()
    assert np.isnan(leads[2, 3])
    assert not present[8]
    assert not leads[8].any()


@pytest.mark.parametrize(
    ("signal", "names", "message"),
    [
        (np.zeros((2, 4)), ("I", "i"), "different leads, got I twice"),
        (np.zeros((2, 4)), ("vx", "RESP"), "must hold a standard lead"),
        (np.full((1, 4), np.nan), ("I",), "must hold a standard lead with samples"),
        (np.array([[1.0, np.inf]]), ("I",), "must be in mV"),
        (np.array([[1.0, 1e30]]), ("V2",), "must be in mV"),
        (np.array([[1.0, 1e300]]), ("V2",), "must be in mV"),
    ],
)
def test_what_cannot_be_twelve_leads(signal, names, message):
    with pytest.raises(ValueError, match=message):
        Record(signal, 500, names).standard_leads()


@pytest.mark.parametrize(
    ("signal", "rate", "names", "message"),
    [
        (np.zeros(5), 500, ("I",), "must be .num_leads, num_samples."),
        (np.zeros((1, 0)), 500, ("I",), "not empty"),
        (np.zeros((2, 5)), 500, ("I",), "must name 2 leads, got 1"),
        (np.zeros((1, 5)), 0, ("I",), "sampling_rate_hz"),
        (np.zeros((1, 5)), float("nan"), ("I",), "sampling_rate_hz"),
        (np.array([["a"]]), 500, ("I",), "must be numbers"),
        (np.zeros((1, 5), dtype=complex), 500, ("I",), "must be numbers"),
    ],
)
def test_what_is_no_record(signal, rate, names, message):
    with pytest.raises(ValueError, match=message):
        Record(signal, rate, names)
