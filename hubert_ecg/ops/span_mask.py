"""Which tokens masked prediction masks."""

from __future__ import annotations

import torch
from torch import Tensor

from hubert_ecg.ops import _dropout
from hubert_ecg.ops import span_mask_reference as reference
from hubert_ecg.ops._op import Array, Op, check_real, check_whole, describe, takes_arrays

# PyTorch's own ops draw and sort the few numbers of a batch wherever they are: there is no kernel.
_span_mask = Op(
    "span_mask(int num_records, int num_tokens, float mask_prob, int mask_length, Tensor? valid, Tensor seed,"
    " Tensor? record_ids=None, int min_masks=2, str mask_strategy='spans', Tensor? places=None) -> Tensor",
    reference.span_mask,
)


@takes_arrays("valid", "record_ids", "places")
def span_mask(
    num_records: int,
    num_tokens: int,
    mask_prob: float,
    mask_length: int = 1,
    valid: Array | None = None,
    seed: Array | int | None = None,
    record_ids: Array | None = None,
    min_masks: int = 2,
    mask_strategy: str = "spans",
    places: Array | None = None,
    device: torch.device | str | None = None,
) -> Array:
    """Draw the tokens that masked prediction masks: the same number for each record, so that shapes are static.

    Units are put down in random order until there are enough masked tokens; of the last one only as many tokens are
    masked as are wanted. What a unit is, the strategy says:

    * ``tokens``: a token.
    * ``spans``: ``mask_length`` consecutive tokens. Spans may touch and overlap, and lie within the record; the last
      one is cut at its end. With ``mask_length`` 1 the same as ``tokens``.
    * ``lead``: all tokens of a lead. Of the last lead, tokens drawn at random are masked.
    * ``block``: one interval of time in all leads, as long as ``mask_length`` tokens of a lead: the ``12 mask_length``
      tokens that follow each other in time. Blocks may touch and overlap, and one that reaches the end of the record
      goes on at its beginning, so that every time is masked as often; the last one is cut at its end.

    A record with padding or absent leads has the share ``mask_prob`` of its valid tokens masked, by spans of valid
    tokens as long as there are such, or by what is valid of leads and blocks; the rest of its M indices point at
    padding, which the loss ignores.

    What is drawn for a record follows from the seed, its id and its own valid tokens: on any device, and whatever else
    is in the batch.

    >>> span_mask(2, 12, 0.5, mask_length=3, seed=1)
    tensor([[ 3,  4,  5,  9, 10, 11],
            [ 0,  1,  2,  5,  6,  7]])

    Args:
        num_records: records, B.
        num_tokens: tokens of a record, N.
        mask_prob: share of the tokens to mask, above 0.
        mask_length: tokens in a span, or of a lead in a block.
        valid: [B, N] bool, tokens that are no padding; default: all.
        seed: whole number or int64 []; None draws one from torch's generator.
        record_ids: [B] int64, what to know the records by; default: their places in the batch. Those within any range
            of ``2**63 / N`` are told apart.
        min_masks: fewest masked tokens of a record (as far as it has as many).
        mask_strategy: "tokens", "spans", "lead" or "block".
        places: [N, 2] int64, the lead of each token and its time, in any unit, as
            :func:`hubert_ecg.features.token_places` gives them; for "lead" and "block".
        device: where to draw; default: that of ``valid``, else of ``record_ids``, else of ``seed``, else the CPU.

    Returns:
        [B, M] int64 with ``M = min(N, max(min_masks, floor(mask_prob * N + 1 / 2)))``: distinct token indices,
        ascending.

    Raises:
        ValueError: an argument of a wrong shape, dtype or range, named with what was given.
    """
    for name, number in (("num_records", num_records), ("min_masks", min_masks)):
        check_whole(f"span_mask: {name}", number)
        if number < 0:
            raise ValueError(f"span_mask: {name} must be 0 or more, got {number}")
    for name, number in (("num_tokens", num_tokens), ("mask_length", mask_length)):
        check_whole(f"span_mask: {name}", number)
        if number < 1:
            raise ValueError(f"span_mask: {name} must be at least 1, got {number}")
    check_real("span_mask: mask_prob", mask_prob)
    if not 0 < mask_prob <= 1:
        raise ValueError(f"span_mask: mask_prob must be above 0 and at most 1, got {mask_prob}")
    if mask_strategy not in reference.MASK_STRATEGIES:
        known = ", ".join(reference.MASK_STRATEGIES)
        raise ValueError(f"span_mask: mask_strategy must be one of {known}, got {mask_strategy!r}")
    if mask_length != 1 and mask_strategy in ("tokens", "lead"):
        raise ValueError(f"span_mask: mask_length must be 1 with mask_strategy {mask_strategy}, got {mask_length}")
    if places is None and mask_strategy in ("lead", "block"):
        raise ValueError(f"span_mask: places must be given with mask_strategy {mask_strategy}, got None")
    wanted = (
        ("valid", valid, torch.bool, [num_records, num_tokens]),
        ("record_ids", record_ids, torch.int64, [num_records]),
        ("places", places, torch.int64, [num_tokens, 2]),
    )
    for name, tensor, dtype, shape in wanted:
        if tensor is not None and (tensor.dtype != dtype or list(tensor.shape) != shape):
            want = f"{str(dtype).removeprefix('torch.')} {shape}"
            raise ValueError(f"span_mask: {name} must be {want}, got {describe(tensor)}")
    if device is None:
        device = next((given.device for given in (valid, record_ids, seed) if isinstance(given, Tensor)), "cpu")
    device = torch.device(device)
    away = device.type != "cpu"
    given = (valid, record_ids, places)
    valid, record_ids, places = (None if x is None else x.to(device, non_blocking=away) for x in given)
    seed = _dropout.check("span_mask", 1.0, seed, device)
    return _span_mask.call(
        int(num_records),
        int(num_tokens),
        float(mask_prob),
        int(mask_length),
        valid,
        seed,
        record_ids,
        int(min_masks),
        mask_strategy,
        places,
    )


@_span_mask.fake
def _(
    num_records,
    num_tokens,
    mask_prob,
    mask_length,
    valid,
    seed,
    record_ids=None,
    min_masks=2,
    mask_strategy="spans",
    places=None,
):
    return seed.new_empty(num_records, reference.mask_count(num_tokens, mask_prob, min_masks))
