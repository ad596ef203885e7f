"""The loss of masked prediction beyond what every op is tested for: the whole of it, hostile values, memory."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hubert_ecg.ops import codebook_cross_entropy, codebook_loss, linear, use_backend
from hubert_ecg.testing import assert_close

BACKENDS = ("reference", "composed")


def made(b=3, n=7, h=10, p=6, k=11, dtype=torch.float64, seed=0):
    random = torch.Generator().manual_seed(seed)
    x, weight, bias, codebook = (torch.randn(s, generator=random, dtype=dtype) for s in ((b, n, h), (p, h), p, (k, p)))
    labels = torch.randint(0, k, (b, n), generator=random)
    mask = torch.stack([torch.randperm(n, generator=random)[: n // 2 + 1] for _ in range(b)]) if b else labels[:, :3]
    return x, weight, bias, codebook, labels, mask


def plain(x, weight, bias, codebook, labels, mask, temperature=0.1):
    """The published form: every token against every entry in a 4-D cosine."""
    logits = F.cosine_similarity(F.linear(x, weight, bias)[:, :, None], codebook[None, None], dim=-1, eps=1e-16)
    rows = torch.cat([(logits[i, mask[i]] / temperature) for i in range(len(x))])
    target = torch.cat([labels[i, mask[i]] for i in range(len(x))])
    known = target != -100
    loss = F.cross_entropy(rows[known], target[known]) if known.any() else 0 * logits.sum()
    return loss, (rows.argmax(1) == target)[known].double().mean() if known.any() else torch.zeros(())


def with_gradients(function, *leaves):
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    loss, accuracy = function(*leaves)
    return loss, accuracy, torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    "sizes", [{}, {"k": 1}, {"b": 1, "n": 1, "h": 1, "p": 1, "k": 2}, {"b": 5, "n": 31, "k": 2003, "p": 17}]
)
def test_is_the_published_loss_on_masked_tokens(backend, dtype, atol, sizes):
    x, weight, bias, codebook, labels, mask = made(**sizes)
    labels[0, ::3] = -100
    mask[-1, -1] = mask[-1, 0]  # twice: counts twice

    def ours(x, weight, bias, codebook):
        return codebook_loss(x, weight, codebook, labels, mask, bias=bias)

    def theirs(x, weight, bias, codebook):
        return plain(x, weight, bias, codebook, labels, mask)

    leaves = x, weight, bias, codebook
    with use_backend(backend):
        actual = with_gradients(ours, *(leaf.to(dtype) for leaf in leaves))
    expected = with_gradients(theirs, *leaves)
    assert actual[0].dtype == actual[1].dtype == dtype
    assert_close(actual, expected, rtol=atol, atol=atol, name="loss, accuracy, gradients")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    x, weight, bias, codebook, labels, mask = (t.requires_grad_() if t.is_floating_point() else t for t in made(2, 4))
    labels[1, 0] = -100

    def loss(x, weight, codebook, bias):
        return codebook_loss(x, weight, codebook, labels, mask, 0.3, bias)[0]

    with use_backend(backend):
        assert torch.autograd.gradcheck(loss, (x, weight, codebook, bias))


def test_an_ensemble_adds_losses_and_means_accuracies():
    one, two = made(k=5), made(p=9, k=40, seed=1)
    x, mask = one[0], one[5]
    labels = torch.stack([one[4], two[4]])
    together = codebook_loss(x, (one[1], two[1]), [one[3], two[3]], labels, mask, bias=(one[2], None))
    first = codebook_loss(x, one[1], one[3], one[4], mask, bias=one[2])
    second = codebook_loss(x, two[1], two[3], two[4], mask)
    assert_close(together[0], first[0] + second[0], rtol=1e-12, atol=0)
    assert_close(together[1], (first[1] + second[1]) / 2, rtol=1e-12, atol=0)


def test_without_a_mask_all_tokens_count():
    x, weight, _, codebook, labels, _ = made()
    everything = torch.arange(x.shape[1]).expand(len(x), -1)
    assert codebook_loss(x, weight, codebook, labels) == codebook_loss(x, weight, codebook, labels, everything)


def test_other_tokens_take_no_part():
    x, weight, _, codebook, labels, mask = made()
    other = torch.ones(labels.shape, dtype=torch.bool).scatter(1, mask, False)
    expected = codebook_loss(x, weight, codebook, labels, mask)
    hostile = x.masked_fill(other[..., None], torch.nan).requires_grad_()
    actual = codebook_loss(hostile, weight, codebook, labels.masked_fill(other, 10**9), mask)
    assert actual == expected
    actual[0].backward()
    assert hostile.grad.isfinite().all()
    assert not hostile.grad[other].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("b", "ignored"), [(3, True), (0, False)])
def test_nothing_to_count_is_zero_with_zero_gradients(backend, b, ignored):
    x, weight, _, codebook, labels, mask = made(b)
    labels = torch.full_like(labels, -100) if ignored else labels
    with use_backend(backend):
        loss, accuracy, gradients = with_gradients(
            lambda x, weight, codebook: codebook_loss(x, weight, codebook, labels, mask), x, weight, codebook
        )
    assert loss == accuracy == 0
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.004, 0.1, 30.0])
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e15, 1e30])
def test_any_scale_of_float32(backend, scale, temperature):
    random = torch.Generator().manual_seed(3)
    x, codebook = (scale * torch.randn(n, 8, generator=random) for n in (40, 9))
    x[5], codebook[4] = 0, 0
    labels = torch.randint(0, 9, (40,), generator=random)

    def run(x, codebook):
        loss, logsumexp, predicted = codebook_cross_entropy(x, codebook, labels, temperature)
        return (loss + 0.1 * logsumexp).sum(), predicted

    with use_backend(backend):
        loss, predicted, gradients = with_gradients(run, x, codebook)
    with use_backend("reference"):
        exact = with_gradients(run, x.double(), codebook.double())
    assert_close(loss, exact[0], rtol=1e-5, atol=1e-5, name="loss")
    assert torch.equal(predicted, exact[1])
    for i, (gradient, want) in enumerate(zip(gradients, exact[2], strict=True)):
        for row, its in zip(gradient.double(), want, strict=True):
            size = float(its.norm() + want.norm(dim=1).median())
            assert_close(row, its, rtol=0, atol=1e-4 * size, name=f"gradient {i}")


def test_not_a_number_is_loud():
    x, codebook, labels = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 3])
    x[1, 0], x[2, 1] = torch.nan, torch.inf
    for backend in BACKENDS:
        with use_backend(backend):
            loss = codebook_cross_entropy(x, codebook, labels)[0]
        assert loss.isnan().tolist() == [False, True, True, False]
        op = torch.ops.hubert_ecg.codebook_cross_entropy
        with use_backend(backend):
            loss = op(torch.ones(4, 3), codebook, torch.tensor([0, 5, -1, -100]), 0.1)[0]
        assert loss.isnan().tolist() == [False, True, True, False]
        assert loss[3] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    x, _, _, codebook, labels, _ = made(dtype=torch.float32)
    rows = x.flatten(0, 1)[:, :6].to(dtype)
    loss = codebook_cross_entropy(rows, codebook.to(dtype), labels.flatten())[0]
    assert loss.dtype == torch.float32
    expected = codebook_cross_entropy(rows.float(), codebook.to(dtype).float(), labels.flatten())[0]
    assert_close(loss, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_touches_the_projection_alone(backend):
    x, weight, _, codebook, labels, mask = made(k=300, p=64, dtype=torch.float32)
    leaves = [t.clone().requires_grad_() for t in (x, weight, codebook)]
    with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        loss, accuracy = codebook_loss(leaves[0], leaves[1], leaves[2], labels, mask)
        loss.backward()
    assert loss.dtype == accuracy.dtype == torch.float32
    again = [t.clone().requires_grad_() for t in (x, weight, codebook)]
    with use_backend(backend):
        with torch.autocast("cpu", torch.bfloat16):
            projected = linear(again[0], again[1])
        expected = codebook_loss(projected.float(), torch.eye(64), again[2], labels, mask)[0]
        expected.backward()
    assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert_close(leaves[2].grad, again[2].grad, rtol=1e-4, atol=1e-6)
    assert_close(leaves[0].grad, again[0].grad, rtol=2e-2, atol=2e-3)


def test_nothing_of_the_size_of_the_logits_is_kept():
    x, weight, _, codebook, labels, mask = made(4, 93, 8, 4, 2000, dtype=torch.float32)
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        codebook_loss(x, weight, codebook, labels, mask)
    assert max(kept) <= max(codebook.numel(), x.numel())


def test_rows_in_chunks_are_the_rows_at_once(monkeypatch):
    random = torch.Generator().manual_seed(0)
    rows, codebook = (torch.randn(n, 33, generator=random, dtype=torch.float64) for n in (300, 9))
    labels = torch.randint(0, 9, (300,), generator=random)

    def run(rows, codebook):
        loss, _, predicted = codebook_cross_entropy(rows, codebook, labels)
        return loss.sum(), predicted

    expected = with_gradients(run, rows, codebook)
    monkeypatch.setattr(sys.modules["hubert_ecg.ops.codebook_loss"], "_CHUNK", 64)
    assert_close(with_gradients(run, rows, codebook), expected, rtol=1e-12, atol=1e-12)


def test_one_graph():
    x, weight, bias, codebook, labels, mask = made()

    def run(x, weight, codebook):
        return codebook_loss(x, weight, codebook, labels, mask, bias=bias)

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    actual, expected = (with_gradients(f, x, weight, codebook) for f in (compiled, run))
    assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 10)}, r"x must be floating point \[B, N, H\], got float32\[3, 10\]"),
        ({"projection": torch.zeros(6, 9)}, r"projection must be floating point \[P, 10\], got float32\[6, 9\]"),
        ({"projection": torch.zeros(6, 10).long()}, r"projection must be floating point \[P, 10\], got int64\[6, 10\]"),
        ({"projection": torch.zeros(6, 10)}, r"projection must be of the dtype of x .*, got float32\[6, 10\]"),
        ({"bias": torch.zeros(6).half()}, r"bias must be of the dtype of x .*, got float16\[6\]"),
        ({"projection": None}, "projection must be a NumPy, CuPy or torch array, got None"),
        ({"codebook": ["a"]}, "codebook must be a NumPy, CuPy or torch array, got str"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"projection": ()}, "projection, codebook and bias must be one each or equally many, got 0, 1 and 0"),
        ({"codebook": torch.zeros(11, 5)}, r"codebook must be floating point \[K, 6\], got float32\[11, 5\]"),
        ({"bias": torch.zeros(5)}, r"bias must be floating point \[6\], got float32\[5\]"),
        ({"labels": torch.zeros(3, 7)}, r"labels must be int64 \[3, 7\], got float32\[3, 7\]"),
        ({"mask_indices": torch.zeros(2, 4).long()}, r"mask_indices must be int64 \[3, M\], got int64\[2, 4\]"),
        ({"temperature": -1.0}, r"temperature must be above 0, got -1\.0"),
        ({"labels": torch.full((3, 7), 11)}, r"labels must be from 0 to 10, or -100, got 11"),
        ({"labels": torch.full((3, 7), -1)}, r"labels must be from 0 to 10, or -100, got -1"),
    ],
)
def test_refuses_bad_input_in_its_own_words(change, message):
    names = ("x", "projection", "bias", "codebook", "labels", "mask_indices")
    with pytest.raises(ValueError, match=f"codebook_(loss|cross_entropy): {message}"):
        codebook_loss(**{**dict(zip(names, made(), strict=True)), **change})


def test_numpy_arrays_give_numpy_numbers():
    x, projection, bias, codebook, labels, mask = made()
    expected = codebook_loss(x, projection, codebook, labels, mask, bias=bias)
    given = [tensor.detach().numpy() for tensor in (x, projection, codebook, labels, mask)]
    found = codebook_loss(*given, bias=bias.detach().numpy())
    for mine, other in zip(found, expected, strict=True):
        assert isinstance(mine, np.ndarray)
        np.testing.assert_allclose(mine, other.detach().numpy(), rtol=1e-6)


@pytest.mark.parametrize("index", [5, -1])
def test_a_masked_token_outside_of_its_record_is_refused(index):
    mask = torch.tensor([[0, index], [1, 2]])
    with pytest.raises(ValueError, match=f"codebook_loss: mask_indices must be from 0 to 4, got {index}"):
        codebook_loss(torch.randn(2, 5, 4), torch.eye(4), torch.eye(4), torch.zeros(2, 5, dtype=torch.int64), mask)
