"""Attention is torch's over the valid keys alone, with its own dropout; what stands at other keys reaches nothing."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hubert_ecg.ops import OPS, _dropout, attention, masked_span_attention, spans_of, use_backend
from hubert_ecg.testing import assert_close

BACKENDS = [pytest.param(name, id=f"cpu-{name}") for name in OPS["masked_span_attention"].backends["cpu"]]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
CLOSE = {torch.float64: 1e-11, torch.float32: 2e-4}


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_loop(spans, num_tokens):
    """[B, T] bool, token by token."""
    rows = [[any(s <= t < e for s, e in record) for t in range(num_tokens)] for record in spans.tolist()]
    return torch.tensor([row if any(row) else [True] * num_tokens for row in rows]).view(len(rows), num_tokens)


def by_torch(q, k, v, valid=None, scale=None):
    mask = None if valid is None else valid[:, None, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def with_gradients(function, *inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, draw(*out.shape, seed=9).to(out))


def weights_of(num_tokens, dropout_p, seed, B=1, H=1):
    """The weights as dropout leaves them: values that are the identity show them."""
    q = draw(B, num_tokens, H, num_tokens, seed=4)
    v = torch.eye(num_tokens).to(q)[None, :, None].expand_as(q)
    return masked_span_attention(q, q, v, dropout_p=dropout_p, seed=seed), masked_span_attention(q, q, v)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("T", [1, 5, 93, 128, 129, 300])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_equals_torch_of_any_size(T, backend, dtype):
    for D, H in [(8, 3), (64, 2), (80, 1), (96, 2)]:
        q, k, v = (draw(2, T, H, D, seed=i).to(dtype) for i in range(3))
        spans = torch.tensor([[[0, (T + 1) // 2], [T - 1, T]], [[T // 3, T], [0, 0]]])
        for limit in (None, spans):
            with use_backend(backend):
                got = with_gradients(partial(masked_span_attention, spans=limit), q, k, v)
            valid = None if limit is None else by_loop(limit, T)
            want = with_gradients(partial(by_torch, valid=valid), q.double(), k.double(), v.double())
            assert_close(got, want, rtol=CLOSE[dtype], atol=CLOSE[dtype], name=f"T {T}, D {D}, H {H}")


@every_backend
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_only_keys_in_a_span_count_and_nothing_else_leaks(backend, data):
    T = data.draw(st.integers(1, 12))
    bound = st.one_of(st.integers(0, T), st.integers(-3, T + 3))
    spans = data.draw(st.lists(st.lists(st.tuples(bound, bound), min_size=3, max_size=3), min_size=1, max_size=3))
    spans = torch.tensor(spans)
    valid, B = by_loop(spans, T), len(spans)
    q, k, v = (draw(B, T, 2, 8, seed=i, dtype=torch.float32) for i in range(3))
    hostile = data.draw(st.sampled_from([torch.nan, 1e30, torch.inf]))
    attend = partial(masked_span_attention, spans=spans)
    with use_backend(backend):
        got = with_gradients(attend, q, *(x.masked_fill(~valid[..., None, None], hostile) for x in (k, v)))
    want = with_gradients(partial(by_torch, valid=valid), q.double(), k.double(), v.double())
    assert_close(got, want, rtol=1e-4, atol=1e-5, name=f"{spans.tolist()}")
    for gradient in got[2:]:
        assert not gradient[~valid].any()


@every_backend
def test_large_scores_stay_finite(backend):
    q, k, v = (draw(1, 9, 1, 8, seed=i, dtype=torch.float32) for i in range(3))
    with use_backend(backend):
        got = with_gradients(masked_span_attention, 100 * q, 300 * k, v)
    assert ((100 * q[0, :, 0]) @ (300 * k[0, :, 0]).T).abs().max() > 1e4
    assert all(x.isfinite().all() for x in got)
    assert_close(got[0], by_torch(100 * q.double(), 300 * k.double(), v.double()), rtol=1e-3, atol=1e-2)


@every_backend
def test_rows_of_queries_are_those_of_all_tokens(backend):
    T, queries = 11, torch.tensor([[3, 3, 10, 0], [11, -1, 5, 3]])
    q, k, v = (draw(2, T, 2, 8, seed=i, dtype=torch.float32) for i in range(3))
    spans = torch.tensor([[[2, 8]], [[0, 4]]])
    inside = ((queries >= 0) & (queries < T))[..., None, None]

    def some(q, k, v):
        every = by_torch(q, k, v, by_loop(spans, T))
        return every[torch.arange(2)[:, None], queries.clamp(0, T - 1)] * inside

    with use_backend(backend):
        got = with_gradients(partial(masked_span_attention, spans=spans, queries=queries), q, k, v)
    want = with_gradients(some, q.double(), k.double(), v.double())
    assert_close(got, want, rtol=1e-4, atol=1e-5, name="queries")
    untouched = [t for t in range(T) if t not in queries[1].tolist()]
    assert not got[1][1, untouched].any()


@every_backend
def test_packed_gives_the_same_bits(backend):
    qkv = draw(2, 9, 3, 2, 8, dtype=torch.float32)
    spans = torch.tensor([[[0, 4], [6, 9]], [[0, 0], [1, 5]]])
    how = {"spans": spans, "dropout_p": 0.25, "seed": 5}
    with use_backend(backend):
        packed = with_gradients(partial(masked_span_attention, **how), qkv)
        apart = with_gradients(partial(masked_span_attention, **how), *qkv.unbind(2))
    assert_close(packed[0], apart[0], rtol=0, atol=0, name="result")
    assert_close(packed[1], torch.stack(apart[1:], 2), rtol=0, atol=0, name="gradients")


def test_parts_of_a_packed_tensor_are_not_copied_and_neither_are_their_gradients():
    parts = draw(2, 9, 3, 2, 8).unbind(2)
    assert all(a is b for a, b in zip(attention._dense(*parts), parts, strict=True))
    gradients = with_gradients(masked_span_attention, *parts)[1:]
    assert len({x.untyped_storage().data_ptr() for x in gradients}) == 1


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_dropout_has_its_rate_and_scale(dropout_p):
    T = 64
    dropped, whole = weights_of(T, dropout_p, 3, B=4, H=4)
    kept = dropped != 0
    assert_close(dropped[kept], whole[kept] / (1 - dropout_p), rtol=1e-9, atol=0, name="kept weights")
    spread = (dropout_p * (1 - dropout_p) / kept.numel()) ** 0.5
    assert abs(1 - kept.double().mean().item() - dropout_p) < 4 * spread
    index = torch.arange(16 * T * T).view(4, 4, T, T).transpose(1, 2)
    assert torch.equal(kept, _dropout.bits(torch.tensor(3), index) >= _dropout.threshold(dropout_p))


def test_dropout_follows_from_the_seed():
    same, other = (weights_of(32, 0.5, seed)[0] for seed in (7, 8))
    assert_close(weights_of(32, 0.5, torch.tensor(7))[0], same, rtol=0, atol=0, name="the same seed")
    agree = ((same != 0) == (other != 0)).double().mean().item()
    assert abs(agree - 0.5) < 4 * 0.5 / 32
    torch.manual_seed(1)
    first, second = weights_of(32, 0.5, None)[0], weights_of(32, 0.5, None)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert_close(weights_of(32, 0.5, None)[0], first, rtol=0, atol=0, name="torch's generator")


def test_without_dropout_no_random_number_is_drawn():
    before = torch.random.get_rng_state()
    masked_span_attention(draw(1, 4, 3, 1, 8))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_backward_drops_what_forward_dropped(backend):
    spans, queries = torch.tensor([[[0, 3], [4, 6]], [[2, 2], [1, 1]]]), torch.tensor([[1, 1, 5], [0, 3, -1]])
    qkv = draw(2, 6, 3, 2, 4).requires_grad_()
    for limit, rows in itertools.product((None, spans), (None, queries)):
        with use_backend(backend):
            attend = partial(masked_span_attention, spans=limit, queries=rows, dropout_p=0.4, seed=11)
            assert torch.autograd.gradcheck(attend, qkv)


@every_backend
def test_same_bits_in_every_run(backend):
    q, k, v = (draw(2, 40, 2, 16, seed=i, dtype=torch.float32) for i in range(3))
    queries = torch.randint(40, (2, 60), generator=torch.Generator().manual_seed(0))
    attend = partial(masked_span_attention, queries=queries, dropout_p=0.2, seed=1)
    with use_backend(backend):
        assert_close(with_gradients(attend, q, k, v), with_gradients(attend, q, k, v), rtol=0, atol=0)


def test_half_precision_is_summed_in_float32():
    for dtype, bound in ((torch.float16, 1e-3), (torch.bfloat16, 8e-3)):
        q, k, v = (draw(2, 93, 2, 64, seed=i).to(dtype) for i in range(3))
        got = masked_span_attention(q, k, v)
        assert got.dtype == dtype
        # A rounding of the result is all that is lost.
        assert_close(got, by_torch(q.double(), k.double(), v.double()), rtol=bound, atol=1e-4, name=str(dtype))


def test_autocast_leaves_the_dtype_alone():
    qkv = draw(1, 5, 3, 1, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = masked_span_attention(qkv)
    assert_close(got, masked_span_attention(qkv), rtol=0, atol=0)
    assert got.dtype == torch.float32


def test_a_training_step_with_dropout_and_spans_is_one_graph():
    valid = torch.tensor([[True, True, False, True, False]])

    def attend(qkv):
        return masked_span_attention(qkv, spans=spans_of(valid), dropout_p=0.5, seed=3)

    qkv, compiled = draw(1, 5, 3, 2, 8), torch.compile(attend, backend="aot_eager", fullgraph=True)
    assert_close(with_gradients(compiled, qkv), with_gradients(attend, qkv), rtol=1e-12, atol=1e-12)
    drawn = torch.compile(lambda x: masked_span_attention(x, dropout_p=0.5), backend="aot_eager", fullgraph=True)
    assert drawn(qkv).isfinite().all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 17).flatmap(lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), max_size=4)))
def test_spans_of_a_mask(rows):
    valid = torch.tensor(rows, dtype=torch.bool).view(len(rows), len(rows[0]) if rows else 0)
    spans = spans_of(valid)
    assert spans.shape == (len(rows), (valid.shape[1] + 1) // 2, 2)
    assert spans.dtype == torch.int64
    for row, record in zip(rows, spans.tolist(), strict=True):
        runs, at = [], 0
        for value, run in itertools.groupby(row):
            length = len(list(run))
            runs += [[at, at + length]] if value else []
            at += length
        assert record == runs + [[len(row)] * 2] * (len(record) - len(runs))
