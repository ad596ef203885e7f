"""Which tokens masked prediction masks."""

from __future__ import annotations

import torch
from torch import Tensor

from hubert_ecg.ops import _dropout
from hubert_ecg.ops import span_mask_reference as reference
from hubert_ecg.ops._op import Array, Op, describe, takes_arrays

# PyTorch's own ops draw and sort the few numbers of a batch wherever they are: there is no kernel.
_span_mask = Op(
    "span_mask(int num_records, int num_tokens, float mask_prob, int mask_length, Tensor? valid, Tensor seed,"
    " Tensor? record_ids=None, int min_masks=2) -> Tensor",
    reference.span_mask,
)


@takes_arrays("valid", "record_ids")
def span_mask(
    num_records: int,
    num_tokens: int,
    mask_prob: float,
    mask_length: int = 1,
    valid: Array | None = None,
    seed: Array | int | None = None,
    record_ids: Array | None = None,
    min_masks: int = 2,
    device: torch.device | str | None = None,
) -> Array:
    """Draw the tokens that masked prediction masks: the same number for each record, so that shapes are static.

    Spans are put down in random order until there are enough masked tokens; the last span is cut at its end where it
    would give more. Spans may touch and overlap. A record with padding has the share ``mask_prob`` of its valid tokens
    masked, by spans of valid tokens as long as there are such; the rest of its M indices point at padding, which the
    loss ignores.

    What is drawn for a record follows from the seed, its id and its own valid tokens: on any device, and whatever else
    is in the batch.

    >>> span_mask(2, 12, 0.5, mask_length=3, seed=1)
    tensor([[ 3,  4,  5,  9, 10, 11],
            [ 0,  1,  2,  5,  6,  7]])

    Args:
        num_records: records, B.
        num_tokens: tokens of a record, N.
        mask_prob: share of the tokens to mask, above 0.
        mask_length: tokens in a span.
        valid: [B, N] bool, tokens that are no padding; default: all.
        seed: whole number or int64 []; None draws one from torch's generator.
        record_ids: [B] int64 from 0 on, what to know the records by; default: their places in the batch.
        min_masks: fewest masked tokens of a record (as far as it has as many).
        device: where to draw; default: that of ``valid``, else of ``record_ids``, else of ``seed``, else the CPU.

    Returns:
        [B, M] int64 with ``M = min(N, max(min_masks, round(mask_prob * N)))``: distinct token indices, ascending.

    Raises:
        ValueError: an argument of a wrong shape, dtype or range, named with what was given.
    """
    for name, number, least in (("num_records", num_records, 0), ("min_masks", min_masks, 0)):
        if number < least:
            raise ValueError(f"span_mask: {name} must be 0 or more, got {number}")
    for name, number in (("num_tokens", num_tokens), ("mask_length", mask_length)):
        if number < 1:
            raise ValueError(f"span_mask: {name} must be at least 1, got {number}")
    if not 0 < mask_prob <= 1:
        raise ValueError(f"span_mask: mask_prob must be above 0 and at most 1, got {mask_prob}")
    wanted = (
        ("valid", valid, torch.bool, [num_records, num_tokens]),
        ("record_ids", record_ids, torch.int64, [num_records]),
    )
    for name, tensor, dtype, shape in wanted:
        if tensor is not None and (tensor.dtype != dtype or list(tensor.shape) != shape):
            want = f"{str(dtype).removeprefix('torch.')} {shape}"
            raise ValueError(f"span_mask: {name} must be {want}, got {describe(tensor)}")
    if device is None:
        device = next((given.device for given in (valid, record_ids, seed) if isinstance(given, Tensor)), "cpu")
    device = torch.device(device)
    away = device.type != "cpu"
    valid, record_ids = (None if x is None else x.to(device, non_blocking=away) for x in (valid, record_ids))
    seed = _dropout.check("span_mask", 1.0, seed, device)
    return _span_mask.call(num_records, num_tokens, mask_prob, mask_length, valid, seed, record_ids, min_masks)


@_span_mask.fake
def _(num_records, num_tokens, mask_prob, mask_length, valid, seed, record_ids=None, min_masks=2):
    return seed.new_empty(num_records, reference.mask_count(num_tokens, mask_prob, min_masks))
