"""The loss of masked prediction: which entry of a codebook a masked token is nearest to, by its cosine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hubert_ecg.ops import codebook_loss_reference as reference
from hubert_ecg.ops._op import (
    Array,
    Op,
    autocast_dtype,
    check_device,
    check_dtype,
    check_real,
    describe,
    takes_arrays,
    to_tensor,
)
from hubert_ecg.ops.codebook_loss_reference import EPSILON, IGNORED, row_loss
from hubert_ecg.ops.linear import linear

_cross_entropy = Op(
    "codebook_cross_entropy(Tensor x, Tensor codebook, Tensor labels, float temperature=0.1)"
    " -> (Tensor loss, Tensor logsumexp, Tensor predicted)",
    reference.codebook_cross_entropy,
)
_backward = Op(
    "codebook_cross_entropy_backward(Tensor grad_loss, Tensor grad_logsumexp, Tensor x, Tensor codebook, Tensor labels,"
    " Tensor logsumexp, float temperature) -> (Tensor, Tensor)",
    reference.codebook_cross_entropy_backward,
)

# Logits that are held at a time: as many as stay in the caches of a CPU.
_CHUNK = 1 << 19


@takes_arrays("x", "labels", "mask_indices")
def codebook_loss(
    x: Array,
    projection: Array | Sequence[Array],
    codebook: Array | Sequence[Array],
    labels: Array,
    mask_indices: Array | None = None,
    temperature: float = 0.1,
    bias: Array | Sequence[Array | None] | None = None,
) -> tuple[Array, Array]:
    """Loss and accuracy of predicting the clusters of masked tokens.

    The masked rows of ``x`` are projected, ``p = x W^T + b``, and compared with the entries of the codebook,
    ``logits[k] = cos(p, codebook[k]) / temperature``; the loss is the mean cross entropy with the labels, as in
    HuBERT (Hsu et al. 2021, equation 3). Tokens that are not masked take no part, and nothing of the size of the
    logits is kept for the backward pass. Under autocast the projection alone is in half precision.

    For an ensemble of E codebooks, of any sizes, give sequences of projections, codebooks and biases, and labels
    ``[E, B, N]``: losses are added up, of accuracies the mean is taken.

    >>> x = torch.tensor([[[3.0, 0.0], [0.0, 2.0], [5.0, 5.0]]])
    >>> loss, accuracy = codebook_loss(x, torch.eye(2), torch.eye(2), torch.tensor([[0, 0, 1]]), torch.tensor([[0, 1]]))
    >>> round(float(loss), 4), float(accuracy)
    (5.0, 0.5)

    Args:
        x: hidden states, [B, N, H] floating point.
        projection: W, [P, H], or E of them.
        codebook: [K, P], or E of them.
        labels: [B, N] int64, or [E, B, N]; -100 is ignored.
        mask_indices: [B, M] int64, the tokens that count, as :func:`span_mask` draws them; one that is there twice
            counts twice. Default: all tokens.
        temperature: what cosines are divided by.
        bias: b, [P], or E of them (None among them, too); default: none.

    Returns:
        The loss and the share of the tokens whose label is the nearest entry, [] float32 (float64 where ``x`` is);
        0 where every label is ignored.

    Raises:
        ValueError: a wrong shape, dtype or device, named with what was given; on a CPU, a label that no codebook entry
            has. (On CUDA the loss is then NaN: a look would make the host wait.)
    """
    if not isinstance(projection, Sequence):
        _check_tokens(x, labels)
        labels = labels[None]
    projections, codebooks = _listed("projection", projection), _listed("codebook", codebook)
    biases: list[Tensor | None] = [None] * len(projections)
    if isinstance(bias, Sequence):
        biases = [None if shift is None else _tensor("bias", shift) for shift in bias]
    elif bias is not None:
        biases = [_tensor("bias", bias)] * len(projections)
    _check_ensemble(x, projections, codebooks, biases, labels, mask_indices)
    rows, targets = x.flatten(0, 1), labels.flatten(1)
    if mask_indices is not None:
        if x.device.type == "cpu" and not torch.compiler.is_compiling() and mask_indices.numel():
            low, high = (int(bound) for bound in mask_indices.aminmax())
            if low < 0 or high >= x.shape[1]:
                want = f"from 0 to {x.shape[1] - 1}"
                raise ValueError(f"codebook_loss: mask_indices must be {want}, got {low if low < 0 else high}")
        place = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
        place = (mask_indices + place).flatten()
        rows, targets = rows.index_select(0, place), targets.index_select(1, place)
    losses, shares = [], []
    for weight, shift, entries, target in zip(projections, biases, codebooks, targets, strict=True):
        loss, _, predicted = codebook_cross_entropy(linear(rows, weight, shift), entries, target, temperature)
        count = (target != IGNORED).sum().clamp_min(1)
        losses.append(loss.sum() / count)
        shares.append((predicted == target).sum().to(loss.dtype) / count)
    return torch.stack(losses).sum(), torch.stack(shares).mean()


@takes_arrays("x", "codebook", "labels")
def codebook_cross_entropy(
    x: Array, codebook: Array, labels: Array, temperature: float = 0.1
) -> tuple[Array, Array, Array]:
    """Cross entropy of labels and ``logits[r, k] = cos(x[r], codebook[k]) / temperature``, without keeping the logits.

    A vector shorter than 1e-8 is divided by 1e-8 rather than by its length.

    >>> codebook_cross_entropy(torch.tensor([[0.0, 2.0]]), torch.eye(2), torch.tensor([1]), temperature=1.0)
    (tensor([0.3133]), tensor([1.3133]), tensor([1]))

    Args:
        x: [R, P] floating point; half precision is computed in float32, whatever autocast says.
        codebook: [K, P] floating point.
        labels: [R] int64 from 0 to K - 1, or -100: ignored.
        temperature: above 0.

    Returns:
        loss [R] ``logsumexp - logits[label]``, 0 where the label is ignored; logsumexp [R] of the logits; predicted [R]
        int64, the nearest entry.

    Raises:
        ValueError: a wrong shape, dtype or device, named with what was given; on a CPU, a label that no entry has. (On
            CUDA its loss is NaN.)
    """
    op = "codebook_cross_entropy"
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"{op}: x must be floating point [R, P], got {describe(x)}")
    if codebook.ndim != 2 or not codebook.is_floating_point() or len(codebook) < 1 or codebook.shape[1] != x.shape[1]:
        raise ValueError(
            f"{op}: codebook must be floating point [K, {x.shape[1]}] with K > 0, got {describe(codebook)}"
        )
    if labels.dtype != torch.int64 or labels.shape != x.shape[:1]:
        raise ValueError(f"{op}: labels must be int64 [{len(x)}], got {describe(labels)}")
    check_device(op, x, codebook=codebook, labels=labels)
    check_real(f"{op}: temperature", temperature)
    if not temperature > 0:
        raise ValueError(f"{op}: temperature must be above 0, got {temperature}")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        strange = (labels != IGNORED) & ((labels < 0) | (labels >= len(codebook)))
        if strange.any():
            given = int(labels[strange][0])
            raise ValueError(f"{op}: labels must be from 0 to {len(codebook) - 1}, or {IGNORED}, got {given}")
    wide = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return _cross_entropy.call(x.to(wide), codebook.to(wide), labels, temperature)


def _listed(name: str, given: Array | Sequence[Array]) -> list[Tensor]:
    return [_tensor(name, array) for array in (given if isinstance(given, Sequence) else [given])]


def _tensor(name: str, array: Array) -> Tensor:
    return array if isinstance(array, Tensor) else to_tensor(array, f"codebook_loss: {name}")


def _check_tokens(x: Tensor, labels: Tensor, *ensemble: int) -> None:
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"codebook_loss: x must be floating point [B, N, H], got {describe(x)}")
    want = [*ensemble, *x.shape[:2]]
    if labels.dtype != torch.int64 or list(labels.shape) != want:
        raise ValueError(f"codebook_loss: labels must be int64 {want}, got {describe(labels)}")


def _check_ensemble(
    x: Tensor,
    projections: Sequence[Tensor],
    codebooks: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    labels: Tensor,
    mask_indices: Tensor | None,
) -> None:
    op = "codebook_loss"
    if not projections or not len(projections) == len(codebooks) == len(biases):
        raise ValueError(
            f"{op}: projection, codebook and bias must be one each or equally many, "
            f"got {len(projections)}, {len(codebooks)} and {len(biases)}"
        )
    for weight, entries, shift in zip(projections, codebooks, biases, strict=True):
        if weight.ndim != 2 or weight.shape[1] != x.shape[2] or not weight.is_floating_point():
            raise ValueError(f"{op}: projection must be floating point [P, {x.shape[2]}], got {describe(weight)}")
        if entries.ndim != 2 or entries.shape[1] != len(weight) or not entries.is_floating_point():
            raise ValueError(f"{op}: codebook must be floating point [K, {len(weight)}], got {describe(entries)}")
        if shift is not None and (shift.shape != weight.shape[:1] or not shift.is_floating_point()):
            raise ValueError(f"{op}: bias must be floating point [{len(weight)}], got {describe(shift)}")
        check_device(op, x, projection=weight, codebook=entries, bias=shift)
        if autocast_dtype(x) is None:
            check_dtype(op, x, projection=weight, bias=shift)
    _check_tokens(x, labels, len(projections))
    check_device(op, x, mask_indices=mask_indices)
    if mask_indices is not None and (mask_indices.dtype != torch.int64 or mask_indices.shape[:-1] != x.shape[:1]):
        raise ValueError(f"{op}: mask_indices must be int64 [{len(x)}, M], got {describe(mask_indices)}")


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of length 1, and what they were multiplied by."""
    # Divided by their largest number first, so that no square overflows.
    largest = torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True).clamp_min(EPSILON)
    u = (x / largest).contiguous()
    scale = (torch.linalg.vector_norm(u, dim=1, keepdim=True) * largest).clamp_min(EPSILON).reciprocal()
    return u.mul_(largest * scale), scale


def _through_unit(grad: Tensor, u: Tensor, scale: Tensor) -> Tensor:
    """The gradient of ``x``, in place of that of ``u, scale = _unit(x)``: along ``u`` only where x is short."""
    along = (grad[:, None] @ u[..., None])[..., 0] * (scale * EPSILON < 1)
    return grad.addcmul_(u, along, value=-1).mul_(scale)


@_cross_entropy.fake
def _(x, codebook, labels, temperature=0.1):
    return _outputs(x, labels)


@_backward.fake
def _(grad_loss, grad_logsumexp, x, codebook, labels, logsumexp, temperature):
    return x.new_empty(x.shape), codebook.new_empty(codebook.shape)


@_cross_entropy.composed
def _(x, codebook, labels, temperature=0.1):
    (u, _), (c, _) = _unit(x), _unit(codebook)
    loss, logsumexp, predicted = _outputs(x, labels)
    u.div_(temperature)
    for at in _chunks(x, codebook):
        logits = u[at] @ c.T
        own = logits.gather(1, labels[at].clamp(0, len(c) - 1)[:, None])[:, 0]
        top, predicted[at] = logits.max(1)
        logsumexp[at] = logits.sub_(top[:, None]).exp_().sum(1).log_().add_(top)
        loss[at] = logsumexp[at] - own
    return row_loss(loss, labels, len(c)), logsumexp, predicted


@_backward.composed
def _(grad_loss, grad_logsumexp, x, codebook, labels, logsumexp, temperature):
    (u, u_scale), (c, c_scale) = _unit(x), _unit(codebook)
    grad_u, grad_c = torch.empty_like(u), torch.zeros_like(c)
    grad_loss = row_loss(grad_loss, labels, len(c)) / temperature
    grad_all = grad_loss + grad_logsumexp / temperature
    for at in _chunks(x, codebook):
        # The logits again: one product more, for nothing of their size between the passes.
        slope = torch.addmm(logsumexp[at, None], u[at], c.T, beta=-1, alpha=1 / temperature)
        slope.exp_().mul_(grad_all[at, None])
        slope.scatter_add_(1, labels[at].clamp(0, len(c) - 1)[:, None], -grad_loss[at, None])
        torch.mm(slope, c, out=grad_u[at])
        grad_c.addmm_(slope.T, u[at])
    return _through_unit(grad_u, u, u_scale), _through_unit(grad_c, c, c_scale)


@_cross_entropy.triton
def _(kernels, x, codebook, labels, temperature=0.1):
    outputs = _outputs(x, labels)
    if len(x):
        u, c = _unit(x)[0].div_(temperature), _unit(codebook)[0]
        kernels.codebook_cross_entropy(u, c, labels.contiguous(), *outputs)
    return outputs


@_backward.triton
def _(kernels, grad_loss, grad_logsumexp, x, codebook, labels, logsumexp, temperature):
    if not len(x):
        return torch.empty_like(x), torch.zeros_like(codebook)
    (u, u_scale), (c, c_scale) = _unit(x), _unit(codebook)
    grad_loss = row_loss(grad_loss, labels, len(c)) / temperature
    grad_all = grad_loss + grad_logsumexp / temperature
    given = u / temperature, c, labels.contiguous(), logsumexp.contiguous()
    grad_u, grad_c = kernels.codebook_cross_entropy_backward(grad_loss, grad_all, *given)
    return _through_unit(grad_u, u, u_scale), _through_unit(grad_c.mul_(temperature), c, c_scale)


def _outputs(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(len(x)), x.new_empty(len(x)), labels.new_empty(len(x))


def _chunks(x: Tensor, codebook: Tensor) -> list[slice]:
    # On CUDA a chunk must fill the device.
    rows = max(64, (_CHUNK if x.device.type == "cpu" else 64 * _CHUNK) // len(codebook))
    return [slice(first, first + rows) for first in range(0, len(x), rows)]


def _setup_context(ctx, inputs, output):
    x, codebook, labels, ctx.temperature = inputs
    _, logsumexp, predicted = output
    ctx.mark_non_differentiable(predicted)
    ctx.save_for_backward(x, codebook, labels, logsumexp)


def _differentiate(ctx, grad_loss, grad_logsumexp, _):
    x, codebook, labels, logsumexp = ctx.saved_tensors
    with torch.autocast(x.device.type, enabled=False):
        grads = _backward.call(grad_loss, grad_logsumexp, x, codebook, labels, logsumexp, ctx.temperature)
    return *grads, None, None


_cross_entropy.autograd(_differentiate, _setup_context)
