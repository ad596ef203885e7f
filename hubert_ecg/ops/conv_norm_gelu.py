"""The first convolution of a feature extractor with its norm over time and GELU, as one op."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from hubert_ecg.ops import conv_norm_gelu_reference as reference
from hubert_ecg.ops._op import Array, Op, autocast_dtype, check_device, check_real, check_whole, describe, takes_arrays

# Channels of one step of the kernels in csrc/conv_norm_gelu.h.
_CHANNELS = 64

_op = Op(
    "conv_norm_gelu(Tensor x, Tensor weight, Tensor norm_weight, Tensor norm_bias, int stride, Tensor? valid=None, "
    "float eps=1e-05) -> Tensor",
    reference.conv_norm_gelu,
)
_backward = Op(
    "conv_norm_gelu_backward(Tensor grad, Tensor x, Tensor weight, Tensor norm_weight, Tensor norm_bias, int stride, "
    "Tensor? valid=None, float eps=1e-05, bool with_input=True) -> (Tensor, Tensor, Tensor, Tensor)",
    reference.conv_norm_gelu_backward,
)


@takes_arrays("x", "weight", "norm_weight", "norm_bias", "valid", "bias")
def conv_norm_gelu(
    x: Array,
    weight: Array,
    norm_weight: Array,
    norm_bias: Array,
    stride: int,
    valid: Array | None = None,
    eps: float = 1e-5,
    bias: Array | None = None,
) -> Array:
    """A convolution of one signal to C channels, GroupNorm with one group for each channel, GELU; channels last.

    ``gelu(norm_weight (z - mean) / sqrt(var + eps) + norm_bias)`` with
    ``z[b, f, c] = sum_j weight[c, j] x[b, stride f + j]``, mean and variance of each record and channel over its valid
    frames; every frame is normalised with them.

    ``z`` is never stored, and the statistics need no pass over it: with the mean ``m`` and the covariance ``V`` (both
    in float64) of a record's windows, ``mean = weight[c] . m`` and ``var = weight[c]' V weight[c]``. The input and the
    parameters alone are kept for the backward, which computes z again.

    Half precision is computed in float32. Under autocast, x is taken in autocast's dtype, as a convolution takes it.

    >>> x = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    >>> conv_norm_gelu(x, torch.ones(1, 2), torch.ones(1), torch.zeros(1), stride=2)
    tensor([[[-0.1587],
             [ 0.8413]]])

    Args:
        x: signals, [B, S] floating point.
        weight: taps, [C, k] or [C, 1, k].
        norm_weight: gains of the norm, [C].
        norm_bias: shifts of the norm, [C].
        stride: samples from one frame to the next.
        valid: [B, F] bool, frames that the statistics are taken over; default: all.
        eps: added to the variance.
        bias: of the convolution, [C]. The norm takes it off again: it changes nothing, and its gradient is 0.

    Returns:
        [B, F, C] of the dtype of x, F = (S - k) // stride + 1.

    Raises:
        ValueError: a wrong shape, dtype or device, named with what was given.
    """
    _check(x, weight, norm_weight, norm_bias, stride, valid, eps)
    x = x.to(autocast_dtype(x) or x.dtype)
    if bias is not None:
        _check_tensor("bias", bias, x, (len(weight),))
        norm_bias = norm_bias + 0 * bias
    return _op.call(x, weight.flatten(1), norm_weight, norm_bias, stride, valid, eps)


def _check(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    stride: int,
    valid: Tensor | None,
    eps: float,
) -> None:
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"conv_norm_gelu: x must be floating point [B, S], got {describe(x)}")
    fits = weight.ndim == 2 or (weight.ndim == 3 and weight.shape[1] == 1)
    if not fits or not weight.is_floating_point() or 0 in weight.shape:
        raise ValueError(f"conv_norm_gelu: weight must be floating point [C, k] or [C, 1, k], got {describe(weight)}")
    _check_tensor("weight", weight, x, tuple(weight.shape))
    channels, kernel = weight.shape[0], weight.shape[-1]
    if x.shape[1] < kernel:
        raise ValueError(f"conv_norm_gelu: x must be at least {kernel} samples long, got {describe(x)}")
    _check_tensor("norm_weight", norm_weight, x, (channels,))
    _check_tensor("norm_bias", norm_bias, x, (channels,))
    check_whole("conv_norm_gelu: stride", stride)
    if stride < 1:
        raise ValueError(f"conv_norm_gelu: stride must be at least 1, got {stride}")
    frames = (x.shape[1] - kernel) // stride + 1
    if valid is not None:
        if valid.dtype != torch.bool or valid.shape != (len(x), frames):
            raise ValueError(f"conv_norm_gelu: valid must be bool [{len(x)}, {frames}], got {describe(valid)}")
        check_device("conv_norm_gelu", x, valid=valid)
    check_real("conv_norm_gelu: eps", eps)
    if not eps >= 0:
        raise ValueError(f"conv_norm_gelu: eps must be at least 0, got {eps}")


def _check_tensor(name: str, given: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    if not given.is_floating_point() or given.shape != shape:
        raise ValueError(f"conv_norm_gelu: {name} must be floating point {list(shape)}, got {describe(given)}")
    check_device("conv_norm_gelu", x, **{name: given})


@dataclasses.dataclass
class _Folded:
    """The norm as part of the convolution: n[b, f, c] = offset[b, c] + sum_j taps[b, j, c] x[b, stride f + j].

    Attributes:
        x: ``[B, S]`` less a level of each record, in the dtype of the products.
        taps: ``[B, k, C]``, weight times gain over deviation.
        offset: ``[B, C]``.
        scale: ``[B, C]`` float64, gain over deviation.
        rstd: ``[B, C]`` float64, the inverse of the deviation.
        mean: ``[B, k]`` float64, of the windows of x.
        covariance: ``[B, k, k]`` float64, of the windows of x.
        count: ``[B]``, frames that the statistics are taken over, at least 1.
    """

    x: Tensor
    taps: Tensor
    offset: Tensor
    scale: Tensor
    rstd: Tensor
    mean: Tensor
    covariance: Tensor
    count: Tensor


def _moments(x: Tensor, kernel: int, stride: int, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean ``[B, k]`` and covariance ``[B, k, k]`` of a record's windows in float64, and their number ``[B]``."""
    windows = x.double().unfold(1, kernel, stride)
    if valid is None:
        count = windows.new_full((len(x),), windows.shape[1])
    else:
        windows = windows.masked_fill(~valid[..., None], 0)
        count = valid.sum(1).clamp_min(1).double()
    mean = windows.sum(1) / count[:, None]
    centred = windows - mean[:, None]
    if valid is not None:
        centred = centred.masked_fill(~valid[..., None], 0)
    return mean, centred.mT @ centred / count[:, None, None], count


def _fold(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    stride: int,
    valid: Tensor | None,
    eps: float,
    moments: tuple[Tensor, Tensor, Tensor] | None = None,
) -> _Folded:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, covariance, count = moments or _moments(x, weight.shape[1], stride, valid)
    taps = weight.double()
    variance = ((taps @ covariance) * taps).sum(-1)
    rstd = torch.rsqrt(variance + eps)
    scale = norm_weight.double() * rstd
    # Products of what is left of the signal without its level keep their digits at any level.
    level = mean.mean(1, keepdim=True)
    mean = mean - level
    return _Folded(
        x=(x.double() - level).to(dtype).contiguous(),
        taps=(taps.T * scale[:, None]).to(dtype).contiguous(),
        offset=(norm_bias.double() - scale * (mean @ taps.T)).to(dtype),
        scale=scale,
        rstd=rstd,
        mean=mean,
        covariance=covariance,
        count=count,
    )


def _gradients(
    folded: _Folded,
    total: Tensor,
    products: Tensor,
    windows: Tensor | None,
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    stride: int,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four gradients from a few sums over frames of g, the gradient of the norm's output n.

    With u the windows of x less their mean, w the weight of a channel, r = rstd, a = gain r, s = sum g, G = sum g u,
    V the covariance, N the number of valid frames, and q = sum g (n - shift) / gain = r w . G:

        grad shift = s,   grad gain = q,   grad w = a (G - r q V w)
        grad u = sum_c a g w  -  [valid] (sum_c a s w + (sum_c a r q w w') u) / N

    each summed over records but for the last one.

    Args:
        folded: what the forward ran with.
        total: ``[B, C]`` float64, sum of g over frames.
        products: ``[B, k, C]`` float64, sum over frames of g times the windows of ``folded.x``.
        windows: ``[B, F, k]``, sum over channels of g times ``folded.taps``; None: no gradient of x.
        x: as given to the op, as are the rest.
    """
    taps = weight.double()
    centred = products - folded.mean[..., None] * total[:, None]
    normed = folded.rstd * (centred * taps.T).sum(1)
    through_variance = (folded.covariance @ taps.T) * (folded.rstd * normed)[:, None]
    grad_weight = (folded.scale[:, None] * (centred - through_variance)).sum(0).T
    grad_x = x.new_empty(0)
    if windows is not None:
        inner = torch.einsum("bc,cj,ck->bjk", folded.scale * folded.rstd * normed, taps, taps)
        constant = (folded.scale * total) @ taps - (folded.mean[:, None] @ inner)[:, 0]
        count = folded.count[:, None]
        # In the dtype of the products: as many of them as the signal has windows.
        inner, constant = ((t / c).to(windows.dtype) for t, c in ((inner, count[..., None]), (constant, count)))
        through_statistics = torch.baddbmm(constant[:, None], folded.x.unfold(1, taps.shape[1], stride), inner)
        if valid is not None:
            through_statistics = through_statistics.masked_fill(~valid[..., None], 0)
        grad_x = torch.ops.aten.unfold_backward(windows - through_statistics, x.shape, 1, taps.shape[1], stride)
    return (
        grad_x.to(x.dtype),
        grad_weight.contiguous().to(weight.dtype),
        normed.sum(0).to(norm_weight.dtype),
        total.sum(0).to(norm_bias.dtype),
    )


def _output(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    return x.new_empty(len(x), (x.shape[1] - weight.shape[1]) // stride + 1, len(weight))


@_op.fake
def _(x, weight, norm_weight, norm_bias, stride, valid=None, eps=1e-5):
    return _output(x, weight, stride)


@_backward.fake
def _(grad, x, weight, norm_weight, norm_bias, stride, valid=None, eps=1e-5, with_input=True):
    grad_x = x.new_empty(x.shape if with_input else 0)
    return grad_x, weight.new_empty(weight.shape), norm_weight.new_empty(len(weight)), norm_bias.new_empty(len(weight))


@_op.triton
def _(kernels, x, weight, norm_weight, norm_bias, stride, valid=None, eps=1e-5):
    moments = kernels.moments(x, weight.shape[1], stride, valid)
    folded = _fold(x, weight, norm_weight, norm_bias, stride, valid, eps, moments)
    y = _output(x, weight, stride)
    kernels.conv_norm_gelu(folded.x, folded.taps, folded.offset, y, stride)
    return y


@_backward.triton
def _(kernels, grad, x, weight, norm_weight, norm_bias, stride, valid=None, eps=1e-5, with_input=True):
    moments = kernels.moments(x, weight.shape[1], stride, valid)
    folded = _fold(x, weight, norm_weight, norm_bias, stride, valid, eps, moments)
    sums, windows = kernels.conv_norm_gelu_backward(grad, folded.x, folded.taps, folded.offset, stride, with_input)
    given = (x, weight, norm_weight, norm_bias, stride, valid)
    return _gradients(folded, sums[:, -1], sums[:, :-1], windows, *given)


@_op.native
def _(kernel, x, weight, norm_weight, norm_bias, stride, valid=None, eps=1e-5):
    folded = _fold(x, weight, norm_weight, norm_bias, stride, valid, eps)
    y = _output(x, weight, stride)
    kernel(folded.x, *_padded(folded), y, stride)
    return y


@_backward.native
def _(kernel, grad, x, weight, norm_weight, norm_bias, stride, valid=None, eps=1e-5, with_input=True):
    folded = _fold(x, weight, norm_weight, norm_bias, stride, valid, eps)
    (batch, frames, channels), taps = grad.shape, weight.shape[1]
    padded, offset = _padded(folded)
    sums = padded.new_empty(batch, taps + 1, padded.shape[2], dtype=torch.float64)
    windows = padded.new_empty(padded.shape[2] // _CHANNELS if with_input else 0, batch, frames, taps)
    kernel(grad.to(x.dtype).contiguous(), folded.x, padded, offset, sums, windows, stride)
    sums = sums[..., :channels]
    through = windows.sum(0) if with_input else None
    given = (x, weight, norm_weight, norm_bias, stride, valid)
    return _gradients(folded, sums[:, -1], sums[:, :-1], through, *given)


def _padded(folded: _Folded) -> tuple[Tensor, Tensor]:
    more = (0, -folded.offset.shape[1] % _CHANNELS)
    return F.pad(folded.taps, more).contiguous(), F.pad(folded.offset, more).contiguous()


def _setup_context(ctx, inputs, output):
    x, weight, norm_weight, norm_bias, stride, valid, eps = inputs
    ctx.save_for_backward(x, weight, norm_weight, norm_bias, valid)
    ctx.stride, ctx.eps = stride, eps


def _run_backward(ctx, grad):
    x, weight, norm_weight, norm_bias, valid = ctx.saved_tensors
    with_input = ctx.needs_input_grad[0]
    grad_x, *others = _backward.call(grad, x, weight, norm_weight, norm_bias, ctx.stride, valid, ctx.eps, with_input)
    return grad_x if with_input else None, *others, None, None, None


_op.autograd(_run_backward, _setup_context)
