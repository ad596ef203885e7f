"""The loss of masked prediction, forward and backward: ours, and logits of every token in two forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hubert_ecg import ops
from hubert_ecg.testing import assert_close

TOKENS, HIDDEN, PROJECTED, TEMPERATURE = 93, 768, 256, 0.1
BATCH = {"cpu": 8, "cuda": 448}


@pytest.fixture(params=[100, 1000], ids=lambda entries: f"K{entries}")
def leaves(request, device):
    random = torch.Generator(device).manual_seed(0)
    shapes = (BATCH[device.type], TOKENS, HIDDEN), (PROJECTED, HIDDEN), (PROJECTED,), (request.param, PROJECTED)
    x, weight, bias, codebook = (torch.randn(shape, generator=random, device=device) for shape in shapes)
    return tuple(leaf.requires_grad_() for leaf in (x, weight * HIDDEN**-0.5, bias, codebook))


@pytest.mark.benchmark(group="codebook_loss")
def test_codebook_loss(race, checked, leaves, device):
    batch, num_entries = BATCH[device.type], len(leaves[3])
    random = torch.Generator(device).manual_seed(1)
    labels = torch.randint(0, num_entries, (batch, TOKENS), generator=random, device=device)
    mask = ops.span_mask(batch, TOKENS, 0.33, seed=2, device=device)
    masked = torch.zeros(batch, TOKENS, dtype=torch.bool, device=device).scatter(1, mask, True)

    def with_gradients(function, leaves=leaves):
        def run():
            loss, accuracy = function(*leaves)
            return loss, accuracy, torch.autograd.grad(loss, leaves)

        return run

    def ours(x, weight, bias, codebook):
        return ops.codebook_loss(x, weight, codebook, labels, mask, TEMPERATURE, bias)

    def of_all(logits):
        chosen, target = logits[masked] / TEMPERATURE, labels[masked]
        return F.cross_entropy(chosen, target), (chosen.argmax(1) == target).to(chosen.dtype).mean()

    def broadcast_cosine(x, weight, bias, codebook):
        projected = F.linear(x, weight, bias)
        return of_all(F.cosine_similarity(projected[:, :, None], codebook[None, None], dim=-1))

    def products(x, weight, bias, codebook):
        projected = F.normalize(F.linear(x, weight, bias), dim=-1)
        return of_all(projected @ F.normalize(codebook, dim=-1).T)

    exact = with_gradients(products, tuple(leaf.detach().double().requires_grad_() for leaf in leaves))()
    candidates = {
        "ours": ours,
        "broadcast cosine of all tokens": broadcast_cosine,
        "one product of all tokens": products,
    }
    if device.type == "cuda":
        candidates["one product of all tokens, compiled"] = torch.compile(products)
    runs = checked(
        {name: with_gradients(function) for name, function in candidates.items()},
        lambda name, answer: assert_close(answer, exact, rtol=1e-5, atol=1e-5, name=name),
    )
    race(runs.pop("ours"), runs, "records", batch, rounds=3)
