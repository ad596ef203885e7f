"""The synthetic cohort: what a label claims is measured in the signal, not asked of the generator."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest

from hubert_ecg.config import UserError
from hubert_ecg.data.dataset import describe
from hubert_ecg.data.synthetic import LABELS, Cohort, generate_ecg
from hubert_ecg.signal import LEADS

RATE_HZ = 500
KINDS = [
    ("NORM",),
    ("SBRAD",),
    ("STACH",),
    ("AFIB",),
    ("SR", "PVC"),
    ("CRBBB",),
    ("CLBBB",),
    ("STE",),
    ("AFIB", "CLBBB", "PVC"),
    ("STACH", "CRBBB", "STE", "PVC"),
]
SEEDS = range(6)


def lead(signal: np.ndarray, name: str) -> np.ndarray:
    return signal[LEADS.index(name)].astype(np.float64)


def clean(seed: int, *labels: str) -> tuple[np.ndarray, dict]:
    signal, got, facts = generate_ecg(seed, labels, noise=False)
    assert set(labels) <= set(got)
    return signal, facts


def r_peaks_s(signal: np.ndarray) -> np.ndarray:
    """QRS complexes by the slope of all leads together; knows nothing of how the signal was made."""
    slope = np.sqrt((np.diff(signal.astype(np.float64), axis=1) ** 2).sum(axis=0))
    slope = np.convolve(slope, np.ones(50) / 50, mode="same")
    peaks = []
    for i in np.flatnonzero(slope > 0.45 * np.quantile(slope, 0.995)):
        if peaks and i - peaks[-1] < 0.24 * RATE_HZ:
            peaks[-1] = i if slope[i] > slope[peaks[-1]] else peaks[-1]
        else:
            peaks.append(i)
    return np.array(peaks) / RATE_HZ


def qrs_ms(signal: np.ndarray, r_s: float) -> float:
    """From the first to the last steep sample around an R peak."""
    start = round((r_s - 0.12) * RATE_HZ)
    part = signal[:, start : start + round(0.28 * RATE_HZ)].astype(np.float64)
    slope = np.sqrt((np.diff(part, axis=1) ** 2).sum(axis=0))
    steep = np.flatnonzero(slope > 0.12 * slope[30:90].max())
    # P and T are apart from it by more than 24 ms.
    groups = np.split(steep, np.flatnonzero(np.diff(steep) > 12) + 1)
    qrs = max(groups, key=lambda group: slope[group].sum())
    return 1000 * (qrs[-1] - qrs[0]) / RATE_HZ


def average_beat(signal: np.ndarray, facts: dict, before_s: float, after_s: float) -> np.ndarray:
    """Mean of the beats around R, against the level just before QRS."""
    last_s = signal.shape[1] / RATE_HZ - after_s
    r_times = [r for r in facts["r_times_s"] if before_s <= r < last_s and r not in facts["premature_times_s"]]
    starts = [round((r - before_s) * RATE_HZ) for r in r_times]
    width = round((before_s + after_s) * RATE_HZ)
    beat = np.mean([signal[:, start : start + width].astype(np.float64) for start in starts], axis=0)
    onset = round((before_s - facts["qrs_onset_to_r_ms"] / 1000) * RATE_HZ)
    return beat - beat[:, onset - 6 : onset - 3].mean(axis=1, keepdims=True)


@pytest.mark.parametrize("labels", KINDS, ids="+".join)
@pytest.mark.parametrize("rate_hz", [500, 333])
def test_limb_leads_obey_einthoven_and_goldberger(labels, rate_hz):
    for seed in range(4):
        signal, _, _ = generate_ecg(seed, labels, sampling_rate_hz=rate_hz)
        leads = {name: lead(signal, name) for name in LEADS}
        for name, expected in {
            "III": leads["II"] - leads["I"],
            "aVR": -(leads["I"] + leads["II"]) / 2,
            "aVL": leads["I"] - leads["II"] / 2,
            "aVF": leads["II"] - leads["I"] / 2,
        }.items():
            np.testing.assert_allclose(leads[name], expected, rtol=0, atol=1e-6, err_msg=name)


def test_chest_leads_share_the_noise_of_wilsons_terminal():
    # White noise of a limb electrode reaches all chest leads alike.
    noisy, silent = (generate_ecg(3, ("NORM",), noise=noise)[0] for noise in (True, False))
    noise = np.diff((noisy - silent)[6:].astype(np.float64), axis=1)
    correlation = np.corrcoef(noise)[np.triu_indices(6, 1)]
    assert (correlation > 0.02).mean() > 0.8


@pytest.mark.parametrize("labels", KINDS, ids="+".join)
def test_signal_is_finite_and_of_ordinary_size(labels):
    for seed in SEEDS:
        signal, got, _ = generate_ecg(seed, labels)
        assert signal.shape == (12, 5000)
        assert signal.dtype == np.float32
        assert np.isfinite(signal).all()
        assert np.abs(signal).max() < 8
        assert (np.ptp(signal, axis=1) > 0.1).all()
        assert np.ptp(signal[6:], axis=1).max() > 0.8
        assert set(labels) <= set(got) <= set(LABELS)


@pytest.mark.parametrize(("duration_s", "rate_hz", "num_samples"), [(5, 100, 500), (7.3, 257, 1876), (31, 1000, 31000)])
def test_any_length_and_rate(duration_s, rate_hz, num_samples):
    signal, labels, facts = generate_ecg(5, ("AFIB", "PVC"), duration_s=duration_s, sampling_rate_hz=rate_hz)
    assert signal.shape == (12, num_samples)
    assert np.isfinite(signal).all()
    assert labels == ("AFIB", "PVC")
    assert 0 <= facts["r_times_s"][0] <= facts["r_times_s"][-1] < duration_s
    assert facts["r_times_s"][-1] > duration_s - 3


def test_half_the_rate_is_every_second_sample():
    fast, _, _ = generate_ecg(8, ("SR", "PVC"), sampling_rate_hz=500, noise=False)
    slow, _, _ = generate_ecg(8, ("SR", "PVC"), sampling_rate_hz=250, noise=False)
    np.testing.assert_allclose(slow, fast[:, ::2], rtol=0, atol=0.0025)


def test_same_seed_same_bits():
    signal, labels, facts = generate_ecg(11)
    again, labels_again, facts_again = generate_ecg(11)
    assert signal.tobytes() == again.tobytes()
    assert (labels, facts) == (labels_again, facts_again)
    assert np.abs(generate_ecg(12)[0] - signal).max() > 0.1
    first, second = (generate_ecg(np.random.default_rng(1))[0] for _ in range(2))
    assert first.tobytes() == second.tobytes()
    rng = np.random.default_rng(1)
    assert generate_ecg(rng)[0].tobytes() != generate_ecg(rng)[0].tobytes()


def test_noise_leaves_the_heart_alone():
    noisy, _, facts = generate_ecg(4, ("AFIB",))
    silent, _, facts_silent = generate_ecg(4, ("AFIB",), noise=False)
    assert facts == facts_silent
    difference = (noisy - silent).astype(np.float64)
    assert 0.003 < difference.std() < 1.0
    beat = average_beat(silent, facts, 0.1, 0.1)
    # What noise adds is not locked to the beat.
    extra = average_beat(noisy, facts, 0.1, 0.1) - beat
    assert extra.std() < 0.25 * beat.std()


@pytest.mark.parametrize(
    ("rhythm", "low", "high"), [("SR", 60, 100), ("SBRAD", 0, 60), ("STACH", 100, 200), ("AFIB", 40, 200)]
)
def test_rate_counted_in_the_signal_gives_the_label(rhythm, low, high):
    for seed in SEEDS:
        signal, facts = clean(seed, rhythm)
        peaks = r_peaks_s(signal)
        rate = 60 * (len(peaks) - 1) / (peaks[-1] - peaks[0])
        assert low <= facts["heart_rate_bpm"] <= high
        # An R peak at the edge may be cut.
        assert rate == pytest.approx(facts["heart_rate_bpm"], rel=0.05 if rhythm == "AFIB" else 0.02), seed


def test_fibrillation_is_irregular_and_sinus_rhythm_is_not():
    for seed in SEEDS:
        for rhythm in ("AFIB", "SR", "SBRAD", "STACH"):
            rr = np.diff(r_peaks_s(clean(seed, rhythm)[0]))
            variation = rr.std() / rr.mean()
            assert variation > 0.095 if rhythm == "AFIB" else variation < 0.1, (rhythm, seed, variation)


def test_fibrillation_has_no_p_but_waves_at_4_to_9_hz():
    alike, share = {"SR": [], "AFIB": []}, []
    for seed in range(8):
        for rhythm, found in alike.items():
            signal, _, facts = generate_ecg(seed, (rhythm,), duration_s=30, noise=False)
            onsets = np.array(facts["r_times_s"]) - facts["qrs_onset_to_r_ms"] / 1000
            # Where P belongs, in beats that T of the beat before has left alone.
            late = onsets[1:][np.diff(onsets) > 0.65]
            parts = [lead(signal, "II")[(i := round(t * RATE_HZ)) - 85 : i - 10] for t in late]
            parts = [part - np.linspace(part[0], part[-1], len(part)) for part in parts]
            if len(parts) >= 4:
                found.append(np.median(np.corrcoef(parts)[np.triu_indices(len(parts), 1)]))
        # The longest pause of the last one, which fibrillates, after T.
        i = np.argmax(np.diff(onsets))
        start, stop = onsets[i] + 0.5, onsets[i + 1] - 0.03
        if stop - start > 0.4:
            part = lead(signal, "V1")[round(start * RATE_HZ) : round(stop * RATE_HZ)]
            spectrum = np.abs(np.fft.rfft((part - part.mean()) * np.hanning(len(part)), 4096)) ** 2
            frequency = np.fft.rfftfreq(4096, 1 / RATE_HZ)
            share.append(spectrum[(frequency >= 3) & (frequency <= 10)].sum() / spectrum[frequency <= 45].sum())
    assert min(map(len, alike.values())) >= 4
    assert len(share) >= 3
    assert min(alike["SR"]) > 0.9
    assert max(alike["AFIB"]) < 0.5
    assert np.median(share) > 0.7


@pytest.mark.parametrize("conduction", ["NORM", "CRBBB", "CLBBB"])
def test_qrs_is_as_wide_as_the_label_says(conduction):
    for seed in SEEDS:
        signal, facts = clean(seed, conduction)
        measured = np.median([qrs_ms(signal, r) for r in facts["r_times_s"] if 0.2 < r < 9.7])
        assert measured == pytest.approx(facts["qrs_ms"], abs=22), seed
        assert measured > 115 if conduction != "NORM" else measured < 112, (seed, measured)


def test_right_block_ends_upwards_in_v1_and_left_block_downwards():
    for seed in range(12):
        signal, facts = clean(seed, "CRBBB")
        beat = average_beat(signal, facts, 0.15, 0.45)
        end = round((0.15 + (facts["qrs_ms"] - facts["qrs_onset_to_r_ms"]) / 1000) * RATE_HZ)
        late = slice(end - round(0.055 * RATE_HZ), end)
        repolarisation = slice(end + round(0.04 * RATE_HZ), None)
        assert lead(beat, "V1")[late].max() > 0.3, seed
        for name in ("I", "V6"):
            assert lead(beat, name)[late].min() < -0.1, (name, seed)
        assert lead(beat, "V6")[:end].max() > 0.2, seed

        signal, facts = clean(seed, "CLBBB")
        beat = average_beat(signal, facts, 0.15, 0.45)
        v1, v6, one = (lead(beat, name) for name in ("V1", "V6", "I"))
        assert v1[:end].min() < -0.4, seed
        assert v1[:end].max() < 0.35 * -v1[:end].min(), seed
        for up in (v6, one):
            # Broad and upright, without a septal q; T against it.
            assert up[:end].max() > 0.15, seed
            assert up[:end].min() > -0.25 * up[:end].max(), seed
        assert v6[repolarisation].mean() < 0 < v1[repolarisation].mean(), seed


@pytest.mark.parametrize("rhythm", ["SR", "STACH"])
def test_st_level_at_j60_gives_the_label(rhythm):
    groups = {
        "anterior": {"V1": 0.1, "V2": 0.2, "V3": 0.2, "V4": 0.1},
        "inferior": {"II": 0.1, "III": 0.1, "aVF": 0.1},
        "lateral": {"I": 0.1, "aVL": 0.1, "V5": 0.1, "V6": 0.1},
    }
    reciprocal = {"anterior": "III", "inferior": "aVL", "lateral": "III"}
    territories = Counter()
    for seed in range(14):
        for elevated in (True, False):
            labels = (rhythm, "STE") if elevated else (rhythm,)
            signal, facts = clean(seed, *labels)
            beat = average_beat(signal, facts, 0.12, 0.3)
            at = 0.12 + (facts["qrs_ms"] - facts["qrs_onset_to_r_ms"]) / 1000 + 0.060
            level = {name: lead(beat, name)[round(at * RATE_HZ)] for name in LEADS}
            for name, expected in facts["st_levels_mv"].items():
                # T of the beat before lies under P and QRS when the heart is fast.
                assert level[name] == pytest.approx(expected, abs=0.07 + 0.12 * abs(expected)), (name, seed)
            beyond = {
                place: sorted(level[name] / limit for name, limit in leads.items())[-2]
                for place, leads in groups.items()
            }
            if elevated:
                territory = facts["st_territory"]
                territories[territory] += 1
                assert beyond[territory] > 0.9, (territory, beyond)
                assert level[reciprocal[territory]] < 0.02, (territory, level)
            else:
                assert max(beyond.values()) < 1.05, (seed, beyond)
    assert len(territories) == 3


def test_premature_beats_come_early_and_wide_with_a_pause_and_t_against_qrs():
    for seed in SEEDS:
        signal, facts = clean(seed, "SR", "PVC")
        r_times = np.array(facts["r_times_s"])
        mean_rr = 60 / facts["heart_rate_bpm"]
        assert facts["premature_times_s"]
        for time in facts["premature_times_s"]:
            i = int(np.flatnonzero(r_times == time)[0])
            if not 0 < i < len(r_times) - 1:
                continue
            before, after = r_times[i] - r_times[i - 1], r_times[i + 1] - r_times[i]
            assert before < 0.85 * mean_rr
            assert after > 1.1 * mean_rr
            # Fully compensated: the sinus node did not notice.
            assert before + after == pytest.approx(2 * mean_rr, rel=0.17)
            assert qrs_ms(signal, time) > 105
            middle = round(time * RATE_HZ)
            part = signal[:, middle - 50 : middle + 200].astype(np.float64)
            part -= np.median(part, axis=1, keepdims=True)
            large = np.argmax(np.abs(part[:, :100]).max(axis=1))
            extreme = part[large, :100][np.argmax(np.abs(part[large, :100]))]
            t_wave = part[large, 130:][np.argmax(np.abs(part[large, 130:]))]
            assert extreme * t_wave < 0, seed


def test_axis_read_from_the_leads_is_the_axis_of_the_facts():
    for seed in SEEDS:
        signal, facts = clean(seed, "NORM")
        beat = average_beat(signal, facts, 0.12, 0.12)
        start = round((0.12 - facts["qrs_onset_to_r_ms"] / 1000) * RATE_HZ)
        qrs = slice(start, start + round(facts["qrs_ms"] / 1000 * RATE_HZ))
        axis = np.degrees(np.arctan2(2 / np.sqrt(3) * lead(beat, "aVF")[qrs].sum(), lead(beat, "I")[qrs].sum()))
        assert axis == pytest.approx(facts["axis_deg"], abs=4), seed
        assert -30 <= facts["axis_deg"] <= 90


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"labels": ("WPW",)}, "WPW"),
        ({"labels": ("SBRAD", "AFIB")}, "one rhythm"),
        ({"labels": ("CRBBB", "CLBBB")}, "at most one block"),
        ({"labels": ("CLBBB", "STE")}, "STE with CLBBB"),
        ({"labels": ("NORM", "PVC")}, "NORM with a finding"),
        ({"duration_s": 4.9}, "duration_s must be at least 5"),
        ({"duration_s": float("nan")}, "duration_s"),
        ({"sampling_rate_hz": 50}, "sampling_rate_hz must be at least 100"),
        ({"sampling_rate_hz": float("inf")}, "sampling_rate_hz"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_impossible_wishes(arguments, words):
    with pytest.raises(ValueError, match=words) as failure:
        generate_ecg(**arguments)
    assert str(failure.value).startswith("generate_ecg: ")


def test_no_labels_means_any():
    drawn = Counter(label for seed in range(60) for label in generate_ecg(seed, sampling_rate_hz=100)[1])
    assert set(drawn) == set(LABELS)


@pytest.fixture(scope="module")
def entries() -> list:
    return Cohort().entries()


def test_cohort_is_balanced_and_folds_respect_patients(entries):
    assert len(entries) == len({entry.record_id for entry in entries}) == 2000
    count = Counter(label for entry in entries for label in entry.labels["all"])
    assert set(count) == set(LABELS)
    assert min(count.values()) >= 0.1 * len(entries)

    folds = {}
    for entry in entries:
        assert folds.setdefault(entry.patient_id, entry.fold) == entry.fold
    seen = Counter(Counter(entry.patient_id for entry in entries).values())
    assert seen.keys() == {1, 2}
    assert 100 < seen[2] < 300
    per_fold = Counter((entry.fold, label) for entry in entries for label in entry.labels["all"])
    for fold in range(1, 11):
        assert 180 <= sum(entry.fold == fold for entry in entries) <= 220
        for label in LABELS:
            assert per_fold[fold, label] == pytest.approx(count[label] / 10, rel=0.15)


def test_one_person_keeps_age_sex_and_block(entries):
    people: dict[str, list] = {}
    for entry in entries:
        people.setdefault(str(entry.patient_id), []).append(entry)
    pairs = [pair for pair in people.values() if len(pair) == 2]
    assert pairs
    for first, second in pairs:
        assert (first.age, first.sex) == (second.age, second.sex)
        assert {"CRBBB", "CLBBB"} & set(first.labels["all"]) == {"CRBBB", "CLBBB"} & set(second.labels["all"])
    assert {entry.sex for pair in pairs for entry in pair} == {"male", "female"}
    assert all(18 <= entry.age <= 95 for pair in pairs for entry in pair)


def test_cohort_tasks_follow_from_the_labels():
    cohort = Cohort(num_records=60)
    assert cohort.tasks == ("all", "rhythm")
    assert cohort.label_names("all") == LABELS
    assert cohort.label_names("rhythm") == ("AFIB", "SBRAD", "SR", "STACH")
    for entry in cohort.entries():
        labels = set(entry.labels["all"])
        assert len(entry.labels["rhythm"]) == 1
        assert set(entry.labels["rhythm"]) == labels & {"AFIB", "SBRAD", "SR", "STACH"}
        assert ("NORM" in labels) == (not labels - {"NORM", "SR"})


def test_record_depends_on_seed_and_place_alone():
    short, long = Cohort(num_records=30, seed=7), Cohort(num_records=90, seed=7)
    assert long.entries()[:30] == short.entries()
    entry = short.entries()[17]
    long.read(long.entries()[80])
    record = long.read(entry)
    again = pickle.loads(pickle.dumps(short)).read(entry)
    assert record.signal.tobytes() == again.signal.tobytes()
    assert record.signal.tobytes() != Cohort(num_records=30, seed=8).read(entry).signal.tobytes()
    assert not np.array_equal(record.signal, short.read(short.entries()[18]).signal)


def test_records_carry_what_their_entries_say():
    cohort = Cohort(num_records=12)
    entry = cohort.entries()[3]
    record = describe(cohort.read(entry), entry)
    assert record.sampling_rate_hz == 500
    assert record.lead_names == LEADS
    assert (record.record_id, record.patient_id, record.fold) == (entry.record_id, entry.patient_id, entry.fold)
    assert record.labels == entry.labels
    signal, present = record.standard_leads()
    assert present.all()
    np.testing.assert_array_equal(signal, record.signal)
    assert len(list(cohort)) == len(cohort) == 12


def test_fingerprint_tells_cohorts_apart():
    prints = [Cohort(num_records=n, seed=s).fingerprint() for n, s in ((10, 0), (11, 0), (10, 1), (10, 0))]
    assert len(set(prints)) == 3
    assert prints[0] == prints[3]


@pytest.mark.parametrize(("arguments", "words"), [({"num_records": 0}, "num_records"), ({"seed": -1}, "seed")])
def test_cohort_refuses_what_cannot_be(arguments, words):
    with pytest.raises(UserError, match=f"synthetic: {words} must be at least"):
        Cohort(**arguments)
