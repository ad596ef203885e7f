from __future__ import annotations

import math
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import torch

from hubert_ecg import signal
from hubert_ecg.data.synthetic import generate_ecg
from hubert_ecg.signal import LEADS, decimate_flattened, decimate_leads, prepare_ecg_for_inference

ROOT = Path(__file__).resolve().parents[1]


def published(record, rate_hz, target=5000, factor=5, normalize=True):
    """The published chain, lead by lead, in NumPy and SciPy."""
    num_taps = int(0.3 * rate_hz)
    num_taps += num_taps % 2 == 0
    taps = scipy.signal.firwin(num_taps, [0.05, 47], pass_zero=False, fs=rate_hz)
    leads = [scipy.signal.filtfilt(taps, 1, lead) for lead in np.asarray(record, np.float64)]
    leads = scipy.signal.resample(leads, int(len(leads[0]) * 500 / rate_hz), axis=1)
    if normalize:
        for i, lead in enumerate(leads):
            leads[i] = 2 * (lead - lead.min()) / (lead.max() - lead.min() + 1e-8) - 1
    crop = leads[:, :target]
    crop = np.where(np.isnan(crop), np.nanmean(crop), crop)
    crop = np.pad(crop, ((0, 0), (0, target - crop.shape[1])))
    return scipy.signal.decimate(crop.flatten(), factor).reshape(12, -1)


def beats(num_samples, rate_hz, heart_rate=75, first_s=0.3):
    """A lead of identical beats in mV: P, Q, R, S and T as Gaussians."""
    t = np.arange(num_samples) / rate_hz
    lead = np.zeros(num_samples)
    for start in np.arange(-3, t[-1] + 3, 60 / heart_rate) + first_s:
        for height, delay, width in ((0.12, -0.18, 0.03), (-0.1, -0.03, 0.01), (1.2, 0, 0.012), (-0.25, 0.03, 0.012)):
            lead += height * np.exp(-0.5 * ((t - start - delay) / width) ** 2)
        lead += 0.25 * np.exp(-0.5 * ((t - start - 0.3) / 0.05) ** 2)
    return lead


def twelve(lead):
    return np.tile(lead, (12, 1))


def random_record(num_samples, seed=0):
    """Drifting leads with offsets: a random walk."""
    random = np.random.default_rng(seed)
    return random.standard_normal((12, num_samples)).cumsum(1) * 0.05 + random.standard_normal((12, 1))


# Published


@pytest.mark.parametrize("rate_hz", [100, 250, 257, 360, 400, 499.97, 500, 1000])
@pytest.mark.parametrize(("seconds", "target"), [(10, 2500), (10, 5000), (4.37, 2500), (1.31, 5000)])
def test_published_equals_the_published_chain(rate_hz, seconds, target):
    record = random_record(int(seconds * rate_hz))
    ours = prepare_ecg_for_inference(record, rate_hz, target, compat="published")
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, published(record, rate_hz, target), rtol=0, atol=1e-5)


@pytest.mark.parametrize("factor", [2, 5, 10])
def test_published_decimates_by_any_factor_in_any_unit(factor):
    record = random_record(5000) * 1000
    ours = prepare_ecg_for_inference(record, 500, 5000, factor, normalize=False, compat="published")
    theirs = published(record, 500, 5000, factor, normalize=False)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


def test_published_without_decimation_is_the_whole_filtered_record():
    record = random_record(3601)
    ours = prepare_ecg_for_inference(record, 360, None, 1, compat="published")
    leads = scipy.signal.resample(
        scipy.signal.filtfilt(scipy.signal.firwin(109, [0.05, 47], pass_zero=False, fs=360), 1, record), 5001, axis=1
    )
    low, high = leads.min(1, keepdims=True), leads.max(1, keepdims=True)
    np.testing.assert_allclose(ours, 2 * (leads - low) / (high - low + 1e-8) - 1, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rate_hz", [257, 500])
def test_published_keeps_its_accuracy_beside_what_it_takes_away(rate_hz):
    """Offsets, other units, steps, noise above the band and constant leads."""
    record, t = random_record(10 * rate_hz), np.arange(10 * rate_hz) / rate_hz
    noise, step, ramp = 1e4 * np.sin(2 * np.pi * 60 * t), 50 * (t > 5), 1e3 * t
    constant = np.full_like(record, 3.3)
    for hostile in (
        record + 1e6,
        record * 1e300,
        record * 1e-9,
        record + noise,
        record + step,
        record + ramp,
        constant,
    ):
        ours = prepare_ecg_for_inference(hostile, rate_hz, compat="published")
        np.testing.assert_allclose(ours, published(hostile, rate_hz), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rate_hz", [360, 500])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16])
def test_published_is_the_same_with_and_without_the_native_module(monkeypatch, rate_hz, dtype):
    """What a GPU computes; one record has nothing to read, one misses samples, one lead is constant."""
    batch = np.stack([random_record(4 * rate_hz + 1) for _ in range(4)]) * 1000
    batch[3, 5] = 7
    if dtype is not np.int16:
        batch[1] = np.nan
        batch[2, [0, 4, 9], [0, 77, -1]] = np.nan, np.inf, -np.inf
    batch = batch.astype(dtype)
    for options in ({"downsampling_factor": 1}, {"normalize": False}, {"target_length": 1503}):
        with_it = prepare_ecg_for_inference(batch, rate_hz, compat="published", **options)
        with monkeypatch.context() as patched:
            patched.setattr(signal, "_native_ring", None)
            patched.setattr(signal, "_native_scale", None)
            without = prepare_ecg_for_inference(batch, rate_hz, compat="published", **options)
        np.testing.assert_allclose(with_it, without, rtol=1e-6, atol=2e-6 * max(1, np.abs(without).max()))


@pytest.mark.parametrize("missing", [np.nan, np.inf, -np.inf])
def test_published_fills_a_lead_with_a_missing_sample_with_the_mean_of_the_others(missing):
    record = random_record(5000)
    record[3, 7] = record[7, 4999] = missing
    expected = record.copy()
    expected[~np.isfinite(record)] = np.nan
    ours = prepare_ecg_for_inference(record, 500, 2500, compat="published")
    np.testing.assert_allclose(ours, published(expected, 500, 2500), rtol=0, atol=1e-5)


def test_published_record_without_samples_is_zero():
    ours = prepare_ecg_for_inference(np.full((12, 5000), np.nan), compat="published")
    assert (ours == 0).all()


def test_published_equals_the_published_chain_on_real_records(shared_data):
    # Constant leads are among them: 0 / 1e-8, which must not become noise.
    paths = ["chapman_ningbo/JS11438", "chapman_ningbo/JS20004", "georgia/*", "ptb/S0001"]
    for path in (sorted(shared_data.glob(f"cinc2021/{pattern}.mat"))[0] for pattern in paths):
        raw = scipy.io.loadmat(path)["val"]
        rate_hz = 1000 if path.stem == "S0001" else 500
        raw = raw[:, : 10 * rate_hz] / 1000
        ours = prepare_ecg_for_inference(raw, rate_hz, 2500, compat="published")
        np.testing.assert_allclose(ours, published(raw, rate_hz, 2500), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rate_hz", [250, 257, 360, 400, 499.97, 500, 1000])
def test_published_filter_is_filtfilt_up_to_the_ends(rate_hz):
    """The shortest records too, and odd and even lengths."""
    taps = signal._published_taps(rate_hz)
    shortest = 3 * len(taps) + 1
    for num_samples in (shortest, shortest + 1, int(4.37 * rate_hz), int(10 * rate_hz) + 1):
        record = random_record(num_samples)
        ring, low, extent = signal._published_ring(torch.from_numpy(record)[None], len(taps) - 1)
        ring = (ring * extent + low)[0]
        gain = abs(np.fft.rfft(taps, ring.shape[-1])) ** 2
        ours = np.fft.irfft(np.fft.rfft(ring) * gain, ring.shape[-1])[:, :num_samples]
        np.testing.assert_allclose(ours, scipy.signal.filtfilt(taps, 1, record), rtol=0, atol=1e-12)


@pytest.mark.parametrize("num", [999, 1000, 1250, 1251, 2500])
@pytest.mark.parametrize("num_samples", [1000, 1001])
def test_resampling_is_scipys(num_samples, num):
    record = random_record(num_samples)
    ours = signal._resample(torch.from_numpy(record), num)
    np.testing.assert_allclose(ours, scipy.signal.resample(record, num, axis=1), rtol=0, atol=1e-12)


def test_forward_backward_is_filtfilt_of_short_and_recursive_filters():
    record = torch.from_numpy(random_record(700))
    taps = scipy.signal.firwin(31, 0.2)
    ours = signal._forward_backward(record, torch.from_numpy(taps), 93)
    np.testing.assert_allclose(ours, scipy.signal.filtfilt(taps, 1, record.numpy()), rtol=0, atol=1e-12)
    for factor in (2, 5, 10):
        # What a GPU computes, where SciPy does not reach.
        ours = signal._forward_backward(record.flatten(), *signal._anti_alias(factor))[::factor]
        np.testing.assert_allclose(ours, scipy.signal.decimate(record.numpy().ravel(), factor), rtol=0, atol=1e-10)


def test_decimate_leads_keeps_each_lead_to_itself():
    batch = np.random.default_rng(3).standard_normal((2, 12, 2503)).astype(np.float32)
    expected = scipy.signal.decimate(batch[..., :2500].astype(np.float64), 5)
    np.testing.assert_allclose(decimate_leads(batch, 5), expected, atol=1e-6)
    other = batch.copy()
    other[:, 4] += 100
    untouched = [lead for lead in range(12) if lead != 4]
    np.testing.assert_array_equal(decimate_leads(other, 5)[:, untouched], decimate_leads(batch, 5)[:, untouched])
    assert np.array_equal(decimate_leads(batch, 1), batch)
    with pytest.raises(ValueError, match=r"^decimate_leads: ecg must hold at least 28 samples in a lead, got 20"):
        decimate_leads(batch[..., :20], 5)


def test_decimate_flattened_crosses_the_borders_of_leads_and_drops_what_is_left_over():
    batch = np.stack([random_record(2503, seed) for seed in range(3)]).astype(np.float32)
    ours = decimate_flattened(batch, 5)
    for record, result in zip(batch, ours, strict=True):
        expected = scipy.signal.decimate(record[:, :2500].astype(np.float64).ravel(), 5).reshape(12, 500)
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(decimate_flattened(record, 5), result)
    assert np.array_equal(decimate_flattened(batch, 1), batch)
    assert decimate_flattened(torch.from_numpy(batch), 5).dtype == torch.float32


# Corrected


def in_units(lead, rate_hz, factor=5):
    return prepare_ecg_for_inference(twelve(lead), rate_hz, None, factor, normalize=False)


@pytest.mark.parametrize("rate_hz", [100, 128, 257.0, 360, 499.97, 500, 1000])
@pytest.mark.parametrize("frequency_hz", [1.5, 3, 10, 25, 40])
def test_the_band_of_the_ecg_keeps_its_gain_and_phase(rate_hz, frequency_hz):
    lead = np.sin(2 * np.pi * frequency_hz * np.arange(int(10 * rate_hz)) / rate_hz + 1)
    ours = in_units(lead, rate_hz)[0]
    expected = np.sin(2 * np.pi * frequency_hz * np.arange(len(ours)) / 100 + 1)
    # An end cuts a wave at any phase, and no filter knows how it went on.
    assert np.abs(ours - expected)[200:-200].max() < 0.02


@pytest.mark.parametrize(("factor", "kept_hz"), [(1, 40), (5, 40), (10, 20), (50, 4)])
def test_what_the_output_cannot_carry_is_removed_and_not_folded(factor, kept_hz):
    out_hz, t = 500 / factor, np.arange(5000) / 500
    ours = in_units(np.sin(2 * np.pi * kept_hz * t), 500, factor)[0]
    expected = np.sin(2 * np.pi * kept_hz * np.arange(len(ours)) / out_hz)
    inner = slice(int(2 * out_hz), -int(2 * out_hz))
    assert np.abs(ours - expected)[inner].max() < 0.02
    for share in (1.1, 1.5, 1.9):
        stopped = np.sin(2 * np.pi * share * min(50, out_hz / 2) * t)
        assert np.abs(in_units(stopped, 500, factor)[0][inner]).max() < 0.01


@pytest.mark.parametrize("rate_hz", [100, 257.0, 500])
@pytest.mark.parametrize("seconds", [5, 10, 40])
def test_base_line_vanishes_up_to_the_ends(rate_hz, seconds):
    t = np.arange(int(seconds * rate_hz)) / rate_hz
    for phase in (0, 2):
        wander_hz = np.array([0.1, 0.14, 0.17, 0.2, 0.25, 0.3] * 2)[:, None]
        phases = phase + np.repeat([0, 1], 6)[:, None]
        waves = 2 * np.sin(2 * np.pi * wander_hz * t + phases)
        left = np.abs(prepare_ecg_for_inference(waves, rate_hz, None, normalize=False)) / 2
        assert left.max() < 0.015
        assert left[:, 50:-50].max() < 0.01
    assert np.abs(in_units(np.full_like(t, -1000.0), rate_hz)).max() < 1e-9
    assert np.abs(in_units(300 * t - 40, rate_hz)).max() < 1e-9


@pytest.mark.parametrize("end_s", [0.0, 0.01, 0.03, 0.3])
def test_the_first_and_last_beat_survive_wherever_the_record_is_cut(end_s):
    # A beat right at the start, or cut by it: mirroring about the first sample would err by a whole R wave.
    whole = beats(15000, 500)
    start = 5000 + round(500 * (0.3 - end_s))
    expected = in_units(whole, 500)[0]
    ours = in_units(whole[start : start + 5000], 500)[0]
    error = np.abs(ours - expected[start // 5 : start // 5 + 1000])
    assert error.max() < 0.2
    assert error[100:-100].max() < 0.03


def test_wander_of_2_mv_leaves_the_beats_as_they_are():
    t = np.arange(5000) / 500
    clean = beats(5000, 500)
    ours = in_units(clean + 2 * np.sin(2 * np.pi * 0.2 * t) + 3 + 0.1 * t, 500)[0]
    assert np.abs(ours - in_units(clean, 500)[0]).max() < 0.03
    assert np.abs(ours[100:-100] - clean[500:-500:5]).max() < 0.15


def test_any_rate_gives_the_same_ecg():
    results = {}
    for rate_hz in (250, 257.0, 360, 400, 499.97, 500, 1000):
        results[rate_hz] = prepare_ecg_for_inference(twelve(beats(int(10 * rate_hz), rate_hz)), rate_hz)
    for rate_hz, result in results.items():
        assert np.abs(result - results[1000])[:, 20:980].max() < 0.02, rate_hz


@pytest.mark.parametrize("seconds", [5, 10])
@pytest.mark.parametrize("heart_rate", [60, 75, 110])
def test_one_artefact_does_not_set_the_scale(seconds, heart_rate):
    random = np.random.default_rng(0)
    clean = twelve(beats(500 * seconds, 500, heart_rate)) + 0.01 * random.standard_normal((12, 500 * seconds))
    expected = prepare_ecg_for_inference(clean, 500, None)
    t = np.arange(250) / 500
    for start in range(0, 500 * (seconds - 1) + 1, 333):
        record, span = clean.copy(), slice(start, start + 250)
        record[0, span] += 24
        record[1, span] -= 24 * np.sin(2 * np.pi * 10 * t)
        record[2, span] += 24 * random.standard_normal(250)
        record[3, start] += 24
        record[4, span] = 24
        ours = prepare_ecg_for_inference(record, 500, None)
        elsewhere = np.ones(100 * seconds, bool)
        elsewhere[max(0, start // 5 - 50) : start // 5 + 100] = False
        for lead in range(5):
            ratio = ours[lead, elsewhere] @ expected[lead, elsewhere] / np.sum(expected[lead, elsewhere] ** 2)
            assert abs(ratio - 1) < 0.05, (lead, start)
        assert np.abs(ours - expected)[:5, elsewhere].max() < 0.05
        assert np.abs(ours).max() <= 1
        np.testing.assert_array_equal(ours[5:], expected[5:])


@pytest.mark.parametrize(
    ("seconds", "shape", "artefact_s"),
    [
        *((5, "pulse", 0.1), (5, "pulse", 0.5), (10, "pulse", 1), (10, "pulse", 2)),
        *((5, "step", 5), (10, "step", 10), (10, "soft step", 10), (5, "steps", 1.4), (10, "steps", 1.4)),
    ],
)
def test_a_long_artefact_does_not_set_the_scale(seconds, shape, artefact_s):
    gains, likeness = [], []
    for rhythm in ("SR", "SBRAD", "STACH", "AFIB", "PVC"):
        clean = generate_ecg(5, labels=[rhythm])[0][:, : 500 * seconds]
        expected = prepare_ecg_for_inference(clean, 500, None)
        for start in (0.0, 0.31 * seconds, 0.5 * seconds, 0.77 * seconds):
            first, last = int(500 * start), int(500 * (start + artefact_s))
            record = clean.copy()
            record[:, first:last] += 10
            if shape == "steps":
                record[:, last:] -= 10
            if shape == "soft step":
                record[:, first:] -= 10 * np.exp(-np.arange(500 * seconds - first) / 5)
            elsewhere = np.ones(100 * seconds, bool)
            for edge in (first, last):
                elsewhere[max(0, edge // 5 - 100) : edge // 5 + 100] = False
            elsewhere[first // 5 : last // 5] &= shape != "pulse"
            ours, wanted = prepare_ecg_for_inference(record, 500, None)[:, elsewhere], expected[:, elsewhere]
            gains.append((ours * wanted).sum(1) / np.square(wanted).sum(1))
            likeness.append((ours * wanted).sum(1) / np.sqrt(np.square(ours).sum(1) * np.square(wanted).sum(1)))
    gains = np.stack(gains)
    assert abs(np.median(gains) - 1) < 0.02
    assert np.quantile(gains, 0.1) > 0.9
    assert np.quantile(gains, 0.9) < 1.1
    assert np.quantile(likeness, 0.1) > 0.95


def test_a_beat_is_not_a_step():
    """Square beats of any width, twice as high as the others, stay."""
    record = twelve(beats(5000, 500))
    expected = prepare_ecg_for_inference(record, 500, None, normalize=False)
    for width in (10, 60, 150):
        wide = record.copy()
        wide[:, 2000 : 2000 + width] += 1.9
        ours = prepare_ecg_for_inference(wide, 500, None, normalize=False)
        assert np.abs((ours - expected)[:, 400 : 400 + width // 5]).max() > 1, width


def test_typical_peak_is_half_and_a_beat_of_twice_the_height_is_not_clipped():
    lead = beats(10000, 500)
    large = lead.copy()
    large[4000:4400] *= 1.9
    ours = prepare_ecg_for_inference(twelve(lead), 500, None)[0]
    assert 0.45 < ours.max() < 0.55
    ours = prepare_ecg_for_inference(twelve(large), 500, None)[0]
    assert 0.85 < ours.max() < 1


def test_the_unit_does_not_matter():
    record = random_record(5000)
    expected = prepare_ecg_for_inference(record)
    for factor in (1000, 1e-6, 4.88, 2.0**20):
        np.testing.assert_allclose(prepare_ecg_for_inference(record * factor), expected, rtol=0, atol=1e-6)
    microvolts = (record * 1000).round().astype(np.int16)
    np.testing.assert_allclose(prepare_ecg_for_inference(microvolts), expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize("level", [0.0, 0.1, -3.7, 1000.1, 1e7])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_flat_lead_is_exactly_zero(level, dtype):
    record = random_record(3600).astype(dtype)
    record[4] = min(level, 60_000)
    record[5] = np.linspace(0, 64, 3600) if dtype is np.float64 else 0
    for rate_hz in (360, 257.0):
        ours = prepare_ecg_for_inference(record, rate_hz)
        assert (ours[4:6] == 0).all()
        assert np.isfinite(ours).all()
        assert (np.abs(ours[[0, 1, 2, 3, 6]]).max(1) > 0.3).all()


def test_missing_samples_are_bridged_by_lines():
    x = torch.tensor([[math.nan, 1, math.nan, math.nan, 4, math.nan], [math.nan] * 6, [3, 1, 4, 1, 5, 9]])
    seen = torch.isfinite(x)
    expected = [[1, 1, 2, 3, 4, 4], [0] * 6, [3, 1, 4, 1, 5, 9]]
    torch.testing.assert_close(signal._bridge(x.double(), seen), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("missing", [np.nan, np.inf, -np.inf])
def test_gaps_leave_the_rest_of_the_lead_as_it_is(missing):
    clean = twelve(beats(5000, 500)) + 5
    expected = prepare_ecg_for_inference(clean)
    record = clean.copy()
    record[0, 2000:2100] = record[1, :700] = record[2, -700:] = record[3] = missing
    # More than half of the record: what is left must set the scale.
    record[4, 1000:4000] = missing
    record[5, ::7] = missing
    ours = prepare_ecg_for_inference(record)
    assert np.isfinite(ours).all()
    assert np.abs(ours[0] - expected[0])[[*range(350), *range(470, 1000)]].max() < 0.05
    assert np.abs(ours[1] - expected[1])[200:].max() < 0.05
    assert np.abs(ours[2] - expected[2])[:800].max() < 0.05
    assert (ours[3] == 0).all()
    assert np.abs(ours[4] - expected[4])[[*range(150), *range(850, 1000)]].max() < 0.08
    assert np.abs(ours[5] - expected[5]).max() < 0.1
    np.testing.assert_array_equal(ours[6:], expected[6:])


@pytest.mark.parametrize("compat", ["corrected", "published"])
def test_batch_and_single_agree_exactly_and_leads_do_not_mix(compat):
    batch = np.stack([random_record(1800, seed) for seed in range(3)])
    batch[1, 3, 100:200] = np.nan
    kept = batch.copy()
    together = prepare_ecg_for_inference(batch, 360, compat=compat)
    np.testing.assert_array_equal(batch, kept)
    for record, result in zip(batch, together, strict=True):
        np.testing.assert_array_equal(prepare_ecg_for_inference(record, 360, compat=compat), result)
    if compat == "corrected":
        other = batch[0].copy()
        other[1:] = random_record(1800, 9)[1:]
        np.testing.assert_array_equal(prepare_ecg_for_inference(other, 360)[0], together[0, 0])


@pytest.mark.parametrize("compat", ["corrected", "published"])
@pytest.mark.parametrize("factor", [1, 5, 10])
def test_length_is_counted_at_500_hz_and_the_rest_is_zero(compat, factor):
    record = random_record(720)
    whole, length = prepare_ecg_for_inference(record, 360, None, factor, compat=compat, return_length=True)
    assert whole.shape == (12, 1000 // factor)
    assert length == 1000 // factor
    for target in (600, 1000, 5000, 2503):
        ours, length = prepare_ecg_for_inference(record, 360, target, factor, compat=compat, return_length=True)
        assert ours.shape == (12, target // factor)
        assert length == min(target, 1000) // factor
        if compat == "corrected":
            # Filter and scale are those of the whole record.
            np.testing.assert_array_equal(ours[:, :length], whole[:, :length])
            assert (ours[:, length:] == 0).all()
        elif length < target // factor:
            # Zeros were there before the decimation.
            assert np.abs(ours[6, length + 100 // factor : -(100 // factor)]).max() < 1e-2
    lengths = prepare_ecg_for_inference(record[None], 360, 5000, factor, compat=compat, return_length=True)[1]
    assert isinstance(lengths, np.ndarray)
    assert lengths.tolist() == [1000 // factor]


@pytest.mark.parametrize("compat", ["corrected", "published"])
def test_a_batch_is_the_same_on_any_number_of_threads(compat):
    batch = torch.from_numpy(np.stack([random_record(5000, seed) for seed in range(7)]))
    batch[1, 3, 100:200] = torch.nan
    batch[2, 4, 500:600] += 50
    own, later = torch.get_num_threads(), []
    try:
        torch.set_num_threads(1)
        expected = prepare_ecg_for_inference(batch, compat=compat)
        torch.set_num_threads(3)
        with torch.inference_mode():
            torch.testing.assert_close(prepare_ecg_for_inference(batch, compat=compat), expected, rtol=0, atol=0)
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert [torch.get_num_threads(), *later] == [3, 3]
        with pytest.raises(ValueError, match="must be longer than 453 samples"):
            prepare_ecg_for_inference(batch[..., :200], compat="published")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(own)


@pytest.mark.parametrize("compat", ["corrected", "published"])
def test_kinds_and_dtypes(compat):
    record = random_record(2500) * 1000
    expected = prepare_ecg_for_inference(record, compat=compat)
    ours = prepare_ecg_for_inference(torch.from_numpy(record).requires_grad_(), compat=compat)
    assert isinstance(ours, torch.Tensor)
    assert not ours.requires_grad
    np.testing.assert_array_equal(ours, expected)
    for dtype in (np.float32, np.float16, np.int32, np.int16, ">f4", ">i2", np.uint16):
        ours = prepare_ecg_for_inference((record + 9999 * (dtype is np.uint16)).astype(dtype), compat=compat)
        assert isinstance(ours, np.ndarray)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, expected, rtol=0, atol=0.05)
    for view in (np.asfortranarray(record), np.repeat(record, 2, 1)[:, ::2], record[::-1][::-1]):
        np.testing.assert_array_equal(prepare_ecg_for_inference(view, compat=compat), expected)
    locked = record.copy()
    locked.flags.writeable = False
    np.testing.assert_array_equal(prepare_ecg_for_inference(locked, compat=compat), expected)
    assert prepare_ecg_for_inference(np.zeros((0, 12, 5000)), compat=compat).shape == (0, 12, 1000)


@pytest.mark.cuda
@pytest.mark.parametrize("compat", ["corrected", "published"])
@pytest.mark.parametrize("rate_hz", [257.0, 500])
def test_gpu_equals_cpu(compat, rate_hz):
    batch = torch.from_numpy(np.stack([random_record(2600, seed) for seed in range(100)]))
    batch[1, 3, 100:200] = torch.nan
    batch[2, 4, 500:600] += 50
    ours = prepare_ecg_for_inference(batch.cuda(), rate_hz, compat=compat)
    assert ours.is_cuda
    torch.testing.assert_close(ours.cpu(), prepare_ecg_for_inference(batch, rate_hz, compat=compat), rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_samples", [5, 6, 17, 100, 499])
def test_short_records_are_finite(num_samples):
    for record in (random_record(num_samples), np.full((12, num_samples), 3.0)):
        ours, length = prepare_ecg_for_inference(record, return_length=True)
        assert np.isfinite(ours).all()
        assert length == num_samples // 5
        assert np.abs(ours).max() <= 1


def test_twenty_minutes():
    lead = np.tile(beats(200, 250), 1500).astype(np.float32)
    ours = prepare_ecg_for_inference(twelve(lead), 250, None)
    assert ours.shape == (12, 120_000)
    # The same beat again and again, all the way.
    first, late = (ours[0, start : start + 80].astype(np.float64) for start in (8000, 112_000))
    assert np.abs(first - late).max() < 1e-3
    assert 0.45 < first.max() < 0.55


ZEROS = np.zeros((12, 5000))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"raw": np.zeros(5000)}, r"raw must be \[12, samples\] or \[B, 12, samples\], got \[5000\]"),
        ({"raw": np.zeros((5000, 12))}, r"got \[5000, 12\]; transpose it"),
        ({"raw": np.zeros((3, 8, 5000))}, r"got \[3, 8, 5000\]"),
        ({"raw": np.zeros((1, 1, 12, 5000))}, r"got \[1, 1, 12, 5000\]"),
        ({"raw": np.zeros((12, 0))}, r"at least one sample, got \[12, 0\]"),
        ({"raw": np.zeros((12, 4))}, r"at least one sample of the output \(0\.01 s\), got 4 samples at 500 Hz"),
        ({"raw": None}, "raw must be a NumPy, CuPy or torch array, got None"),
        ({"raw": [[0.0] * 5000] * 12}, "raw must be a NumPy, CuPy or torch array, got list"),
        ({"raw": np.full((12, 5000), "x")}, "raw must hold numbers"),
        ({"raw": np.zeros((12, 5000), complex)}, "raw must hold numbers"),
        ({"raw": torch.zeros(12, 5000, dtype=torch.complex64)}, "raw must be real, got torch.complex64"),
        ({"sampling_rate": 0}, "sampling_rate must be a positive number of Hz, got 0"),
        ({"sampling_rate": -500}, "sampling_rate must be a positive number of Hz, got -500"),
        ({"sampling_rate": math.nan}, "sampling_rate must be a positive number of Hz, got nan"),
        ({"sampling_rate": "500"}, "sampling_rate must be a positive number of Hz, got '500'"),
        ({"sampling_rate": None}, "sampling_rate must be a positive number of Hz, got None"),
        ({"sampling_rate": 0.5}, r"must leave a band above 0\.7 Hz, got 0\.5 Hz and 100 Hz; is sampling_rate in Hz\?"),
        ({"target_length": 0}, "target_length must be a positive whole number, got 0"),
        ({"target_length": 2500.0}, r"target_length must be a positive whole number, got 2500\.0"),
        ({"target_length": 4}, r"target_length must be at least downsampling_factor \(5\), got 4"),
        ({"downsampling_factor": 0}, "downsampling_factor must be a positive whole number, got 0"),
        ({"downsampling_factor": 2.5}, r"downsampling_factor must be a positive whole number, got 2\.5"),
        ({"downsampling_factor": 500}, "must leave a band"),
        ({"compat": "original"}, "compat must be 'corrected' or 'published', got 'original'"),
        ({"compat": "published", "sampling_rate": 94}, "sampling_rate must be above 94 Hz with compat='published'"),
        (
            {"compat": "published", "raw": np.zeros((12, 453))},
            "raw must be longer than 453 samples at 500 Hz with compat='published', got 453",
        ),
    ],
)
def test_errors_name_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=f"^prepare_ecg_for_inference: .*{message}"):
        prepare_ecg_for_inference(**{"raw": ZEROS, **arguments})


def test_decimate_errors():
    with pytest.raises(ValueError, match=r"^decimate_flattened: ecg must be \[12, samples\]"):
        decimate_flattened(np.zeros((3, 500)), 5)
    with pytest.raises(ValueError, match=r"^decimate_flattened: factor must be a positive whole number, got 0"):
        decimate_flattened(ZEROS, 0)
    with pytest.raises(ValueError, match=r"^decimate_flattened: ecg must hold at least 5 samples in a lead, got 4"):
        decimate_flattened(ZEROS[:, :4], 5)


def test_lead_names():
    assert LEADS == ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")


def test_the_guides_import_works_from_the_root_and_loads_no_readers():
    code = (
        "import sys; from preprocessors.ecg_preprocessing import prepare_ecg_for_inference as f; import numpy as np;"
        "ecg = f(np.zeros((12, 5000)), sampling_rate=500, target_length=5000, downsampling_factor=5, normalize=True);"
        "print(ecg.shape,"
        "sorted({'wfdb', 'pandas', 'matplotlib', 'sklearn', 'triton'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(12, 1000) []"
