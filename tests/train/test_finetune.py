from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from hubert_ecg import evaluation, train
from hubert_ecg.config import FinetuneConfig, UserError
from hubert_ecg.data import Loader
from hubert_ecg.models import HubertECGConfig, HubertECGForClassification, HubertECGForPretraining, load_file, save_file
from hubert_ecg.train.finetune import Classification, TaskRecords, build_model
from hubert_ecg.train.records import positive_weights
from hubert_ecg.train.throughput import COLUMNS

from .tiny import stopped

CPU = torch.device("cpu")
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
PREPROCESSING = {"downsampling_factor": 5, "compat": "corrected"}


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory) -> Path:
    """A pretrained model of two narrow layers."""
    torch.manual_seed(0)
    model = HubertECGForPretraining(HubertECGConfig.preset("tiny", vocab_sizes=[5], conv_dim=(16,) * 5, **SMALL))
    path = tmp_path_factory.mktemp("pretrained") / "model.pt"
    save_file(model, path)
    return path


@pytest.fixture
def config(tmp_path, cohort_path, pretrained):
    def make(**fields) -> FinetuneConfig:
        defaults = {
            "data_path": cohort_path,
            "pretrained_model": str(pretrained),
            "output_dir": tmp_path,
            "batch_size": 8,
            "learning_rate": 3e-3,
            "max_steps": 6,
            "validate_every": 3,
            "log_every": 2,
            "num_workers": 0,
            "num_crops": 2,
            "device": "cpu",
        }
        return FinetuneConfig(**{"dataset": "synthetic", "task": "all", **defaults, **fields})

    return make


def state(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)[0].state_dict()


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_the_best_model_knows_all_that_prediction_needs(config, cohort, tmp_path):
    result = train.finetune(config())
    assert result["model"] == tmp_path / "synthetic_all.pt"
    assert result["step"] == 6
    model, extra = load_file(result["model"])
    assert model.label_names == cohort.label_names("all")
    assert extra["label_names"] == list(cohort.label_names("all"))
    assert extra["preprocessing"] == PREPROCESSING
    assert (extra["dataset"], extra["task"], extra["problem"]) == ("synthetic", "all", "multilabel")

    # What the file predicts is what the best validation saw, and the thresholds are chosen on it.
    validation = cohort.split("validation")
    targets = cohort.targets("all")[validation]
    scores = train.predict(model, cohort, validation, num_crops=2, device="cpu", num_workers=0)
    found = evaluation.evaluate(targets, scores, model.label_names, num_bootstrap=0)
    assert found.macro["auroc"].value == result["metrics"]["auroc"]
    np.testing.assert_allclose(extra["thresholds"], evaluation.choose_thresholds(targets, scores), rtol=1e-5)

    folder = HubertECGForClassification.from_pretrained(result["folder"])
    assert_same_weights(folder.state_dict(), model.state_dict())
    assert folder.config.thresholds == extra["thresholds"]
    assert folder.config.extra["task"] == "all"
    last = HubertECGForClassification.from_pretrained(result["folder"] / "last")
    assert last.label_names == model.label_names
    settings = json.loads((result["folder"] / "settings.json").read_text())
    assert settings["config"]["learning_rate"] == 3e-3
    assert settings["total_steps"] == 6
    assert settings["records"] == {"train": len(cohort.split("train")), "validation": len(validation)}
    header = result["metrics_csv"].read_text().splitlines()[0]
    assert header == ",".join(["step,epoch,split,loss,auroc,auprc,lr,grad_norm", *COLUMNS])


def test_the_same_command_gives_the_same_model_and_an_interrupted_one_too(config, tmp_path):
    fields = {"dropout": 0.2, "encoder_dropout": 0.1, "layerdrop": 0.3, "freeze_extractor": False}
    once = train.finetune(config(output_dir=tmp_path / "a", **fields))
    fields["deterministic"] = True  # which a CPU always is
    with stopped(Classification, lambda _, step: step == 3):
        train.finetune(config(output_dir=tmp_path / "b", **fields))
    again = train.finetune(config(output_dir=tmp_path / "b", resume=True, **fields))
    assert again["metrics"] == once["metrics"]
    assert_same_weights(state(again["model"]), state(once["model"]))
    for folder in ("", "last"):
        a, b = (HubertECGForClassification.from_pretrained(run["folder"] / folder) for run in (once, again))
        assert_same_weights(a.state_dict(), b.state_dict())
    lines = [run["metrics_csv"].read_text().splitlines() for run in (once, again)]
    first, second = ([line.rsplit(",", len(COLUMNS))[0] for line in log] for log in lines)
    assert first == second


def test_augmented_runs_repeat_and_continue(config, tmp_path):
    plain, once = (train.finetune(config(output_dir=tmp_path / str(name), augment=name)) for name in (None, "all"))
    with stopped(Classification, lambda _, step: step == 3):
        train.finetune(config(output_dir=tmp_path / "b", augment="all"))
    again = train.finetune(config(output_dir=tmp_path / "b", augment="all", resume=True))
    weights = [state(run["model"]) for run in (plain, once, again)]
    assert_same_weights(weights[1], weights[2])
    with pytest.raises(AssertionError):
        assert_same_weights(weights[0], weights[1])


@pytest.mark.parametrize("frozen", ["encoder", "extractor", "nothing"])
def test_what_is_frozen_stays_and_is_in_evaluation_mode(config, cohort, pretrained, frozen):
    settings = config(
        freeze_encoder=frozen == "encoder", freeze_extractor=frozen == "extractor", max_steps=2, encoder_dropout=0.5
    )
    records = TaskRecords(cohort, settings)
    objective = Classification(settings, build_model(settings, records, PREPROCESSING), records, CPU)
    objective.train_mode()
    encoder = objective.model.hubert_ecg
    assert encoder.encoder.training == (frozen != "encoder")
    assert encoder.feature_extractor.training == (frozen == "nothing")
    before = load_file(pretrained)[0].state_dict()
    after = state(train.finetune(settings)["model"])
    changed = {
        part
        for part in ("feature_extractor", "feature_projection", "encoder", "masked_spec_embed")
        for name in before
        if name.startswith(part) and not torch.equal(before[name], after["hubert_ecg." + name])
    }
    expected = {"feature_extractor", "feature_projection", "encoder"}
    if frozen == "encoder":
        expected = set()
    if frozen == "extractor":
        expected -= {"feature_extractor"}
    assert changed == expected


def test_weights_of_positives_are_those_of_the_records_used(config, cohort):
    settings = config(label_share=0.5)
    records = TaskRecords(cohort, settings)
    assert len(records.train) == round(0.5 * len(cohort.split("train")))
    model = build_model(settings, records, PREPROCESSING)
    weight = Classification(settings, model, records, CPU).weight
    assert weight.tolist() == positive_weights(cohort.targets("all")[records.train]).tolist()
    assert Classification(config(class_weights=False), model, records, CPU).weight is None


def test_predictions_are_means_over_crops_in_the_order_asked_for(cohort, pretrained):
    torch.manual_seed(1)
    model = HubertECGForClassification.from_pretrained(pretrained, label_names=["a", "b"])
    indices = np.array([17, 2, 30, 5, 11])
    options = {"num_crops": 3, "device": "cpu", "num_workers": 0}
    scores = train.predict(model, cohort, indices, batch_size=2, **options)
    assert scores.shape == (5, 2)
    assert scores.dtype == np.float32
    room = cohort.num_samples[indices] - 500
    expected = np.zeros((5, 2))
    with torch.no_grad():
        for share in (0, 0.5, 1):
            starts = np.rint(share * room).astype(np.int64)
            ecg, lengths = cohort.gather(indices, starts, 500)
            per_lead = torch.from_numpy(lengths[:, None] * cohort.present(indices))
            expected += model(torch.from_numpy(ecg), lengths=per_lead).logits.sigmoid().numpy() / 3
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    reverse = train.predict(model, cohort, indices[::-1], batch_size=4, **options)
    np.testing.assert_allclose(reverse[::-1], scores, atol=1e-6)
    assert train.predict(model, cohort, indices[:0], **options).shape == (0, 2)


def test_prediction_refuses_a_store_at_another_rate(cohort, pretrained):
    model = HubertECGForClassification.from_pretrained(pretrained, label_names=["a"], sampling_rate_hz=50.0)
    with pytest.raises(ValueError, match="store must be at the model's 50 Hz, got 100 Hz"):
        train.predict(model, cohort, np.arange(2), device="cpu")


class Relabelled:
    """A store whose task is another one."""

    def __init__(self, store, targets, names, problem="multilabel", train=None, validation=None):
        self._store, self._targets, self._names, self._problem = store, targets, names, problem
        self._splits = {"train": train, "validation": validation}

    def __getattr__(self, name):
        return getattr(self._store, name)

    def __len__(self):
        return len(self._store)

    def split(self, name):
        return self._store.split(name) if self._splits.get(name) is None else self._splits[name]

    def problem_of(self, task):
        return self._problem

    def label_names(self, task):
        return self._names

    def targets(self, task):
        return self._targets.astype(np.float32)


def use(monkeypatch, store):
    monkeypatch.setattr("hubert_ecg.data.open_store", lambda *args, **kwargs: store, raising=False)


def test_the_last_model_has_thresholds_of_its_own(config, cohort):
    # The first validation is the best one, so that best and last differ.
    result = train.finetune(config(learning_rate=1.0, max_steps=6, validate_every=1, freeze_encoder=True))
    assert result["best_step"] < 6
    validation = cohort.split("validation")
    last = HubertECGForClassification.from_pretrained(result["folder"] / "last")
    scores = train.predict(last, cohort, validation, num_crops=2, device="cpu", num_workers=0)
    wanted = evaluation.choose_thresholds(cohort.targets("all")[validation], scores)
    np.testing.assert_allclose(last.config.thresholds, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_a_regression_predicts_in_its_own_unit(config, cohort, monkeypatch, head):
    values = np.linspace(40, 90, len(cohort))[:, None]
    values[cohort.split("train")[0]] = np.nan
    store = Relabelled(cohort, values, ("rate",), "regression")
    use(monkeypatch, store)
    result = train.finetune(config(head=head))
    model, extra = load_file(result["model"])
    assert extra["problem"] == "regression"
    assert extra["thresholds"] is None
    validation = cohort.split("validation")
    scores = train.predict(model, store, validation, num_crops=2, device="cpu", num_workers=0)
    rmse = float(np.sqrt(((scores - values[validation]) ** 2).mean()))
    assert result["metrics"]["rmse"] == pytest.approx(rmse, rel=1e-4)
    # Without standardisation, six steps would leave the prediction near 0.
    assert 40 < scores.mean() < 90


def test_multiclass_scores_are_shares(config, cohort, monkeypatch):
    targets = np.eye(3)[np.arange(len(cohort)) % 3]
    targets[0] = 0
    store = Relabelled(cohort, targets, ("a", "b", "c"))
    use(monkeypatch, store)
    result = train.finetune(config(problem="multiclass", max_steps=2))
    model, _ = load_file(result["model"])
    scores = train.predict(model, store, np.arange(4), device="cpu", num_workers=0)
    np.testing.assert_allclose(scores.sum(1), 1, atol=1e-5)
    records = TaskRecords(store, config(problem="multiclass"))
    assert 0 not in records.train
    with pytest.raises(UserError, match="multiclass needs one label for each record, got"):
        TaskRecords(cohort, config(problem="multiclass"))


@pytest.mark.parametrize("weighted", [True, False])
def test_the_weights_of_classes_count_in_the_mean_of_a_step(cohort, config, monkeypatch, weighted):
    targets = np.eye(3)[np.minimum(np.arange(len(cohort)) % 7, 2)]
    store = Relabelled(cohort, targets, ("a", "b", "c"))
    use(monkeypatch, store)
    settings = config(problem="multiclass", class_weights=weighted, dropout=0.0)
    records = TaskRecords(store, settings)
    objective = Classification(settings, build_model(settings, records, PREPROCESSING), records, CPU)
    losses = {}
    for size in (6, 2):
        batches = Loader(cohort, records.train[:6], size, num_workers=0).batches(0)
        found = [(objective.loss(batch, 0, 0)[0].item(), objective.counts(batch, 0, 0)[0]) for batch in batches]
        losses[size] = sum(loss * count for loss, count in found) / sum(count for _, count in found)
    assert losses[2] == pytest.approx(losses[6], rel=1e-5)


def test_undefined_labels_do_not_choose_the_model(config, cohort, monkeypatch, capsys):
    targets = cohort.targets("all").copy()
    targets[cohort.split("validation")] = 0
    targets[cohort.split("train"), 0] = 0
    use(monkeypatch, Relabelled(cohort, targets, cohort.label_names("all")))
    result = train.finetune(config(max_steps=3))
    assert np.isnan(result["metrics"]["auroc"])
    assert np.isfinite(result["metrics"]["loss"])
    assert f"no positive training record for {cohort.label_names('all')[0]}" in capsys.readouterr().out


def test_without_validation_records_some_training_records_validate(config, cohort, capsys, monkeypatch):
    store = Relabelled(cohort, cohort.targets("all"), cohort.label_names("all"), validation=np.array([], dtype=int))
    records = TaskRecords(store, config())
    assert sorted([*records.train, *records.validation]) == cohort.split("train").tolist()
    assert len(records.validation) == round(0.1 * len(cohort.split("train")))
    assert "drawn by seed, validate" in records.news[0]


def test_records_without_a_label_can_be_dropped(config, cohort):
    targets = cohort.targets("all").copy()
    train_records = cohort.split("train")
    targets[train_records[:4]] = 0
    store = Relabelled(cohort, targets, cohort.label_names("all"))
    kept, dropped = (TaskRecords(store, config(unlabelled=choice)) for choice in ("keep", "drop"))
    assert set(train_records[:4]) <= set(kept.train)
    assert not set(train_records[:4]) & set(dropped.train)
    for records, what in ((kept, "kept as negatives"), (dropped, "left out")):
        (line,) = (line for line in records.news if "without a label" in line)
        assert re.fullmatch(rf"\d+ records without a label of the task are {what} \(--unlabelled\)", line)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "nonsense"}, "no task 'nonsense'"),
        ({"dataset": "nonsense", "data_path": None}, "nonsense"),
        ({"pretrained_model": "/nowhere/model.pt"}, "no model at /nowhere/model.pt"),
        ({"pretrained_model": "random:huge"}, "size must be one of"),
        ({"problem": "regression"}, "is multilabel, got regression"),
        ({"label_share": 0.0}, "label_share must be"),
        ({"augment": "scale,flip"}, "--augment must be of warp, scale, .*, or all, got 'scale,flip'"),
        ({"splits_from": Path("/nowhere/splits.csv")}, "--splits_from: /nowhere/splits.csv cannot be read"),
        ({"device": "cuda:77"}, "device: "),
        ({"precision": "float16"}, "float16 needs a CUDA device"),
    ],
)
def test_what_the_user_can_mend_is_one_clear_line(config, fields, message):
    with pytest.raises(UserError, match=message) as failed:
        train.finetune(config(**fields))
    assert "\n" not in str(failed.value)
