"""Attention of one layer of the base model, forward, and with its backward, against torch's own kernels and others."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hubert_ecg import ops
from hubert_ecg.ops import OPS, use_backend
from hubert_ecg.testing import assert_close

T, H, D = 93, 12, 64
BATCH = {"cpu": 16, "cuda": 448}


def forms(device, limited, dropout_p, dtype):
    """q, k and v; attention of ours, torch and others, or why it is not here; and the share of keys that are valid."""
    random = torch.Generator(device).manual_seed(0)
    shape = BATCH[device.type], T, H, D
    inputs = [torch.randn(shape, generator=random, device=device).to(dtype).requires_grad_() for _ in range(3)]
    spans = mask = None
    if limited:
        # Five leads of twelve are there, of the length that seven tokens see.
        spans = torch.tensor([[[8 * lead, 8 * lead + 7] for lead in range(5)]], device=device).expand(shape[0], -1, -1)
        token = torch.arange(T, device=device)
        mask = ((spans[..., :1] <= token) & (token < spans[..., 1:])).any(1)[:, None, None]

    def ours(*qkv, p, backend=None):
        if backend is None:
            return ops.masked_span_attention(*qkv, spans, None, p)
        with use_backend(backend):
            return ops.masked_span_attention(*qkv, spans, None, p)

    def sdpa(*qkv, p, backend=None):
        turned = [x.transpose(1, 2) for x in qkv]
        if backend is None:
            return F.scaled_dot_product_attention(*turned, attn_mask=mask, dropout_p=p).transpose(1, 2)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*turned, attn_mask=mask, dropout_p=p).transpose(1, 2)

    found = {"ours": ours, "torch SDPA": sdpa}
    if device.type == "cuda":
        table = OPS["masked_span_attention"].backends["cuda"]
        for name in list(table)[:-1]:
            found[f"ours, {name}"] = functools.partial(ours, backend=name)
        for backend in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
            found[f"torch SDPA, {backend}"] = functools.partial(sdpa, backend=getattr(SDPBackend, backend))
        found["FlexAttention"] = "takes no dropout" if dropout_p else flex_attention(mask, shape, device)
        found["flash-attn"] = "takes no mask of keys" if limited else flash_attention(dtype)
    return inputs, found, 1.0 if mask is None else float(mask.float().mean())


def flex_attention(mask, shape, device):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # One compiled form for each case, and not the last of too many.
    torch.compiler.reset()
    compiled, blocks = torch.compile(flex_attention), None
    if mask is not None:
        keys = mask[:, 0, 0]
        blocks = create_block_mask(lambda b, h, q, k: keys[b, k], shape[0], None, T, T, device=device)
    return lambda *qkv, p: compiled(*(x.transpose(1, 2) for x in qkv), block_mask=blocks).transpose(1, 2)


def flash_attention(dtype):
    if dtype == torch.float32:
        return "takes half precision alone"
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return "not here; pip install flash-attn"
    return lambda *qkv, p: flash_attn_func(*qkv, dropout_p=p)


def forward(attend, inputs, grad, p):
    def run():
        with torch.no_grad():
            return attend(*inputs, p=p)

    return run


def with_gradients(attend, inputs, grad, p):
    def run():
        out = attend(*inputs, p=p)
        return out, *torch.autograd.grad(out, inputs, grad)

    return run


# How it runs; tensors as large as q that are read and written at least, whole ones and those of which only valid keys
# are needed; and products of queries and keys. The backward reads q, k, v, the result and its gradient, writes three
# gradients, and computes the scores again.
PASSES = {"forward": (forward, 2, 2, 2), "both": (with_gradients, 8, 4, 7)}


@pytest.mark.benchmark(group="attention")
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["whole", "dropout"])
@pytest.mark.parametrize("limited", [False, True], ids=["all_keys", "spans"])
def test_attention(race, checked, device, limited, dropout_p, dtype, passes):
    made, num_whole, num_of_keys, num_products = PASSES[passes]
    inputs, found, share = forms(device, limited, dropout_p, dtype)
    grad = torch.randn(inputs[0].shape, generator=torch.Generator(device).manual_seed(1), device=device).to(dtype)
    rtol, atol = OPS["masked_span_attention_backward"].tolerance[dtype]
    whole = [x.detach().float().requires_grad_() for x in inputs]
    expected = made(found["torch SDPA"], whole, grad.float(), 0.0)()

    def runs_with(p):
        return {
            name: attend if isinstance(attend, str) else made(attend, inputs, grad, p) for name, attend in found.items()
        }

    def check(name, answer):
        # What is asked of ours is not asked of others in half precision.
        slack = 1 if name.startswith("ours") else 4
        assert_close(answer, expected, rtol=slack * rtol, atol=slack * atol, name=name)

    # What dropout leaves differs from one to the other.
    able = checked(runs_with(0.0), check)
    runs = {name: able[name] if isinstance(able[name], str) else run for name, run in runs_with(dropout_p).items()}
    moved = (num_whole + share * num_of_keys) * inputs[0].nbytes
    operations = share * num_products * 2 * inputs[0].numel() * T
    race(runs.pop("ours"), runs, "records", BATCH[device.type], moved=moved, operations=operations, dtype=dtype)
