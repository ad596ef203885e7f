"""Masked tokens, against their definition: a plain simulation in NumPy, and every case where there are few."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubert_ecg.features import token_geometry, token_places
from hubert_ecg.ops import span_mask

PLACES = token_places(500, 100)
LEADS, TIMES = PLACES.numpy().T
BY_TIME = np.argsort(TIMES, kind="stable")


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


def circular_runs(masked: np.ndarray) -> list[int]:
    """Lengths of the runs of True in a ring, in the order of their ends; one that goes round is one."""
    first = int(np.argmin(masked))
    assert not masked[first]
    ring = np.roll(masked, -first)
    return [len(list(group)) for value, group in itertools.groupby(ring) if value]


def within_chance(counts, draws) -> bool:
    """Whether shares of about equal chance differ by no more than five standard deviations, and not by construction."""
    share = counts / draws
    return np.abs(share - share.mean()).max() < 5 * np.sqrt(share.mean() * (1 - share.mean()) / draws)


@pytest.mark.parametrize(("rate", "num_samples"), [(100, 500), (50, 250), (500, 2500), (100, 1000), (100, 137)])
def test_a_token_lies_where_the_middle_of_its_receptive_field_does(rate, num_samples):
    geometry = token_geometry(rate)
    middles = geometry.stride * np.arange(geometry.num_tokens(num_samples)) + geometry.receptive_field // 2
    places = token_places(num_samples, rate).numpy()
    np.testing.assert_array_equal(places, np.stack([middles // num_samples, middles % num_samples], 1))


def test_tokens_are_spans_of_one():
    valid = torch.rand(30, 93) < 0.8
    for given_valid in (None, valid):
        independent = span_mask(30, 93, 0.33, 1, given_valid, seed=4, mask_strategy="tokens")
        assert torch.equal(independent, span_mask(30, 93, 0.33, 1, given_valid, seed=4))


@pytest.mark.parametrize(("prob", "count"), [(0.33, 31), (0.15, 14), (0.5, 47), (0.02, 2), (1.0, 93)])
def test_whole_leads_are_masked_but_one(prob, count):
    mask = span_mask(3000, 93, prob, seed=5, mask_strategy="lead", places=PLACES)
    assert mask.shape == (3000, count)
    assert (mask.diff(dim=1) > 0).all()
    masked = indicators(mask, 93)
    of_lead = np.stack([masked[:, lead == LEADS].mean(1) for lead in range(12)], 1)
    assert (((of_lead > 0) & (of_lead < 1)).sum(1) <= 1).all()
    if prob < 1:
        # Leads alike, within their number of tokens, and within the partial lead all of its tokens.
        for size in (7, 8):
            leads = [lead for lead in range(12) if (lead == LEADS).sum() == size]
            assert within_chance(masked[:, np.isin(LEADS, leads)].sum(0), 3000)
        assert count < 8 or len({tuple(row) for row in (of_lead == 1).tolist()}) > 10


def test_every_set_of_whole_leads_is_as_likely():
    # Three of four leads with two tokens each.
    places = torch.tensor([[lead, time] for time in range(2) for lead in (3, 0, 7, 2)])
    mask = span_mask(8000, 8, 0.75, seed=9, mask_strategy="lead", places=places)
    sets, counts = np.unique(mask.numpy(), axis=0, return_counts=True)
    assert len(sets) == 4
    assert np.abs(counts - 2000).max() < 5 * np.sqrt(8000 * 3 / 16)


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("prob", [0.15, 0.33, 0.6])
def test_a_block_is_one_interval_of_time_in_all_leads(length, prob):
    draws = 3000
    mask = span_mask(draws, 93, prob, length, seed=6, mask_strategy="block", places=PLACES)
    assert mask.shape == (draws, int(prob * 93 + 0.5))
    assert (mask.diff(dim=1) > 0).all()
    masked = indicators(mask, 93)
    for row in masked[:300, BY_TIME].astype(bool):
        runs = circular_runs(row)
        # Whole blocks of as many tokens as 12 leads have in the time of `length`, and one that is cut.
        assert len(runs) <= -(-mask.shape[1] // (12 * length))
        assert sum(run < 12 * length for run in runs) <= 1
    assert within_chance(masked.sum(0), draws)
    if 12 * length >= mask.shape[1]:
        # One block: one stretch of time, in which all leads are masked and after which none is.
        for row in masked[:300].astype(bool):
            inside, outside = np.sort(TIMES[row]), np.sort(TIMES[~row])
            gaps = np.searchsorted(outside, inside)
            assert len(set(gaps.tolist())) <= 2
        assert mask.shape[1] < 24 or all(len(set(LEADS[row].tolist())) == 12 for row in mask[:300].numpy())


def test_a_block_is_the_same_time_in_all_leads():
    # Twelve leads whose tokens lie at the same eight times: one block of one token is one of these times.
    places = torch.tensor([[lead, time] for lead in range(12) for time in range(8)])
    mask = span_mask(4000, 96, 12 / 96, 1, seed=2, mask_strategy="block", places=places)
    times = places[:, 1].numpy()[mask.numpy()]
    leads = places[:, 0].numpy()[mask.numpy()]
    assert all(sorted(row) == list(range(12)) for row in leads.tolist())
    # Its first token may be any: then it lies in a time and in the next.
    assert all({(b - a) % 8 for a, b in itertools.pairwise(sorted(set(row)))} <= {1, 7} for row in times.tolist())
    assert within_chance(np.bincount(times.flatten(), minlength=8), 48_000)


@pytest.mark.parametrize(("strategy", "length"), [("tokens", 1), ("spans", 3), ("lead", 1), ("block", 1), ("block", 2)])
def test_each_strategy_respects_padding_and_absent_leads(strategy, length):
    valid = torch.from_numpy((TIMES < [[500], [300], [500], [40], [500]]) & (LEADS < [[12], [12], [5], [12], [0]]))
    ids = torch.tensor([5, 1 << 50, 0, -3, 8])
    how = {"seed": 3, "mask_strategy": strategy, "places": PLACES}
    mask = span_mask(5, 93, 0.33, length, valid, record_ids=ids, **how)
    wanted = [min(n, max(2, int(0.33 * n + 0.5))) for n in valid.sum(1).tolist()]
    assert valid.gather(1, mask).sum(1).tolist() == wanted
    assert (mask.diff(dim=1) > 0).all()
    order = [3, 0, 2]
    assert torch.equal(span_mask(3, 93, 0.33, length, valid[order], record_ids=ids[order], **how), mask[order])
    alone = span_mask(1, 93, 0.33, length, record_ids=ids[:1], **how)
    assert torch.equal(alone, mask[:1])
    assert not torch.equal(alone, span_mask(1, 93, 0.33, length, record_ids=ids[:1], **{**how, "seed": 4}))
    assert not torch.equal(alone, span_mask(1, 93, 0.33, length, record_ids=ids[1:2], **how))


def test_absent_leads_and_padding_leave_whole_what_is_there():
    valid = torch.from_numpy((TIMES < 300) & (LEADS < 6)).expand(500, -1)
    of_lead = indicators(span_mask(500, 93, 0.5, 1, valid, seed=1, mask_strategy="lead", places=PLACES), 93)
    there = valid[0].numpy()
    shares = np.stack([of_lead[:, there & (lead == LEADS)].mean(1) for lead in range(6)], 1)
    assert (((shares > 0) & (shares < 1)).sum(1) <= 1).all()
    assert within_chance(of_lead[:, there].sum(0), 500)
    in_time = indicators(span_mask(500, 93, 0.4, 5, valid, seed=1, mask_strategy="block", places=PLACES), 93)
    kept = BY_TIME[there[BY_TIME]]
    assert all(len(circular_runs(row)) == 1 for row in in_time[:, kept].astype(bool))


def test_ids_are_any_whole_numbers_and_far_ones_differ():
    ids = torch.tensor([0, 1, -1, 1 << 32, 1 << 54, -(1 << 54), (1 << 54) + 1, 7])
    mask = span_mask(len(ids), 93, 0.33, seed=1, record_ids=ids)
    assert len({tuple(row) for row in mask.tolist()}) == len(ids)
    assert torch.equal(span_mask(1, 93, 0.33, seed=1, record_ids=ids[2:3]), mask[2:3])
    many = span_mask(4000, 93, 0.33, seed=1, record_ids=-torch.arange(1, 4001))
    assert within_chance(indicators(many, 93).sum(0), 4000)


@pytest.mark.parametrize(("prob", "num_tokens", "count"), [(0.5, 5, 3), (0.25, 10, 3), (0.25, 14, 4), (0.3, 15, 5)])
def test_halves_are_rounded_up(prob, num_tokens, count):
    assert span_mask(1, num_tokens, prob).shape == (1, count)


@pytest.mark.cuda
def test_a_gpu_draws_the_same():
    valid = torch.rand(9, 93) < 0.9
    for given_valid, (strategy, length) in itertools.product(
        (None, valid), (("tokens", 1), ("spans", 4), ("lead", 1), ("block", 2))
    ):
        how = {"seed": 3, "mask_strategy": strategy, "places": PLACES}
        there = span_mask(9, 93, 0.33, length, given_valid, device="cuda", **how)
        assert torch.equal(there.cpu(), span_mask(9, 93, 0.33, length, given_valid, **how))
