"""The architecture against transformers' HubertModel with the published configuration: same weights, same numbers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers

from hubert_ecg.models import HubertECG, HubertECGConfig, num_tokens

# Every difference between sizes, at a width that is quick: odd head size, channels unlike the width, two rates.
SMALL_DIMS = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "conv_dim": 24,
    "compat": "published",
}


def _twins(config: HubertECGConfig) -> tuple[HubertECG, transformers.HubertModel]:
    """Our model and theirs with the same weights, drawn so that no path is negligible."""
    torch.manual_seed(3)
    model = HubertECG(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    theirs = transformers.HubertModel(transformers.HubertConfig(**config.to_dict())).eval()
    theirs.load_state_dict(model.state_dict(), strict=True)
    return model, theirs


def _config(rate: float, **overrides) -> HubertECGConfig:
    config = HubertECGConfig.preset("tiny", sampling_rate_hz=rate)
    fields = {**SMALL_DIMS, **overrides}
    fields["conv_dim"] = (fields["conv_dim"],) * len(config.conv_kernel)
    return dataclasses.replace(config, **fields)


@pytest.mark.parametrize("batch", [2, 9], ids=["direct", "fourier"])
@pytest.mark.parametrize("taps", [128, 31])
@pytest.mark.parametrize(("rate", "seconds"), [(100, 5), (100, 10), (50, 5), (500, 5)])
def test_all_hidden_states_are_equal(rate, seconds, taps, batch):
    model, theirs = _twins(_config(rate, num_conv_pos_embeddings=taps, conv_bias=taps == 31))
    ecg = torch.randn(batch, 12, rate * seconds)
    with torch.no_grad():
        ours = model(ecg, output_hidden_states=True)
        expected = theirs(ecg.flatten(1), output_hidden_states=True)
    assert len(ours.hidden_states) == len(expected.hidden_states) == 4
    for mine, other in zip(ours.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.last_hidden_state, expected.last_hidden_state, atol=1e-4, rtol=0)
    assert ours.last_hidden_state.shape[1] == num_tokens(model.config, 12 * rate * seconds)


@pytest.mark.slow
def test_published_small_size_is_equal():
    model, theirs = _twins(HubertECGConfig.preset("small"))
    ecg = torch.randn(2, 6000)
    with torch.no_grad():
        ours = model(ecg, output_hidden_states=True).hidden_states
        expected = theirs(ecg, output_hidden_states=True).hidden_states
    assert len(ours) == len(expected) == 9
    for mine, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=0)


def test_gradients_are_equal():
    model, theirs = _twins(_config(100))
    ecg = torch.randn(2, 6000)
    weight = torch.randn(2, 93, 48)
    (model(ecg).last_hidden_state * weight).sum().backward()
    (theirs(ecg).last_hidden_state * weight).sum().backward()
    other = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        if name != "masked_spec_embed":
            # The gradient of the keys' bias is rounding alone: softmax does not see what is added to every key.
            scale = other[name].grad.abs().max().clamp_min(1e-2)
            torch.testing.assert_close(parameter.grad / scale, other[name].grad / scale, atol=1e-4, rtol=0)


def test_masked_tokens_are_replaced_alike():
    model, theirs = _twins(_config(100))
    ecg = torch.randn(3, 6000)
    indices = torch.stack([torch.randperm(93)[:31] for _ in range(3)])
    mask = torch.zeros(3, 93, dtype=torch.bool).scatter(1, indices, True)
    with torch.no_grad():
        ours = model(ecg, mask_indices=indices).last_hidden_state
        expected = theirs(ecg, mask_time_indices=mask).last_hidden_state
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_padding_is_masked_alike_where_both_count_the_same_tokens():
    model, theirs = _twins(_config(100))
    # 64 k + 82 samples hold exactly k + 1 whole receptive fields, and the rule of the centres agrees.
    lengths = torch.tensor([64 * 30 + 82, 64 * 7 + 90, 6000])
    mask = torch.arange(6000) < lengths[:, None]
    ecg = torch.randn(3, 6000) * mask
    with torch.no_grad():
        ours = model(ecg[:, None], lengths=lengths)
        expected = theirs(ecg, attention_mask=mask.long()).last_hidden_state
    assert ours.valid.sum(1).tolist() == [31, 8, 93]
    torch.testing.assert_close(ours.last_hidden_state[ours.valid], expected[ours.valid], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("size", "clusters", "millions"), [("small", 1000, 30.6), ("base", 500, 93.1), ("large", 1000, 188.6)]
)
def test_parameter_counts_are_the_published_ones(size, clusters, millions):
    from hubert_ecg.models import HubertECGForPretraining

    with torch.device("meta"):
        model = HubertECGForPretraining(HubertECGConfig.preset(size, vocab_sizes=[clusters]))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
