"""The conv front end of the base model, forward and backward: ours and eager PyTorch, on the same weights and records.

``pytest benchmarks/test_conv_norm_gelu.py`` first compares results and gradients, then times both in turns.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hubert_ecg.ops import conv_norm_gelu, strided_conv
from hubert_ecg.testing import assert_close

BATCH, SAMPLES, CHANNELS = 16, 6000, 512
GPU_BATCH = 448
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


def run_race(ours, eager, given, batch, device, race, dtype=None):
    x = torch.randn(batch, SAMPLES, generator=torch.Generator().manual_seed(1)).to(device)
    cuda = device == "cuda"

    def step(function, grad):
        with torch.autocast(device, dtype, enabled=dtype is not None):
            y = function(x, *given)
        gradients = torch.autograd.grad(y, given, grad)
        if cuda:
            torch.cuda.synchronize()
        return y, gradients

    with torch.no_grad():
        like = eager(x[:1], *given)
    random = torch.Generator(device).manual_seed(2)
    # Each gets its gradient in the layout of its own result.
    theirs = torch.randn(batch, *like.shape[1:], generator=random, device=device) / batch
    own = theirs.transpose(1, 2).contiguous()
    (y, gradients), (want, expected) = step(ours, own), step(eager, theirs)
    tolerance = 1e-3 if dtype is None else 0.1
    for name, actual, other in zip(
        ["y", *map(str, range(len(given)))], [y, *gradients], [want.transpose(1, 2), *expected], strict=True
    ):
        scale = other.float().abs().max()
        assert_close(actual.float() / scale, other.float() / scale, rtol=0, atol=tolerance, name=name)
    race(lambda: step(ours, own), {"eager PyTorch": lambda: step(eager, theirs)}, "records", batch)


def test_first_layer(race):
    run_race(ours_first, eager_first, parameters("cpu")[:3], BATCH, "cpu", race)


def test_front_end(race):
    run_race(ours_front, eager_front, parameters("cpu"), BATCH, "cpu", race)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("front", [False, True], ids=["first_layer", "front_end"])
def test_on_a_gpu(front, race):
    pair = (ours_front, eager_front) if front else (ours_first, eager_first)
    given = parameters("cuda")
    run_race(*pair, given if front else given[:3], GPU_BATCH, "cuda", race, torch.bfloat16)
