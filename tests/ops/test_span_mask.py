"""Masked spans, against their definition: a plain simulation in NumPy, and every case where there are few."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubert_ecg.ops import span_mask


def runs(row: list[int]) -> list[int]:
    """Lengths of the runs of consecutive indices."""
    lengths = [1]
    for before, after in itertools.pairwise(row):
        if after == before + 1:
            lengths[-1] += 1
        else:
            lengths.append(1)
    return lengths


def put_down(starts, length, count) -> list[int]:
    """The definition: spans in this order until ``count`` tokens are masked, the last one cut at its end."""
    masked: dict[int, None] = {}
    for start in starts:
        for token in range(start, start + length):
            if len(masked) < count:
                masked.setdefault(token)
    return sorted(masked)


def indicators(mask, num_tokens) -> np.ndarray:
    found = np.zeros((len(mask), num_tokens))
    np.put_along_axis(found, np.asarray(mask), 1.0, 1)
    return found


@pytest.mark.parametrize(("prob", "count"), [(0.33, 31), (0.15, 14), (0.2, 19), (0.5, 47), (1.0, 93), (0.001, 2)])
@pytest.mark.parametrize("length", [1, 4, 93, 200])
def test_every_record_has_the_same_number_of_masked_tokens(prob, count, length):
    mask = span_mask(64, 93, prob, length)
    assert mask.shape == (64, count)
    assert mask.dtype == torch.int64
    assert mask.min() >= 0
    assert mask.max() < 93
    assert (mask.diff(dim=1) > 0).all()


@pytest.mark.parametrize(("num_tokens", "prob", "length"), [(6, 0.5, 2), (6, 0.34, 1), (7, 0.72, 3), (5, 0.6, 4)])
def test_each_set_of_tokens_is_as_likely_as_its_orders_of_spans_are(num_tokens, prob, length):
    draws = 20_000
    mask = span_mask(draws, num_tokens, prob, length, seed=11)
    orders = list(itertools.permutations(range(num_tokens - length + 1)))
    expected: dict[tuple[int, ...], float] = {}
    for order in orders:
        masked = tuple(put_down(order, length, mask.shape[1]))
        expected[masked] = expected.get(masked, 0.0) + draws / len(orders)
    sets, counts = np.unique(mask.numpy(), axis=0, return_counts=True)
    seen = dict(zip(map(tuple, sets.tolist()), counts.tolist(), strict=True))
    assert set(seen) <= set(expected)
    chi_square = sum((seen.get(masked, 0) - number) ** 2 / number for masked, number in expected.items())
    # Five standard deviations above its mean.
    freedom = len(expected) - 1
    assert chi_square < freedom + 5 * max(2 * freedom, 1) ** 0.5


@pytest.mark.parametrize("length", [1, 2, 5, 10, 60])
def test_tokens_and_pairs_are_masked_as_often_as_in_a_simulation(length):
    draws, num_tokens, random = 4000, 93, np.random.default_rng(0)
    mask = span_mask(draws, num_tokens, 0.33, length, seed=length)
    simulated = [put_down(random.permutation(num_tokens - length + 1), length, mask.shape[1]) for _ in range(draws)]
    ours, theirs = indicators(mask, num_tokens), indicators(simulated, num_tokens)
    for lag in (0, 1, 2, length, 40):
        a, b = ((x[:, lag:] * x[:, : num_tokens - lag]) for x in (ours, theirs))
        spread = np.sqrt((a.var(0) + b.var(0)) / draws)
        difference = np.abs(a.mean(0) - b.mean(0))
        assert (difference <= 5 * spread).all(), (lag, difference.max())


def test_a_record_with_padding_masks_its_valid_tokens_as_in_a_simulation():
    draws, length, random = 4000, 3, np.random.default_rng(1)
    valid = np.zeros(40, dtype=bool)
    valid[3:12], valid[15:17], valid[20:33] = True, True, True
    whole = [start for start in range(38) if valid[start : start + length].all()]
    count = round(0.4 * valid.sum())
    mask = span_mask(draws, 40, 0.4, length, torch.from_numpy(np.tile(valid, (draws, 1))), seed=3)
    simulated = [put_down(random.permutation(whole), length, count) for _ in range(draws)]
    ours, theirs = indicators(mask, 40)[:, valid], indicators(simulated, 40)[:, valid]
    assert (ours.sum(1) == count).all()
    spread = np.sqrt((ours.var(0) + theirs.var(0)) / draws)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) <= 5 * spread).all()


def test_tokens_that_no_whole_span_reaches_come_last_and_in_any_order():
    valid = torch.zeros(4000, 20, dtype=torch.bool)
    valid[:, [1, 2, 3, 4, 8, 10, 12, 14]] = True
    mask = span_mask(4000, 20, 0.75, 4, valid, seed=2)
    masked = indicators(mask, 20)[:, valid[0]]
    assert (masked.sum(1) == 6).all()
    assert (masked[:, :4] == 1).all()
    assert np.abs(masked[:, 4:].mean(0) - 0.5).max() < 5 * 0.5 / 4000**0.5


def test_spans_are_whole_except_one():
    mask = span_mask(500, 93, 0.33, 5, seed=1)
    cut = [sum(run < 5 for run in runs(row)) for row in mask.tolist()]
    assert max(cut) <= 1
    assert max(max(runs(row)) for row in mask.tolist()) > 5


def test_the_seed_decides():
    first, second = (span_mask(8, 93, 0.33, 3, seed=7) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, span_mask(8, 93, 0.33, 3, seed=torch.tensor(7)))
    assert not torch.equal(first, span_mask(8, 93, 0.33, 3, seed=8))
    torch.manual_seed(5)
    drawn = span_mask(8, 93, 0.33), span_mask(8, 93, 0.33)
    assert not torch.equal(*drawn)
    torch.manual_seed(5)
    assert torch.equal(span_mask(8, 93, 0.33), drawn[0])


def test_a_record_is_masked_alike_wherever_it_stands():
    ids, valid = torch.tensor([9, 2, 1 << 45, 0, 77]), torch.rand(5, 50) < 0.9
    valid[2] = True
    mask = span_mask(5, 50, 0.4, 3, valid, seed=1, record_ids=ids)
    for order in ([4, 1, 0, 3, 2], [2, 1]):
        again = span_mask(len(order), 50, 0.4, 3, valid[order], seed=1, record_ids=ids[order])
        assert torch.equal(again, mask[order])
    # Padding of others changes nothing.
    assert torch.equal(span_mask(1, 50, 0.4, 3, seed=1, record_ids=ids[2:3]), mask[2:3])
    assert torch.equal(span_mask(3, 50, 0.4, seed=1), span_mask(3, 50, 0.4, seed=1, record_ids=torch.arange(3)))


@settings(max_examples=60, deadline=None)
@given(
    spans=st.lists(
        st.lists(st.tuples(st.booleans(), st.integers(1, 20)), min_size=1, max_size=8), min_size=1, max_size=4
    ),
    prob=st.floats(0.01, 1.0),
    length=st.integers(1, 9),
    seed=st.integers(-(2**63), 2**64 - 1),
)
def test_valid_tokens_are_masked_in_their_share_and_the_rest_points_at_padding(spans, prob, length, seed):
    rows = [[flag for flag, count in record for _ in range(count)] for record in spans]
    width = max(map(len, rows))
    valid = torch.tensor([row + [False] * (width - len(row)) for row in rows])
    mask = span_mask(len(rows), width, prob, length, valid, seed)
    assert (mask.diff(dim=1) > 0).all()
    assert mask.shape[1] == min(width, max(2, int(prob * width + 0.5)))
    masked_valid = valid.gather(1, mask).sum(1)
    wanted = [min(n, max(2, int(prob * n + 0.5))) for n in valid.sum(1).tolist()]
    assert masked_valid.tolist() == wanted


@pytest.mark.cuda
def test_a_gpu_draws_the_same():
    valid = torch.rand(9, 93) < 0.9
    for given_valid in (None, valid):
        there = span_mask(9, 93, 0.33, 4, given_valid, seed=3, device="cuda")
        assert torch.equal(there.cpu(), span_mask(9, 93, 0.33, 4, given_valid, seed=3))
