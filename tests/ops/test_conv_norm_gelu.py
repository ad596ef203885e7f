"""What tests/ops/test_every_op.py does not ask of conv_norm_gelu: eager PyTorch, padding, autocast, memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hubert_ecg.ops import conv_norm_gelu, use_backend


def parameters(channels, kernel, dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    shapes = [(channels, 1, kernel), (channels,), (channels,)]
    return [torch.randn(*shape, generator=random, dtype=dtype).requires_grad_() for shape in shapes]


def eager(x, weight, gain, shift, stride, eps=1e-5, bias=None):
    z = F.group_norm(F.conv1d(x[:, None], weight, bias, stride), len(weight), gain, shift, eps)
    return F.gelu(z).transpose(1, 2)


@pytest.mark.parametrize(("samples", "kernel", "stride"), [(6000, 10, 4), (500, 2, 2), (77, 5, 1), (90, 4, 7)])
def test_is_convolution_norm_and_gelu_of_torch(samples, kernel, stride):
    given = parameters(67, kernel)
    x = torch.randn(2, samples).requires_grad_()
    actual, expected = conv_norm_gelu(x, *given, stride), eager(x, *given, stride)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)
    weighting = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(y, (x, *given), weighting) for y in (actual, expected))
    for mine, other in zip(ours, theirs, strict=True):
        scale = other.abs().max()
        torch.testing.assert_close(mine / scale, other / scale, atol=2e-5, rtol=0)


@settings(max_examples=50, deadline=None)
@given(
    frames=st.lists(st.booleans(), min_size=7, max_size=40),
    kernel=st.integers(1, 9),
    stride=st.integers(1, 6),
    level=st.sampled_from([0.0, -3.0, 1e3]),
    outside=st.sampled_from([0.0, 1e3, -1e6, torch.nan, torch.inf]),
    backend=st.sampled_from(["native", "reference"]),
)
def test_samples_outside_valid_frames_change_no_valid_frame(frames, kernel, stride, level, outside, backend):
    valid = torch.tensor([frames, frames[::-1]])
    samples = (len(frames) - 1) * stride + kernel
    seen = torch.zeros(2, samples, dtype=torch.bool)
    for f in range(len(frames)):
        seen[:, f * stride : f * stride + kernel] |= valid[:, f, None]
    x = level + torch.randn(2, samples)
    given = parameters(5, kernel)
    with use_backend(backend), torch.no_grad():
        expected = conv_norm_gelu(x, *given, stride, valid)
        actual = conv_norm_gelu(torch.where(seen, x, outside), *given, stride, valid)
        alone = [conv_norm_gelu(x[i : i + 1], *given, stride, valid[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(actual[valid], expected[valid], atol=0, rtol=0)
    torch.testing.assert_close(torch.cat(alone), expected, atol=0, rtol=0)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_small_signal_on_a_high_level_keeps_its_digits(backend):
    given = parameters(8, 10)
    x = 0.1 * torch.randn(2, 400)
    raised = (x + 1000).requires_grad_()
    # What is left of the signal when it is rounded on that level.
    x = (raised.detach().double() - 1000).float()
    with use_backend(backend):
        y = conv_norm_gelu(raised, *given, 4)
        torch.testing.assert_close(y, conv_norm_gelu(x, *given, 4), atol=1e-4, rtol=1e-4)


def test_a_bias_changes_nothing_and_gets_a_gradient_of_zero():
    given, bias = parameters(6, 4), torch.randn(6).requires_grad_()
    x = torch.randn(3, 50)
    y = conv_norm_gelu(x, *given, 2, bias=bias)
    torch.testing.assert_close(y, conv_norm_gelu(x, *given, 2), atol=0, rtol=0)
    torch.testing.assert_close(y, eager(x, *given, 2, bias=bias), atol=1e-5, rtol=1e-5)
    (grad,) = torch.autograd.grad(y.sum(), bias)
    assert torch.equal(grad, torch.zeros(6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_decides_the_dtype_and_statistics_stay_wide(dtype):
    given, x = parameters(16, 10), torch.randn(2, 300)
    with torch.autocast("cpu", dtype):
        y = conv_norm_gelu(x, *given, 4)
    assert y.dtype == dtype
    wide = conv_norm_gelu(x.to(dtype).float(), *given, 4)
    torch.testing.assert_close(y, wide.to(dtype), atol=0, rtol=0)
    for grad in torch.autograd.grad(y.float().sum(), given):
        assert grad.dtype == torch.float32


def test_keeps_the_input_and_the_parameters_alone_for_the_backward():
    given, x = parameters(32, 10), torch.randn(4, 1000)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        conv_norm_gelu(x, *given, 4)
    assert sum(kept) == x.numel() + sum(p.numel() for p in given)


def test_an_input_without_gradient_is_not_given_one():
    given, x = parameters(4, 3), torch.randn(2, 30)
    conv_norm_gelu(x, *given, 2).sum().backward()
    assert x.grad is None
    assert all(p.grad is not None for p in given)
