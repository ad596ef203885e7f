"""Copies of one recording in a store, found by the hashes of its index and checked on its samples."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from hubert_ecg.data.quality import HASH_BITS, HASH_LEADS, NUM_HASH_BYTES, differences

if TYPE_CHECKING:
    from hubert_ecg.data.store import Store

# Copies: share of the bits that agree, and correlation of their samples, over the leads that both have.
_AGREEING, _CORRELATION = 0.85, 0.9
_BAND_BITS, _PAIRS_AT_ONCE = 24, 1 << 16


def duplicates(store: Store) -> list[np.ndarray]:
    """Records that are copies of one recording, whatever their unit, gain, format, rate, leads or end.

    Candidates agree in the first or last 24 hash bits of a lead; they are copies where 85 % of the bits of all leads
    that both have agree (see :func:`hubert_ecg.data.quality.signal_hash`), and the median correlation of these leads is
    above 0.9, over the length of the shorter.

    Returns:
        Ascending positions of each group of two and more, by the first of each.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    count = len(store)
    hashes = np.frombuffer(b"".join(store.column("signal_hash")), np.uint8).reshape(count, NUM_HASH_BYTES)
    bands = hashes.view(f">u{HASH_BITS // 8}").astype(np.uint32)
    pairs: set[tuple[int, int]] = set()
    for lead, shift in itertools.product(range(len(HASH_LEADS)), (0, HASH_BITS - _BAND_BITS)):
        code = bands[:, lead]
        # Turned, so that the bits that are to agree come first.
        turned = (code << shift) | (code >> (HASH_BITS - shift)) if shift else code
        order = np.argsort(turned, kind="stable")
        same = np.flatnonzero((np.diff(turned[order] >> (HASH_BITS - _BAND_BITS)) == 0) & (code[order[1:]] != 0))
        for start in range(0, len(same), _PAIRS_AT_ONCE):
            places = same[start : start + _PAIRS_AT_ONCE]
            a, b = order[places], order[places + 1]
            alike = _agreement(bands[a], bands[b]) >= _AGREEING
            pairs.update(zip(np.minimum(a, b)[alike].tolist(), np.maximum(a, b)[alike].tolist(), strict=True))
    copies = np.array([pair for pair in sorted(pairs) if _correlation(store, *pair) > _CORRELATION], np.int64)
    if not len(copies):
        return []
    links = coo_matrix((np.ones(len(copies)), (copies[:, 0], copies[:, 1])), (count, count))
    _, group = connected_components(links, directed=False)
    members = np.unique(copies)
    by_group: dict[int, list[int]] = {}
    for position in members.tolist():
        by_group.setdefault(int(group[position]), []).append(position)
    return [np.array(positions) for positions in by_group.values()]


def _agreement(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The share of equal bits over the leads that both have."""
    both = (a != 0) & (b != 0)
    differ = np.unpackbits(np.where(both, a ^ b, 0).astype(np.uint32).view(np.uint8), axis=1).sum(1)
    return 1 - differ / np.maximum(HASH_BITS * both.sum(1), 1)


def _correlation(store: Store, one: int, other: int) -> float:
    """The median correlation of the leads that two records have, over the length of the shorter."""
    length = int(store.num_samples[[one, other]].min())
    signal, _ = store.gather(np.array([one, other]), None, length, num_threads=1)
    moves = differences(signal, store.stored_rate_hz).astype(np.float64)
    moves -= moves.mean(2, keepdims=True)
    power = np.square(moves).sum(2)
    both = power.min(0) > 0
    if not both.any():
        return 0.0
    return float(np.median((moves[0] * moves[1]).sum(1)[both] / np.sqrt(power[0] * power[1])[both]))
