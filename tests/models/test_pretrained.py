"""Weights in and out: every layout, both spellings, and one clear line where something does not fit."""

from __future__ import annotations

import dataclasses
import json
import logging
import pickle
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file as save_safetensors

from hubert_ecg.config import UserError
from hubert_ecg.models import (
    HubertECG,
    HubertECGConfig,
    HubertECGForClassification,
    HubertECGForPretraining,
    load_file,
    save_file,
)

CONFIG = dataclasses.replace(
    HubertECGConfig.preset("tiny"),
    hidden_size=32,
    num_hidden_layers=2,
    intermediate_size=48,
    conv_dim=(16,) * 5,
    classifier_proj_size=24,
    vocab_sizes=[7, 5],
)
ECG = torch.randn(2, 6000, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pretraining() -> HubertECGForPretraining:
    torch.manual_seed(0)
    return HubertECGForPretraining(CONFIG).eval()


def _assert_same_encoder(model: torch.nn.Module, other: torch.nn.Module) -> None:
    encoders = [getattr(m, "hubert_ecg", m) for m in (model, other)]
    with torch.no_grad():
        one, two = (encoder.encode(ECG).last_hidden_state for encoder in encoders)
    torch.testing.assert_close(one, two, atol=0, rtol=0)


def _old_spelling(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    return {re.sub("|".join(names), lambda match: names[match[0]], name): value for name, value in state.items()}


def _published_config(**more) -> dict:
    """A config.json as published: fields of transformers, and nothing of ours."""
    fields = CONFIG.to_dict()
    ours = {"compat", "sampling_rate_hz", "num_leads", "problem", "head", "thresholds", "classifier_dropout"}
    fields = {name: value for name, value in fields.items() if name not in ours | {"id2label", "label2id"}}
    return {
        **fields,
        "architectures": ["HuBERTECG"],
        "auto_map": {"AutoModel": "hubert_ecg.HuBERTECG"},
        "torch_dtype": "float32",
        "mask_feature_prob": 0.0,
        **more,
    }


@pytest.mark.parametrize("rate", [50, 100, 500])
@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_configs_survive_json(size, rate):
    config = HubertECGConfig.preset(
        size, sampling_rate_hz=rate, vocab_sizes=[500], thresholds=[0.25], id2label={0: "AF"}
    )
    assert HubertECGConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == dataclasses.replace(
        config, extra={name: value for name, value in config.to_dict().items() if name in _fixed_names()}
    )
    assert config.stride == {50: 32, 100: 64, 500: 320}[rate]


def _fixed_names() -> set[str]:
    from hubert_ecg.models.shape import _FIXED

    return set(_FIXED)


def test_unknown_fields_of_a_config_are_kept():
    fields = _published_config(something_new={"a": [1, 2]})
    assert HubertECGConfig.from_dict(fields).to_dict() | fields == HubertECGConfig.from_dict(fields).to_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 30}, "hidden_size must be a multiple of num_attention_heads"),
        ({"hidden_size": 12}, "multiple of num_conv_pos_embedding_groups"),
        ({"conv_dim": [4]}, "must be of one length"),
        ({"layerdrop": 1.5}, "layerdrop must be from 0 to 1"),
        ({"vocab_sizes": [0]}, "vocab_sizes must be positive"),
        ({"compat": "old"}, "compat must be"),
        ({"do_stable_layer_norm": True}, "do_stable_layer_norm must be False, got True"),
        ({"feat_extract_norm": "layer"}, "feat_extract_norm must be 'group'"),
    ],
)
def test_impossible_configs_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        HubertECGConfig.from_dict({**CONFIG.to_dict(), **fields})


@pytest.mark.parametrize(("size", "rate"), [("huge", 100), ("base", 128)])
def test_unknown_presets_are_named(size, rate):
    with pytest.raises(ValueError, match=str(size if size == "huge" else rate)):
        HubertECGConfig.preset(size, sampling_rate_hz=rate)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_own_formats_give_every_class_back(kind, pretraining, tmp_path):
    classifier = HubertECGForClassification(CONFIG, ["AF", "SR"], "multiclass", "mlp")
    classifier.config.thresholds = [0.25, 0.5]
    for model in (HubertECG(CONFIG), pretraining, classifier):
        path = tmp_path / type(model).__name__
        if kind == "folder":
            model.save_pretrained(path)
        else:
            path = path.with_suffix(".pt")
            save_file(model, path, {"step": 3})
            loaded, extra = load_file(path)
            assert type(loaded) is type(model)
            assert extra == {"step": 3}
            assert loaded.config.to_dict() == model.config.to_dict()
        again = type(model).from_pretrained(path)
        assert not again.training
        for name, value in model.state_dict().items():
            torch.testing.assert_close(again.state_dict()[name], value, atol=0, rtol=0)
        assert {**again.config.to_dict(), "architectures": 0} == {**model.config.to_dict(), "architectures": 0}
    assert again.label_names == ("AF", "SR")
    assert again.config.problem == "multiclass"
    assert again.config.thresholds == [0.25, 0.5]


def test_single_files_open_with_weights_only(pretraining, tmp_path):
    save_file(pretraining, tmp_path / "m.pt", {"labels": ["a"], "nested": {"x": [1.5, None, True]}, "t": torch.ones(2)})
    content = torch.load(tmp_path / "m.pt", weights_only=True)
    assert content["extra"]["nested"] == {"x": [1.5, None, True]}
    with pytest.raises(ValueError, match=r"extra\['when'\]\[0\] must be a plain value"):
        save_file(pretraining, tmp_path / "n.pt", {"when": [object()]})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.pt"]


def test_a_failed_write_leaves_the_old_file(pretraining, tmp_path, monkeypatch):
    save_file(pretraining, tmp_path / "m.pt", {"step": 1})

    def fails(content, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="disk full"):
        save_file(pretraining, tmp_path / "m.pt", {"step": 2})
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]
    assert load_file(tmp_path / "m.pt")[1] == {"step": 1}


@pytest.mark.parametrize("spelling", ["new", "old", "wrapped"])
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_published_folders(weights, spelling, pretraining, tmp_path):
    state = pretraining.state_dict()
    if spelling == "old":
        state = _old_spelling(state)
    elif spelling == "wrapped":
        state = {f"module._orig_mod.{name}": value for name, value in state.items()}
    (tmp_path / "config.json").write_text(json.dumps(_published_config()))
    if weights.endswith("bin"):
        torch.save(state, tmp_path / weights)
    else:
        save_safetensors(state, tmp_path / weights)
    for kind in (HubertECG, HubertECGForPretraining):
        model = kind.from_pretrained(tmp_path)
        _assert_same_encoder(model, pretraining)
        assert model.config.sampling_rate_hz == 100
        assert model.config.extra["auto_map"] == {"AutoModel": "hubert_ecg.HuBERTECG"}
    torch.testing.assert_close(model.label_embedding[1].weight, pretraining.label_embedding[1].weight)


@pytest.mark.parametrize("head", ["linear", "mlp", "label_embedding"])
def test_published_classifiers(head, tmp_path):
    torch.manual_seed(0)
    classifier = HubertECGForClassification(CONFIG, ["LABEL_0", "LABEL_1", "LABEL_2"], head=head).eval()
    (tmp_path / "config.json").write_text(json.dumps(_published_config()))
    state = _old_spelling(classifier.state_dict())
    state.pop("hubert_ecg.masked_spec_embed")
    torch.save(state, tmp_path / "pytorch_model.bin")
    loaded = HubertECGForClassification.from_pretrained(tmp_path)
    assert loaded.label_names == classifier.label_names
    with torch.no_grad():
        torch.testing.assert_close(loaded(ECG).logits, classifier(ECG).logits, atol=0, rtol=0)
    _assert_same_encoder(HubertECG.from_pretrained(tmp_path), classifier)


def test_published_single_files_load_without_their_classes(pretraining, tmp_path):
    """The config is a pickled object of transformers: it is read as a record, and no class is imported for it."""
    fields = _published_config()
    del fields["model_type"], fields["vocab_sizes"]
    config = transformers.HubertConfig(**{**fields, "id2label": {0: "LABEL_0", 1: "LABEL_1"}})
    content = {"model_config": config, "model_state_dict": _old_spelling(pretraining.state_dict()), "global_step": 7}
    with torch.no_grad():
        pretraining.encoder.layer_norm.weight[3] = 1.5
    torch.save(content, tmp_path / "published.pt")
    code = (
        "import sys; from hubert_ecg.models import HubertECGForPretraining as M; "
        f"m = M.from_pretrained({str(tmp_path / 'published.pt')!r}); "
        "assert not {'transformers', 'pandas', 'matplotlib', 'sklearn', 'wfdb', 'triton'} & set(sys.modules); "
        "print(float(m.encoder.layer_norm.weight.detach().sum()), m.config.vocab_sizes, m.config.id2label)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert shown.stdout.strip() == f"{float(pretraining.encoder.layer_norm.weight.detach().sum())} [7, 5] {{}}"
    _assert_same_encoder(HubertECG.from_pretrained(tmp_path / "published.pt"), pretraining)


class _Attack:
    def __reduce__(self):
        return (exec, ("import builtins; builtins.hubert_ecg_was_attacked = True",))


def test_code_in_a_file_is_never_run(pretraining, tmp_path):
    import builtins

    content = {"model_config": _Attack(), "model_state_dict": pretraining.state_dict()}
    torch.save(content, tmp_path / "evil.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(content["model_config"], protocol=2))
    for name in ("evil.pt", "raw.pt"):
        with pytest.raises(UserError) as caught:
            HubertECG.from_pretrained(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not hasattr(builtins, "hubert_ecg_was_attacked")


@pytest.mark.parametrize("kind", ["HubertModel", "HubertForCTC", "HubertForSequenceClassification"])
def test_transformers_folders_both_ways(kind, tmp_path, caplog):
    torch.manual_seed(0)
    theirs = getattr(transformers, kind)(transformers.HubertConfig(**CONFIG.to_dict())).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    with caplog.at_level(logging.INFO, "hubert_ecg"):
        ours = HubertECG.from_pretrained(tmp_path / "theirs")
    assert ("left out" in caplog.text) == (kind != "HubertModel")
    with torch.no_grad():
        expected = getattr(theirs, "hubert", theirs)(ECG).last_hidden_state
        torch.testing.assert_close(ours(ECG).last_hidden_state, expected, atol=1e-4, rtol=0)

    ours.save_pretrained(tmp_path / "ours")
    again = transformers.HubertModel(transformers.HubertConfig(**ours.config.to_dict())).eval()
    from safetensors.torch import load_file as load_safetensors

    again.load_state_dict(load_safetensors(tmp_path / "ours" / "model.safetensors"), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(again(ECG).last_hidden_state, expected, atol=1e-5, rtol=0)


def test_sharded_folders(pretraining, tmp_path):
    state = pretraining.state_dict()
    names = sorted(state)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for part, held in parts.items():
        save_safetensors({name: state[name] for name in held}, tmp_path / part)
    weight_map = {name: part for part, held in parts.items() for name in held}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(_published_config()))
    _assert_same_encoder(HubertECGForPretraining.from_pretrained(tmp_path), pretraining)


@pytest.mark.parametrize("source", ["folder", "file"])
def test_fine_tuning_takes_the_backbone(source, pretraining, tmp_path, caplog):
    path = tmp_path / ("m.pt" if source == "file" else "m")
    if source == "file":
        save_file(pretraining, path)
    else:
        pretraining.save_pretrained(path)
    model = HubertECGForClassification.from_pretrained(path, label_names=["AF", "SR"], layerdrop=0.25, dropout=0.5)
    _assert_same_encoder(model, pretraining)
    assert model.hubert_ecg.encoder.layerdrop == 0.25
    assert model.classifier_dropout.p == 0.5
    assert "drawn afresh: classifier.bias, classifier.weight" in caplog.text
    with pytest.raises(UserError, match=r"label_names must be distinct .*; weights that were not fine-tuned"):
        HubertECGForClassification.from_pretrained(path)


def test_heads_for_other_labels_or_clusters_are_drawn_afresh(pretraining, tmp_path, caplog):
    classifier = HubertECGForClassification(CONFIG, ["AF", "SR"])
    classifier.save_pretrained(tmp_path / "c")
    same = HubertECGForClassification.from_pretrained(tmp_path / "c", label_names=["AF", "SR"])
    torch.testing.assert_close(same.classifier.weight, classifier.classifier.weight, atol=0, rtol=0)
    assert not caplog.records
    other = HubertECGForClassification.from_pretrained(tmp_path / "c", label_names=["SR", "AF"])
    assert (other.classifier.weight != classifier.classifier.weight).any()
    assert "drawn afresh" in caplog.text
    pretraining.save_pretrained(tmp_path / "p")
    model = HubertECGForPretraining.from_pretrained(tmp_path / "p", vocab_sizes=[50, 60])
    assert [len(book.weight) for book in model.label_embedding] == [50, 60]
    torch.testing.assert_close(model.final_proj[1].weight, pretraining.final_proj[1].weight, atol=0, rtol=0)


def test_tensors_that_do_not_fit_are_named(pretraining, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(_published_config()))
    state = dict(pretraining.state_dict())

    def error(changed: dict[str, torch.Tensor]) -> str:
        torch.save(changed, tmp_path / "pytorch_model.bin")
        with pytest.raises(UserError) as caught:
            HubertECGForPretraining.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    lost = {name: value for name, value in state.items() if "layers.1.attention" not in name}
    assert "missing encoder.layers.1.attention.k_proj.bias" in error(lost)
    assert "and 3 more" in error(lost)
    assert "unexpected encoder.adapter.weight" in error({**state, "encoder.adapter.weight": torch.ones(1)})
    assert "feature_projection.projection.weight must be [32, 16], got [32, 4]" in error(
        {**state, "feature_projection.projection.weight": torch.ones(32, 4)}
    )
    assert "label_embedding.0.weight must be [7, 24], got [9, 24]" in error(
        {**state, "label_embedding.0.weight": torch.ones(9, 24)}
    )


@pytest.mark.parametrize("name", ["./nowhere", "nowhere", "models/hubert.pt", "x.safetensors", "a/b/c", ""])
def test_a_missing_model_is_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(UserError) as caught:
        HubertECG.from_pretrained(name)
    assert "\n" not in str(caught.value)


def test_broken_folders_and_files_are_one_line(pretraining, tmp_path):
    def error(path) -> str:
        with pytest.raises(UserError) as caught:
            HubertECG.from_pretrained(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "config.json" in error(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "not JSON" in error(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(_published_config()))
    assert "model.safetensors" in error(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    assert "cannot be read" in error(tmp_path)
    save_safetensors(pretraining.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(_published_config(do_stable_layer_norm=True)))
    assert "do_stable_layer_norm must be False" in error(tmp_path)
    save_file(pretraining, tmp_path / "m.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "m.pt").read_bytes()[:1000])
    assert "cannot be read" in error(tmp_path / "cut.pt")
    torch.save({"a": 1}, tmp_path / "other.pt")
    assert "holds no model" in error(tmp_path / "other.pt")
    torch.save([1], tmp_path / "list.pt")
    assert "holds no model" in error(tmp_path / "list.pt")
    with pytest.raises(UserError, match="no model file"):
        load_file(tmp_path / "gone.pt")
    with pytest.raises(UserError, match="from_pretrained"):
        load_file(tmp_path / "other.pt")


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.pkl", "x.csv", "empty.pt"])
def test_files_that_are_no_models_are_told_what_is(tmp_path, name):
    np.save(tmp_path / "x.npy", np.zeros(3))
    np.savez(tmp_path / "x.npz", a=np.zeros(3))
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"centroids": [1.0]}))
    (tmp_path / "x.csv").write_text("filename,AF\n")
    (tmp_path / "empty.pt").touch()
    with pytest.raises(UserError) as caught:
        HubertECG.from_pretrained(tmp_path / name)
    said = str(caught.value)
    assert said.startswith(str(tmp_path / name))
    assert "give a .pt file of pretrain or finetune" in said
    assert all(word in said for word in ("config.json and model.safetensors", "hub id (org/name)", "hubert_ecg_base"))


def test_tensors_without_their_config(pretraining, tmp_path):
    save_safetensors(pretraining.state_dict(), tmp_path / "alone.safetensors")
    with pytest.raises(UserError, match=r"alone\.safetensors needs the config\.json of its model beside it"):
        HubertECG.from_pretrained(tmp_path / "alone.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(_published_config()))
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match=r"index\.json must say in which file each tensor is \(weight_map\)"):
        HubertECG.from_pretrained(tmp_path)


def test_files_of_old_versions_of_torch_are_read(pretraining, tmp_path):
    content = {"model_config": pretraining.config.to_dict(), "model_state_dict": pretraining.state_dict()}
    torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    _assert_same_encoder(HubertECG.from_pretrained(tmp_path / "m.pt"), pretraining)


def test_a_local_folder_wins_over_the_hub(pretraining, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    pretraining.save_pretrained("hubert_ecg_base")
    _assert_same_encoder(HubertECG.from_pretrained("hubert_ecg_base"), pretraining)
    with pytest.raises(UserError, match=r"pip install hubert-ecg\[hub\]"):
        HubertECG.from_pretrained("hubert_ecg_small")


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("name", "repository"),
    [("hubert_ecg_large", "Edoardo-BS/hubert-ecg-large"), ("someone/their-model", "someone/their-model")],
)
def test_names_go_to_the_hub(name, repository, weights, pretraining, tmp_path, monkeypatch):
    class EntryNotFoundError(Exception):
        pass

    asked = []

    def hf_hub_download(repo_id, filename):
        asked.append((repo_id, filename))
        if filename not in ("config.json", weights):
            raise EntryNotFoundError(filename)
        return str(tmp_path / filename)

    pretraining.save_pretrained(tmp_path)
    if weights.endswith("bin"):
        (tmp_path / "model.safetensors").unlink()
        torch.save(pretraining.state_dict(), tmp_path / weights)
    fake = types.ModuleType("huggingface_hub")
    fake.hf_hub_download = hf_hub_download
    fake.utils = types.ModuleType("huggingface_hub.utils")
    fake.utils.EntryNotFoundError = EntryNotFoundError
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils", fake.utils)
    _assert_same_encoder(HubertECG.from_pretrained(name), pretraining)
    assert {repo for repo, _ in asked} == {repository}
    assert ("pytorch_model.bin" in dict(map(reversed, asked))) == weights.endswith("bin")


def test_the_folder_around_a_single_model_stands_for_it(pretraining, tmp_path):
    pretraining.save_pretrained(tmp_path / "out" / "hubert_ecg")
    _assert_same_encoder(HubertECG.from_pretrained(tmp_path / "out"), pretraining)
    pretraining.save_pretrained(tmp_path / "out" / "other")
    with pytest.raises(UserError, match=r"has no config.json; did you mean .*hubert_ecg, .*other\?"):
        HubertECG.from_pretrained(tmp_path / "out")


def test_a_safetensors_file_is_read_itself(pretraining, tmp_path):
    pretraining.save_pretrained(tmp_path)
    _assert_same_encoder(HubertECG.from_pretrained(tmp_path / "model.safetensors"), pretraining)
    # Not the model beside it.
    save_safetensors({"cluster_centers": torch.ones(2, 3)}, tmp_path / "kmeans.safetensors")
    with pytest.raises(UserError, match=r"kmeans\.safetensors does not fit HubertECG: missing encoder"):
        HubertECG.from_pretrained(tmp_path / "kmeans.safetensors")


def test_the_hub_tells_nothing_of_its_attempts(pretraining, tmp_path, monkeypatch, caplog):
    hub = pytest.importorskip("huggingface_hub")

    def download(repository, name):
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s")
        raise OSError("no network")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    with pytest.raises(UserError, match="no network"):
        HubertECG.from_pretrained("hubert_ecg_base")
    assert not caplog.records
    logging.getLogger("huggingface_hub").warning("still heard")
    assert logging.getLogger("huggingface_hub").level != logging.ERROR


def test_an_unreachable_hub_is_one_line(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as caught:
        HubertECG.from_pretrained("hubert_ecg_base")
    message = str(caught.value)
    assert message.startswith(
        "Edoardo-BS/hubert-ecg-base is no folder here and cannot be had from the Hugging Face hub"
    )
    assert "\n" not in message


@pytest.mark.parametrize(
    "wrong", [{"conv_kernel": (10, 3, 3, 2, 1)}, {"conv_stride": (4, 2, 2, 2, 0)}, {"conv_dim": (0, 8, 8, 8, 8)}]
)
def test_an_extractor_that_skips_samples_or_has_no_size_is_refused(wrong):
    with pytest.raises(ValueError, match="no conv_kernel below its conv_stride, got "):
        dataclasses.replace(CONFIG, **{"conv_dim": (8,) * 5, **wrong})
