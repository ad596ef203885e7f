"""Several iterations in one command: stages, what is skipped and what is done again, teachers and labels."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hubert_ecg import KMeans, cli, features, train
from hubert_ecg.config import PRETRAIN_PRESETS, PretrainConfig, UserError
from hubert_ecg.data import Loader
from hubert_ecg.models import HubertECG, HubertECGConfig, HubertECGForPretraining, load_file, save_file
from hubert_ecg.train import clusters, iterations, records
from hubert_ecg.train.pretrain import MaskedPrediction
from hubert_ecg.train.pseudo_labels import PseudoLabels
from hubert_ecg.train.run import open_run
from hubert_ecg.train.stages import Stage
from hubert_ecg.train.targets import find_targets
from hubert_ecg.train.token_features import TokenFeatures

from . import tiny
from .tiny import stopped

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


settings = functools.partial(tiny.settings, batch_size=8, max_steps=3, validate_every=2, checkpoint_every=1)
TWO = {"iterations": 2, "later_num_clusters": "12", "later_max_steps": "4"}


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)[0].state_dict()


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.fixture(scope="module")
def straight(tmp_path_factory, cohort_path):
    """Two iterations that go through."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, train.pretrain(settings(folder, cohort_path, **TWO))


def after_the_first(straight: Path, folder: Path) -> None:
    """What there is when the first iteration is done."""
    shutil.copytree(straight / "iteration_1", folder / "iteration_1")


def test_the_last_model_is_where_that_of_one_iteration_is(straight):
    folder, result = straight
    assert result["model"] == folder / "hubert_ecg.pt"
    assert result["step"] == 4
    assert_same_weights(result["model"], folder / "iteration_2" / "hubert_ecg.pt")
    encoder = HubertECG.from_pretrained(folder)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, weights(result["model"])[name]), name
    sizes = [load_file(folder / f"iteration_{i}" / "hubert_ecg.pt")[0].config.vocab_sizes for i in (1, 2)]
    assert sizes == [[8], [12]]
    for number in (1, 2):
        assert (folder / f"iteration_{number}" / "hubert_ecg" / "metrics.csv").is_file()
    assert not list(folder.rglob("features*"))


def test_later_targets_are_clusters_of_the_model_before(straight, cohort, cohort_path, tmp_path):
    folder, _ = straight
    model = folder / "iteration_1" / "hubert_ecg.pt"
    kmeans = KMeans.load(folder / "iteration_2" / "hubert_ecg" / "kmeans.safetensors")
    positions = cohort.split("train")
    (batch,) = Loader(cohort, positions, len(positions), crop="first", num_workers=0).batches(0)
    with torch.no_grad():
        # Layer 3 of 4: five sixths of the depth.
        x = HubertECG.from_pretrained(model)(batch.ecg, output_hidden_states=True).hidden_states[3]
    wanted = KMeans(12, random_state=0, max_iter=100).fit(x.half().flatten(0, 1))
    np.testing.assert_allclose(kmeans.cluster_centers_, wanted.cluster_centers_, atol=2e-3)
    # The same by hand: one iteration with a teacher.
    by_hand = settings(tmp_path, cohort_path, feature_type="latent", teacher=str(model), num_clusters=12, max_steps=4)
    assert_same_weights(train.pretrain(by_hand)["model"], folder / "hubert_ecg.pt")


@pytest.mark.parametrize("stop", [0, 2])
def test_stopped_in_the_second_iteration_it_continues_bit_for_bit(
    straight, tmp_path, cohort_path, monkeypatch, stop, capsys
):
    after_the_first(straight[0], tmp_path)
    with stopped(MaskedPrediction, lambda _, step: step == stop):
        train.pretrain(settings(tmp_path, cohort_path, **TWO))
    assert not (tmp_path / "hubert_ecg.pt").exists()
    said = capsys.readouterr().out
    assert re.search(r"^iteration 2/2 train: stopped by SIGTERM after step", said, re.MULTILINE)
    assert all(re.match(r"iteration [12]/2( clusters| train)?: ", line) for line in said.splitlines())
    # Nothing is clustered again.
    monkeypatch.setattr(KMeans, "fit", None)
    train.pretrain(settings(tmp_path, cohort_path, **TWO, resume=True))
    assert "iteration 1/2 train: done before with the same settings and inputs" in capsys.readouterr().out
    assert_same_weights(tmp_path / "hubert_ecg.pt", straight[0] / "hubert_ecg.pt")


def test_only_what_changed_and_what_follows_is_done_again(straight, tmp_path, cohort_path, capsys):
    shutil.copytree(straight[0], tmp_path, dirs_exist_ok=True)

    def run(**fields):
        train.pretrain(settings(tmp_path, cohort_path, **TWO | fields))
        return capsys.readouterr().out

    def steps(said, number):
        return f"iteration {number}/2 train: step" in said

    # Where the files lie and how often they are written alters no result.
    said = run(checkpoint_every=2, log_every=1)
    assert said.count("done before with the same settings and inputs") == 4
    assert not steps(said, 1)
    assert not steps(said, 2)
    said = run(later_learning_rate="2e-3", resume=True)
    assert "iteration 2/2 train: done again: learning_rate was 0.001 and is 0.002" in said
    assert said.count("done before") == 3
    said = run(num_clusters=9)
    assert "iteration 1/2 clusters: done again: num_clusters was 8 and is 9" in said
    assert "iteration 1/2 train: done again: clusters was" in said
    assert "iteration 2/2 clusters: done again: teacher was" in said
    assert steps(said, 1)
    assert steps(said, 2)
    (tmp_path / "iteration_2" / "hubert_ecg.pt").unlink()
    said = run(num_clusters=9)
    assert "iteration_2/hubert_ecg.pt is not what it was" in said
    assert said.count("done before") == 3
    assert steps(said, 2)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("cut", [True, False])
def test_a_damaged_folder_of_a_model_is_made_anew_of_its_file(straight, tmp_path, cohort_path, capsys, name, cut):
    shutil.copytree(straight[0], tmp_path, dirs_exist_ok=True)
    for number in (1, 2):
        path = tmp_path / f"iteration_{number}" / "hubert_ecg" / name
        if cut:
            path.write_bytes(path.read_bytes()[:-40])
        else:
            path.unlink()
    train.pretrain(settings(tmp_path, cohort_path, **TWO))
    assert capsys.readouterr().out.count("done before with the same settings and inputs") == 4
    for folder in ("iteration_1", "iteration_2", "."):
        place = Path(folder) / "hubert_ecg" / name
        assert (tmp_path / place).read_bytes() == (straight[0] / place).read_bytes()


def test_an_interrupted_stage_is_not_continued_with_other_targets(straight, tmp_path, cohort_path, capsys):
    after_the_first(straight[0], tmp_path)
    with stopped(MaskedPrediction, lambda _, step: step == 2):
        train.pretrain(settings(tmp_path, cohort_path, **TWO))
    # The same settings of the run, other settings of the loop: refused, nothing is lost.
    with pytest.raises(UserError, match=r"resume: learning_rate must be 0\.001"):
        train.pretrain(settings(tmp_path, cohort_path, **TWO, later_learning_rate="0.1", resume=True))
    train.pretrain(settings(tmp_path, cohort_path, **TWO, seed=0, max_steps=2, later_start="fresh", resume=True))
    said = capsys.readouterr().out
    assert "iteration 1/2 train: done again: max_steps was 3 and is 2" in said
    assert "iteration 2/2 train: resumed" not in said


def test_previous_weights_go_on_with_fresh_codebooks(straight, cohort_path, tmp_path, monkeypatch):
    started = {}
    monkeypatch.setattr(
        MaskedPrediction,
        "train_mode",
        lambda self: started.setdefault(str(self.folder), {k: v.clone() for k, v in self.model.state_dict().items()}),
    )
    train.pretrain(settings(tmp_path, cohort_path, **TWO, later_start="previous"))
    before = weights(tmp_path / "iteration_1" / "hubert_ecg.pt")
    start = started[str(tmp_path / "iteration_2" / "hubert_ecg")]
    for name, value in before.items():
        assert torch.equal(value, start[name]) == (not name.startswith("label_embedding")), name
    # Of the same size, too.
    base = straight[0] / "iteration_1" / "hubert_ecg.pt"
    train.pretrain(settings(tmp_path / "more", cohort_path, start_from=str(base), max_steps=1))
    start = started[str(tmp_path / "more" / "hubert_ecg")]
    assert torch.equal(start["final_proj.0.weight"], weights(base)["final_proj.0.weight"])
    assert not torch.equal(start["label_embedding.0.weight"], weights(base)["label_embedding.0.weight"])


def test_a_stage_vouches_for_its_result(tmp_path):
    facts = {"records": "abc", "rate": 0.1, "layers": (1, 2)}
    stage = Stage(tmp_path / "s.json", facts)
    assert not stage.begun
    assert stage.changed() is None
    stage.begin()
    assert Stage(tmp_path / "s.json", facts).begun
    assert not Stage(tmp_path / "s.json", facts).done
    stage.finish({"step": 3})
    again = Stage(tmp_path / "s.json", facts)
    assert again.done
    assert again.changed() is None
    assert again.result == {"step": 3}
    assert Stage(tmp_path / "s.json", facts | {"rate": 0.2}).changed() == ("rate", "rate was 0.1 and is 0.2")
    assert Stage(tmp_path / "s.json", {"rate": 0.1, "layers": [1, 2]}).changed()[0] == "records"
    (tmp_path / "s.json").write_text("{")
    assert not Stage(tmp_path / "s.json", facts).begun


def test_latent_features_are_hidden_states_and_no_layer_above_is_computed():
    torch.manual_seed(0)
    whole = HubertECG(HubertECGConfig.preset("tiny", hidden_dropout=0.5)).eval()
    ecg, lengths = torch.randn(3, 12, 500), torch.tensor([500, 400, 120])
    with torch.no_grad():
        wanted = whole(ecg, lengths, output_hidden_states=True)
    for layer in (1, 3, 4):
        model = HubertECG(whole.config)
        model.load_state_dict(whole.state_dict())
        calls = []
        for one in model.encoder.layers:
            one.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        latent = features.Latent(model, layer)
        with torch.autocast("cpu", torch.bfloat16):
            x = latent(ecg, lengths)
        assert len(calls) == layer
        assert x.dtype == torch.float32
        assert not x.requires_grad
        torch.testing.assert_close(x[wanted.valid], wanted.hidden_states[layer][wanted.valid], rtol=0, atol=1e-6)
        # Nothing that stands in padding matters.
        noisy = ecg.clone()
        noisy[2, :, 120:] = 9
        torch.testing.assert_close(latent(noisy, lengths), x, rtol=0, atol=1e-6)
    for layer in (0, 5):
        with pytest.raises(ValueError, match=rf"layer must be from 1 to 4, got {layer}"):
            features.Latent(HubertECG(whole.config), layer)
    with pytest.raises(ValueError, match=r"use features\.Latent"):
        features.extract(torch.zeros(12, 500), "latent")
    assert [features.default_layer(n) for n in (1, 4, 8, 12, 16)] == [1, 3, 7, 10, 13]


def test_half_precision_is_exact_enough_for_kmeans(straight, cohort):
    model = HubertECG.from_pretrained(straight[0] / "hubert_ecg.pt")
    (batch,) = Loader(cohort, np.arange(40), 40, crop="first", num_workers=0).batches(0)
    x = features.Latent(model, 3)(batch.ecg).flatten(0, 1)
    exact, half = (KMeans(20, random_state=0).fit(points) for points in (x, x.half()))
    # As good clusters, and labels that differ no more than where two clusters meet.
    assert half.score(x) == pytest.approx(exact.score(x), rel=1e-2)
    assert (exact.predict(x) == exact.predict(x.half())).float().mean() > 0.995


def test_clusters_of_a_folder_are_those_of_memory(straight, cohort_path, tmp_path, monkeypatch):
    teacher = {"feature_type": "latent", "teacher": str(straight[0] / "hubert_ecg.pt"), "teacher_layer": 2}
    config = settings(tmp_path / "a", cohort_path, **teacher)
    (memory,) = find_targets(open_run(config, "a", CPU))
    for module in (clusters, sys.modules[find_targets.__module__]):
        monkeypatch.setattr(module, "IN_MEMORY_BYTES", 0)
    (streamed,) = find_targets(open_run(dataclasses.replace(config, output_dir=tmp_path / "b"), "b", CPU))
    np.testing.assert_array_equal(memory.cluster_centers_, streamed.cluster_centers_)
    assert not (tmp_path / "b" / "hubert_ecg" / "features").exists()
    one, other = (json.loads((tmp_path / run / "hubert_ecg" / "clusters.json").read_text()) for run in "ab")
    assert one == other
    kept = dataclasses.replace(config, output_dir=tmp_path / "c", keep_features=True)
    find_targets(open_run(kept, "c", CPU))
    found = TokenFeatures.load(tmp_path / "c" / "hubert_ecg" / "features")
    assert found.features.dtype == np.float16
    # The commands give the same model, one by one.
    flags = ["--feature_type", "latent", "--teacher", teacher["teacher"], "--teacher_layer", "2"]
    common = ["--data_path", str(cohort_path), "--device", "cpu", "--num_workers", "0", *flags]
    assert cli.main(["extract", *common, "--output_path", str(tmp_path / "f")]) == 0
    extracted = TokenFeatures.load(tmp_path / "f")
    assert extracted.settings["teacher_layer"] == 2
    places = [extracted.record_ids.index(name) for name in found.record_ids]
    np.testing.assert_array_equal(extracted.features[places], found.features)


def test_an_ensemble_has_a_head_and_a_codebook_for_each_model(straight, cohort, cohort_path, tmp_path):
    one, other = (
        settings(tmp_path / str(k), cohort_path, num_clusters=k, seed=k, feature_type="time_freq") for k in (5, 7)
    )
    paths = []
    for config in (one, other):
        find_targets(open_run(config, "a", CPU))
        paths.append(str(config.output_dir / "hubert_ecg" / "kmeans.safetensors"))
    config = settings(
        tmp_path, cohort_path, feature_type="time_freq", kmeans_path=",".join(paths), max_steps=5, alpha=0.5
    )
    result = train.pretrain(config)
    model, _ = load_file(result["model"])
    assert model.config.vocab_sizes == [5, 7]
    assert {"target_clusters_0", "target_clusters_1"} <= result["metrics"].keys()
    run = open_run(config, "a", CPU)
    models = [KMeans.load(path) for path in paths]
    (batch,) = Loader(cohort, run.train[:6], 6, num_workers=0).batches(0)
    labels = PseudoLabels(run.featuriser, models)(batch)
    x = features.extract(batch.leads, "time_freq").flatten(0, 1)
    for found, kmeans in zip(labels, models, strict=True):
        assert torch.equal(found.flatten(), kmeans.predict(x))
    assert (result["folder"] / "kmeans_2.safetensors").is_file()
    assert len(json.loads((result["folder"] / "clusters_2.json").read_text())["counts"]) == 7
    resumed = train.pretrain(dataclasses.replace(config, resume=True))
    assert resumed["step"] == 5


def test_stored_labels_train_the_model_that_online_labels_of_the_same_crops_do(cohort, tmp_path, monkeypatch):
    kmeans = find_targets(open_run(settings(tmp_path, cohort.path), "a", CPU))
    path = tmp_path / "hubert_ecg" / "kmeans.safetensors"
    argv = ["label", "--data_path", str(cohort.path), "--kmeans_path", f"{path},{path}", "--name", "twice"]
    assert cli.main([*argv, "--device", "cpu", "--num_workers", "0"]) == 0
    stored = cohort.labels("twice")
    (batch,) = Loader(cohort, np.arange(40), 40, crop="first", num_workers=0).batches(0)
    run = open_run(settings(tmp_path, cohort.path), "a", CPU)
    online = PseudoLabels(run.featuriser, [*kmeans, *kmeans])(batch)
    np.testing.assert_array_equal(stored.values, online.numpy())
    assert stored.facts["vocab_sizes"] == [8, 8]

    by_column = train.pretrain(settings(tmp_path / "column", cohort.path, labels="twice"))
    crops = records.random_crops
    monkeypatch.setattr(
        sys.modules[MaskedPrediction.__module__],
        "random_crops",
        lambda *given, **named: crops(*given, **named | {"labels": ["twice"]}),
    )
    in_step = train.pretrain(settings(tmp_path / "step", cohort.path, kmeans_path=f"{path},{path}"))
    assert_same_weights(by_column["model"], in_step["model"])


def test_labels_that_were_written_anew_are_not_gone_on_with(cohort, tmp_path):
    def write(seed: int) -> None:
        random = np.random.default_rng(seed)
        labels = random.integers(8, size=(1, len(cohort), 93), dtype=np.int16)
        cohort.write_labels("drawn", labels, num_clusters=8, crop_s=5.0, facts={"seed": seed})

    write(1)
    fields = {"labels": "drawn", "max_steps": 2}
    with stopped(MaskedPrediction, lambda _, step: step == 0):
        train.pretrain(settings(tmp_path, cohort.path, **fields))
    write(2)
    with pytest.raises(UserError, match="--labels drawn must have seed 1 as when the run began, got 2; write them so"):
        train.pretrain(settings(tmp_path, cohort.path, **fields, resume=True))
    write(1)
    assert train.pretrain(settings(tmp_path, cohort.path, **fields, resume=True))["step"] == 2


def other_models(folder: Path) -> dict[str, str]:
    """Models that do not fit."""
    made = {}
    for name, fields in {
        "slow": {"sampling_rate_hz": 50},
        "published": {"compat": "published"},
        "good": {},
    }.items():
        made[name] = str(folder / f"{name}.pt")
        save_file(HubertECGForPretraining(HubertECGConfig.preset("tiny", **fields)), made[name])
    shape = HubertECGConfig.preset("tiny")
    other = dataclasses.replace(shape, conv_kernel=(*shape.conv_kernel[:-1], 3))
    made["grid"] = str(folder / "grid.pt")
    save_file(HubertECGForPretraining(other), made["grid"])
    return made


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"feature_type": "latent"}, "--feature_type latent needs a model: give --teacher"),
        ({"teacher": "good"}, "--teacher is for --feature_type latent, got --feature_type mfcc"),
        ({"teacher_layer": 2}, "--teacher_layer is for --feature_type latent"),
        ({"feature_type": "latent", "teacher": "good", "teacher_layer": 5}, "--teacher_layer must be from 1 to 4"),
        ({"feature_type": "latent", "teacher": "slow"}, "sampling_rate_hz 100.0 .*, got 50.* --downsampling_factor 10"),
        ({"feature_type": "latent", "teacher": "published"}, "compat corrected .* got published .*--compat published"),
        ({"feature_type": "latent", "teacher": "grid"}, "receptive_field .* the same convolutions"),
        ({"feature_type": "latent", "teacher": "/no/such.pt"}, "no model at /no/such.pt"),
        ({"start_from": "good", "size": "small"}, "--start_from must be of the --size .* hidden_size 512, got 128"),
        ({"labels": "none"}, "no finished labels 'none'"),
        ({"labels": "a", "teacher": "good"}, "--labels are clusters already: leave out --teacher"),
        ({"later_num_clusters": "5"}, "--later_num_clusters is for later iterations"),
        ({"iterations": 2, "later_num_clusters": "5,x"}, "--later_num_clusters must be numbers above 0"),
        ({"iterations": 2, "later_max_steps": "-3"}, "--later_max_steps must be numbers above 0"),
        ({"iterations": 3, "later_teacher_layer": "2,5"}, "--later_teacher_layer must be from 1 to 4"),
        ({"iterations": 2, "later_num_clusters": "9999"}, "num_clusters must be at most the number of tokens"),
    ],
)
def test_what_the_user_can_mend_is_said_before_any_work(tmp_path, cohort_path, fields, said):
    models = other_models(tmp_path)
    fields = {name: models.get(value, value) if isinstance(value, str) else value for name, value in fields.items()}
    with pytest.raises(UserError, match=said) as failed:
        train.pretrain(settings(tmp_path / "run", cohort_path, **fields))
    assert "\n" not in str(failed.value)
    assert not list(tmp_path.glob("run/**/kmeans*"))


def test_flags_of_later_iterations():
    config = settings(Path("x"), Path("y"), iterations=4, later_learning_rate="1e-3,2e-3", max_steps=7)
    assert iterations.later_configs(config) == [
        {"num_clusters": 500, "max_steps": 7, "learning_rate": 1e-3, "teacher_layer": 3},
        {"num_clusters": 1000, "max_steps": 7, "learning_rate": 2e-3, "teacher_layer": 3},
        {"num_clusters": 1000, "max_steps": 7, "learning_rate": 2e-3, "teacher_layer": 3},
    ]
    line = ["--data_path", "x", "--iterations", "3", "--later_max_steps", "400000", "--later_num_clusters", "500,1000"]
    config = cli.parse("pretrain", line)
    assert [later["max_steps"] for later in iterations.later_configs(config)] == [400_000, 400_000]


def test_the_page_of_recipes_is_what_the_presets_set():
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] == "| `"]
    rows = {cells[0].strip("`"): cells[1:] for cells in table}
    defaults = {field.name: field.default for field in dataclasses.fields(PretrainConfig)}
    flags = {flag for preset in PRETRAIN_PRESETS.values() for flag in preset}
    assert rows.keys() == flags
    for flag, (guide, published, corrected, why) in rows.items():
        for said, value in (
            (guide, defaults[flag]),
            (published, PRETRAIN_PRESETS["published"].get(flag, defaults[flag])),
            (corrected, PRETRAIN_PRESETS["corrected"].get(flag, defaults[flag])),
        ):
            assert said == str(value), flag
        assert (published == corrected) or len(why) > 20, flag
    for preset in PRETRAIN_PRESETS:
        config = cli.parse("pretrain", ["--preset", preset, "--data_path", "x"])
        assert iterations.later_configs(config)[0]["num_clusters"] == 500
        iterations.check_settings(config)


def test_ranks_share_features_clusters_and_labels(processes, straight, cohort, tmp_path):
    given = str(cohort.path), str(straight[0] / "hubert_ecg.pt")
    tiny.share(str(tmp_path / "one"), *given, "one")
    run = processes.run(2, tiny.__file__, "share", tmp_path / "two", *given, "two")
    assert run.out.count("both: 8 clusters of") == 1
    one, two = (TokenFeatures.load(tmp_path / name / "features") for name in ("one", "two"))
    assert one.record_ids == two.record_ids
    np.testing.assert_allclose(one.features, two.features, rtol=0, atol=2e-3)
    centers = [
        KMeans.load(tmp_path / name / "hubert_ecg" / "kmeans.safetensors").cluster_centers_ for name in ("one", "two")
    ]
    np.testing.assert_allclose(*centers, rtol=0, atol=1e-3)
    assert (cohort.labels("one").values == cohort.labels("two").values).mean() > 0.99
