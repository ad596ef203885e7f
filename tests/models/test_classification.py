"""The classifier: losses against their definitions, heads, label names."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from hubert_ecg.models import HubertECGConfig, HubertECGForClassification

CONFIG = dataclasses.replace(
    HubertECGConfig.preset("tiny"), hidden_size=32, num_hidden_layers=1, intermediate_size=48, conv_dim=(16,) * 5
)
NAMES = ["NORM", "AFIB", "LBBB"]
ECG = torch.randn(4, 12, 500, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.tensor([0.5, 2.0, 7.0])


def _model(problem: str, head: str = "linear") -> HubertECGForClassification:
    torch.manual_seed(0)
    model = HubertECGForClassification(CONFIG, NAMES, problem, head).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_multilabel_loss_is_weighted_binary_cross_entropy(weight):
    model, targets = _model("multilabel"), torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1]])
    output = model(ECG, targets=targets, pos_weight=weight)
    p = output.logits.double().sigmoid()
    positive = torch.ones(3) if weight is None else weight
    expected = -(positive * targets * p.log() + (1 - targets) * (1 - p).log()).mean()
    torch.testing.assert_close(output.loss.double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(model.scores(output.logits).double(), p, atol=1e-6, rtol=0)


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_multiclass_loss_takes_indices_and_one_hot_rows(weight):
    model, classes = _model("multiclass"), torch.tensor([2, 0, 1, 1])
    output = model(ECG, targets=classes, pos_weight=weight)
    expected = F.cross_entropy(output.logits.double(), classes, weight=None if weight is None else weight.double())
    torch.testing.assert_close(output.loss.double(), expected, atol=1e-6, rtol=0)
    one_hot = F.one_hot(classes, 3).float()
    torch.testing.assert_close(model(ECG, targets=one_hot, pos_weight=weight).loss, output.loss, atol=0, rtol=0)
    torch.testing.assert_close(model.scores(output.logits).sum(-1), torch.ones(4))


def test_multiclass_rows_without_a_class_leave_the_loss():
    model, targets = _model("multiclass"), torch.tensor([[0.0, 1, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0]])
    some = model(ECG, targets=targets, pos_weight=WEIGHT).loss
    kept = model(ECG[[0, 2]], targets=targets[[0, 2]], pos_weight=WEIGHT).loss
    torch.testing.assert_close(some, kept, atol=1e-6, rtol=0)
    assert model(ECG, targets=torch.zeros(4, 3), pos_weight=WEIGHT).loss == 0


def test_regression_loss_is_the_mean_square():
    model, targets = _model("regression"), torch.randn(4, 3)
    output = model(ECG, targets=targets)
    torch.testing.assert_close(output.loss, (output.logits - targets).square().mean(), atol=1e-6, rtol=0)
    torch.testing.assert_close(model.scores(output.logits), output.logits, atol=0, rtol=0)


@pytest.mark.parametrize("head", ["linear", "mlp", "label_embedding"])
def test_heads_are_the_published_ones(head):
    model = _model("multilabel", head)
    pooled = model.hubert_ecg(ECG).last_hidden_state.mean(1)
    if head == "linear":
        expected = pooled @ model.classifier.weight.T + model.classifier.bias
    elif head == "mlp":
        first, last = model.classifier[0], model.classifier[2]
        expected = torch.tanh(pooled @ first.weight.T + first.bias) @ last.weight.T + last.bias
    else:
        expected = torch.cosine_similarity(pooled[:, None], model.label_embedding.weight[None], dim=-1)
    torch.testing.assert_close(model(ECG).logits, expected, atol=1e-5, rtol=0)


def test_label_names_and_problem_live_in_the_config():
    model = _model("multiclass", "mlp")
    assert model.label_names == tuple(NAMES)
    fields = model.config.to_dict()
    assert fields["id2label"] == {"0": "NORM", "1": "AFIB", "2": "LBBB"}
    assert fields["label2id"] == {"NORM": 0, "AFIB": 1, "LBBB": 2}
    again = HubertECGForClassification(HubertECGConfig.from_dict(fields))
    assert (again.label_names, again.config.problem, again.config.head) == (tuple(NAMES), "multiclass", "mlp")
    assert CONFIG.id2label == {}


def test_the_order_of_many_labels_is_kept_through_json():
    names = [f"label {index}" for index in range(71)]
    fields = HubertECGForClassification(CONFIG, names).config.to_dict()
    shuffled = {**fields, "id2label": dict(sorted(fields["id2label"].items()))}
    assert HubertECGConfig.from_dict(shuffled).label_names == tuple(names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "label_names must be distinct names"),
        ({"label_names": []}, "label_names must be distinct names"),
        ({"label_names": ["a", "a"]}, "label_names must be distinct names"),
        ({"label_names": ["a"], "problem": "binary"}, "problem must be multilabel"),
        ({"label_names": ["a"], "head": "conv"}, "head must be linear"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        HubertECGForClassification(CONFIG, **arguments)


@pytest.mark.parametrize("problem", ["multilabel", "regression"])
def test_targets_of_another_shape_do_not_broadcast(problem):
    with pytest.raises(ValueError, match=r"targets must be \[4, 3\], got \[4\]"):
        _model(problem)(ECG, targets=torch.zeros(4))


def test_gradients_reach_every_parameter_but_the_mask_embedding():
    model = _model("multilabel", "mlp").train()
    model(ECG, targets=torch.ones(4, 3)).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == {"hubert_ecg.masked_spec_embed"}
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.grad is not None)
