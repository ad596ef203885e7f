"""Every backend of every op against its reference. A new op or backend needs no new test, only samples."""

from __future__ import annotations

import doctest
import inspect
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from hubert_ecg import ops
from hubert_ecg.ops import OPS, use_backend
from hubert_ecg.testing import assert_close, poisoned_memory, strided

DTYPES = [torch.float32, torch.float64]


def convert(args, dtype):
    return tuple(a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)


def describe(args):
    return ", ".join(f"{tuple(a.shape)}" if isinstance(a, torch.Tensor) else f"{a}" for a in args)


def cases():
    for name, op in OPS.items():
        for device, table in op.backends.items():
            marks = [pytest.mark.cuda] if device == "cuda" else []
            for backend in table:
                yield pytest.param(op, device, backend, id=f"{name}-{device}-{backend}", marks=marks)


every_op = pytest.mark.parametrize("op", list(OPS.values()), ids=list(OPS))
every_backend = pytest.mark.parametrize(("op", "device", "backend"), list(cases()))
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@every_dtype
@every_backend
def test_agrees_with_reference_in_float64(op, device, backend, dtype):
    rtol, atol = op.tolerance[dtype]
    for sample in op.samples(device):
        args = convert(sample, dtype)
        with use_backend(backend), poisoned_memory():
            actual = op.call(*args)
        assert_close(
            actual,
            op.reference(*convert(args, torch.float64)),
            rtol=rtol,
            atol=atol,
            name=f"{op.name}({describe(args)})",
        )


@every_backend
def test_takes_strided_input(op, device, backend):
    for args in op.samples(device):
        apart = tuple(strided(a) if isinstance(a, torch.Tensor) else a for a in args)
        with use_backend(backend):
            assert_close(op.call(*apart), op.call(*args), rtol=1e-5, atol=1e-5, name=f"{op.name}({describe(args)})")


@every_backend
def test_leaves_its_input_alone(op, device, backend):
    for args in op.samples(device):
        before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        with use_backend(backend):
            op.call(*args)
        for i, (now, then) in enumerate(zip(args, before, strict=True)):
            if isinstance(now, torch.Tensor):
                assert_close(now, then, rtol=0, atol=0, name=f"{op.name}: argument {i}")


@every_op
def test_output_is_contiguous_and_of_the_traced_kind(op):
    for args in op.samples("cpu"):
        torch.library.opcheck(op.call, args, test_utils=("test_schema", "test_faketensor"))


@every_op
def test_opcheck(op):
    torch.library.opcheck(op.call, next(op.samples("cpu")))


@every_op
def test_public_function_compiles_to_one_graph(op):
    args = next(op.samples("cpu"))
    public = getattr(ops, op.name)
    compiled = torch.compile(public, backend="aot_eager", fullgraph=True)
    assert_close(compiled(*args), public(*args), rtol=0, atol=0, name=op.name)


@every_op
def test_gives_back_the_kind_it_got(op):
    args = next(op.samples("cpu"))
    public = getattr(ops, op.name)
    arrays = tuple(a.numpy() if isinstance(a, torch.Tensor) else a for a in args)
    for a in arrays:
        if isinstance(a, np.ndarray):
            a.flags.writeable = False  # as in a memory map
    actual, expected = public(*arrays), public(*args)
    wide = tuple(a.astype(np.longdouble) if isinstance(a, np.ndarray) and a.dtype.kind == "f" else a for a in arrays)
    public(*wide)
    for a, e in zip(*((r if isinstance(r, tuple) else (r,)) for r in (actual, expected)), strict=True):
        assert isinstance(a, np.ndarray)
        np.testing.assert_array_equal(a, e.numpy(), err_msg=op.name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_op
def test_half_precision_is_computed_in_float32(op, dtype):
    public = getattr(ops, op.name)
    args = convert(next(op.samples("cpu")), dtype)
    assert_close(public(*args), public(*convert(args, torch.float32)), rtol=0, atol=0, name=op.name)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@every_op
def test_refuses_bad_input_in_its_own_words(op, device):
    public = getattr(ops, op.name)
    errors = list(op.errors())
    assert errors, f"{op.name} has no samples of what it refuses"
    for args, pattern in errors:
        there = [a.to(device) if isinstance(a, torch.Tensor) and a.device.type == "cpu" else a for a in args]
        with pytest.raises(ValueError, match=rf"^{pattern}"):
            public(*there)


@every_op
def test_no_gradient_passes_in_silence(op):
    first = next(op.samples())
    args = [a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in first]
    results = getattr(ops, op.name)(*args)
    assert not any(result.requires_grad for result in (results if isinstance(results, tuple) else (results,)))


@every_op
def test_docstring_shows_what_it_computes(op):
    public = getattr(ops, op.name)
    examples = doctest.DocTestFinder(recurse=False).find(public, op.name, globs={"torch": torch, op.name: public})
    results = [doctest.DocTestRunner().run(example) for example in examples]
    assert sum(result.attempted for result in results), f"{op.name} shows no example"
    assert not sum(result.failed for result in results)


@every_op
def test_samples_hold_an_empty_batch_and_odd_sizes(op):
    sizes = [a.shape for args in op.samples("cpu") for a in args if isinstance(a, torch.Tensor)]
    assert any(0 in shape for shape in sizes), f"{op.name} has no empty sample"
    assert any(shape and shape[-1] % 2 for shape in sizes), f"{op.name} has no sample of odd size"


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("op", [op for op in OPS.values() if "native" in op.backends["cpu"]], ids=lambda op: op.name)
def test_does_not_depend_on_the_number_of_threads(op, threads):
    args = max(op.samples("cpu"), key=lambda args: args[0].numel())
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = op.call(*args)
        torch.set_num_threads(threads)
        assert_close(op.call(*args), expected, rtol=0, atol=0, name=op.name)
    finally:
        torch.set_num_threads(before)


AGREE = f"""
import torch
from hubert_ecg.ops import OPS
from hubert_ecg.testing import assert_close
{inspect.getsource(convert)}
for op in OPS.values():
    for dtype, (rtol, atol) in op.tolerance.items():
        for sample in op.samples():
            args = convert(sample, dtype)
            want = op.reference(*convert(args, torch.float64))
            assert_close(op.call(*args), want, rtol=rtol, atol=atol, name=op.name)
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_agrees_on_older_processors(isa):
    subprocess.run([sys.executable, "-c", AGREE], env={**os.environ, "HUBERT_ECG_ISA": isa}, check=True)
