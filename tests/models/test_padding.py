"""What stands in padded samples changes nothing that is valid."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubert_ecg.models import (
    HubertECG,
    HubertECGConfig,
    HubertECGForClassification,
    HubertECGForPretraining,
    padding_lengths,
    token_mask,
)
from hubert_ecg.ops import span_mask

CONFIG = dataclasses.replace(
    HubertECGConfig.preset("tiny"), hidden_size=32, num_hidden_layers=2, intermediate_size=48, conv_dim=(16,) * 5
)


def _hostile(kind: str, shape: torch.Size) -> torch.Tensor:
    if kind == "noise":
        return torch.randn(shape)
    return torch.full(shape, {"zeros": 0.0, "1e3": 1e3, "nan": torch.nan, "inf": torch.inf}[kind])


def _brute_force_tokens(config: HubertECGConfig, lengths: torch.Tensor, num_samples: int) -> torch.Tensor:
    """The rule token by token: more than half of the stride samples in the middle of the receptive field."""
    rows = []
    for record in lengths.tolist():
        flat = [sample < length for length in record for sample in range(num_samples)]
        middle = (config.receptive_field - config.stride) // 2
        starts = range(0, len(flat) - config.receptive_field + 1, config.stride)
        rows.append([2 * sum(flat[s + middle : s + middle + config.stride]) > config.stride for s in starts])
    return torch.tensor(rows)


@pytest.fixture(scope="module")
def models() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    published = dataclasses.replace(CONFIG, compat="published")
    models = {"corrected": HubertECG(CONFIG), "published": HubertECG(published)}
    with torch.no_grad():
        for parameter in models["corrected"].parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    models["published"].load_state_dict(models["corrected"].state_dict())
    return {name: model.eval() for name, model in models.items()}


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(
        st.lists(st.one_of(st.integers(0, 200), st.sampled_from([0, 1, 199, 200])), min_size=3, max_size=3),
        min_size=1,
        max_size=9,
    ),
    kind=st.sampled_from(["zeros", "noise", "1e3", "nan", "inf"]),
    compat=st.sampled_from(["corrected", "published"]),
)
def test_padded_samples_change_no_valid_token(models, lengths, kind, compat):
    model = models[compat]
    lengths = torch.tensor(lengths)
    ecg = torch.randn(len(lengths), 3, 200)
    padded = torch.arange(200) >= lengths[..., None]
    with torch.no_grad():
        expected = model(ecg.masked_fill(padded, 0.0), lengths, output_hidden_states=True)
        actual = model(torch.where(padded, _hostile(kind, ecg.shape), ecg), lengths, output_hidden_states=True)
    valid = torch.ones(actual.hidden_states[0].shape[:2], dtype=bool) if actual.valid is None else actual.valid
    torch.testing.assert_close(valid, _brute_force_tokens(CONFIG, lengths, 200))
    for mine, other in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine[valid], other[valid], atol=1e-5, rtol=0)


def test_first_norm_counts_valid_frames_only(models):
    """Against a float64 norm over the frames that the rule names, at a length that cuts a lead short."""
    model = models["corrected"].double()
    ecg = torch.randn(2, 2, 300, dtype=torch.float64) * 3 + 1
    lengths = torch.tensor([[300, 120], [45, 0]])
    kept = (torch.arange(300) < lengths[..., None]).flatten(1)
    layer = model.feature_extractor.conv_layers[0]
    x = layer.conv((ecg.flatten(1) * kept)[:, None])
    for record in range(2):
        frames = [f for f in range(x.shape[2]) if 2 * int(kept[record, 4 * f + 3 : 4 * f + 7].sum()) > 4]
        chosen = x[record][:, frames]
        mean, var = chosen.mean(1, keepdim=True), chosen.var(1, unbiased=False, keepdim=True)
        expected = (x[record] - mean) / (var + 1e-5).sqrt() * layer.layer_norm.weight[:, None]
        expected = torch.nn.functional.gelu(expected + layer.layer_norm.bias[:, None])
        counted = torch.zeros(2, x.shape[2], dtype=torch.bool)
        counted[record, frames] = True
        actual = layer((ecg.flatten(1) * kept)[:, None], counted)[record]
        torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)
    models["corrected"].float()


def test_compat_decides_whether_padding_enters_the_first_norm(models):
    ecg, lengths = torch.randn(1, 2, 300) + 2, torch.tensor([[300, 40]])
    with torch.no_grad():
        corrected, published = (models[name](ecg, lengths).last_hidden_state for name in ("corrected", "published"))
        assert (corrected - published).abs().max() > 1e-2
        full = [models[name](ecg).last_hidden_state for name in ("corrected", "published")]
    torch.testing.assert_close(*full, atol=0, rtol=0)


def test_a_whole_record_is_the_same_beside_a_padded_one(models):
    ecg = torch.randn(3, 12, 500)
    lengths = torch.tensor([500, 77, 500])
    with torch.no_grad():
        together = models["corrected"](ecg, lengths).last_hidden_state
        alone = models["corrected"](ecg[[0, 2]]).last_hidden_state
    torch.testing.assert_close(together[[0, 2]], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("leads", [1, 2, 8, 12])
def test_lengths_for_all_leads_or_for_each(models, leads):
    ecg, lengths = torch.randn(2, leads, 400), torch.tensor([400, 250])
    with torch.no_grad():
        one = models["corrected"](ecg, lengths)
        each = models["corrected"](ecg, lengths[:, None].expand(-1, leads))
    assert one.valid.sum(1)[1] < one.valid.sum(1)[0]
    torch.testing.assert_close(one.last_hidden_state, each.last_hidden_state, atol=0, rtol=0)


def test_a_flattened_record_has_the_same_padding(models):
    ecg, lengths = torch.randn(2, 12, 500), torch.randint(0, 501, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(
            models["corrected"](ecg.flatten(1), lengths).last_hidden_state,
            models["corrected"](ecg, lengths).last_hidden_state,
            atol=0,
            rtol=0,
        )


def test_records_without_a_valid_token_are_finite_forward_and_backward():
    torch.manual_seed(0)
    ecg = torch.full((3, 12, 500), torch.nan)
    ecg[1, 0] = torch.randn(500)
    lengths = torch.zeros(3, 12, dtype=torch.int64)
    lengths[1, 0], lengths[2, 3] = 500, 5
    ecg[2, 3] = 1.0
    pretraining = HubertECGForPretraining(CONFIG)
    valid = token_mask(CONFIG, lengths, 500)
    assert valid.sum(1).tolist() == [0, 8, 0]
    mask = span_mask(3, 93, 0.33, valid=valid)
    labels = torch.randint(0, 100, (3, 93))
    classifier = HubertECGForClassification(CONFIG, ["a", "b"])
    for model, loss in (
        (pretraining, pretraining(ecg, lengths, labels=labels, mask_indices=mask, alpha=0.5).loss),
        (classifier, classifier(ecg, lengths, targets=torch.ones(3, 2)).loss),
    ):
        assert loss.isfinite()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_only_padding_gives_zero_loss_not_nan():
    model = HubertECGForPretraining(CONFIG)
    lengths = torch.zeros(2, dtype=torch.int64)
    output = model(
        torch.randn(2, 6000),
        lengths,
        labels=torch.zeros(2, 93, dtype=torch.int64),
        mask_indices=span_mask(2, 93, 0.33),
    )
    assert output.loss == 0
    assert output.accuracy == 0


def test_padding_takes_no_part_in_pooling_and_loss():
    torch.manual_seed(0)
    ecg, lengths = torch.randn(4, 12, 500), torch.randint(100, 400, (4, 12))
    valid = token_mask(CONFIG, lengths, 500)
    classifier = HubertECGForClassification(CONFIG, ["a"]).eval()
    with torch.no_grad():
        output = classifier(ecg, lengths=lengths)
        states = classifier.hubert_ecg(ecg, lengths).last_hidden_state
        pooled = torch.stack([states[i, valid[i]].mean(0) for i in range(4)])
        torch.testing.assert_close(output.logits, classifier.classifier(pooled), atol=1e-6, rtol=0)

        pretraining = HubertECGForPretraining(CONFIG).eval()
        mask = span_mask(4, 93, 0.5, valid=valid)
        labels = torch.randint(0, 100, (4, 93))
        other = torch.where(valid, labels, (labels + 1) % 100)
        for alpha in (1.0, 0.3):
            one = pretraining(ecg, lengths, labels=labels, mask_indices=mask, alpha=alpha)
            two = pretraining(ecg, lengths, labels=other, mask_indices=mask, alpha=alpha)
            assert one.loss == two.loss
            assert one.accuracy == two.accuracy


def test_full_lengths_take_the_path_without_masks(models):
    assert padding_lengths(torch.tensor([500, 500]), 500) is None
    assert padding_lengths(torch.tensor([500, 499]), 500) is not None
    assert padding_lengths(None, 500) is None
    ecg = torch.randn(2, 12, 500)
    with torch.no_grad():
        output = models["corrected"](ecg, torch.full((2, 12), 500))
        torch.testing.assert_close(output.last_hidden_state, models["corrected"](ecg).last_hidden_state, atol=0, rtol=0)
    assert output.valid is None


@pytest.mark.parametrize(
    ("ecg", "lengths", "message"),
    [
        (torch.zeros(6000), None, r"ecg must be \[B, L, T\]"),
        (torch.zeros(1, 1, 12, 500), None, r"ecg must be \[B, L, T\]"),
        (torch.zeros(1, 12, 500, dtype=torch.int16), None, "floating point"),
        (torch.zeros(1, 81), None, "at least 82 samples"),
        (torch.zeros(2, 12, 500), torch.tensor([500]), r"lengths must be \[2\] or \[2, 12\]"),
        (torch.zeros(2, 12, 500), torch.zeros(2, 3), r"lengths must be \[2\] or \[2, 12\]"),
        (torch.zeros(2, 5999), torch.tensor([400, 400]), "12 leads of equal length"),
    ],
)
def test_wrong_shapes_are_named(models, ecg, lengths, message):
    with pytest.raises(ValueError, match=message):
        models["corrected"](ecg, lengths)
