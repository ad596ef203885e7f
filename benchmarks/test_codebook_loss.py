"""The loss of masked prediction, forward and backward: ours, and logits of every token in two forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hubert_ecg import ops
from hubert_ecg.testing import assert_close

BATCH, TOKENS, HIDDEN, PROJECTED, TEMPERATURE = 8, 93, 768, 256, 0.1


@pytest.fixture(params=[100, 1000], ids=lambda entries: f"K{entries}")
def leaves(request):
    random = torch.Generator().manual_seed(0)
    shapes = (BATCH, TOKENS, HIDDEN), (PROJECTED, HIDDEN), (PROJECTED,), (request.param, PROJECTED)
    x, weight, bias, codebook = (torch.randn(shape, generator=random) for shape in shapes)
    return tuple(leaf.requires_grad_() for leaf in (x, weight * HIDDEN**-0.5, bias, codebook))


@pytest.mark.benchmark(group="codebook_loss")
def test_codebook_loss(race, leaves):
    num_entries = len(leaves[3])
    labels = torch.randint(0, num_entries, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))
    mask = ops.span_mask(BATCH, TOKENS, 0.33, seed=2)
    masked = torch.zeros(BATCH, TOKENS, dtype=torch.bool).scatter(1, mask, True)

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
    for name, function in (("ours", ours), ("broadcast", broadcast_cosine), ("products", products)):
        assert_close(with_gradients(function)(), exact, rtol=1e-5, atol=1e-5, name=name)
    peers = {
        "broadcast cosine of all tokens": with_gradients(broadcast_cosine),
        "one product of all tokens": with_gradients(products),
    }
    race(with_gradients(ours), peers, "records", BATCH, rounds=3)
