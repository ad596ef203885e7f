"""Masked tokens in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hubert_ecg.ops._dropout import bits

# What comes after every unit: tokens that no whole span reaches, then padding.
_UNREACHED, _PADDING = 1 << 61, 1 << 62
_NUM_LEADS = 12
MASK_STRATEGIES = ("tokens", "spans", "lead", "block")


def span_mask(
    num_records: int,
    num_tokens: int,
    mask_prob: float,
    mask_length: int,
    valid: Tensor | None,
    seed: Tensor,
    record_ids: Tensor | None = None,
    min_masks: int = 2,
    mask_strategy: str = "spans",
    places: Tensor | None = None,
) -> Tensor:
    token = torch.arange(num_tokens, device=seed.device)
    record = torch.arange(num_records, device=seed.device) if record_ids is None else record_ids

    def draw(which: int) -> Tensor:
        """A number for each token of each record. Unlike bits, bits and place are never equal."""
        return bits(seed, record[:, None] * (2 * num_tokens) + which * num_tokens + token) * num_tokens + token

    if mask_strategy == "lead" and places is not None:
        order = _by_lead(draw(0), draw(1), places[:, 0])
    elif mask_strategy == "block" and places is not None:
        order = _by_block(draw(0), mask_length, places[:, 1])
    else:
        order = _by_span(draw(0), mask_length, valid)
        if valid is not None:
            order = torch.where(order < _PADDING, order, _UNREACHED + draw(1))
    count = mask_count(num_tokens, mask_prob, min_masks)
    if valid is None:
        return order.argsort(dim=1, stable=True)[:, :count].sort(1).values
    order = order.masked_fill(~valid, _PADDING)
    num_valid = valid.sum(1, keepdim=True)
    share = (num_valid.double() * mask_prob + 0.5).long()
    wanted = torch.minimum(num_valid, share.clamp_min(min_masks))
    # The first tokens wanted, then as many of padding.
    place = torch.arange(count, device=seed.device)
    place = torch.where(place < wanted, place, place - wanted + num_valid)
    return order.argsort(dim=1, stable=True).gather(1, place).sort(1).values


def _by_span(first: Tensor, mask_length: int, valid: Tensor | None) -> Tensor:
    """When each token is masked: with the earliest span of valid tokens over it, ``_PADDING`` where there is none."""
    num_records, num_tokens = first.shape
    length = min(mask_length, num_tokens)
    start = first[:, : num_tokens - length + 1]
    if valid is not None:
        start = start.masked_fill(~valid.unfold(1, length, 1).all(-1), _PADDING)
    around = start.new_full((num_records, num_tokens + length - 1), _PADDING)
    around[:, length - 1 : num_tokens] = start
    return around.unfold(1, length, 1).amin(-1)


def _by_lead(first: Tensor, second: Tensor, lead: Tensor) -> Tensor:
    """With its lead, whose draw is that of its first token; tokens of one lead in an order of their own."""
    unit = (lead[:, None] == lead).int().argmax(1)
    within = second.argsort(1).argsort(1)
    return first[:, unit] * len(lead) + within


def _by_block(first: Tensor, mask_length: int, time: Tensor) -> Tensor:
    """With the earliest block over it; tokens of one block in the order of time, going round from the end to the
    beginning."""
    num_tokens = len(time)
    length = min(mask_length * _NUM_LEADS, num_tokens)
    # Block k is the length tokens from the k-th in time on, whichever their leads; draws say which k they are of.
    around = torch.cat([first[:, num_tokens - length + 1 :], first], 1)
    block = around.unfold(1, length, 1).amin(-1)
    rank = torch.arange(num_tokens, device=first.device)
    order = block * num_tokens + (rank - block) % num_tokens
    return torch.empty_like(order).scatter_(1, time.argsort(stable=True).expand_as(order), order)


def mask_count(num_tokens: int, mask_prob: float, min_masks: int) -> int:
    return min(num_tokens, max(min_masks, int(mask_prob * num_tokens + 0.5)))


def span_mask_samples(device: str) -> Iterator[tuple[Any, ...]]:
    random, token = torch.Generator().manual_seed(0), torch.arange(93)
    ids = torch.tensor([3, 1 << 40, 0], device=device)
    seed = torch.tensor(-5, device=device)
    valid = (torch.rand(3, 31, generator=random) < 0.8).to(device)
    valid[1] = False
    yield 3, 31, 0.4, 3, valid, seed, ids, 2
    yield 3, 31, 0.4, 3, None, seed, None, 2
    yield 0, 7, 0.5, 2, valid[:0, :7], seed, None, 2
    yield 3, 93, 0.33, 1, None, seed, ids, 2
    yield 3, 31, 1.0, 40, valid, seed, ids, 2
    yield 3, 1, 0.1, 1, None, seed, ids, 0
    places = torch.stack([token * 64 // 500, token * 64 % 500], 1).to(device)[:31]
    yield 3, 31, 0.4, 1, valid, seed, ids, 2, "lead", places
    yield 3, 31, 0.4, 1, None, seed, -ids, 2, "lead", places
    yield 3, 31, 0.4, 1, valid, seed, ids, 2, "block", places
    yield 3, 31, 0.4, 2, None, seed, None, 2, "block", places
    yield 3, 31, 0.4, 1, None, seed, None, 2, "tokens", None


# Indices are equal, never close.
span_mask_tolerance = {torch.float32: (0.0, 0.0), torch.float64: (0.0, 0.0)}


def span_mask_errors() -> Iterator[tuple[tuple[Any, ...], str]]:
    valid = torch.ones(2, 10, dtype=torch.bool)
    yield (-1, 10, 0.3), r"span_mask: num_records must be 0 or more, got -1"
    yield (2, 0, 0.3), r"span_mask: num_tokens must be at least 1, got 0"
    yield (2, 10, 0.0), r"span_mask: mask_prob must be above 0 and at most 1, got 0\.0"
    yield (2, 10, 1.5), r"span_mask: mask_prob must be above 0 and at most 1, got 1\.5"
    yield (2, 10, 0.3, 0), r"span_mask: mask_length must be at least 1, got 0"
    yield (2, 10, 0.3, 1, valid[:, :9]), r"span_mask: valid must be bool \[2, 10\], got bool\[2, 9\]"
    yield (2, 10, 0.3, 1, valid.float()), r"span_mask: valid must be bool \[2, 10\], got float32\[2, 10\]"
    yield (2, 10, 0.3, 1, valid, 0.5), r"span_mask: seed must be int64 \[\], a whole number or None, got 0\.5"
    yield (2, 10, 0.3, 1, None, 1, torch.zeros(3, dtype=torch.int64)), r"span_mask: record_ids must be int64 \[2\], got"
    yield (2, 10, 0.3, 1, None, 1, torch.zeros(2)), r"span_mask: record_ids must be int64 \[2\], got float32\[2\]"
    yield (2, 10, 0.3, 1, None, 1, None, -1), r"span_mask: min_masks must be 0 or more, got -1"
    yield (2.0, 10, 0.3), r"span_mask: num_records must be a whole number, got 2\.0"
    yield (2, True, 0.3), r"span_mask: num_tokens must be a whole number, got True"
    yield (2, 10, "0.3"), r"span_mask: mask_prob must be a number, got '0\.3'"
    yield (2, 10, True), r"span_mask: mask_prob must be a number, got True"
    yield (2, 10, 0.3, 1.5), r"span_mask: mask_length must be a whole number, got 1\.5"
    yield (2, 10, 0.3, 1, None, 1, None, 2.0), r"span_mask: min_masks must be a whole number, got 2\.0"
    places = torch.zeros(10, 2, dtype=torch.int64)
    yield (2, 10, 0.3, 1, None, 1, None, 2, "leads"), r"span_mask: mask_strategy must be one of tokens, .*, got 'leads'"
    yield (2, 10, 0.3, 3, None, 1, None, 2, "tokens"), r"span_mask: mask_length must be 1 with mask_strategy tokens, go"
    yield (2, 10, 0.3, 3, None, 1, None, 2, "lead", places), r"span_mask: mask_length must be 1 with mask_strategy lead"
    yield (
        (2, 10, 0.3, 1, None, 1, None, 2, "lead"),
        r"span_mask: places must be given with mask_strategy lead, got",
    )
    yield (
        (2, 10, 0.3, 1, None, 1, None, 2, "block", places[:9]),
        r"span_mask: places must be int64 \[10, 2\], got",
    )
