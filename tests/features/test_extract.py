from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from hubert_ecg import features, ops
from hubert_ecg.features import tokens

RATES = {50: 250, 100: 500, 500: 2500}
WIDTHS = {"mfcc": 39, "time_freq": 16, "mixed": 29}


def ecg(num_samples, batch=None, seed=0):
    random = np.random.default_rng(seed)
    return random.standard_normal((*([batch] if batch else []), 12, num_samples)).astype(np.float32)


def corrected_frames(ecg, rate_hz):
    return tokens.cut_frames(ecg, tokens.frame_plan("test", ecg, "corrected", rate_hz))


def kaldi_mfcc(frame, rate_hz, low_hz=20.0, high_hz=None):
    """Kaldi's definition of 13 cepstral coefficients of one frame, in float64 NumPy."""
    x = frame.astype(np.float64) - frame.astype(np.float64).mean()
    x = x - 0.97 * np.concatenate([x[:1], x[:-1]])
    x = x * (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(len(x)) / (len(x) - 1))) ** 0.85
    padded = 2 ** int(np.ceil(np.log2(len(x))))
    power = np.abs(np.fft.rfft(x, padded)[:-1]) ** 2
    # The filters are float32 numbers: built in float64 they would move coefficients by more than 1e-3.
    low, high = mel(low_hz), mel(high_hz or rate_hz / 2)
    edges = np.float32(low) + np.arange(25, dtype=np.float32)[:, None] * np.float32((high - low) / 24)
    at = np.float32(1127) * np.log(1 + np.float32(rate_hz / padded) * np.arange(padded // 2, dtype=np.float32) / 700)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    bank = np.clip(np.minimum((at - left) / (centre - left), (right - at) / (right - centre)), 0, None)
    energies = np.maximum(bank.astype(np.float64) @ power, np.finfo(np.float32).eps)
    order = np.arange(13)[:, None]
    cosines = np.cos(np.pi / 23 * order * (np.arange(23) + 0.5)) * np.where(
        order == 0, np.sqrt(1 / 23), np.sqrt(2 / 23)
    )
    return cosines @ np.log(energies) * (1 + 11 * np.sin(np.pi * order[:, 0] / 22))


def mel(hz):
    return 1127 * np.log(1 + np.asarray(hz) / 700)


def statistics(frame):
    """The 16 statistics of one frame, in float64 NumPy and SciPy."""
    x = frame.astype(np.float64)
    rms = np.sqrt(np.mean(x**2))
    peak = np.abs(x).max()
    power = np.abs(np.fft.fft(x)) ** 2 / len(x)
    time = [x.min(), x.max(), x.mean(), rms, x.var(), x.std(), np.mean(x**2), peak, np.ptp(x), peak / rms]
    shape = [scipy.stats.skew(x), scipy.stats.kurtosis(x)]
    return np.array([*time, *shape, power.max(), power.sum(), power.mean(), power.var()])


def published_shards(record, rate_hz):
    leads = {
        50: [lead[1:-1] for lead in record],
        100: [lead[2:-2] for lead in record],
        500: [lead[2:-3] if i % 2 else lead[2:-2] for i, lead in enumerate(record)],
    }[rate_hz]
    return np.concatenate(leads).reshape(-1, {50: 32, 100: 64, 500: 322}[rate_hz])


@pytest.mark.parametrize("rate_hz", RATES)
def test_published_equals_one_call_for_each_shard(rate_hz):
    record = ecg(RATES[rate_hz])
    # What preprocessing gives: limited to [-1, 1], with a lead that is off.
    record = np.clip(record / 3, -1, 1)
    record[5] = 0
    shards = published_shards(record, rate_hz)
    assert len(shards) == 93
    coefficients = np.array([kaldi_mfcc(shard, rate_hz) for shard in shards])
    ours = features.extract(record, "mfcc", "published", rate_hz)
    np.testing.assert_allclose(ours[:, :13], coefficients, rtol=0, atol=1e-3)
    assert (ours[:, 13:] == 0).all()
    # 0 / 0 in the lead that is off.
    with np.errstate(invalid="ignore"):
        expected = np.nan_to_num(np.array([statistics(shard) for shard in shards]))
    np.testing.assert_allclose(features.extract(record, "time_freq", "published", rate_hz), expected, atol=1e-3)
    mixed = features.extract(record, "mixed", "published", rate_hz)
    np.testing.assert_allclose(mixed, np.concatenate([expected, coefficients], 1), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("rate_hz", RATES)
def test_corrected_equals_frames_amid_the_receptive_fields(rate_hz):
    record = ecg(RATES[rate_hz], seed=1)
    stride, field = {50: (32, 50), 100: (64, 82), 500: (320, 400)}[rate_hz]
    flat = record.reshape(-1)
    frames = np.array([flat[stride * t + (field - stride) // 2 :][:stride] for t in range(93)])
    coefficients = np.array([kaldi_mfcc(frame, rate_hz, 0.5, min(50, rate_hz / 2)) for frame in frames])
    ours = features.extract(record, "mfcc", sample_rate_hz=rate_hz)
    np.testing.assert_allclose(ours[:, :13], coefficients, rtol=0, atol=2e-3)
    np.testing.assert_array_equal(features.extract(record, "mixed", sample_rate_hz=rate_hz)[:, 16:], ours[:, :13])
    expected = np.array([statistics(frame) for frame in frames])
    time_freq = features.extract(record, "time_freq", sample_rate_hz=rate_hz)
    np.testing.assert_allclose(time_freq, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(features.extract(record, "mixed", sample_rate_hz=rate_hz)[:, :16], time_freq)

    # Slopes by regression over five frames, a lead's first and last frame repeated beyond its ends.
    middles = stride * np.arange(93) + field // 2
    lead_of_frame = (middles // RATES[rate_hz]).astype(int)
    slopes = [ours[:, :13].astype(np.float64)]
    for _ in range(2):
        slope = np.empty_like(slopes[-1])
        for lead in range(12):
            own = np.pad(slopes[-1][lead_of_frame == lead], ((2, 2), (0, 0)), mode="edge")
            slope[lead_of_frame == lead] = (2 * (own[4:] - own[:-4]) + own[3:-1] - own[1:-3]) / 10
        slopes.append(slope)
    np.testing.assert_allclose(ours, np.concatenate(slopes, 1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("rate_hz", RATES)
def test_no_mel_filter_is_empty(rate_hz):
    frames = corrected_frames(torch.zeros(1, 12, RATES[rate_hz]), rate_hz)
    padded = 2 ** int(np.ceil(np.log2(frames.samples.shape[-1])))
    edges = np.linspace(*mel(frames.band_hz), 25)
    bins = mel(rate_hz / padded * np.arange(padded // 2))
    for left, centre, right in zip(edges[:-2], edges[1:-1], edges[2:], strict=True):
        weights = np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre))
        assert weights.max() > 0.05
    assert frames.band_hz == (0.5, min(50, rate_hz / 2))


@pytest.mark.parametrize("rate_hz", RATES)
@pytest.mark.parametrize("feature_type", WIDTHS)
def test_a_token_depends_on_its_receptive_field_only(rate_hz, feature_type):
    record = ecg(RATES[rate_hz], seed=2)
    geometry = features.token_geometry(rate_hz)
    static = 13 if feature_type == "mfcc" else WIDTHS[feature_type]
    before = features.extract(record, feature_type, sample_rate_hz=rate_hz)[:, :static]
    for token in (0, 1, 7, 46, 92):
        start = token * geometry.stride
        outside = np.ones(12 * RATES[rate_hz], bool)
        outside[start : start + geometry.receptive_field] = False
        flat = record.reshape(-1).copy()
        flat[outside] += 5
        after = features.extract(flat.reshape(12, -1), feature_type, sample_rate_hz=rate_hz)[:, :static]
        np.testing.assert_array_equal(after[token], before[token])
        flat = record.reshape(-1).copy()
        flat[start + geometry.receptive_field // 2] += 5
        after = features.extract(flat.reshape(12, -1), feature_type, sample_rate_hz=rate_hz)[:, :static]
        assert np.abs(after[token] - before[token]).max() > 0.01


@pytest.mark.parametrize("rate_hz", RATES)
def test_another_lead_does_not_change_the_slopes(rate_hz):
    record = ecg(RATES[rate_hz], seed=3)
    frames = corrected_frames(torch.from_numpy(record[None]), rate_hz)
    ends = np.cumsum(frames.frames_per_lead)
    before = features.extract(record, "mfcc", sample_rate_hz=rate_hz)
    margin = features.token_geometry(rate_hz).stride
    for lead in (0, 5, 11):
        changed = record.copy()
        # Not where a frame of the neighbour ends in this lead.
        changed[lead, margin:-margin] += ecg(RATES[rate_hz], seed=4)[lead, margin:-margin]
        after = features.extract(changed, "mfcc", sample_rate_hz=rate_hz)
        own = np.arange(93)
        own = (own < ends[lead]) & (own >= ends[lead] - frames.frames_per_lead[lead])
        np.testing.assert_array_equal(after[~own], before[~own])
        assert np.abs(after[own] - before[own])[:, 13:].max() > 0.01


@pytest.mark.parametrize(
    ("rate_hz", "stride", "field", "frame"), [(50, 32, 50, 32), (100, 64, 82, 64), (500, 320, 400, 322)]
)
def test_geometry_is_that_of_the_convolutions(rate_hz, stride, field, frame):
    geometry = features.token_geometry(rate_hz)
    assert geometry[:3] == (stride, field, frame)
    assert features.token_geometry(float(rate_hz)) == geometry
    for num_samples in (*range(1, 60), RATES[rate_hz], 2 * RATES[rate_hz], 6 * RATES[rate_hz] + 7):
        length = 12 * num_samples
        for kernel, step in zip(geometry.kernels, geometry.strides, strict=True):
            length = max(0, (length - kernel) // step + 1)
        assert geometry.num_tokens(num_samples) == length
    assert geometry.num_tokens(RATES[rate_hz]) == 93


@pytest.mark.parametrize("num_samples", [7, 8, 50, 499, 500, 501, 1000, 3000])
@pytest.mark.parametrize("feature_type", WIDTHS)
def test_any_length(num_samples, feature_type):
    batch = ecg(num_samples, batch=3)
    ours = features.extract(batch, feature_type)
    num_tokens = features.token_geometry(100).num_tokens(num_samples)
    assert ours.shape == (3, num_tokens, WIDTHS[feature_type])
    assert np.isfinite(ours).all()
    frames = corrected_frames(torch.from_numpy(batch), 100)
    assert sum(frames.frames_per_lead) == num_tokens
    for record, result in zip(batch, ours, strict=True):
        np.testing.assert_allclose(features.extract(record, feature_type), result, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("compat", ["corrected", "published"])
@pytest.mark.parametrize("feature_type", WIDTHS)
def test_silence_is_finite_and_an_empty_batch_stays_empty(feature_type, compat):
    assert np.isfinite(features.extract(np.zeros((2, 12, 500)), feature_type, compat)).all()
    assert features.extract(np.zeros((0, 12, 500)), feature_type, compat).shape == (0, 93, WIDTHS[feature_type])


def test_kinds_and_dtypes():
    batch = ecg(500, batch=2)
    expected = features.extract(batch, "mixed")
    assert isinstance(expected, np.ndarray)
    ours = features.extract(torch.from_numpy(batch).requires_grad_(), "mixed")
    assert isinstance(ours, torch.Tensor)
    assert not ours.requires_grad
    np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal(features.extract(batch.astype(np.float64), "mixed"), expected)
    np.testing.assert_array_equal(features.extract(np.repeat(batch, 2, -1)[..., ::2], "mixed"), expected)
    for dtype in (np.float16, np.float64, np.int16):
        assert features.extract(batch.astype(dtype), "mixed").dtype == np.float32


@pytest.mark.cuda
@pytest.mark.parametrize("compat", ["corrected", "published"])
@pytest.mark.parametrize("feature_type", WIDTHS)
def test_gpu_equals_cpu(feature_type, compat):
    batch = torch.from_numpy(ecg(500, batch=5))
    ours = features.extract(batch.cuda(), feature_type, compat)
    assert ours.is_cuda
    torch.testing.assert_close(ours.cpu(), features.extract(batch, feature_type, compat), rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("compat", ["corrected", "published"])
@pytest.mark.parametrize("feature_type", features.FEATURE_TYPES)
def test_one_graph_without_breaks(feature_type, compat):
    ecg = torch.randn(2, 12, 500, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(lambda x: features.extract(x, feature_type, compat), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ecg), features.extract(ecg, feature_type, compat), rtol=0, atol=0)


def test_a_line_adds_a_type(monkeypatch):
    monkeypatch.setitem(features.FEATURE_TYPES, "energy", lambda frames: ops.time_freq(frames.samples)[..., 6:7])
    assert features.num_features("energy") == 1
    assert features.extract(ecg(500), "energy").shape == (93, 1)
    assert {name: features.num_features(name) for name in WIDTHS} == WIDTHS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mel",), r"feature_type must be one of \['mfcc', 'mixed', 'time_freq'\], got 'mel'"),
        (("mfcc", "old"), "compat must be 'corrected' or 'published', got 'old'"),
        (("mfcc", "corrected", 250), r"sample_rate_hz must be one of \[50, 100, 500\], got 250"),
        (("mfcc", "published", 50), r"ecg must hold 250 samples of each lead \(5 s at 50 Hz\).*got 500"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        features.extract(np.zeros((12, 500)), *arguments)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros(6000), r"ecg must be \[12, T\] or \[B, 12, T\], got \[6000\]"),
        (np.zeros((500, 12)), r"got \[500, 12\]"),
        (np.zeros((12, 6)), "ecg must hold at least 7 samples of each lead, one token at 100 Hz, got 6"),
        (torch.zeros(12, 500, dtype=torch.complex64), "ecg must be real"),
        (None, "ecg must be a NumPy, CuPy or torch array, got None"),
        ([1.0], "ecg must be a NumPy, CuPy or torch array, got list"),
    ],
)
def test_errors_of_shape(given, message):
    with pytest.raises(ValueError, match=f"^extract: .*{message}"):
        features.extract(given, "mfcc")
