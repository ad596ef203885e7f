from __future__ import annotations

import csv
import dataclasses
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from hubert_ecg import clustering, features, train
from hubert_ecg.config import PretrainConfig, UserError, to_json
from hubert_ecg.data import Loader
from hubert_ecg.models import HubertECG, HubertECGConfig, HubertECGForPretraining, load_file
from hubert_ecg.train import checkpoint
from hubert_ecg.train.cluster_use import ClusterUse, effective_number
from hubert_ecg.train.pretrain import MaskedPrediction
from hubert_ecg.train.pseudo_labels import PseudoLabels
from hubert_ecg.train.run import model_config, open_run
from hubert_ecg.train.targets import find_targets
from hubert_ecg.train.throughput import COLUMNS
from hubert_ecg.train.token_features import FeatureWork, TokenFeatures, ValidTokens

from . import tiny
from .tiny import settings, stopped

CPU = torch.device("cpu")


def objective_of(config: PretrainConfig, kmeans=None) -> MaskedPrediction:
    """What a run of these settings would train, with k-means models that are given or found."""
    run = open_run(config, "pretrain", CPU)
    kmeans = find_targets(run) if kmeans is None else kmeans
    run.shape.vocab_sizes = [len(one.cluster_centers_) for one in kmeans]
    torch.manual_seed(0)
    return MaskedPrediction(config, run.shape, PseudoLabels(run.featuriser, kmeans), run.store, run.validation, CPU)


def rows(folder: Path) -> list[str]:
    """The log without its last columns, the speed."""
    return [
        line.rsplit(",", len(COLUMNS))[0] for line in (folder / "hubert_ecg" / "metrics.csv").read_text().splitlines()
    ]


def assert_same_run(a: Path, b: Path) -> None:
    first, second = (checkpoint.load(run / "hubert_ecg" / "checkpoint.safetensors") for run in (a, b))
    assert first["progress"] == second["progress"]
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    for name, moments in first["optimiser"].items():
        for key, value in moments.items():
            assert torch.equal(value, second["optimiser"][name][key]), f"{name} {key}"
    best, again = (load_file(run / "hubert_ecg.pt")[0].state_dict() for run in (a, b))
    for name, value in best.items():
        assert torch.equal(value, again[name]), name
    assert rows(a) == rows(b)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, cohort_path):
    """A run that goes through."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, train.pretrain(settings(folder, cohort_path))


def test_the_output_is_complete(straight, cohort):
    folder, result = straight
    assert result["model"] == folder / "hubert_ecg.pt"
    assert result["step"] == 12
    model, extra = load_file(result["model"])
    assert isinstance(model, HubertECGForPretraining)
    assert model.config.vocab_sizes == [8]
    assert model.config.compat == "corrected"
    assert extra["preprocessing"] == {"downsampling_factor": 5, "compat": "corrected"}
    encoder = HubertECG.from_pretrained(result["folder"])
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    HubertECGForPretraining.from_pretrained(result["folder"] / "last")
    clusters = json.loads(result["clusters"].read_text())
    assert sum(clusters["counts"]) == clusters["num_tokens"] == 93 * len(cohort.split("train"))
    assert len(clusters["counts"]) == 8
    assert all(np.isfinite(value) for value in clusters["scores"].values())
    kmeans = clustering.KMeans.load(result["kmeans"])
    saved = checkpoint.load(result["folder"] / "checkpoint.safetensors")
    again = clustering.KMeans.from_state(saved["objective"]["kmeans"][0])
    np.testing.assert_array_equal(np.asarray(kmeans.cluster_centers_), np.asarray(again.cluster_centers_))
    assert (saved["epoch"], saved["position"]) == divmod(12, -(-len(cohort.split("train")) // 5))
    assert saved["config"] == to_json(settings(folder, cohort.path))
    with result["metrics_csv"].open() as file:
        table = list(csv.DictReader(file))
    assert table[0].keys() >= {"step", "epoch", "split", "loss", "masked_loss", "unmasked_loss", "accuracy", "lr"}
    validation = [row for row in table if row["split"] == "validation"]
    assert [int(row["step"]) for row in validation] == [4, 8, 12]
    losses = [float(row["loss"]) for row in validation]
    assert result["metrics"]["loss"] == min(losses)
    assert result["best_step"] == 4 * (1 + losses.index(min(losses)))


def test_it_learns(cohort, tmp_path):
    config = settings(tmp_path, cohort.path, layerdrop=0.0, dropout=0.0)
    objective = objective_of(config)
    optimiser = torch.optim.AdamW(objective.model.parameters(), lr=1e-3)
    (batch,) = Loader(cohort, cohort.split("train")[:4], 4, crop="first", num_workers=0).batches(0)
    losses = []
    for _ in range(40):
        # The same step each time: the same mask.
        loss, metrics = objective.loss(batch, 0, 0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert metrics["accuracy"] > 2 / 8


@pytest.mark.parametrize("stop", [5, 8])
def test_a_stopped_run_continues_bit_for_bit(straight, tmp_path, cohort_path, monkeypatch, stop):
    with stopped(MaskedPrediction, lambda _, step: step == stop - 1):
        train.pretrain(settings(tmp_path, cohort_path))
    # k-means comes from the checkpoint.
    monkeypatch.setattr(clustering.KMeans, "fit", None)
    train.pretrain(settings(tmp_path, cohort_path, resume=True))
    assert_same_run(tmp_path, straight[0])


def test_a_run_killed_at_a_random_moment_continues_bit_for_bit(processes, straight, tmp_path, cohort_path):
    saved = tmp_path / "hubert_ecg" / "checkpoint.safetensors"
    wait = random.Random().uniform(0.0, 1.0)
    run = processes.start(0, tiny.__file__, "resume", tmp_path, cohort_path, torch.get_num_threads())
    run.wait_until(saved.is_file)
    time.sleep(wait)
    run.kill()
    train.pretrain(settings(tmp_path, cohort_path, resume=True))
    assert_same_run(tmp_path, straight[0])


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_deterministic_run_on_a_gpu_repeats_and_continues_bit_for_bit(cohort, tmp_path, precision):
    fields = {"device": "cuda:0", "precision": precision, "deterministic": True}
    for name in ("a", "b"):
        train.pretrain(settings(tmp_path / name, cohort.path, **fields))
    with stopped(MaskedPrediction, lambda _, step: step == 7):
        train.pretrain(settings(tmp_path / "c", cohort.path, **fields))
    train.pretrain(settings(tmp_path / "c", cohort.path, resume=True, **fields))
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert_same_run(tmp_path / "a", tmp_path / "c")


def test_a_cpu_is_deterministic_anyway(straight, tmp_path, cohort_path):
    train.pretrain(settings(tmp_path, cohort_path, deterministic=True))
    assert_same_run(straight[0], tmp_path)


def test_clusters_are_those_of_the_fitted_features(cohort, tmp_path):
    run = open_run(settings(tmp_path, cohort.path), "pretrain", CPU)
    (kmeans,) = find_targets(run)
    quality = json.loads((run.folder / "clusters.json").read_text())
    (batch,) = Loader(cohort, run.train, len(run.train), crop="first", num_workers=0).batches(0)
    labels = PseudoLabels(run.featuriser, [kmeans])
    online = labels(batch)
    assert online.shape == (1, len(run.train), 93)
    assert online.dtype == torch.int64
    x = features.extract(batch.leads, "mfcc").flatten(0, 1)
    assert torch.equal(online.flatten(), kmeans.predict(x))
    assert np.bincount(online.flatten(), minlength=8).tolist() == quality["counts"]
    again = clustering.KMeans(8, random_state=0, max_iter=100).fit(x)
    np.testing.assert_array_equal(again.cluster_centers_, kmeans.cluster_centers_)
    # In a half-precision step the labels are the same, and in an ensemble.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(labels(batch), online)
        both = PseudoLabels(run.featuriser, [kmeans, kmeans])(batch)
    assert torch.equal(both, online.expand(2, -1, -1))
    assert not (run.folder / "features").exists()


def test_padding_is_not_clustered(cohort, tmp_path):
    run = open_run(settings(tmp_path, cohort.path, crop_s=12.0), "pretrain", CPU)
    work = FeatureWork(cohort, np.arange(3), run.featuriser, run.shape, 12.0, 0)
    values, valid = TokenFeatures.allocate(None, work.shape)
    work.fill(values, valid, slice(None))
    x = ValidTokens(TokenFeatures(values, valid, [], {}), 0, 3, CPU).read()
    # 10 of 12 s: 5/6 of the 224 tokens of 12 x 1200 samples, give or take one where two leads meet.
    assert abs(len(x) / 3 - 224 * 5 / 6) <= 12
    assert np.isfinite(x).all()


def test_a_mask_depends_on_seed_step_and_record_alone(cohort, tmp_path):
    def masks(seed, step, batch_size, micro=0):
        config = settings(tmp_path, cohort.path, seed=seed, batch_size=batch_size)
        objective = objective_of(config, kmeans)
        drawn = {}
        objective.model.register_forward_pre_hook(
            lambda module, args, kwargs: drawn.update(zip(at, kwargs["mask_indices"].tolist(), strict=True)),
            with_kwargs=True,
        )
        for batch in Loader(cohort, validation, batch_size, num_workers=0).batches(0):
            at = batch.index.tolist()
            objective.loss(batch, step, micro)
        return drawn

    config, validation = settings(tmp_path, cohort.path), cohort.split("validation")
    kmeans = find_targets(open_run(config, "pretrain", CPU))
    first = masks(0, 3, 4)
    assert first == masks(0, 3, 2) == masks(0, 3, 4, micro=1)
    assert len({tuple(mask) for mask in first.values()}) == len(first) > 2
    assert not set(map(tuple, first.values())) & set(map(tuple, masks(0, 4, 4).values()))
    assert not set(map(tuple, first.values())) & set(map(tuple, masks(1, 3, 4).values()))


def test_validation_is_masked_and_always_the_same(cohort, tmp_path):
    config = settings(tmp_path, cohort.path, alpha=0.75)
    objective = objective_of(config)
    objective.model.eval()
    masks = []
    objective.model.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["mask_indices"].clone()), with_kwargs=True
    )
    state = torch.get_rng_state()
    with torch.no_grad():
        first, second = objective.validate(lambda: None), objective.validate(lambda: None)
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    assert masks[0].shape[1] == round(0.33 * 93)
    assert first["loss"] == pytest.approx(0.75 * first["masked_loss"] + 0.25 * first["unmasked_loss"])
    # Predictions of an untrained model are near chance.
    assert 1.0 < first["masked_loss"] < 4.0
    assert 1 <= first["predicted_clusters"] <= 8
    # The targets' use is that of the clusters of the very crops, counted by hand.
    counts = np.zeros(8, dtype=np.int64)
    for batch in objective.validation.batches(0):
        counts += np.bincount(objective.labels(batch).flatten(), minlength=8)
    assert first["target_clusters"] == effective_number(counts)
    assert set(first) == {"loss", *objective.metrics}


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_where_all_tokens_are_masked_there_is_no_loss_of_others(cohort, tmp_path, alpha):
    objective = objective_of(settings(tmp_path, cohort.path, mask_prob=1.0, alpha=alpha))
    with torch.no_grad():
        metrics = objective.validate(lambda: None)
    assert math.isnan(metrics["unmasked_loss"])
    assert metrics["loss"] == alpha * metrics["masked_loss"]
    assert metrics["masked_loss"] > 1


def test_the_number_of_clusters_in_use():
    assert effective_number(np.array([7, 0, 0])) == 1
    assert effective_number(np.array([3, 3, 3, 3])) == 4
    assert 1 < effective_number(np.array([100, 1])) < 1.1
    assert effective_number(np.zeros(4, dtype=int)) == 1


def test_cluster_use_is_counted_for_each_codebook_and_without_padding():
    targets = torch.tensor([[[0, 1, 2, 3]], [[0, 0, 0, 1]]])
    guesses = torch.tensor([[[0, 0, 0, 0]], [[0, 1, 0, 1]]])
    use = ClusterUse([4, 2], CPU)
    use.add(targets, guesses, torch.tensor([[True, True, True, False]]))
    use.add(targets, guesses, torch.tensor([[False, False, False, True]]))
    assert [counts.tolist() for counts in use.counts] == [[[1, 1, 1, 1], [4, 0, 0, 0]], [[3, 1], [2, 2]]]
    metrics = use.metrics()
    assert tuple(metrics) == ClusterUse.columns(2)
    assert (metrics["target_clusters_0"], metrics["predicted_clusters_0"]) == (4, 1)
    assert (metrics["predicted_clusters"], metrics["collapsed"]) == (1.5, 1)
    assert ClusterUse.columns(1) == ("target_clusters", "predicted_clusters", "collapsed")


def test_alarms_are_raised_below_a_tenth():
    def alarms(targets, predictions):
        use = ClusterUse([len(targets)], CPU)
        use.counts[0] += torch.tensor([targets, predictions])
        return use.metrics()["collapsed"], use.alarms()

    assert alarms([10] * 40, [10] * 40) == (0, {})
    assert alarms([10] * 40, [100] * 4 + [0] * 36) == (0, {})
    collapsed, found = alarms([10] * 40, [133] * 3 + [0] * 37)
    assert collapsed == 1
    assert list(found) == ["predictions 0"]
    assert "use 3.0 clusters, far fewer than the 40.0" in found["predictions 0"]
    collapsed, found = alarms([133] * 3 + [0] * 37, [133] * 3 + [0] * 37)
    assert collapsed == 0
    assert list(found) == ["targets 0"]
    assert "use 3.0 of 40 clusters" in found["targets 0"]
    # A tenth of few is less than there can be: one alone is too few.
    assert list(alarms([10] * 8, [79, 1] + [0] * 6)[1]) == ["predictions 0"]
    assert alarms([10] * 8, [60, 20] + [0] * 6) == (0, {})
    assert alarms([90, 10], [100, 0])[0] == 0
    # Six tokens cannot use a tenth of a thousand clusters.
    assert alarms([1] * 6 + [0] * 994, [1] * 6 + [0] * 994) == (0, {})


def test_a_collapse_is_said_once_until_it_is_mended(cohort, tmp_path, capsys):
    config = settings(tmp_path, cohort.path, num_clusters=24, log_every=1)
    objective = objective_of(config)
    objective.model.eval()
    objective.warmup_steps = 2
    capsys.readouterr()
    guesses = {True: torch.zeros, False: lambda *shape, dtype: torch.arange(math.prod(shape)).view(shape) % 24}

    def validate(step, collapsed):
        objective._step = step
        objective.model.likeliest = lambda x: guesses[collapsed](1, *x.shape[:2], dtype=torch.int64)
        with torch.no_grad():
            metrics = objective.validate(lambda: None)
        assert metrics["predicted_clusters"] == pytest.approx(1 if collapsed else 24, rel=1e-3)
        assert metrics["collapsed"] == collapsed
        return capsys.readouterr().out

    # During the warm-up, models predict few clusters anyway.
    assert validate(2, True) == ""
    assert validate(3, True).startswith("pretrain: warning at step 3: the predictions use 1.0 clusters")
    assert validate(4, True) == ""
    assert validate(5, False) == ""
    assert "warning at step 6" in validate(6, True)
    # A run that goes on from a checkpoint has said it.
    state = objective.state()
    objective = objective_of(config)
    objective.model.eval()
    objective.warmup_steps = 2
    objective.load_state(state)
    capsys.readouterr()
    assert objective._step == 6
    assert validate(7, True) == ""
    assert validate(8, False) == ""
    assert "warning at step 9" in validate(9, True)


@pytest.mark.parametrize("chunk", [1 << 23, 100])
def test_likeliest_clusters_are_those_of_the_logits(chunk, monkeypatch):
    from hubert_ecg.models import hubert_ecg as module

    monkeypatch.setattr(module, "_MAX_LOGITS", chunk)
    torch.manual_seed(0)
    model = HubertECGForPretraining(HubertECGConfig.preset("tiny", vocab_sizes=[7, 30])).eval()
    with torch.no_grad():
        output = model(torch.randn(3, 12, 500))
        found = model.likeliest(output.last_hidden_state)
    assert found.shape == (2, 3, 93)
    for clusters, logits in zip(found, output.logits, strict=True):
        assert torch.equal(clusters, logits.argmax(-1))


@pytest.mark.parametrize("strategy", ["lead", "block"])
def test_a_run_masks_as_its_strategy_says(cohort, tmp_path, strategy):
    config = settings(tmp_path, cohort.path, mask_strategy=strategy)
    objective = objective_of(config)
    (batch,) = Loader(cohort, cohort.split("train")[:8], 8, num_workers=0).batches(0)
    *_, mask = objective._inputs(batch, 0, 0)
    leads, times = features.token_places(500, 100).T
    for row in mask:
        if strategy == "lead":
            masked, size = leads[row].bincount(minlength=12), leads.bincount()
            assert ((masked > 0) & (masked < size)).sum() <= 1
        else:
            # 31 tokens of three blocks of 12: at each masked time, most leads are.
            assert 6 <= len(set(leads[row].tolist())) <= 12
            order = times.argsort()
            assert (torch.isin(order, row).diff() != 0).sum() <= 6
    assert train.pretrain(dataclasses.replace(config, max_steps=1))["step"] == 1


def test_a_mask_length_that_means_nothing_is_refused(tmp_path):
    for strategy in ("tokens", "lead"):
        with pytest.raises(UserError, match=f"--mask_length must be 1 with --mask_strategy {strategy}, got 4"):
            settings(tmp_path, tmp_path, mask_strategy=strategy, mask_length=4)


def test_flags_shape_the_model(tmp_path):
    shape = model_config(settings(tmp_path, tmp_path, dropout=0.2, layerdrop=None, downsampling_factor=10))
    assert (shape.hidden_dropout, shape.attention_dropout, shape.activation_dropout) == (0.2, 0.2, 0.2)
    assert shape.layerdrop == HubertECGConfig.preset("tiny").layerdrop
    assert shape.sampling_rate_hz == 50
    assert shape.conv_stride == (4, 2, 2, 2)
    given = {"hidden_size": 96, "num_hidden_layers": 7, "num_attention_heads": 6, "intermediate_size": 200}
    larger = model_config(settings(tmp_path, tmp_path, **given))
    assert {name: getattr(larger, name) for name in given} == given


def test_a_given_kmeans_model_sets_the_number_of_clusters(cohort, tmp_path):
    x = features.extract(torch.from_numpy(cohort.gather(np.arange(8), None, 500)[0]), "time_freq").flatten(0, 1).numpy()
    path = tmp_path / "kmeans.safetensors"
    clustering.KMeans(5, random_state=0).fit(x).save(path)
    fields = {"kmeans_path": path, "feature_type": "time_freq", "max_steps": 1}
    result = train.pretrain(settings(tmp_path, cohort.path, **fields))
    assert load_file(result["model"])[0].config.vocab_sizes == [5]
    with pytest.raises(UserError, match="kmeans_path must be a model for 39 features"):
        train.pretrain(settings(tmp_path, cohort.path, kmeans_path=path))


@pytest.mark.parametrize("feature_type", ["time_freq", "mixed"])
def test_published_features_and_other_types_train_too(cohort, tmp_path, feature_type):
    from hubert_ecg.data.build import build
    from hubert_ecg.data.packing import Settings
    from hubert_ecg.data.synthetic import Cohort

    published = build(Cohort(num_records=12, seed=1), tmp_path / "store", Settings(5, "published"))
    fields = {"compat": "published", "feature_type": feature_type, "max_steps": 2, "alpha": 0.5}
    result = train.pretrain(settings(tmp_path, published.path, **fields))
    model, extra = load_file(result["model"])
    assert extra["preprocessing"]["compat"] == model.config.compat == "published"
    with result["metrics_csv"].open() as file:
        (step, validation) = csv.DictReader(file)
    assert float(step["loss"]) == pytest.approx(
        (float(step["masked_loss"]) + float(step["unmasked_loss"])) / 2, rel=1e-4
    )
    assert float(validation["unmasked_loss"]) > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data_path": Path("/nowhere/at/all")}, "/nowhere/at/all"),
        ({"num_clusters": 100_000}, "num_clusters must be at most the number of tokens"),
        ({"downsampling_factor": 4}, "downsampling_factor"),
        ({"hidden_size": 100}, "hidden_size must be a multiple of num_conv_pos_embedding_groups, got 100 and 16"),
        ({"device": "cuda:77"}, "device: "),
        ({"compat": "published", "crop_s": 10.0}, "crop_s must be 5"),
    ],
)
def test_what_the_user_can_mend_is_one_clear_line(tmp_path, cohort_path, fields, message):
    with pytest.raises(UserError, match=message) as failed:
        train.pretrain(settings(tmp_path, **{"data_path": cohort_path, **fields}))
    assert "\n" not in str(failed.value)
