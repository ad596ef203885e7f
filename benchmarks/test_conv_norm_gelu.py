"""The conv front end of the base model, forward and backward: ours and eager PyTorch, on the same weights and records.

``pytest benchmarks/test_conv_norm_gelu.py`` first compares results and gradients, then times both in turns.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hubert_ecg.ops import conv_norm_gelu, strided_conv
from hubert_ecg.testing import assert_close

SAMPLES, CHANNELS = 6000, 512
BATCH = {"cpu": 16, "cuda": 448}
# Kernel and stride of the layers after the first one.
LAYERS = [(3, 2), (3, 2), (2, 2), (2, 2)]


def parameters(device):
    random = torch.Generator().manual_seed(0)
    shapes = [(CHANNELS, 1, 10), (CHANNELS,), (CHANNELS,), *((CHANNELS, CHANNELS, kernel) for kernel, _ in LAYERS)]
    scales = [1.0, 1.0, 0.1, *((2 / (CHANNELS * kernel)) ** 0.5 for kernel, _ in LAYERS)]
    return [
        (scale * torch.randn(*shape, generator=random)).to(device).requires_grad_()
        for shape, scale in zip(shapes, scales, strict=True)
    ]


def eager_first(x, weight, gain, shift):
    return F.gelu(F.group_norm(F.conv1d(x[:, None], weight, stride=4), CHANNELS, gain, shift))


def eager_front(x, weight, gain, shift, *weights):
    x = eager_first(x, weight, gain, shift)
    for own, (_, stride) in zip(weights, LAYERS, strict=True):
        x = F.gelu(F.conv1d(x, own, stride=stride))
    return x


def ours_first(x, weight, gain, shift):
    return conv_norm_gelu(x, weight, gain, shift, 4)


def ours_front(x, weight, gain, shift, *weights):
    x = ours_first(x, weight, gain, shift)
    for own, (_, stride) in zip(weights, LAYERS, strict=True):
        x = F.gelu(strided_conv(x, own, stride))
    return x


def run_race(ours, eager, num_given, device, race):
    batch, given = BATCH[device.type], parameters(device)[:num_given]
    x = torch.randn(batch, SAMPLES, generator=torch.Generator(device).manual_seed(1), device=device)
    half = device.type == "cuda"

    def step(function, grad):
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            y = function(x, *given)
        return y, *torch.autograd.grad(y, given, grad.to(y.dtype))

    with torch.no_grad():
        like = eager(x[:1], *given)
    random = torch.Generator(device).manual_seed(2)
    # Each gets its gradient in the layout of its own result.
    theirs = torch.randn(batch, *like.shape[1:], generator=random, device=device) / batch
    own = theirs.transpose(1, 2).contiguous()
    (y, *gradients), (want, *expected) = step(ours, own), step(eager, theirs)
    for i, (actual, other) in enumerate(zip([y, *gradients], [want.transpose(1, 2), *expected], strict=True)):
        scale = other.float().abs().max()
        atol = 0.1 if half else 1e-3
        assert_close(actual.float() / scale, other.float() / scale, rtol=0, atol=atol, name=f"result {i}")
    peers = {"eager PyTorch": lambda: step(eager, theirs)}
    if device.type == "cuda":
        compiled = torch.compile(eager)
        peers["torch.compile"] = lambda: step(compiled, theirs)
    race(lambda: step(ours, own), peers, "records", batch)


@pytest.mark.benchmark(group="front end")
def test_first_layer(race, device):
    run_race(ours_first, eager_first, 3, device, race)


@pytest.mark.benchmark(group="front end")
def test_front_end(race, device):
    run_race(ours_front, eager_front, None, device, race)
