"""Every backend of every op against its reference. A new op or backend needs no new test, only samples."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from torch.autograd import forward_ad

from hubert_ecg import ops
from hubert_ecg.ops import OPS, use_backend
from hubert_ecg.testing import assert_close, poisoned_memory, strided

DTYPES = [torch.float32, torch.float64]


def convert(args, dtype):
    return tuple(a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)


def describe(args):
    return ", ".join(f"{tuple(a.shape)}" if isinstance(a, torch.Tensor) else f"{a}" for a in args)


def cases(ops=OPS, by_dtype=False):
    for name, op in ops.items():
        for device, table in op.backends.items():
            marks = [pytest.mark.cuda] if device == "cuda" else []
            for backend in table:
                which = f"{name}-{device}-{backend}"
                if not by_dtype:
                    yield pytest.param(op, device, backend, id=which, marks=marks)
                    continue
                for dtype in op.tolerance:
                    # Triton's interpreter multiplies matrices of bfloat16 wrongly, on a CPU.
                    if (device, backend, dtype) != ("cpu", "triton", torch.bfloat16):
                        yield pytest.param(op, device, backend, dtype, id=f"{which}-{dtype}", marks=marks)


def each(ops, argument="op"):
    return pytest.mark.parametrize(argument, list(ops.values()), ids=list(ops))


PUBLIC = {name: op for name, op in OPS.items() if op.public}
DIFFERENTIABLE = {name: op for name, op in PUBLIC.items() if op.differentiable}
WITHOUT_GRADIENT = {name: op for name, op in PUBLIC.items() if not op.differentiable}

every_op, every_public_op = each(OPS), each(PUBLIC)
every_backend = pytest.mark.parametrize(("op", "device", "backend"), list(cases()))
every_backend_and_dtype = pytest.mark.parametrize(("op", "device", "backend", "dtype"), list(cases(by_dtype=True)))


@every_backend_and_dtype
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
        torch.library.opcheck(op.overload, args, test_utils=("test_schema", "test_faketensor"))


@every_op
def test_opcheck(op):
    torch.library.opcheck(op.overload, next(op.samples("cpu")))


@every_public_op
def test_public_function_compiles_to_one_graph(op):
    args = next(op.samples("cpu"))
    public = getattr(ops, op.name)
    compiled = torch.compile(public, backend="aot_eager", fullgraph=True)
    assert_close(compiled(*args), public(*args), rtol=0, atol=0, name=op.name)


@every_public_op
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


@every_public_op
def test_refuses_what_is_not_dense(op):
    args = next(op.samples("cpu"))
    place = next(i for i, a in enumerate(args) if isinstance(a, torch.Tensor))
    for given, kind in ((args[place].to_sparse(), "a sparse_coo tensor"), (csr_array(np.eye(3)), "a sparse csr_array")):
        with pytest.raises(ValueError, match=rf"^{op.name}: \w+ must be dense, got {kind}"):
            getattr(ops, op.name)(*args[:place], given, *args[place + 1 :])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each(WITHOUT_GRADIENT)
def test_half_precision_is_computed_in_float32(op, dtype):
    public = getattr(ops, op.name)
    args = convert(next(op.samples("cpu")), dtype)
    assert_close(public(*args), public(*convert(args, torch.float32)), rtol=0, atol=0, name=op.name)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@every_public_op
def test_refuses_bad_input_in_its_own_words(op, device):
    public = getattr(ops, op.name)
    errors = list(op.errors())
    assert errors, f"{op.name} has no samples of what it refuses"
    for args, pattern in errors:
        there = [a.to(device) if isinstance(a, torch.Tensor) and a.device.type == "cpu" else a for a in args]
        with pytest.raises(ValueError, match=rf"^{pattern}"):
            public(*there)


@each(WITHOUT_GRADIENT)
def test_no_gradient_passes_in_silence(op):
    first = next(op.samples())
    args = [a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in first]
    results = getattr(ops, op.name)(*args)
    assert not any(result.requires_grad for result in (results if isinstance(results, tuple) else (results,)))


def differentiable(args):
    return tuple(
        a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
    )


def gradients(function, args, num_results=None):
    """Of a fixed weighting of the results that have a gradient; what an op keeps for its backward comes after these."""
    args = differentiable(args)
    results = function(*args)
    results = (results if isinstance(results, tuple) else (results,))[:num_results]
    results = [r for r in results if r.requires_grad]
    random = torch.Generator().manual_seed(1)
    weights = [torch.randn(r.shape, generator=random).to(r) for r in results]
    leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    return torch.autograd.grad(results, leaves, weights, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize(("op", "device", "backend", "dtype"), list(cases(DIFFERENTIABLE, by_dtype=True)))
def test_gradients_agree_with_autograd_through_the_reference_in_float64(op, device, backend, dtype):
    rtol, atol = OPS[f"{op.name}_backward"].tolerance[dtype]
    for sample in op.samples(device):
        args = convert(sample, dtype)
        public = getattr(ops, op.name)
        with use_backend(backend), poisoned_memory():
            actual, results = gradients(public, args), public(*args)
        num_results = len(results) if isinstance(results, tuple) else 1
        expected = gradients(op.reference, convert(args, torch.float64), num_results)
        assert_close(actual, expected, rtol=rtol, atol=atol, name=f"gradients of {op.name}({describe(args)})")


@each(DIFFERENTIABLE)
def test_backward_is_the_derivative(op):
    args = convert(next(op.samples("cpu")), torch.float64)
    with use_backend("reference"):
        assert torch.autograd.gradcheck(getattr(ops, op.name), differentiable(args))


@each(DIFFERENTIABLE)
def test_forward_and_backward_compile_to_one_graph(op):
    args = next(op.samples("cpu"))
    compiled = torch.compile(getattr(ops, op.name), backend="aot_eager", fullgraph=True)
    expected = gradients(getattr(ops, op.name), args)
    assert_close(gradients(compiled, args), expected, rtol=1e-6, atol=1e-6, name=f"gradients of {op.name}")


@each(DIFFERENTIABLE)
def test_a_second_derivative_is_refused(op):
    args = differentiable(convert(next(op.samples("cpu")), torch.float64))
    results = op.call(*args)
    first = results[0] if isinstance(results, tuple) else results
    leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    gradient = torch.autograd.grad(first.square().sum(), leaves[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match=f"{op.name}: has no second derivative"):
        torch.autograd.grad(gradient.square().sum(), leaves)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@each(DIFFERENTIABLE)
def test_no_forward_mode_derivative_passes_in_silence(op):
    args = convert(next(op.samples("cpu")), torch.float64)
    for place, arg in enumerate(args):
        if not isinstance(arg, torch.Tensor) or not arg.is_floating_point():
            continue

        def alone(x, place=place):
            return getattr(ops, op.name)(*args[:place], x, *args[place + 1 :])

        if op.name == "linear":  # torch's own in float64
            torch.func.jvp(alone, (arg,), (torch.ones_like(arg),))
            continue
        with pytest.raises(RuntimeError, match=f"{op.name}: has no forward-mode derivative"):
            torch.func.jvp(alone, (arg,), (torch.ones_like(arg),))
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="has no forward-mode derivative"):
            alone(forward_ad.make_dual(arg, torch.ones_like(arg)))


@each(DIFFERENTIABLE)
def test_tensors_of_two_devices_are_refused(op):
    args = next(op.samples("cpu"))
    for place, arg in enumerate(args[1:], 1):
        if isinstance(arg, torch.Tensor) and arg.ndim:
            there = [*args[:place], arg.to("meta"), *args[place + 1 :]]
            with pytest.raises(ValueError, match=rf"^{op.name}: \w+ must be .* got "):
                getattr(ops, op.name)(*there)


@each(DIFFERENTIABLE)
def test_every_backend_gives_what_is_traced_of_any_memory_format(op):
    args = tuple(
        a.transpose(0, 1).contiguous().transpose(0, 1) if isinstance(a, torch.Tensor) and a.ndim > 1 else a
        for a in next(op.samples("cpu"))
    )
    for backend in op.backends["cpu"]:
        with use_backend(backend):
            torch.library.opcheck(op.overload, args, test_utils=("test_schema", "test_faketensor"))


@each(DIFFERENTIABLE)
def test_keeps_the_dtype_it_got(op):
    for dtype in op.tolerance:
        args = convert(next(op.samples("cpu")), dtype)
        results = getattr(ops, op.name)(*args)
        assert (results[0] if isinstance(results, tuple) else results).dtype in (dtype, torch.float32), dtype


@every_public_op
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


def test_triton_kernels_agree_in_the_interpreter():
    """Triton reads the variable when it is imported: a run of its own."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if tuple(map(int, version("triton").split(".")[:2])) < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("the interpreter of Triton before 3.7 does not run on NumPy 2.4 or newer")
    # The interpreter computes with NumPy, which warns of the infinities that it is given.
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", "-k", "cpu-triton"]
    here = [sys.executable, "-m", "pytest", *options, str(Path(__file__).parent)]
    run = subprocess.run(here, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-10000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("op", [op for op in OPS.values() if "native" in op.backends["cpu"]], ids=lambda op: op.name)
def test_does_not_depend_on_the_number_of_threads(op, threads):
    args = max(op.samples("cpu"), key=lambda args: args[0].numel())
    # A product of float32 is torch's own.
    args = convert(args, torch.bfloat16 if op.name.startswith("linear") else torch.float32)
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
