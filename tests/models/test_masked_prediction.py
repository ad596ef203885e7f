"""The masked-prediction loss, against its definition in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from hubert_ecg.models import HubertECGConfig, HubertECGForPretraining
from hubert_ecg.ops import span_mask

CONFIG = dataclasses.replace(
    HubertECGConfig.preset("tiny"),
    hidden_size=32,
    num_hidden_layers=2,
    intermediate_size=48,
    conv_dim=(16,) * 5,
    classifier_proj_size=24,
)


def _broadcast_loss(model, states, labels, mask, alpha):
    """The published form: every token against every entry in a 4-D cosine, then the loss on a boolean index."""
    masked = torch.zeros(states.shape[:2], dtype=torch.bool).scatter(1, mask, True)
    total, right = 0.0, []
    for project, codebook, target in zip(model.final_proj, model.label_embedding, labels, strict=True):
        logits = torch.cosine_similarity(project(states).unsqueeze(2), codebook.weight[None, None], dim=-1) / 0.1
        part = F.cross_entropy(logits[masked], target[masked])
        if alpha < 1:
            part = alpha * part + (1 - alpha) * F.cross_entropy(logits[~masked], target[~masked])
        total = total + part
        right.append((logits[masked].argmax(-1) == target[masked]).double().mean())
    return total, torch.stack(right).mean()


@pytest.mark.parametrize("alpha", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("vocab_sizes", [[100], [17, 300]])
def test_loss_and_gradients_equal_the_broadcast_cosine(vocab_sizes, alpha):
    torch.manual_seed(0)
    model = HubertECGForPretraining(dataclasses.replace(CONFIG, vocab_sizes=vocab_sizes)).double().eval()
    ecg = torch.randn(3, 12, 500, dtype=torch.float64)
    mask = span_mask(3, 93, 0.33)
    labels = torch.stack([torch.randint(0, size, (3, 93)) for size in vocab_sizes])
    output = model(ecg, labels=labels, mask_indices=mask, alpha=alpha)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    expected, accuracy = _broadcast_loss(model, model.encode(ecg, None, mask).last_hidden_state, labels, mask, alpha)
    expected.backward()
    torch.testing.assert_close(output.loss, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(output.accuracy.double(), accuracy, atol=1e-6, rtol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-10, rtol=1e-7, msg=name)
    if alpha == 1:
        assert output.unmasked_loss is None
    else:
        torch.testing.assert_close(alpha * output.masked_loss + (1 - alpha) * output.unmasked_loss, output.loss)


def test_float32_loss_is_close_to_float64():
    torch.manual_seed(0)
    model = HubertECGForPretraining(dataclasses.replace(CONFIG, vocab_sizes=[1000])).eval()
    ecg, mask, labels = torch.randn(4, 6000), span_mask(4, 93, 0.33), torch.randint(0, 1000, (4, 93))
    single = model(ecg, labels=labels, mask_indices=mask).loss
    double = model.double()(ecg.double(), labels=labels, mask_indices=mask).loss
    torch.testing.assert_close(single.double(), double, atol=1e-5, rtol=0)


def test_logits_are_cosines_and_come_beside_a_loss_only_on_request():
    model = HubertECGForPretraining(dataclasses.replace(CONFIG, vocab_sizes=[5, 7])).eval()
    ecg, labels, mask = torch.randn(2, 6000), torch.zeros(2, 2, 93, dtype=torch.int64), span_mask(2, 93, 0.33)
    assert model(ecg, labels=labels, mask_indices=mask).logits is None
    asked = model(ecg, labels=labels, mask_indices=mask, output_logits=True).logits
    assert [tuple(part.shape) for part in asked] == [(2, 93, 5), (2, 93, 7)]
    logits = model(ecg).logits
    assert [tuple(part.shape) for part in logits] == [(2, 93, 5), (2, 93, 7)]
    assert max(part.abs().max() for part in logits) <= 10.001


def test_ignored_labels_leave_the_loss():
    torch.manual_seed(0)
    model = HubertECGForPretraining(CONFIG).eval()
    ecg, mask, labels = torch.randn(2, 6000), span_mask(2, 93, 0.33), torch.randint(0, 100, (2, 93))
    some = labels.clone()
    some[0] = -100
    torch.testing.assert_close(
        model(ecg, labels=some, mask_indices=mask).loss,
        model(ecg[1:], labels=labels[1:], mask_indices=mask[1:]).loss,
        atol=1e-5,
        rtol=0,
    )


def test_autocast_keeps_the_cosine_in_float32():
    torch.manual_seed(0)
    model = HubertECGForPretraining(CONFIG).eval()
    ecg, mask, labels = torch.randn(2, 6000), span_mask(2, 93, 0.33), torch.randint(0, 100, (2, 93))
    exact = model(ecg, labels=labels, mask_indices=mask).loss
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ecg, labels=labels, mask_indices=mask, output_logits=True)
    assert output.logits[0].dtype == output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, exact, atol=0.05, rtol=0)


def test_codebooks_change_between_iterations():
    model = HubertECGForPretraining(CONFIG)
    projection = model.final_proj[0].weight.detach().clone()
    model.resize_codebooks([500, 30])
    assert model.config.vocab_sizes == [500, 30]
    assert model.config.to_dict()["ensemble_length"] == 2
    torch.testing.assert_close(model.final_proj[0].weight, projection)
    labels = torch.stack([torch.randint(0, 500, (2, 93)), torch.randint(0, 30, (2, 93))])
    model(torch.randn(2, 6000), labels=labels, mask_indices=span_mask(2, 93, 0.33)).loss.backward()
    assert model.label_embedding[0].weight.grad.shape == (500, 24)
    model.resize_codebooks([9])
    assert len(model.final_proj) == len(model.label_embedding) == 1
    reloaded = HubertECGForPretraining(model.config)
    reloaded.load_state_dict(model.state_dict())


def test_layerdrop_is_drawn_by_the_host_generator_and_only_in_training():
    model = HubertECGForPretraining(dataclasses.replace(CONFIG, num_hidden_layers=12, layerdrop=0.5))
    ran = []
    for index, layer in enumerate(model.encoder.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    ecg = torch.randn(1, 6000)

    def layers_run() -> tuple[int, ...]:
        ran.clear()
        model(ecg)
        return tuple(ran)

    torch.manual_seed(1)
    first = [layers_run() for _ in range(20)]
    torch.manual_seed(1)
    assert [layers_run() for _ in range(20)] == first
    assert 0.3 < sum(map(len, first)) / (20 * 12) < 0.7
    model.eval()
    assert all(layers_run() == tuple(range(12)) for _ in range(5))


@pytest.mark.parametrize("layerdrop", [0.0, 1.0], ids=["last layer", "no layer"])
@pytest.mark.parametrize("lengths", [None, [500, 260]], ids=["whole", "padded"])
def test_the_last_layer_computes_masked_tokens_alone_where_only_they_count(lengths, layerdrop):
    torch.manual_seed(0)
    still = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "layerdrop": layerdrop}
    model = HubertECGForPretraining(dataclasses.replace(CONFIG, **still)).double().train()
    ecg, mask, labels = torch.randn(2, 12, 500).double(), span_mask(2, 93, 0.33), torch.randint(0, 100, (2, 93))
    inputs = {"lengths": None if lengths is None else torch.tensor(lengths), "labels": labels, "mask_indices": mask}
    few, all_ = model(ecg, **inputs), model(ecg, **inputs, output_hidden_states=True)
    assert few.last_hidden_state.shape == (2, mask.shape[1], 32)
    assert all_.last_hidden_state.shape == (2, 93, 32)
    chosen = all_.last_hidden_state.gather(1, mask[..., None].expand(-1, -1, 32))
    torch.testing.assert_close(few.last_hidden_state, chosen, atol=1e-12, rtol=0)
    torch.testing.assert_close(few.loss, all_.loss, atol=1e-12, rtol=0)


def test_gradient_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    model = HubertECGForPretraining(CONFIG)
    ecg, mask, labels = torch.randn(2, 6000), span_mask(2, 93, 0.33), torch.randint(0, 100, (2, 93))
    gradients = []
    for flag in (False, True):
        model.encoder.gradient_checkpointing = flag
        model.zero_grad()
        torch.manual_seed(5)
        model(ecg, labels=labels, mask_indices=mask).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=0, rtol=0, msg=name)


def test_it_learns_clusters_that_follow_from_the_signal():
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, vocab_sizes=[3], hidden_dropout=0.0, num_hidden_layers=1)
    model = HubertECGForPretraining(config)
    labels = torch.randint(0, 3, (4, 93))
    ecg = torch.randn(4, 6000) * 0.1
    ecg[:, : 93 * 64] += labels.repeat_interleave(64, dim=1) * torch.randn(93 * 64)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(30):
        loss = model(ecg, labels=labels, mask_indices=span_mask(4, 93, 0.15), alpha=0.0).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


def test_one_graph_without_breaks():
    """Compiled as one graph, padding and loss included, the numbers are the same; no tensor steers Python."""
    torch.manual_seed(0)
    model = HubertECGForPretraining(CONFIG).eval()
    ecg, labels = torch.randn(2, 12, 500), torch.randint(0, 100, (2, 93))
    lengths = torch.tensor([500, 300])
    mask = span_mask(2, 93, 0.33)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(ecg, lengths, labels=labels, mask_indices=mask).loss,
        model(ecg, lengths, labels=labels, mask_indices=mask).loss,
        atol=1e-5,
        rtol=0,
    )


@pytest.mark.parametrize(
    ("labels", "mask", "message"),
    [
        (torch.zeros(2, 92), span_mask(2, 93, 0.3), r"labels must be \[1, 2, 93\]"),
        (torch.zeros(2, 2, 93), span_mask(2, 93, 0.3), r"labels must be \[1, 2, 93\]"),
        (torch.zeros(2, 93), None, "mask_indices must come with labels"),
        (torch.zeros(2, 93), span_mask(3, 93, 0.3), r"mask_indices must be \[2, M\]"),
    ],
)
def test_wrong_labels_are_named(labels, mask, message):
    with pytest.raises(ValueError, match=message):
        HubertECGForPretraining(CONFIG)(torch.zeros(2, 6000), labels=labels, mask_indices=mask)
