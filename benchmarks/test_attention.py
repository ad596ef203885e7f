"""Attention of one layer of the base model, 16 records: forward and backward, against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hubert_ecg import ops
from hubert_ecg.ops import OPS
from hubert_ecg.testing import assert_close

B, T, H, D = 16, 93, 12, 64


@pytest.mark.benchmark(group="attention")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["whole", "dropout"])
@pytest.mark.parametrize("limited", [False, True], ids=["all_keys", "spans"])
def test_attention(race, limited, dropout_p, dtype):
    random = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(B, T, H, D, generator=random).to(dtype) for _ in range(4))
    # Five leads of twelve are there, of the length that seven tokens see.
    spans = torch.tensor([[[8 * lead, 8 * lead + 7] for lead in range(5)]]).expand(B, -1, -1) if limited else None
    mask = None
    if spans is not None:
        token = torch.arange(T)
        mask = ((spans[..., :1] <= token) & (token < spans[..., 1:])).any(1)[:, None, None]
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def ours(p=dropout_p):
        out = ops.masked_span_attention(*inputs, spans, None, p)
        return out, *torch.autograd.grad(out, inputs, grad)

    def sdpa(p=dropout_p):
        turned = (x.transpose(1, 2) for x in inputs)
        out = F.scaled_dot_product_attention(*turned, attn_mask=mask, dropout_p=p).transpose(1, 2)
        return out, *torch.autograd.grad(out, inputs, grad)

    rtol, atol = OPS["masked_span_attention_backward"].tolerance[dtype]
    assert_close(ours(0.0), sdpa(0.0), rtol=rtol, atol=atol, name="attention")
    race(ours, {"torch SDPA": sdpa}, "records", B)
