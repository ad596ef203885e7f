"""Features of 1,000 records at 100 Hz: the extract command against one Kaldi call for each frame, as it used to be."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from hubert_ecg import features
from hubert_ecg.config import ExtractConfig
from hubert_ecg.data import build
from hubert_ecg.data.synthetic import Cohort
from hubert_ecg.train import extract_features

NUM_RECORDS = 1000
# The peer takes minutes for all records; it is timed on these.
NUM_PEER_RECORDS = 10


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "s"
    return build.build(Cohort(num_records=NUM_RECORDS), folder, build.Settings(), num_workers=2)


@pytest.mark.benchmark(group="extract")
def test_command_against_one_call_per_frame(benchmark, capsys, store, tmp_path, torchaudio):
    ecg = torch.from_numpy(np.stack([store[i].signal[:, :500] for i in range(NUM_PEER_RECORDS)]))
    frames = ecg[..., 2:-2].reshape(NUM_PEER_RECORDS, 93, 64)

    def one_call_per_frame() -> torch.Tensor:
        options = {"sample_frequency": 100, "frame_length": 640.0, "frame_shift": 640.0, "use_energy": False}
        calls = (torchaudio.kaldi.mfcc(frame[None].double(), **options) for record in frames for frame in record)
        return torch.cat(list(calls)).view(NUM_PEER_RECORDS, 93, 13)

    start = time.perf_counter()
    expected = one_call_per_frame()
    peer_s = (time.perf_counter() - start) * NUM_RECORDS / NUM_PEER_RECORDS
    ours = features.extract(ecg, "mfcc", compat="published")[..., :13]
    close = (ours.double() - expected).abs() < 5e-3
    assert close.double().mean() > 0.99

    config = ExtractConfig(store.path, output_path=tmp_path / "features.pkl")
    result = benchmark.pedantic(extract_features, (config,), rounds=5, warmup_rounds=1)
    np.testing.assert_array_equal(result.features[:NUM_PEER_RECORDS], features.extract(ecg, "mfcc"))
    if benchmark.disabled:
        return
    ours_s = benchmark.stats.stats.median
    benchmark.extra_info.update(
        unit="records",
        count=NUM_RECORDS,
        median_s={"ours": ours_s, "one Kaldi call per frame": peer_s},
        ratio={"one Kaldi call per frame": round(peer_s / ours_s, 1)},
    )
    with capsys.disabled():
        print(f"\nextract, {NUM_RECORDS} records: {ours_s:.3f} s, {peer_s / ours_s:.0f} times as fast")


@pytest.mark.benchmark(group="extract")
@pytest.mark.parametrize("compat", ["corrected", "published"])
@pytest.mark.parametrize("feature_type", features.FEATURE_TYPES)
def test_every_type(benchmark, store, feature_type, compat):
    ecg = torch.from_numpy(store.gather(np.arange(NUM_RECORDS), None, 500)[0])
    found = benchmark.pedantic(features.extract, (ecg, feature_type, compat), rounds=3, warmup_rounds=1)
    assert found.isfinite().all()
    benchmark.extra_info["records"] = NUM_RECORDS
