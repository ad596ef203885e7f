"""Slopes are torchaudio's within each lead, and never cross from one lead to the next."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hubert_ecg import ops
from hubert_ecg.ops import use_backend
from hubert_ecg.testing import assert_close, torchaudio_parts

BACKENDS = ["native", "reference"]


def by_convolution(x, window):
    """Of one lead [F, D]: a convolution over frames that repeat at the ends."""
    n = (window - 1) // 2
    taps = torch.arange(-n, n + 1, dtype=x.dtype)
    held = torch.nn.functional.pad(x.T[None], (n, n), mode="replicate")
    return torch.nn.functional.conv1d(held[0][:, None], taps[None, None])[:, 0].T / taps.square().sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [3, 5, 9, 31])
def test_is_a_convolution_within_each_lead(window, backend):
    lengths = [8, 1, 0, 7, 40, 2]
    x = torch.randn(3, sum(lengths), 13, dtype=torch.float64, generator=torch.Generator().manual_seed(window))
    with use_backend(backend):
        got = ops.deltas(x, lengths, window)
    for b in range(3):
        leads = zip(got[b].split(lengths), x[b].split(lengths), strict=True)
        for i, (slope, lead) in enumerate(leads):
            if len(lead):
                assert_close(slope, by_convolution(lead, window), rtol=0, atol=1e-12, name=f"lead {i}")


def test_equals_torchaudio():
    try:
        compute_deltas = torchaudio_parts().compute_deltas
    except ImportError as error:
        pytest.skip(str(error))
    x = torch.randn(50, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for window in (3, 5, 9):
        assert_close(ops.deltas(x, window=window), compute_deltas(x.T, window).T, rtol=0, atol=1e-12, name=f"{window}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_line_has_its_slope_inside_and_a_lead_does_not_see_the_next(backend):
    x = torch.cat([3.0 * torch.arange(10.0), torch.full((10,), 1e6)])[:, None]
    with use_backend(backend):
        got = ops.deltas(x, [10, 10])[:, 0]
    assert_close(got[2:8], torch.full((6,), 3.0), rtol=1e-6, atol=0, name="slope")
    assert_close(got[10:], torch.zeros(10), rtol=0, atol=0, name="next lead")


def test_takes_lengths_of_any_kind():
    x = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    want = ops.deltas(x, [4, 5])
    for lengths in ((4, 5), torch.tensor([4, 5]), torch.tensor([4, 5], dtype=torch.int32).numpy()):
        assert_close(ops.deltas(x, lengths), want, rtol=0, atol=0, name=str(type(lengths)))


def test_lengths_in_python_leave_a_graph_whole():
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(lambda x: ops.deltas(x, [2, 3]), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), ops.deltas(x, torch.tensor([2, 3])), rtol=0, atol=0)
    torch.testing.assert_close(ops.deltas(x, np.array([2, 3])), ops.deltas(x, (2, 3)), rtol=0, atol=0)
