"""The random bits of dropout: a good hash, the same in PyTorch and in Triton, steered by the seed alone."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from hubert_ecg.ops._dropout import bits, check, dropout, threshold


def test_bits_are_those_of_plain_unsigned_arithmetic():
    def mix(h):
        h ^= h >> 16
        h = h * 0x21F0AAAD & 0xFFFFFFFF
        h ^= h >> 15
        h = h * 0xD35A2D97 & 0xFFFFFFFF
        return h ^ h >> 15

    for seed in (0, 1, -1, 2**62 + 5, -(2**63)):
        low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
        k0 = mix(low ^ 0x9E3779B9)
        k1 = mix(high + mix(k0 ^ 0x85EBCA6B) & 0xFFFFFFFF)
        for index in (0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 3):
            want = mix(mix(index & 0xFFFFFFFF ^ k0) + (k1 ^ (index >> 32) * 0x9E3779B9 & 0xFFFFFFFF) & 0xFFFFFFFF)
            assert bits(torch.tensor(seed), torch.tensor(index)).item() == want


@pytest.mark.parametrize("dropout_p", [0.01, 0.1, 0.5, 0.9])
def test_rate_is_right_and_elements_are_independent(dropout_p):
    n, neighbours = 1 << 20, (1, 2, 31, 64, 768, 4096)
    dropped = [(bits(torch.tensor(seed), torch.arange(n)) < threshold(dropout_p)).double() for seed in range(5)]
    spread = (dropout_p * (1 - dropout_p) / n) ** 0.5
    for drawn in dropped:
        assert abs(drawn.mean().item() - dropout_p) < 5 * spread
        for lag in neighbours:
            together = ((drawn[lag:] - dropout_p) * (drawn[:-lag] - dropout_p)).mean().item()
            assert abs(together) < 5 * dropout_p * (1 - dropout_p) / n**0.5
    for other in dropped[1:]:
        together = ((dropped[0] - dropout_p) * (other - dropout_p)).mean().item()
        assert abs(together) < 5 * dropout_p * (1 - dropout_p) / n**0.5


def test_each_bit_is_fair_and_each_bit_of_the_seed_matters():
    index = torch.arange(1 << 16)
    first = bits(torch.tensor(0), index)
    for bit in range(64):
        seed = torch.tensor(1 << bit if bit < 63 else -(2**63))
        changed = first ^ bits(seed, index)
        shares = [(changed >> place & 1).double().mean().item() for place in range(32)]
        assert np.abs(np.subtract(shares, 0.5)).max() < 0.02, bit


def test_expectation_is_kept_and_the_extremes_are_exact():
    x, seed = torch.ones(1 << 18, dtype=torch.float64), torch.tensor(3)
    kept = dropout(x, 0.25, seed)
    assert set(kept.unique().tolist()) == {0.0, 1 / 0.75}
    assert abs(kept.mean().item() - 1) < 0.01
    torch.testing.assert_close(dropout(x, 0.0, seed), x, rtol=0, atol=0)
    assert not dropout(x, 1.0, seed).any()


def test_seeds():
    torch.manual_seed(1)
    drawn = check("op", 0.1, None, torch.device("cpu")), check("op", 0.1, None, torch.device("cpu"))
    assert drawn[0] != drawn[1]
    torch.manual_seed(1)
    assert check("op", 0.1, None, torch.device("cpu")) == drawn[0]
    state = torch.random.get_rng_state()
    assert check("op", 0.0, None, torch.device("cpu")) is None
    assert torch.equal(torch.random.get_rng_state(), state)
    assert check("op", 0.1, 2**64 - 1, torch.device("cpu")).item() == -1


IN_TRITON = """
import torch, triton, triton.language as tl
from hubert_ecg.ops import _dropout
from hubert_ecg.ops._dropout_triton import bits, keys

@triton.jit
def kernel(seed_ptr, index_ptr, out_ptr, N: tl.constexpr):
    k0, k1 = keys(seed_ptr)
    at = tl.arange(0, N)
    tl.store(out_ptr + at, bits(k0, k1, tl.load(index_ptr + at)).to(tl.int64))

index = torch.randint(2**62, (256,))
index[:4] = torch.tensor([0, 1, 2**32 - 1, 2**32])
for seed in (0, 1, -1, -(2**63), 2**63 - 1):
    seed, out = torch.tensor(seed), torch.empty(256, dtype=torch.int64)
    kernel[(1,)](seed, index, out, N=256)
    assert torch.equal(out, _dropout.bits(seed, index)), seed
"""


def test_bits_in_triton_are_the_same(tmp_path):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    script = tmp_path / "bits_in_triton.py"
    script.write_text(IN_TRITON)
    subprocess.run([sys.executable, str(script)], env={**os.environ, "TRITON_INTERPRET": "1"}, check=True)
