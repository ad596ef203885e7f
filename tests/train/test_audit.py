"""The audit: numbers against cases made by hand, and the command with its page."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from hubert_ecg import cli, clustering, evaluation, features, train
from hubert_ecg.config import AuditConfig, PretrainConfig, UserError
from hubert_ecg.data import Loader
from hubert_ecg.data.synthetic import generate_ecg
from hubert_ecg.evaluation.audit import NUM_PHASES, ClusterAudit, mutual_information
from hubert_ecg.evaluation.beats import beat_phase, r_peaks
from hubert_ecg.signal import prepare_ecg_for_inference
from hubert_ecg.train.clusters import load_kmeans

PLAN = features.frame_plan("test", torch.empty(12, 500, device="meta"), "corrected", 100)
PLACES = features.token_places(500, 100)
VALID = torch.ones(1, 93, dtype=torch.bool)


def beating(num_records, seed=0):
    """Leads with an R wave at known samples: about one a second, of either polarity, over a little noise."""
    random = np.random.default_rng(seed)
    ecg = 0.01 * random.normal(size=(num_records, 12, 500))
    peaks = [random.integers(5, 60) + np.cumsum(random.integers(80, 100, size=5)) - 80 for _ in range(num_records)]
    wave = np.exp(-0.5 * (np.arange(-6, 7) / 2) ** 2)
    polarity = np.where(np.arange(12) % 3 == 0, -1, 1) * random.uniform(0.3, 1, size=12)
    for record, of_record in zip(ecg, peaks, strict=True):
        for at in of_record:
            samples = np.arange(at - 6, at + 7)
            inside = (samples >= 0) & (samples < 500)
            record[:, samples[inside]] += polarity[:, None] * wave[inside]
    return ecg, [of_record[(of_record > 5) & (of_record < 494)] for of_record in peaks]


def tally(ecg, labels, valid=None, num_clusters=None):
    audit = ClusterAudit(num_clusters or int(labels.max()) + 1, PLAN, 500)
    valid = torch.ones(labels.shape, dtype=torch.bool) if valid is None else valid
    for batch in torch.arange(len(labels)).split(16):
        audit.add(torch.as_tensor(ecg, dtype=torch.float32)[batch], labels[batch], valid[batch])
    return audit


def test_r_peaks_are_where_they_were_put():
    ecg, peaks = beating(40)
    for found, expected in zip(r_peaks(ecg, 100), peaks, strict=True):
        assert len(found) >= len(expected)
        assert np.abs(found[:, None] - expected).min(0).max() <= 1
        # All of them are beats, those at the very edge too.
        assert np.diff(found).min() >= 70
    assert [len(of) for of in r_peaks(np.zeros((2, 12, 500)), 100)] == [0, 0]
    assert [len(of) for of in r_peaks(np.zeros((0, 12, 500)), 100)] == []
    assert [len(of) for of in r_peaks(np.ones((1, 12, 40)), 100)] == [0]


@pytest.mark.parametrize("rate_hz", [50, 100, 500])
def test_r_peaks_of_synthetic_rhythms_at_the_rates_of_models(rate_hz):
    found = missed = wrong = 0
    for seed in range(30):
        raw, _, facts = generate_ecg(seed=seed)
        ecg = prepare_ecg_for_inference(raw, sampling_rate=500, target_length=5000, downsampling_factor=500 // rate_hz)
        expected = np.array(facts["r_times_s"])
        expected = expected[(expected > 0.1) & (expected < 9.9)]
        times = r_peaks(ecg[None], rate_hz)[0] / rate_hz
        apart = np.abs(times[:, None] - expected)
        found += (apart.min(0) <= 0.08).sum()
        missed += (apart.min(0) > 0.08).sum()
        wrong += ((apart.min(1) > 0.08) & (times > 0.1) & (times < 9.9)).sum()
    assert missed / (found + missed) < 0.03
    assert wrong / (found + wrong) < 0.06


def test_one_lead_of_artefacts_does_not_decide():
    ecg, peaks = beating(10)
    ecg[:, 4] = 0
    ecg[:, 7, 100::130] += 50
    for found, expected in zip(r_peaks(ecg, 100), peaks, strict=True):
        assert np.abs(found[:, None] - expected).min(0).max() <= 2


def test_phase_is_nan_outside_beats():
    phase = beat_phase(np.array([0, 10, 15, 29, 30, 99]), np.array([10, 30, 90]), longest=50)
    np.testing.assert_array_equal(phase, [np.nan, 0, 0.25, 0.95, np.nan, np.nan])
    assert np.isnan(beat_phase(np.arange(5), np.array([], dtype=np.int64))).all()


def test_mutual_information_is_that_of_scikit_learn():
    from sklearn.metrics import mutual_info_score

    table = np.random.default_rng(0).integers(0, 30, size=(6, 4))
    table[2] = 0
    bits, share = mutual_information(table)
    assert bits == pytest.approx(mutual_info_score(None, None, contingency=table) / np.log(2))
    columns = table.sum(0) / table.sum()
    assert share == pytest.approx(bits / -(columns * np.log2(columns)).sum())
    both = mutual_information(np.stack([table, np.outer([1, 2, 3], [4, 5]).repeat(2, 0).repeat(2, 1)]))
    assert both[0] == pytest.approx([float(bits), 0.0])
    assert mutual_information(np.array([[3], [4]]))[1] == 0


def test_clusters_that_follow_the_beat_tell_its_phase_and_nothing_else():
    ecg, _ = beating(200)
    of = [beat_phase(PLACES[:, 1].numpy(), found, 250) for found in r_peaks(ecg, 100)]
    labels = torch.from_numpy(np.nan_to_num(np.floor(np.stack(of) * 4), nan=4).astype(np.int64))
    found = tally(ecg, labels).result()
    told = found["information"]
    # Four quarters out of twenty parts: two bits of log2(20), where all phases are as common.
    assert told["beat"].bits == pytest.approx(2, abs=0.02)
    assert told["beat"].share == pytest.approx(2 / np.log2(20), abs=0.01)
    assert told["beat"].chance < 0.02
    assert abs(told["lead"].above_chance) < 0.01
    quarter = next(cluster for cluster in found["clusters"] if cluster["cluster"] == 1)
    assert quarter["phase_counts"][5:10].sum() == quarter["phase_counts"].sum() == quarter["num_tokens"]
    assert found["beats"]["median_rate_bpm"] == pytest.approx(6000 / 89.5, rel=0.03)
    # What lies outside known beats is counted, and has no phase.
    outside = next(cluster for cluster in found["clusters"] if cluster["cluster"] == 4)
    assert outside["num_tokens"] > 0
    assert outside["phase_counts"].sum() == 0
    with_beat = sum(int(np.isfinite(phase).sum()) for phase in of)
    assert found["beats"]["share_of_tokens"] == pytest.approx(with_beat / labels.numel())


def test_clusters_that_are_leads_tell_the_lead():
    ecg, _ = beating(60)
    found = tally(ecg, PLACES[:, 0].expand(60, -1).contiguous()).result()
    assert found["information"]["lead"].share == pytest.approx(1)
    assert abs(found["information"]["beat"].above_chance) < 0.02
    for cluster in found["clusters"]:
        assert cluster["lead_counts"].argmax() == cluster["cluster"]
        assert (cluster["lead_counts"] > 0).sum() == 1
    # 7.75 tokens to a lead: one of them goes on in the next, but for the last lead's.
    assert sum(round(c["share_across_two_leads"] * c["num_tokens"]) for c in found["clusters"]) == 60 * int(
        ((PLACES[:, 1] < 32) | (PLACES[:, 1] + 32 > 500)).sum()
    )


def test_random_clusters_tell_nothing():
    ecg, _ = beating(120)
    labels = torch.randint(0, 30, (120, 93), generator=torch.Generator().manual_seed(0))
    targets = np.random.default_rng(0).random((120, 3)) < 0.4
    found = tally(ecg, labels).result({"all": (("a", "b", "c"), targets)})
    told = found["information"]
    for information in (told["lead"], told["beat"]):
        assert information.share < 0.03
        assert abs(information.above_chance) < 0.01
    for label in told["tasks"]["all"]["labels"].values():
        assert abs(label["share"] - label["chance"]) < 4 * label["chance_sd"]
    assert found["use"]["perplexity"] == pytest.approx(30, rel=0.01)


def test_a_cluster_of_sick_records_tells_their_label():
    ecg, _ = beating(60)
    labels = torch.randint(0, 4, (60, 93), generator=torch.Generator().manual_seed(0))
    sick = np.arange(60) % 3 == 0
    labels[sick, :31] = 4
    targets = np.stack([sick, ~sick, np.arange(60) < 2], 1)
    found = tally(ecg, labels).result({"all": (("sick", "sound", "rare"), targets)})
    task = found["information"]["tasks"]["all"]
    assert task["left_out"] == ["rare"]
    assert set(task["labels"]) == {"sick", "sound"}
    told = task["labels"]["sick"]
    table = np.stack([np.bincount(labels[rows].flatten(), minlength=5) for rows in (sick, ~sick)], 1)
    assert told["share"] == pytest.approx(float(mutual_information(table)[1]))
    assert (told["cluster"], told["num_records"]) == (4, 20)
    # Each of its tokens is in a sick record, as is a third of all tokens.
    assert told["lift"] == pytest.approx(3)
    assert told["share"] > told["chance"] + 5 * told["chance_sd"]


def test_samples_spectra_and_examples_are_those_of_the_tokens():
    random = np.random.default_rng(0)
    ecg = random.normal(size=(20, 12, 500)).astype(np.float32)
    labels = torch.from_numpy(random.integers(0, 3, size=(20, 93)))
    valid = torch.from_numpy(random.random((20, 93)) < 0.7)
    labels[labels == 2] = 3
    audit = tally(ecg, labels, valid, num_clusters=5)
    found = audit.result()
    frames = features.cut_frames(torch.from_numpy(ecg), PLAN).samples.numpy()
    assert [cluster["num_tokens"] for cluster in found["clusters"]] == sorted(audit.counts.tolist(), reverse=True)
    assert found["use"]["num_empty"] == 2
    assert found["num_tokens"] == valid.sum()
    for cluster in found["clusters"][:3]:
        where = ((labels == cluster["cluster"]) & valid).numpy()
        own = frames[where]
        np.testing.assert_allclose(cluster["mean"], own.mean(0), atol=1e-6)
        np.testing.assert_allclose(cluster["sd"], own.std(0), atol=1e-5)
        assert cluster["rms"] == pytest.approx(np.sqrt(np.square(own).mean()), rel=1e-5)
        assert cluster["share_of_records"] == where.any(1).mean()
        assert len(cluster["examples"]) == 8
        assert all((own == example).all(1).any() for example in cluster["examples"])
        # White noise of variance 1: a density of 2 / rate at all frequencies but the ends.
        np.testing.assert_allclose(np.mean(cluster["power_density"][3:-3]), 2 / 100, rtol=0.1)
    time, frequency = found["axes"]["time_s"], found["axes"]["frequency_hz"]
    assert (time[0], time[32], len(time)) == (-0.32, 0, 64)
    assert (frequency[0], frequency[-1], len(frequency)) == (0, 50, 33)


def test_a_rhythm_shows_at_its_frequency_and_examples_are_drawn_alike():
    t = np.arange(500) / 100
    ecg = np.tile(np.sin(2 * np.pi * 12.5 * t), (30, 12, 1))
    audit = tally(ecg, torch.zeros(30, 93, dtype=torch.int64))
    (cluster,) = audit.result()["clusters"]
    assert cluster["power_density"].argmax() == 8
    first = [tuple(row) for row in audit.result()["clusters"][0]["examples"]]
    assert first == [
        tuple(row) for row in tally(ecg, torch.zeros(30, 93, dtype=torch.int64)).result()["clusters"][0]["examples"]
    ]


def test_absent_leads_padding_and_no_token():
    ecg, _ = beating(4)
    ecg[:, 6:] = 0
    valid = (PLACES[:, 0] < 6) & (PLACES[:, 1] < 300)
    found = tally(ecg, torch.zeros(4, 93, dtype=torch.int64), valid.expand(4, -1)).result()
    assert found["clusters"][0]["lead_counts"][6:].sum() == 0
    assert found["num_tokens"] == 4 * int(valid.sum())
    empty = ClusterAudit(3, PLAN, 500)
    with pytest.raises(ValueError, match="audit: there must be at least one token"):
        empty.result()


@pytest.fixture(scope="module")
def run(tmp_path_factory, cohort):
    """A run of pretraining, of one step."""
    folder = tmp_path_factory.mktemp("run")
    config = PretrainConfig(
        cohort.path,
        output_dir=folder,
        size="tiny",
        max_steps=1,
        batch_size=8,
        num_clusters=12,
        num_workers=0,
        device="cpu",
        feature_type="mixed",
    )
    return train.pretrain(config)


def test_the_command_counts_the_clusters_of_the_run(run, cohort, tmp_path, capsys):
    argv = ["--data_path", str(cohort.path), "--model_path", str(run["model"]), "--output_dir", str(tmp_path / "a")]
    assert cli.main(["audit", *argv, "--device", "cpu", "--num_workers", "0", "--batch_size", "7"]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "a" / "audit.json").read_text())
    kmeans = clustering.KMeans.load(run["kmeans"])
    (batch,) = Loader(cohort, np.arange(len(cohort)), len(cohort), crop="first", num_workers=0).batches(0)
    labels = kmeans.predict(features.extract(batch.leads, "mixed").flatten(0, 1))
    counts = np.bincount(labels, minlength=12)
    assert {c["cluster"]: c["num_tokens"] for c in found["clusters"]} == dict(enumerate(counts.tolist()))
    assert found["num_records"] == len(cohort)
    assert found["facts"]["Settings"]["feature_type"] == "mixed"
    assert set(found["information"]["tasks"]) == set(cohort.tasks)
    stable = found["stability"]
    shifts, noises = ([v for k, v in stable.items() if word in k] for word in ("shift", "noise"))
    assert shifts == sorted(shifts, reverse=True)
    assert noises == sorted(noises, reverse=True)
    assert 1 > shifts[0] > sum(c["share"] ** 2 for c in found["clusters"])
    page = (tmp_path / "a" / "audit.html").read_text()
    assert page.count("<figure") == 2 + 2
    assert "12 clusters" in page
    assert "12 clusters of 3720 tokens" in printed
    assert re.search(r"\d+ +│ +\d+\.\d+%", printed)
    # The same command gives the same numbers.
    (again,) = train.audit(AuditConfig(cohort.path, model_path=run["folder"], output_dir=tmp_path / "b", device="cpu"))
    one, two = ((tmp_path / name / "audit.json").read_text() for name in "ab")
    one, two = json.loads(one), json.loads(two)
    assert again["num_tokens"] == one["num_tokens"]
    assert one["clusters"][0]["lead_counts"] == two["clusters"][0]["lead_counts"]
    assert one["information"]["tasks"] == two["information"]["tasks"]


def test_few_records_and_clusters_are_drawn_by_seed(run, cohort, tmp_path):
    fields = {"model_path": run["folder"], "num_records": 5, "max_clusters": 7, "device": "cpu"}
    (found,) = train.audit(AuditConfig(cohort.path, output_dir=tmp_path / "a", **fields))
    assert (found["num_records"], found["num_tokens"]) == (5, 5 * 93)
    page = (tmp_path / "a" / "audit.html").read_text()
    assert page.count('<figure class="clusters"') == 2
    assert "The 7 largest clusters" in page
    (other,) = train.audit(AuditConfig(cohort.path, output_dir=tmp_path / "b", seed=1, **fields))
    assert [c["num_tokens"] for c in found["clusters"]] != [c["num_tokens"] for c in other["clusters"]]
    # A page draws what there is; the JSON file has every cluster.
    assert len(json.loads((tmp_path / "a" / "audit.json").read_text())["clusters"]) == 12


def test_ensembles_have_a_page_each_and_latent_features_are_those_of_the_teacher(run, cohort, tmp_path):
    teacher = {"feature_type": "latent", "teacher": str(run["model"]), "teacher_layer": 1}
    paths = []
    for number, size in enumerate((4, 6)):
        paths.append(tmp_path / f"kmeans{number}.safetensors")
        clustering.KMeans(size, random_state=number).fit(np.random.default_rng(0).normal(size=(500, 128))).save(
            paths[-1]
        )
    config = AuditConfig(cohort.path, kmeans_path=",".join(map(str, paths)), **teacher, num_records=9, device="cpu")
    found = train.audit(config)
    assert [of["num_clusters"] for of in found] == [4, 6]
    for number in (1, 2):
        assert (tmp_path / "audit" / f"audit_{number}.html").is_file()
        assert (tmp_path / "audit" / f"audit_{number}.json").is_file()
    assert len(load_kmeans(config.kmeans_path, 128, "latent")) == 2


def test_flat_short_and_unlabelled_records(tmp_path):
    folder = tmp_path / "records"
    folder.mkdir()
    random = np.random.default_rng(0)
    np.save(folder / "flat.npy", np.zeros((12, 5000), np.float32))
    np.save(folder / "short.npy", random.normal(size=(12, 900)).astype(np.float32))
    for number in range(4):
        np.save(folder / f"{number}.npy", generate_ecg(seed=number)[0])
    x = random.normal(size=(300, 39))
    clustering.KMeans(6, random_state=0).fit(x).save(tmp_path / "kmeans.safetensors")
    config = AuditConfig(
        folder, kmeans_path=str(tmp_path / "kmeans.safetensors"), cache_dir=tmp_path / "cache", device="cpu"
    )
    (found,) = train.audit(config)
    # 1.8 of 5 s, and five whole records.
    assert 5 * 93 < found["num_tokens"] < 5.5 * 93
    assert found["information"]["tasks"] == {}
    text = (tmp_path / "audit" / "audit.json").read_text()
    assert "NaN" not in text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "one of --model_path and --kmeans_path must be given, got none"),
        ({"model_path": "run", "kmeans_path": "k"}, "must be given, got both"),
        (
            {"model_path": "nowhere"},
            "model_path must be what hubert-ecg pretrain wrote, .* got nowhere; .* --kmeans_path",
        ),
        ({"kmeans_path": "run", "feature_type": "mfcc"}, "kmeans_path must be a model for 39 features"),
        ({"kmeans_path": "run", "compat": "published", "crop_s": 6.0}, "crop_s must be 5"),
        ({"kmeans_path": "run", "downsampling_factor": 4}, "downsampling_factor"),
        ({"kmeans_path": "run", "feature_type": "latent"}, "--teacher"),
    ],
)
def test_what_the_user_can_mend_is_one_clear_line(run, cohort, fields, message):
    real = {"model_path": run["folder"], "kmeans_path": str(run["kmeans"])}
    fields = {name: real[name] if value == "run" else value for name, value in fields.items()}
    with pytest.raises(UserError, match=message) as failed:
        train.audit(AuditConfig(cohort.path, device="cpu", **fields))
    assert "\n" not in str(failed.value)


def test_remarks_name_what_should_not_be_overlooked():
    ecg, _ = beating(30)
    labels = torch.zeros(30, 93, dtype=torch.int64)
    labels[7, :50] = 1
    found = tally(ecg, labels, num_clusters=40).result()
    said = " ".join(evaluation.audit.remarks(found))
    assert "used very unevenly" in said
    assert "38 of 40 clusters hold no token" in said
    assert "All tokens of one record: clusters 1." in said
    assert "next to nothing of the position" in said
    assert NUM_PHASES == 20
