"""Attention over spans of keys, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hubert_ecg.ops._dropout import dropout


def unpack(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [B, T, H, D], views of ``q`` [B, T, 3, H, D] where it holds all three."""
    if k is None or v is None:
        q, k, v = q.unbind(2)
    return q, k, v


def scale_of(scale: float | None, dim: int) -> float:
    """``1 / sqrt(D)`` where no scale is given."""
    return max(dim, 1) ** -0.5 if scale is None else scale


def valid_keys(spans: Tensor | None, num_records: int, num_tokens: int, device: torch.device) -> Tensor:
    """[B, T] bool: tokens in any of the record's spans, or all of them where there is none."""
    if spans is None:
        return torch.ones(num_records, num_tokens, dtype=torch.bool, device=device)
    token = torch.arange(num_tokens, device=device)
    valid = ((spans[..., :1] <= token) & (token < spans[..., 1:])).any(1)
    return valid | ~valid.any(1, keepdim=True)


def gather_rows(x: Tensor, queries: Tensor | None) -> Tensor:
    """[B, M, H, D]: rows ``queries`` of ``x`` [B, T, H, D], zeros for those outside of it."""
    if queries is None:
        return x
    if not x.shape[1]:
        return x.new_zeros(x.shape[0], queries.shape[1], *x.shape[2:])
    outside = (queries < 0) | (queries >= x.shape[1])
    rows = x[torch.arange(len(x), device=x.device)[:, None], queries.masked_fill(outside, 0)]
    return rows.masked_fill(outside[..., None, None], 0)


def scatter_rows(rows: Tensor, queries: Tensor, num_tokens: int) -> Tensor:
    """[B, T, H, D]: sums of the ``rows`` [B, M, H, D] of each token, as a product: always in the same order."""
    token = torch.arange(num_tokens, device=rows.device)[:, None]
    return ((token == queries[:, None]).to(rows.dtype) @ rows.flatten(2)).view(len(rows), num_tokens, *rows.shape[2:])


def _scores(q: Tensor, k: Tensor, valid: Tensor, scale: float) -> Tensor:
    """[B, H, Tq, T], -inf at keys that are not valid."""
    return (scale * torch.einsum("bmhd,bnhd->bhmn", q, k)).masked_fill(~valid[:, None, None], -torch.inf)


def _prepared(q: Tensor, k: Tensor | None, v: Tensor | None, spans: Tensor | None, queries: Tensor | None) -> Any:
    """Rows of q, and k and v with zeros at keys that are not valid, in float32 at least; and which are."""
    q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in unpack(q, k, v))
    valid = valid_keys(spans, q.shape[0], q.shape[1], q.device)
    hidden = ~valid[..., None, None]
    return gather_rows(q, queries), k.masked_fill(hidden, 0), v.masked_fill(hidden, 0), valid


def masked_span_attention(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    spans: Tensor | None = None,
    queries: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The result [B, Tq, H, D], and the logarithm [B, H, Tq] of the sum that each row of weights is divided by."""
    rows, keys, values, valid = _prepared(q, k, v, spans, queries)
    scores = _scores(rows, keys, valid, scale_of(scale, q.shape[-1]))
    logsumexp = scores.logsumexp(-1)
    if queries is not None:
        # Infinity leaves a row without weights.
        outside = (queries < 0) | (queries >= q.shape[1])
        logsumexp = logsumexp.masked_fill(outside[:, None], torch.inf)
    weights = (scores - logsumexp[..., None]).exp()
    out = torch.einsum("bhmn,bnhd->bmhd", dropout(weights, dropout_p, seed), values)
    return out.to(q.dtype).contiguous(), logsumexp


def masked_span_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    spans: Tensor | None = None,
    queries: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Gradients of q, k and v, packed: [B, T, 3, H, D]."""
    rows, keys, values, valid = _prepared(q, k, v, spans, queries)
    grad, out = grad.to(rows.dtype), out.to(rows.dtype)
    scale = scale_of(scale, q.shape[-1])
    weights = (_scores(rows, keys, valid, scale) - logsumexp[..., None].to(rows.dtype)).exp()
    of_values = torch.einsum("bhmn,bmhd->bnhd", dropout(weights, dropout_p, seed), grad)
    of_weights = dropout(torch.einsum("bmhd,bnhd->bhmn", grad, values), dropout_p, seed)
    mean = (grad * out).sum(-1).transpose(1, 2)[..., None]
    of_scores = scale * weights * (of_weights - mean)
    of_keys = torch.einsum("bhmn,bmhd->bnhd", of_scores, rows)
    of_rows = torch.einsum("bhmn,bnhd->bmhd", of_scores, keys)
    of_q = of_rows if queries is None else scatter_rows(of_rows, queries, q.shape[1])
    return torch.stack((of_q, of_keys, of_values), 2).to(q.dtype)


def _inputs(device: str) -> Iterator[tuple[Any, ...]]:
    """Arguments of the op after its tensors are drawn: small ones, since Triton's interpreter runs them too."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device)

    def integers(values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    def apart(B: int, T: int, H: int, D: int) -> tuple[Tensor, ...]:
        return tuple(normal(B, T, H, D) for _ in range(3))

    seed = integers(-(2**40) - 5)
    yield (*apart(2, 7, 2, 8), None, None, 0.0, None, None)
    yield (*apart(1, 1, 1, 5), None, None, 0.0, None, None)
    yield (*apart(0, 5, 2, 8), None, None, 0.0, None, None)
    yield (*apart(2, 0, 1, 8), None, None, 0.0, None, None)
    # Overlapping, empty, turned round and outside; a record without a valid key; one of a single key.
    spans = integers(
        [[[0, 3], [2, 5], [9, 9]], [[4, 4], [7, 2], [20, 30]], [[-5, 2], [17, 90], [6, 6]], [[8, 9], [0, 0], [0, 0]]]
    )
    q, k, v = apart(4, 19, 1, 24)
    for x in (k, v):
        x[0, 7:], x[2, 4] = torch.nan, 1e30
    yield q, k, v, spans, None, 0.0, None, 0.3
    queries = integers([[3, 3, 0], [18, -1, 5], [19, 2, 2], [1, 0, 18]])
    yield q, k, v, spans, queries, 0.3, seed, None
    yield (*apart(1, 9, 1, 16), None, integers([[]]), 0.2, seed, None)
    q, k, v = apart(1, 33, 2, 12)
    yield 5 * q, 5 * k, v, None, None, 0.0, None, None
    yield normal(2, 93, 3, 1, 64), None, None, integers([[[0, 40], [50, 93]], [[0, 93], [0, 0]]]), None, 0.1, seed, None
    yield normal(1, 40, 3, 2, 80), None, None, None, integers([[39, 0, 39, 7]]), 0.5, seed + 1, 0.1
    yield (*apart(1, 130, 1, 16), integers([[[1, 129]]]), None, 0.25, seed, None)
    yield (*apart(1, 17, 1, 8), None, None, 1.0, seed, None)


def masked_span_attention_samples(device: str) -> Iterator[tuple[Any, ...]]:
    yield from _inputs(device)


def masked_span_attention_backward_samples(device: str) -> Iterator[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(1)
    for q, k, v, *how in _inputs(device):
        out, logsumexp = masked_span_attention(q, k, v, *how)
        grad = torch.randn(out.shape, generator=random).to(device)
        yield grad, q, k, v, out, logsumexp, *how


masked_span_attention_tolerance = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (1e-4, 2e-5),
    torch.float16: (2e-3, 3e-3),
    torch.bfloat16: (2e-2, 2e-2),
}
masked_span_attention_backward_tolerance = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (1e-3, 2e-4),
    torch.float16: (1e-2, 2e-2),
    torch.bfloat16: (5e-2, 0.2),
}


def masked_span_attention_errors() -> Iterator[tuple[tuple[Any, ...], str]]:
    op, x = "masked_span_attention", torch.zeros(2, 5, 3, 8)
    pairs, rows = torch.zeros(2, 1, 2, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64)
    one = rf"{op}: q must be floating point \[B, T, H, D\], or \[B, T, 3, H, D\] without k and v, got "
    yield (x.int(), x, x), one + r"int32\[2, 5, 3, 8\]"
    yield (x[0], x[0], x[0]), one + r"float32\[5, 3, 8\]"
    yield (x,), one + r"float32\[2, 5, 3, 8\]"
    yield (x[:, :, :2, None],), one + r"float32\[2, 5, 2, 1, 8\]"
    yield (x, x), rf"{op}: v must be float32\[2, 5, 3, 8\] as q is, got None"
    yield (x, x[:, 1:], x), rf"{op}: k must be float32\[2, 5, 3, 8\] as q is, got float32\[2, 4, 3, 8\]"
    yield (x, x, x.half()), rf"{op}: v must be float32\[2, 5, 3, 8\] as q is, got float16\[2, 5, 3, 8\]"
    yield (x, x, x, pairs[0]), rf"{op}: spans must be int64 \[2, S, 2\], got int64\[1, 2\]"
    yield (x, x, x, pairs.int()), rf"{op}: spans must be int64 \[2, S, 2\], got int32\[2, 1, 2\]"
    yield (x, x, x, None, rows[:1]), rf"{op}: queries must be int64 \[2, M\], got int64\[1, 4\]"
    yield (x, x, x, None, None, 1.5), rf"{op}: dropout_p must be from 0 to 1, got 1\.5"
    yield (x, x, x, None, None, 0.1, rows), rf"{op}: seed must be "
    yield (x, x, x, None, None, 0.1, 1, "a"), rf"{op}: scale must be a number, got 'a'"
    yield ([[1.0]],), rf"{op}: q must be a NumPy, CuPy or torch array, got list"
