"""mfcc_assign, time_freq_assign and mixed_assign: the labels of the separate steps, without their memory."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from hubert_ecg import features, ops
from hubert_ecg.ops import use_backend
from hubert_ecg.testing import assert_same_clusters, poisoned_memory, strided

RATES = {50: 250, 100: 500, 500: 2500}
ASSIGN = features.ASSIGN
COMPATS = ("corrected", "published")
BACKENDS = list(ops.OPS["frame_assign"].backends["cpu"])

every_type = pytest.mark.parametrize("feature_type", list(ASSIGN))
every_compat = pytest.mark.parametrize("compat", COMPATS)


def recordings(num_records=6, num_samples=500, rate_hz=100, seed=0):
    """Beats, wander and noise, with a lead that is off and one that clips: [B, 12, T]."""
    random = torch.Generator().manual_seed(seed)
    time = torch.arange(num_samples) / rate_hz + torch.rand(num_records, 12, 1, generator=random)
    beats = torch.exp(-(((time % 0.8) - 0.4) ** 2) / 4e-4) - 0.3 * torch.exp(-(((time % 0.8) - 0.7) ** 2) / 4e-3)
    size = 0.2 + torch.rand(num_records, 12, 1, generator=random)
    noise = 0.03 * torch.randn(num_records, 12, num_samples, generator=random)
    ecg = size * beats + 0.2 * torch.sin(2 * math.pi * 0.3 * time) + noise
    ecg[:, 5] = 0
    ecg[:, 7] = (3 * ecg[:, 7]).clamp(-1, 1)
    return ecg.contiguous()


def unit(x, normalize=True):
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.where(length > 0, 1) if normalize else x


def steps(ecg, feature_type, compat="corrected", rate_hz=100, normalize=True):
    """Points as the separate steps make them: [B N, D]."""
    return unit(features.extract(ecg, feature_type, compat, rate_hz), normalize).flatten(0, -2)


def exact_steps(ecg, feature_type, compat="corrected", rate_hz=100, normalize=True):
    """The same in float64, by the references."""
    plan = features.tokens.frame_plan("test", ecg, compat, rate_hz)
    with use_backend("reference"):
        frames = features.tokens.cut_frames(ecg.double(), plan)
        return unit(features.FEATURE_TYPES[feature_type](frames), normalize).flatten(0, -2)


def some_centroids(points, k, seed=0):
    """Means of random parts of the points, which many points are about equally near to."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, k, (len(points),), generator=random)
    start = points[torch.randperm(len(points), generator=random)[:k]]
    sums, counts = ops.kmeans_accumulate(points, labels, k)
    return (0.7 * start + 0.3 * sums / counts.clamp(min=1)[:, None]).float()


def assert_labels_of_steps(labels, ecg, centroids, feature_type, compat="corrected", rate_hz=100, normalize=True):
    how = (feature_type, compat, rate_hz, normalize)
    points, exact = steps(ecg, *how), exact_steps(ecg, *how)
    # Each of the two ways rounds as the separate steps do, or once in the normalisation more.
    rounding = 2 * (points.double() - exact).norm(dim=1) + 2e-7 * exact.norm(dim=1)
    assert_same_clusters(
        labels.flatten(), ops.kmeans_assign(points, centroids), exact, centroids, rounding, name=str(how)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rate_hz", RATES)
@every_compat
@every_type
def test_labels_are_those_of_the_separate_steps(feature_type, compat, rate_hz, normalize, backend):
    ecg = recordings(6, RATES[rate_hz], rate_hz)
    centroids = some_centroids(steps(ecg, feature_type, compat, rate_hz, normalize), 60)
    with use_backend(backend), poisoned_memory():
        labels = ASSIGN[feature_type](ecg, centroids, rate_hz, compat=compat, normalize=normalize)
    assert labels.shape == (6, 93)
    assert len(labels.unique()) > 15
    assert_labels_of_steps(labels, ecg, centroids, feature_type, compat, rate_hz, normalize)


@pytest.mark.parametrize("num_samples", [7, 8, 11, 50, 499, 501, 682, 683, 694, 3000, 9001])
@every_type
def test_any_length(feature_type, num_samples):
    ecg = recordings(2, num_samples, seed=num_samples)
    centroids = some_centroids(steps(recordings(), feature_type), 33)
    labels = ASSIGN[feature_type](ecg, centroids)
    assert labels.shape == (2, features.token_geometry(100).num_tokens(num_samples))
    assert_labels_of_steps(labels, ecg, centroids, feature_type)


@every_compat
@every_type
def test_one_record_equals_its_row_of_a_batch(feature_type, compat):
    ecg = recordings()
    centroids = some_centroids(steps(ecg, feature_type, compat), 40)
    labels = ASSIGN[feature_type](ecg, centroids, compat=compat)
    for record, expected in zip(ecg, labels, strict=True):
        one = ASSIGN[feature_type](record, centroids, compat=compat)
        assert one.shape == (93,)
        assert torch.equal(one, expected)


@every_compat
@every_type
def test_an_empty_batch_stays_empty(feature_type, compat):
    centroids = torch.randn(3, features.num_features(feature_type))
    labels = ASSIGN[feature_type](torch.zeros(0, 12, 500), centroids, compat=compat)
    assert labels.shape == (0, 93)
    assert labels.dtype == torch.int64
    stored, scale = torch.zeros(0, 12, 500, dtype=torch.int16), torch.zeros(0, 12)
    assert ASSIGN[feature_type](stored, centroids, compat=compat, scale=scale).shape == (0, 93)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rate_hz", RATES)
@every_compat
@every_type
def test_int16_is_read_with_the_scale_of_each_lead(feature_type, compat, rate_hz, backend):
    ecg = recordings(5, RATES[rate_hz], rate_hz)
    scale = ecg.abs().amax(-1).clamp(min=1e-3) / torch.linspace(300, 32767, 12)
    stored = (ecg / scale[..., None]).round().to(torch.int16)
    signal = stored.float() * scale[..., None]
    centroids = some_centroids(steps(signal, feature_type, compat, rate_hz), 50)
    assign = ASSIGN[feature_type]
    with use_backend(backend):
        expected = assign(signal, centroids, rate_hz, compat=compat)
        assert torch.equal(assign(stored, centroids, rate_hz, compat=compat, scale=scale), expected)
        assert torch.equal(assign(stored[2], centroids, rate_hz, compat=compat, scale=scale[2]), expected[2])
        wide = scale.double()
        assert torch.equal(assign(strided(stored), centroids, rate_hz, compat=compat, scale=strided(wide)), expected)
    extremes = torch.full((1, 12, RATES[rate_hz]), -32768, dtype=torch.int16)
    extremes[..., ::3] = 32767
    ones = torch.ones(1, 12)
    expected = assign(extremes.float(), centroids, rate_hz, compat=compat)
    assert torch.equal(assign(extremes, centroids, rate_hz, compat=compat, scale=ones), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@every_compat
@every_type
def test_any_floating_dtype_is_read_as_float32(feature_type, compat, dtype):
    ecg = recordings().to(dtype)
    # Zeros of either sign, the smallest and the largest numbers, and what is none.
    limits = torch.finfo(dtype)
    odd = [0.0, -0.0, limits.tiny, -limits.tiny / 4, limits.smallest_normal / 2, 1.0, -1.0]
    ecg[0, 0, :7] = torch.tensor(odd, dtype=torch.float64).to(dtype)
    ecg[1, 3, 100], ecg[2, 4, 200], ecg[3, 1, 50], ecg[4, 2, 60] = math.nan, math.inf, -math.inf, 65504.0
    centroids = some_centroids(steps(recordings(), feature_type, compat), 50)
    assign = ASSIGN[feature_type]
    assert torch.equal(assign(ecg, centroids, compat=compat), assign(ecg.float(), centroids, compat=compat))


def test_every_float16_is_read_as_what_it_is():
    bits = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    # One sample of each value in a frame of zeros tells by its label which of the two centroids its magnitude is near.
    values = bits.view(torch.float16)
    ecg = torch.zeros(len(values), 2, dtype=torch.float16)
    ecg[:, 0] = values
    for edge in (1e-7, 6e-8, 3e-5, 1.0, 1024.0, 60000.0):
        centroids = torch.zeros(2, 16)
        # Of the 16, only the peak tells them apart.
        centroids[1, 7] = 2 * edge
        how = (None, centroids, "time_freq", 0, 1, 2, None, 100.0, 0.5, 50.0, False)
        assert torch.equal(ops.frame_assign(ecg, *how), ops.frame_assign(ecg.float(), *how))
        assert torch.equal(
            ops.frame_assign(bits[:, None].expand(-1, 2).contiguous().view(torch.bfloat16), *how),
            ops.frame_assign(bits[:, None].expand(-1, 2).contiguous().view(torch.bfloat16).float(), *how),
        )


@every_compat
@every_type
def test_input_in_any_order_in_memory(feature_type, compat):
    ecg = recordings()
    centroids = some_centroids(steps(ecg, feature_type, compat), 50)
    assign = ASSIGN[feature_type]
    expected = assign(ecg, centroids, compat=compat)
    longer = torch.full((6, 12, 700), math.nan)
    longer[..., 100:600] = ecg
    views = {
        "every other sample": strided(ecg),
        "samples outermost": ecg.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "leads outermost": ecg.transpose(0, 1).contiguous().transpose(0, 1),
        "crop": longer[..., 100:600],
        "requires grad": ecg.clone().requires_grad_(),
    }
    for name, view in views.items():
        assert torch.equal(assign(view, strided(centroids), compat=compat), expected), name
    assert torch.equal(assign(ecg[:1].expand(3, 12, 500), centroids, compat=compat), expected[[0, 0, 0]])
    assert torch.equal(assign(ecg[::2], centroids, compat=compat), expected[::2])
    backwards = ecg.numpy()[::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1]
    labels = assign(backwards, centroids.numpy(), compat=compat)
    assert isinstance(labels, np.ndarray)
    np.testing.assert_array_equal(labels, expected)


def test_many_records_that_are_copied_some_at_a_time():
    ecg = recordings(200)
    centroids = some_centroids(steps(ecg, "mfcc", "published"), 100)
    labels = ops.mfcc_assign(ecg, centroids, compat="published")
    assert_labels_of_steps(labels, ecg, centroids, "mfcc", "published")
    assert torch.equal(ops.mfcc_assign(strided(ecg), centroids), ops.mfcc_assign(ecg, centroids))


@every_type
def test_centroids_of_any_floating_dtype_are_rounded_to_float32(feature_type):
    ecg = recordings()
    exact = steps(ecg, feature_type).double()
    centroids = exact[torch.randperm(len(exact), generator=torch.Generator().manual_seed(1))[:50]] + 1e-9
    expected = ASSIGN[feature_type](ecg, centroids.float())
    assert torch.equal(ASSIGN[feature_type](ecg, centroids), expected)
    half = centroids.half()
    assert torch.equal(ASSIGN[feature_type](ecg, half), ASSIGN[feature_type](ecg, half.float()))


@pytest.mark.parametrize("backend", BACKENDS)
@every_type
def test_not_a_number_changes_the_labels_around_it_alone(feature_type, backend):
    ecg, plan = recordings(), features.tokens.frame_plan("test", torch.zeros(12, 500), "corrected", 100)
    centroids = some_centroids(steps(ecg, feature_type), 50)
    # No clean row has the label of a broken one.
    centroids[0] = 100
    assign = ASSIGN[feature_type]
    ends = list(itertools.accumulate(plan.frames_per_lead))
    with use_backend(backend):
        clean = assign(ecg, centroids)
        for value, record, token in [(math.nan, 0, 0), (math.inf, 1, 92), (-math.inf, 2, 46), (math.nan, 3, 10)]:
            broken = ecg.clone()
            broken.view(6, -1)[record, plan.start + token * plan.frame_length + 5] = value
            labels = assign(broken, centroids)
            lead = next(i for i, end in enumerate(ends) if token < end)
            reach = 4 if feature_type == "mfcc" else 0
            first = max(token - reach, ends[lead] - plan.frames_per_lead[lead])
            last = min(token + reach + 1, ends[lead])
            assert (labels[record, first:last] == 0).all()
            labels[record, first:last] = clean[record, first:last]
            assert torch.equal(labels, clean)
    assert (clean > 0).all()
    # A centroid that is none is never nearest.
    centroids[7, 3] = math.nan
    assert not (assign(ecg, centroids) == 7).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", [0.0, 1e-30, 1e-5, 1e5, 1e8, 1e15])
@every_type
def test_signals_of_any_size(feature_type, level, backend):
    ecg = level * recordings()
    exact = exact_steps(ecg, feature_type)
    centroids = some_centroids(exact, 20)
    # No other row has the label of one whose features are beyond float32.
    centroids[0] = 100
    with use_backend(backend):
        labels = ASSIGN[feature_type](ecg, centroids).flatten()
    finite = features.extract(ecg, feature_type).flatten(0, 1).isfinite().all(1)
    assert (labels[~finite] == 0).all()
    expected = ops.kmeans_assign(exact, centroids.double())
    rounding = torch.full((len(exact),), 1e-4)
    assert_same_clusters(labels[finite], expected[finite], exact[finite], centroids, rounding[finite])


@every_compat
@every_type
def test_is_one_graph(feature_type, compat):
    ecg = recordings(2)
    centroids = some_centroids(steps(ecg, feature_type, compat), 10)

    def run(ecg, centroids):
        return ASSIGN[feature_type](ecg, centroids, compat=compat) + 1

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(ecg, centroids), run(ecg, centroids))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads):
    ecg = recordings(40)
    centroids = some_centroids(steps(ecg, "mfcc"), 100)
    expected = ops.mfcc_assign(ecg, centroids)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(ops.mfcc_assign(ecg, centroids), expected)
    finally:
        torch.set_num_threads(before)


MEMORY = """
import torch
from hubert_ecg import features

def most(what):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(what)) / 1024

signal = torch.empty(4000, 12, 500).normal_()
signals = {"float32": signal, "int16": signal.mul(1000).short(), "float16": signal.half()}
scale = torch.full((4000, 12), 1e-3)
for feature_type, assign in features.ASSIGN.items():
    centroids = torch.randn(100, features.num_features(feature_type))
    for compat in ("corrected", "published"):
        for dtype, ecg in signals.items():
            units = scale if dtype == "int16" else None
            assign(ecg[:64], centroids, compat=compat, scale=None if units is None else units[:64])
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # the peak starts again here
            before = most("VmRSS")
            labels = assign(ecg, centroids, compat=compat, scale=units)
            print(feature_type, compat, dtype, most("VmHWM") - before - labels.numel() * 8 / 2**20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.skipif("native" not in BACKENDS, reason="needs the native module")
def test_memory_beyond_input_and_labels():
    out = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True).stdout
    taken = {tuple(line.split()[:3]): float(line.split()[3]) for line in out.splitlines()}
    assert len(taken) == 18
    # MiB, for 4,000 records; their features would take 23 and more.
    assert {what: most for what, most in taken.items() if most > 10} == {}


@every_type
def test_errors(feature_type):
    assign, name, width = ASSIGN[feature_type], f"{feature_type}_assign", features.num_features(feature_type)
    ecg, centroids = torch.zeros(2, 12, 500), torch.zeros(5, width)
    stored, scale = ecg.short(), torch.ones(2, 12)
    cases = [
        ((ecg[0, 0], centroids), {}, r"ecg must be \[12, T\] or \[B, 12, T\], got \[500\]"),
        ((ecg[None], centroids), {}, r"ecg must be \[12, T\] or \[B, 12, T\], got \[1, 2, 12, 500\]"),
        ((ecg[:, :11], centroids), {}, r"ecg must be \[12, T\] or \[B, 12, T\], got \[2, 11, 500\]"),
        ((ecg.transpose(1, 2), centroids), {}, r"ecg must be .*, got \[2, 500, 12\]"),
        ((None, centroids), {}, r"ecg must be .*, got None"),
        (([0.0], centroids), {}, r"ecg must be a NumPy, CuPy or torch array, got list"),
        ((ecg[..., :6], centroids), {}, r"ecg must hold at least 7 samples of each lead, .*, got 6"),
        ((ecg.int(), centroids), {}, r"ecg must be floating point or int16 with scale, got int32\[2, 12, 500\]"),
        ((ecg.bool(), centroids), {}, r"ecg must be floating point or int16 with scale, got bool\[2, 12, 500\]"),
        ((ecg.cfloat(), centroids), {}, r"ecg must be floating point or int16 .*, got complex64\[2, 12, 500\]"),
        ((ecg, centroids[0]), {}, rf"centroids must be .*\[K, {width}\].*, got float32\[{width}\]"),
        ((ecg, centroids[:, 1:]), {}, rf"centroids must be .*\[K, {width}\].*, got float32\[5, {width - 1}\]"),
        ((ecg, centroids[:0]), {}, rf"centroids must be .*K > 0.*, got float32\[0, {width}\]"),
        ((ecg, centroids.int()), {}, rf"centroids must be floating point .*, got int32\[5, {width}\]"),
        ((ecg, centroids.to("meta")), {}, r"centroids must be on the device of ecg \(cpu\), got meta"),
        ((ecg, centroids, 250), {}, r"sample_rate_hz must be one of \[50, 100, 500\], got 250"),
        ((ecg, centroids, -100), {}, r"sample_rate_hz must be one of \[50, 100, 500\], got -100"),
        ((ecg, centroids, math.nan), {}, r"sample_rate_hz must be one of \[50, 100, 500\], got nan"),
        ((ecg, centroids), {"compat": "old"}, r"compat must be 'corrected' or 'published', got 'old'"),
        ((ecg, centroids, 50), {"compat": "published"}, r"ecg must hold 250 samples of each lead .*, got 500"),
        ((stored, centroids), {}, r"scale must be floating point \[2, 12\] for an ecg of int16, got None"),
        ((ecg, centroids), {"scale": scale}, r"scale must be None for an ecg of float32, got float32\[2, 12\]"),
        ((stored, centroids), {"scale": scale[0]}, r"scale must be floating point \[2, 12\], got float32\[12\]"),
        ((stored, centroids), {"scale": scale.int()}, r"scale must be floating point, got int32\[2, 12\]"),
        ((stored[0], centroids), {"scale": scale}, r"scale must be floating point \[12\], got float32\[2, 12\]"),
    ]
    for args, named, message in cases:
        with pytest.raises(ValueError, match=rf"^{name}: {message}"):
            assign(*args, **named)


@pytest.mark.cuda
@every_compat
@every_type
def test_gpu_labels_are_those_of_the_separate_steps(feature_type, compat):
    ecg = recordings(50)
    centroids = some_centroids(steps(ecg, feature_type, compat), 100)
    labels = ASSIGN[feature_type](ecg.cuda(), centroids.cuda(), compat=compat)
    assert labels.is_cuda
    assert_labels_of_steps(labels.cpu(), ecg, centroids, feature_type, compat)
    with pytest.raises(ValueError, match="centroids must be on the device of ecg"):
        ASSIGN[feature_type](ecg.cuda(), centroids, compat=compat)


def test_half_precision_below_its_normal_numbers_is_read_as_it_is():
    random = torch.Generator().manual_seed(0)
    ecg = (3e-5 * torch.randn(4, 12, 500, generator=random)).half()
    centroids = torch.randn(20, 39, generator=random)
    want = ops.mfcc_assign(ecg.float(), centroids)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush")
    try:
        got = ops.mfcc_assign(ecg, centroids)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(got, want)
