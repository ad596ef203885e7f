"""What the loss of masked prediction computes, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
# A shorter vector is divided by this instead of its length.
EPSILON = 1e-8


def codebook_cross_entropy(
    x: Tensor, codebook: Tensor, labels: Tensor, temperature: float = 0.1
) -> tuple[Tensor, Tensor, Tensor]:
    logits = x / _length(x) @ (codebook / _length(codebook)).T / temperature
    logsumexp = logits.logsumexp(1)
    own = logits.gather(1, labels.clamp(0, len(codebook) - 1)[:, None])[:, 0]
    return row_loss(logsumexp - own, labels, len(codebook)), logsumexp, logits.argmax(1)


def codebook_cross_entropy_backward(
    grad_loss: Tensor,
    grad_logsumexp: Tensor,
    x: Tensor,
    codebook: Tensor,
    labels: Tensor,
    logsumexp: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    u, c = x / _length(x), codebook / _length(codebook)
    grad_loss = row_loss(grad_loss, labels, len(codebook))
    slope = (u @ c.T / temperature - logsumexp[:, None]).exp() * (grad_loss + grad_logsumexp)[:, None]
    slope = slope.scatter_add(1, labels.clamp(0, len(codebook) - 1)[:, None], -grad_loss[:, None]) / temperature
    return _through_length(slope @ c, x), _through_length(slope.T @ u, codebook)


def row_loss(loss: Tensor, labels: Tensor, num_entries: int) -> Tensor:
    """Loss of each row: 0 where the label is ignored, NaN where it is no entry of the codebook."""
    known = (labels >= 0) & (labels < num_entries)
    return loss.where(known, torch.where(labels == IGNORED, 0.0, torch.nan).to(loss.dtype))


def _length(x: Tensor) -> Tensor:
    # In float64, where no square overflows.
    return torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64).clamp_min(EPSILON).to(x.dtype)


def _through_length(grad: Tensor, x: Tensor) -> Tensor:
    length = _length(x)
    along = (grad * x / length).sum(1, keepdim=True) * (length > EPSILON)
    return (grad - along * x / length) / length


def codebook_cross_entropy_samples(device: str) -> Iterator[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(0)

    def sample(r: int, k: int, p: int, temperature: float = 0.1, scale: float = 1.0) -> tuple[Any, ...]:
        x, codebook = (scale * torch.randn(n, p, generator=random) for n in (r, k))
        labels = torch.randint(0, k, (r,), generator=random)
        labels[::5] = IGNORED
        return x.to(device), codebook.to(device), labels.to(device), temperature

    for shape in [(7, 5, 3), (0, 3, 5), (1, 1, 1), (33, 100, 24), (65, 130, 33), (70, 67, 129), (3, 515, 7)]:
        yield sample(*shape)
    # Squares that overflow in float32; cosines as they are.
    yield sample(20, 9, 5, scale=1e25)
    yield sample(20, 9, 5, temperature=1.0)
    # Vectors without a direction, a codebook of which every entry but one is such, labels that are all ignored.
    x, codebook, labels, temperature = sample(9, 6, 5)
    yield x.where(torch.arange(9, device=device)[:, None] % 3 > 0, 0.0), codebook, labels, temperature
    yield x, codebook.where(torch.arange(6, device=device)[:, None] == 4, 0.0), labels, temperature
    yield x, codebook, torch.full_like(labels, IGNORED), temperature


def codebook_cross_entropy_backward_samples(device: str) -> Iterator[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(1)
    for x, codebook, labels, temperature in codebook_cross_entropy_samples(device):
        grads = (torch.randn(len(x), generator=random).to(device) for _ in range(2))
        logsumexp = codebook_cross_entropy(x.double(), codebook.double(), labels, temperature)[1].to(x.dtype)
        yield *grads, x, codebook, labels, logsumexp, temperature


# A logit of 1 / temperature has an error of some ulp: the loss has it as it is, the gradient as a factor.
codebook_cross_entropy_tolerance = {torch.float32: (1e-5, 1e-5), torch.float64: (1e-12, 1e-12)}
codebook_cross_entropy_backward_tolerance = {torch.float32: (1e-4, 1e-5), torch.float64: (1e-11, 1e-12)}


def codebook_cross_entropy_errors() -> Iterator[tuple[tuple[Any, ...], str]]:
    op, x, labels = "codebook_cross_entropy", torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    yield (x[0], x, labels), rf"{op}: x must be floating point \[R, P\], got float32\[3\]"
    yield (x.long(), x, labels), rf"{op}: x must be floating point \[R, P\], got int64\[4, 3\]"
    yield (x, x[:, :2], labels), rf"{op}: codebook must be floating point \[K, 3\] with K > 0, got float32\[4, 2\]"
    yield (x, x[:0], labels), rf"{op}: codebook must be .* with K > 0, got float32\[0, 3\]"
    yield (x, x.to("meta"), labels), rf"{op}: codebook must be on the device of x \(\w+(:\d+)?\), got meta"
    yield (x, x, labels[:3]), rf"{op}: labels must be int64 \[4\], got int64\[3\]"
    yield (x, x, labels.int()), rf"{op}: labels must be int64 \[4\], got int32\[4\]"
    yield (x, x, labels.to("meta")), rf"{op}: labels must be on the device of x \(\w+(:\d+)?\), got meta"
    yield (x, x, labels, 0.0), rf"{op}: temperature must be above 0, got 0.0"
    yield (x, x, labels, float("nan")), rf"{op}: temperature must be above 0, got nan"
