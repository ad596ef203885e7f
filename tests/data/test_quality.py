"""Faults that are planted in a recording are found, and nothing is found in one without."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from hubert_ecg.data import open_dataset, quality, read_record
from hubert_ecg.data.record import LIMB, Record
from hubert_ecg.signal import LEADS, prepare_ecg_for_inference

RATE = 500.0
FROM_I_AND_II = np.array([LIMB[name] for name in LEADS[:6]])


@pytest.fixture(scope="module")
def cohort():
    """Thirty synthetic recordings, ``[12, 5000]``."""
    dataset = open_dataset("synthetic", None)
    return [dataset.read(entry).standard_leads()[0] for entry in dataset.entries()[:30]]


@pytest.fixture
def ecg(cohort):
    """One of them, in steps of 5 µV."""
    return (np.rint(cohort[0] / 0.005) * 0.005).astype(np.float32)


def facts(signal, rate=RATE, names=LEADS):
    record = Record(signal, rate, tuple(names))
    return quality.facts(record, *record.standard_leads())


def odd(found):
    """What is there to be said of a recording."""
    said = {name: value for name, value in found.items() if name not in ("size_mv", "limb_residual")}
    return {name: value for name, value in said.items() if value}


def test_nothing_is_odd_about_recordings_as_they_should_be(cohort):
    found = [facts(signal) for signal in cohort]
    assert [odd(of) for of in found] == [{}] * len(found)
    assert max(of["limb_residual"] for of in found) < 1e-3
    assert all(0.3 < of["size_mv"] < 3 for of in found)


def test_flat_leads_in_part_and_as_a_whole(ecg):
    ecg[7], ecg[3, :1200], ecg[10, 2000:2250] = 0.3, 0, 1
    found = facts(ecg)
    assert found["flat_leads"] == ["V2"]
    assert found["partly_flat_leads"] == ["aVR"]
    # A lead that jumps between two values holds none of them.
    ecg[8] = np.where(np.arange(5000) // 250 % 2, 0.2, -0.2)
    assert "V3" not in facts(ecg)["partly_flat_leads"]


def test_gaps(ecg):
    ecg[6, 100:130], ecg[1, 4000] = np.nan, np.nan
    ecg[7, :400] = np.nan
    found = facts(ecg)
    assert (found["gap_leads"], found["num_missing_samples"]) == (["II", "V1", "V2"], 431)
    assert set(odd(found)) == {"gap_leads", "num_missing_samples"}
    assert found["limb_residual"] < 0.02


@pytest.mark.parametrize("share", [0.4, 0.7])
@pytest.mark.parametrize("lead", ["V2", "V5"])
def test_a_lead_at_its_rail_is_clipped(cohort, lead, share):
    place, found = LEADS.index(lead), 0
    for signal in cohort:
        lower, upper = share * signal[place].min(), share * signal[place].max()
        clipped = signal.copy()
        clipped[place] = np.clip(signal[place], lower, upper)
        names = facts(clipped)["clipped_leads"]
        assert set(names) <= {lead}
        found += names == [lead]
    assert found >= 0.9 * len(cohort)


def test_one_long_stay_at_a_rail_is_clipping_and_one_short_one_is_not(ecg):
    quiet = 0.1 * ecg[9]
    for samples, expected in ((15, []), (25, ["V4"])):
        ecg[9] = quiet
        ecg[9, 1000 : 1000 + samples] = 5
        assert facts(ecg)["clipped_leads"] == expected


def test_what_stays_at_an_extreme_without_a_rail_is_not_clipped(ecg):
    time = np.arange(5000) / RATE
    # Peaks of few bits, steps, zero padding, and a level at the end.
    ecg[6] = np.rint(20 * np.sin(2 * np.pi * time)) * 0.005
    ecg[7] = np.abs(ecg[7]) + 0.05
    ecg[7, 2000:2200] = 0
    ecg[8, 4900:] = 9
    assert facts(ecg)["clipped_leads"] == []


@pytest.mark.parametrize("name", LEADS[:6])
def test_an_inverted_limb_lead(ecg, name):
    ecg[LEADS.index(name)] *= -1
    found = facts(ecg)
    assert odd(found) == {"limb_mend": f"{name} inverted"}
    assert found["limb_residual"] > 0.1


@pytest.mark.parametrize(("one", "other"), [("I", "II"), ("II", "III"), ("I", "aVL"), ("aVR", "aVF"), ("aVL", "aVF")])
def test_limb_leads_with_each_others_names(ecg, one, other):
    names = [{one: other, other: one}.get(name, name) for name in LEADS]
    assert odd(facts(ecg, names=names)) == {"limb_mend": f"{one} and {other} exchanged"}


def test_three_limb_leads_leave_a_choice(ecg):
    ecg[2] *= -1
    found = facts(ecg[[0, 1, 2, 6, 7]], names=["I", "II", "III", "V1", "V2"])
    assert found["limb_mend"] == "III inverted or I and II exchanged"


def test_two_limb_leads_cannot_disagree(ecg):
    ecg[1] *= -1
    found = facts(ecg[[0, 1]], names=["i", "Lead II"])
    assert (found["limb_residual"], found["limb_mend"], found["suspected_swap"]) == (None, None, None)


def test_a_damaged_limb_lead_disagrees_and_no_exchange_mends_it(ecg):
    ecg[2] = np.random.default_rng(0).standard_normal(5000)
    found = facts(ecg)
    assert found["limb_residual"] > 0.3
    assert found["limb_mend"] is None


def exchanged(signal, one, other):
    """A recording with two of RA, LA and LL exchanged: their potentials follow from leads I and II."""
    potentials = {"RA": -(signal[0] + signal[1]) / 3}
    potentials |= {"LA": signal[0] + potentials["RA"], "LL": signal[1] + potentials["RA"]}
    potentials[one], potentials[other] = potentials[other], potentials[one]
    first, second = potentials["LA"] - potentials["RA"], potentials["LL"] - potentials["RA"]
    return np.concatenate([FROM_I_AND_II @ np.stack([first, second]), signal[6:]]).astype(np.float32)


@pytest.mark.parametrize(("swap", "share"), [("RA-LA", 0.8), ("RA-LL", 0.9)])
def test_electrodes_exchanged(cohort, swap, share):
    found = [facts(exchanged(signal, *swap.split("-"))) for signal in cohort]
    assert sum(of["suspected_swap"] == swap for of in found) >= share * len(found)
    # The laws of the limb leads hold all the same.
    assert max(of["limb_residual"] for of in found) < 1e-3


@pytest.mark.parametrize("swap", ["RA-LA", "RA-LL", "LA-LL"])
def test_electrodes_exchanged_on_a_heart_as_the_weights_know_it(ecg, swap):
    chest = np.random.default_rng(0).standard_normal((6, 2)) @ ecg[[6, 10]] * 0.5
    ecg[6:] = chest
    ecg[:6] = FROM_I_AND_II @ quality._FROM_CHEST @ chest
    assert odd(facts(ecg)) == {}
    assert odd(facts(exchanged(ecg, *swap.split("-")))) == {"suspected_swap": swap}


def test_an_arm_exchanged_with_the_right_leg(ecg):
    hum = 0.01 * np.random.default_rng(0).standard_normal(5000)
    first, second = ecg[:2].copy()
    # Between the legs, which have one potential, lies nearly nothing.
    for one, two, swap in (
        (first - second, hum, "RA-RL"),
        (second, second + hum, "LA-RL"),
        (hum, second, "RA and LA with both legs"),
    ):
        ecg[:6] = FROM_I_AND_II @ np.stack([one, two])
        assert facts(ecg)["suspected_swap"] == swap


def test_an_artefact_does_not_hide_an_exchange(cohort):
    signal = exchanged(cohort[0], "RA", "LA")
    assert facts(signal)["suspected_swap"] == "RA-LA"
    signal[:6, 700:720] += (FROM_I_AND_II @ [[20.0], [30.0]]).astype(np.float32)
    assert facts(signal)["suspected_swap"] == "RA-LA"


def test_short_and_slow_recordings(ecg):
    for rate, num_samples in ((RATE, 500), (30.0, 31), (1.0, 2)):
        found = facts(ecg[:, 1000 : 1000 + num_samples], rate)
        assert found["flat_leads"] == []
        assert found["limb_residual"] < 0.1


def test_a_flat_recording():
    found = facts(np.zeros((12, 1000), np.float32))
    assert odd(found) == {"flat_leads": list(LEADS)}
    assert (found["size_mv"], found["limb_residual"]) == (0, None)


def hash_of(signal, rate=RATE, compat="corrected"):
    factor = 1 if compat == "published" else 5
    prepared = prepare_ecg_for_inference(signal, rate, None, downsampling_factor=factor, compat=compat)
    return np.frombuffer(quality.signal_hash(prepared, 500 / factor), np.uint8)


@pytest.mark.parametrize("compat", ["corrected", "published"])
def test_copies_have_nearly_the_same_hash_and_others_do_not(cohort, compat):
    hashes = np.stack([hash_of(signal, compat=compat) for signal in cohort])
    for signal, mine in zip(cohort[:10], hashes, strict=False):
        other = hash_of((np.rint(signal / 0.005) * 5 + 700).astype(np.float32), compat=compat)
        assert np.unpackbits(mine ^ other).mean() < 0.05
    for place, mine in enumerate(hashes):
        others = np.delete(hashes, place, 0)
        assert np.unpackbits(others ^ mine, axis=1).mean(1).min() > 0.2


def test_the_hash_of_a_lead_without_signal_is_zero(ecg):
    ecg[8] = 0
    assert not hash_of(ecg).reshape(8, 4)[4].any()
    assert hash_of(ecg).reshape(8, 4)[3].any()


def test_real_recordings(shared_data):
    """What is found in real recordings: those known for it, and next to nothing elsewhere."""
    with open(shared_data / "index.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] in ("ptbxl", "cinc2021/chapman_ningbo")]
    flat, swapped = {}, []
    for row in rows:
        path = shared_data / row["path"]
        record = read_record(path.with_name(f"{path.name}.hea"))
        found = quality.facts(record, *record.standard_leads())
        assert not {"limb_mend", "clipped_leads", "partly_flat_leads", "gap_leads"} & odd(found).keys()
        assert found["limb_residual"] < 0.05
        if found["flat_leads"]:
            flat[row["record"]] = found["flat_leads"]
        if found["suspected_swap"]:
            swapped.append(row["record"])
    assert flat == {
        "JS11438": list(LEADS[6:]),
        "JS45542": list(LEADS[6:]),
        "JS20004": ["V2", "V4", "V6"],
        "JS20008": ["V2", "V4", "V6"],
    }
    assert len(rows) == 129
    assert len(swapped) <= 2
