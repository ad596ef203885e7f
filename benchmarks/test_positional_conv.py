"""The positional convolution of the base model with GELU and residual, forward and backward: ours and other forms.

``positional_conv`` picks between its two forms by device and shape; these are the rows that it should follow.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hubert_ecg.ops import positional_conv
from hubert_ecg.ops.positional_conv import _by_fourier
from hubert_ecg.testing import assert_close

TOKENS, WIDTH, GROUPS, TAPS = 93, 768, 16, 128
PER_GROUP = WIDTH // GROUPS
BATCHES = {"cpu": [1, 16], "cuda": [16, 448]}


def eager(x, weight, bias):
    y = F.conv1d(x.transpose(1, 2), weight, bias, padding=TAPS // 2, groups=GROUPS)[..., :TOKENS]
    return x + F.gelu(y).transpose(1, 2)


def fourier(x, weight, bias):
    return x + F.gelu(_by_fourier(x, weight, bias)).to(x.dtype)


def blocks(size):
    """One product for each group, over rows of all samples that ``size`` tokens see: polyphase, where it is above 1."""

    def run(x, weight, bias):
        count, reach = -(-TOKENS // size), TAPS + size - 1
        padded = F.pad(x, (0, 0, TAPS // 2, count * size + TAPS - TOKENS - TAPS // 2))
        rows = padded.unfold(1, reach, size)[:, :count].unflatten(2, (GROUPS, PER_GROUP))
        rows = rows.permute(2, 0, 1, 3, 4).reshape(GROUPS, -1, PER_GROUP * reach)
        # Each token of a block has the taps one place further on.
        taps = torch.stack([F.pad(weight, (i, size - 1 - i)) for i in range(size)], 1)
        taps = taps.unflatten(0, (GROUPS, PER_GROUP)).reshape(GROUPS, PER_GROUP * size, -1)
        y = (rows @ taps.mT).view(GROUPS, len(x), count, PER_GROUP, size)
        y = y.permute(1, 2, 4, 0, 3).reshape(len(x), count * size, WIDTH)[:, :TOKENS]
        return x + F.gelu(y + bias).to(x.dtype)

    return run


def pytest_generate_tests(metafunc):
    metafunc.parametrize("batch", BATCHES[metafunc.config.getoption("device")])


@pytest.mark.benchmark(group="positional convolution")
def test_positional_conv(race, checked, device, batch):
    random = torch.Generator().manual_seed(0)
    x, weight, bias, grad = (
        torch.randn(*shape, generator=random).to(device)
        for shape in ((batch, TOKENS, WIDTH), (WIDTH, PER_GROUP, TAPS), (WIDTH,), (batch, TOKENS, WIDTH))
    )
    weight *= 0.02
    given = [t.requires_grad_() for t in (x, weight, bias)]
    half = device.type == "cuda"

    def step(function):
        def run():
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                y = function(*given)
            return y.detach(), *torch.autograd.grad(y, given, grad)

        return run

    runs = {
        "ours": step(lambda *given: positional_conv(*given, GROUPS)),
        "eager PyTorch": step(eager),
        "by Fourier transforms": step(fourier),
        "rows of one token": step(blocks(1)),
        "rows of four tokens": step(blocks(4)),
    }
    expected = runs["eager PyTorch"]()

    def check(form, answer):
        for name, actual, other in zip(["y", "x", "weight", "bias"], answer, expected, strict=True):
            scale = float(other.abs().max())
            rtol, atol = (0.0, 0.05 * scale) if half else (1e-4, 2e-4 * scale)
            assert_close(actual, other, rtol=rtol, atol=atol, name=f"{form}: {name}")

    runs = checked(runs, check)
    race(runs.pop("ours"), runs, "records", batch)
