"""An op is one object: its schema, its reference, and the backends that must agree with it.

Dispatch, tests, benchmarks and ``hubert-ecg info`` all walk :data:`OPS`, so each finds a new op or backend by itself.

The module of the reference, ``<stem>_reference.py``, says for each of its ops how the op is tested:

* ``<op>(...)``: the plain PyTorch truth, for any float dtype and any strides;
* ``<op>_samples(device)``: argument tuples of the op (float32 where floating; the tests make float64 and strided ones
  of them), an empty batch, odd sizes and hostile values among them;
* ``<op>_tolerance``: ``{dtype: (rtol, atol)}`` of the floating outputs against the reference in float64;
* ``<op>_errors()``: pairs of arguments that the public function must refuse, and a pattern of what it says.

An op with gradients has its backward as an op of its own, ``<op>_backward``, with samples and tolerance and without a
public function. The arguments of the op, in their order, are those of its public function.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.autograd import forward_ad

from hubert_ecg import native
from hubert_ecg.ops._checked import CUDA_CHECKS

LIBRARY = torch.library.Library("hubert_ecg", "DEF")
OPS: dict[str, Op] = {}
DEVICES = ("cpu", "cuda")
_forced: list[str] = []

#: A NumPy, CuPy or torch array.
Array: TypeAlias = Any


class Op:
    """One operator of ``torch.ops.hubert_ecg``.

    Args:
        schema: the torch schema, ``"name(Tensor x, ...) -> Tensor"``.
        reference: the plain PyTorch truth, run wherever nothing faster exists.

    Attributes:
        overload: the operator as torch knows it.
        backends: device -> backend name -> function; the last is the default. From slow to fast, but a kernel that
            was never checked comes first: it runs where it is asked for by name.
        missing: device -> backend name -> why it is not there.
        checks: device -> backend name -> how its values were checked; empty where they never were.
        public: whether ``hubert_ecg.ops`` has a function of its name; a backward has none.
        differentiable: whether gradients pass through it.
    """

    def __init__(self, schema: str, reference: Callable[..., Any]):
        self.name = schema.split("(", 1)[0]
        self.public = not self.name.endswith("_backward")
        self.differentiable = False
        self.reference = reference
        self.backends: dict[str, dict[str, Callable[..., Any]]] = {d: {"reference": reference} for d in DEVICES}
        self.missing: dict[str, dict[str, str]] = {d: {} for d in DEVICES}
        self.checks: dict[str, dict[str, str]] = {d: {"reference": "by definition"} for d in DEVICES}
        LIBRARY.define(schema)
        LIBRARY.impl(self.name, lambda *args: self.pick("cpu")(*args), "CPU")
        LIBRARY.impl(self.name, lambda *args: self.pick("cuda")(*args), "CUDA")
        self.overload = getattr(torch.ops.hubert_ecg, self.name).default
        OPS[self.name] = self

    def call(self, *args: Any) -> Any:
        """The operator, as the public function calls it.

        Raises:
            RuntimeError: An argument carries a forward-mode derivative, which torch would drop in silence.
        """
        if self.differentiable and forward_ad._current_level >= 0:
            tensors = (x for x in args if isinstance(x, torch.Tensor))
            if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
                raise RuntimeError(f"{self.name}: has no forward-mode derivative; use reverse mode (backward)")
        return self.overload(*args)

    def composed(self, fn: Callable[..., Any]) -> None:
        """A backend made of other ops, on every device: for where this op has no kernel of its own, but they do."""
        for device in DEVICES:
            self.backends[device]["composed"] = fn
            self.checks[device]["composed"] = "as the ops it is made of"

    def native(self, allocate_and_run: Callable[..., Any]) -> None:
        """The C++ and CUDA backend: ``fn(kernel, *args)`` allocates the outputs and runs ``kernel`` into them."""
        for device in DEVICES:
            kernel = native.find(self.name, device)
            if kernel is None:
                self.missing[device]["native"] = native.why_missing or f"built without {device} kernels for this op"
                continue
            backend = {"native": functools.partial(allocate_and_run, kernel)}
            # tests/ops/test_every_op.py finds every kernel of the CPU by itself.
            checked = "tests" if device == "cpu" else CUDA_CHECKS.get(self.name, "")
            others = self.backends[device]
            self.backends[device] = {**others, **backend} if checked else {**backend, **others}
            self.checks[device]["native"] = checked

    def triton(self, allocate_and_launch: Callable[..., Any]) -> None:
        """The Triton backend: ``fn(kernels, *args)`` launches kernels of ``<stem>_triton``, imported on first use.

        In Triton's interpreter (TRITON_INTERPRET=1) it runs on a CPU too, for tests: never as the default.
        """
        if importlib.util.find_spec("triton") is None:
            self.missing["cuda"]["triton"] = "Triton is not installed (pip install hubert-ecg[gpu])"
            return
        stem = self.reference.__module__.removesuffix("_reference")

        def run(*args: Any) -> Any:
            kernels = importlib.import_module(f"{stem}_triton")
            if args[0].device.type == "cpu":
                return allocate_and_launch(kernels, *args)
            with torch.cuda.device(args[0].device):
                return allocate_and_launch(kernels, *args)

        self.backends["cuda"]["triton"] = run
        self.checks["cuda"]["triton"] = "interpreter"
        if os.environ.get("TRITON_INTERPRET") == "1":
            self.backends["cpu"] = {"triton": run, **self.backends["cpu"]}
            self.checks["cpu"]["triton"] = "tests"

    def fake(self, fn: Callable[..., Any]) -> None:
        """Shapes and dtypes of the outputs, for tracing."""
        torch.library.register_fake(f"hubert_ecg::{self.name}", fn, lib=LIBRARY)

    def autograd(self, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
        """Ties the backward, itself an op that was defined before, to this op."""
        self.differentiable = True

        def refuse(ctx: Any, *grads: Any) -> None:
            raise RuntimeError(f"{self.name}: has no second derivative")

        name = f"hubert_ecg::{self.name}_backward"
        torch.library.register_autograd(name, refuse, setup_context=lambda ctx, inputs, output: None, lib=LIBRARY)
        torch.library.register_autograd(f"hubert_ecg::{self.name}", backward, setup_context=setup_context, lib=LIBRARY)

    def pick(self, device: str) -> Callable[..., Any]:
        """The backend that serves ``device`` now: the forced one where the op has it, else the default."""
        return self.backends[device][self.picked(device)]

    def picked(self, device: str) -> str:
        """The name of the backend that serves ``device`` now."""
        table = self.backends[device]
        if _forced and _forced[-1] in table:
            return _forced[-1]
        return next(reversed(table))

    def why(self, device: str) -> str:
        """Why :meth:`picked` is what it is."""
        name, table = self.picked(device), self.backends[device]
        if name != next(reversed(table)):
            return "asked for by use_backend"
        unchecked = [other for other in table if not self.checks[device][other]]
        if unchecked:
            return f"{unchecked[0]} was never checked, on a GPU or in the host build"
        return f"preferred; values checked: {self.checks[device][name]}" if len(table) > 1 else "the only one here"

    def _said(self, what: str) -> Any:
        return getattr(sys.modules[self.reference.__module__], f"{self.name}_{what}")

    def samples(self, device: str = "cpu") -> Iterator[tuple[Any, ...]]:
        """Arguments to test and time the op with."""
        return self._said("samples")(device)

    def errors(self) -> Iterator[tuple[tuple[Any, ...], str]]:
        """Arguments that the public function refuses, each with a pattern of the message."""
        return self._said("errors")()

    @property
    def tolerance(self) -> dict[torch.dtype, tuple[float, float]]:
        """``(rtol, atol)`` by dtype of the input."""
        return self._said("tolerance")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Inside the block, every op that has the backend ``name`` runs it."""
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def takes_arrays(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Lets a function of tensors take NumPy, CuPy and torch arrays, and give back the kind it got.

    The arguments called ``names`` reach the function as tensors that share memory with what was given (read-only memory
    maps too: the function must not write to them), or as None where None was given. The tensors that it returns, alone
    or in a tuple, leave as arrays of the kind of the first named argument.

    ```python
    @takes_arrays("x", "centroids")
    def kmeans_assign(x: Array, centroids: Array) -> Array:
        ...  # x and centroids are tensors here
    ```

    Raises:
        ValueError: a named argument is no such array, or None where its annotation does not say None:
            ``<function>: <argument> must be a NumPy, CuPy or torch array``.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        parameters = inspect.signature(function).parameters
        order = list(parameters)
        places = [(order.index(name), name, "None" in str(parameters[name].annotation)) for name in names]

        @functools.wraps(function)
        def public(*args: Any, **kwargs: Any) -> Any:
            kind = None
            given = list(args)
            for place, name, optional in places:
                by_place = place < len(given)
                if not by_place and name not in kwargs:
                    continue
                array = given[place] if by_place else kwargs[name]
                if array is None and optional:
                    continue
                kind = kind or kind_of(array)
                what = f"{function.__name__}: {name}"
                if isinstance(array, torch.Tensor):
                    check_dense(what, array)
                    continue
                tensor = to_tensor(array, what)
                if by_place:
                    given[place] = tensor
                else:
                    kwargs[name] = tensor
            result = function(*given, **kwargs)
            return result if kind in (None, "torch") else give_back(result, kind)

        # torch.compile counts how often it compiled a code object: each function gets its own.
        public.__code__ = public.__code__.replace(co_name=function.__name__)  # type: ignore[attr-defined]
        return public

    return decorate


def describe(x: torch.Tensor) -> str:
    """A tensor as errors name it: ``float32[4, 8]``."""
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"


def check_device(op: str, x: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Raises ValueError where one of the named tensors does not lie where ``x`` does."""
    for name, other in others.items():
        if other is not None and other.device != x.device:
            raise ValueError(f"{op}: {name} must be on the device of x ({x.device}), got {other.device}")


def check_dtype(op: str, x: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Raises ValueError where one of the named tensors is not of the dtype of ``x``."""
    for name, other in others.items():
        if other is not None and other.dtype != x.dtype:
            raise ValueError(f"{op}: {name} must be of the dtype of x ({x.dtype}), got {describe(other)}")


def check_dense(what: str, x: torch.Tensor) -> None:
    """Raises ValueError where ``x`` is sparse or nested; ``what`` is ``<op>: <argument>``."""
    if x.is_nested or x.layout != torch.strided:
        kind = "a nested tensor" if x.is_nested else f"a {str(x.layout).removeprefix('torch.')} tensor"
        raise ValueError(f"{what} must be dense, got {kind}; convert it first, with to_dense() or to_padded_tensor()")


def check_whole(what: str, value: Any) -> None:
    """Raises ValueError where ``value`` is no whole number; ``what`` is ``<op>: <argument>``."""
    _check_kind(what, value, "a whole number", int | np.integer)


def check_real(what: str, value: Any) -> None:
    """Raises ValueError where ``value`` is no real number (NaN and infinity are)."""
    _check_kind(what, value, "a number", int | float | np.integer | np.floating)


def check_flag(what: str, value: Any) -> None:
    """Raises ValueError where ``value`` is neither True nor False."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{what} must be True or False, got {value!r}")


def _check_kind(what: str, value: Any, want: str, kind: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        raise ValueError(f"{what} must be {want}, got {value!r}")


def as_floating(what: str, x: torch.Tensor, min_samples: int = 0) -> torch.Tensor:
    """``x`` [..., S] in the dtype that kernels compute in: float64 stays, other floating dtypes become float32."""
    if not x.is_floating_point() or x.ndim < 1 or x.shape[-1] < min_samples:
        raise ValueError(f"{what} must be floating point [..., S] with S >= {min_samples}, got {describe(x)}")
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """What autocast wants a product of x in; None where it is off, and for float64, which it leaves alone."""
    on = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if on else None


def kind_of(array: Any) -> str:
    if isinstance(array, torch.Tensor):
        return "torch"
    return "numpy" if isinstance(array, np.ndarray) else type(array).__module__.split(".", 1)[0]


def to_tensor(array: Any, what: str) -> torch.Tensor:
    """A tensor of the numbers of a NumPy or CuPy array, in the same memory where torch can read it; not to be written.

    Raises:
        ValueError: it is no such array, or holds no real numbers.
    """
    if hasattr(array, "toarray"):  # SciPy's sparse ones
        raise ValueError(f"{what} must be dense, got a sparse {type(array).__name__}; convert it with toarray()")
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in "biuf":
            raise ValueError(f"{what} must hold numbers, got dtype {array.dtype}")
        if array.dtype.itemsize > 8:  # long double
            array = array.astype(np.float64)
        if not array.dtype.isnative or any(stride % array.itemsize or stride < 0 for stride in array.strides):
            array = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
        return torch.from_numpy(array if array.flags.writeable else np.asarray(_Writeable(array)))
    if not hasattr(array, "__dlpack__"):
        given = "None" if array is None else type(array).__name__
        raise ValueError(f"{what} must be a NumPy, CuPy or torch array, got {given}")
    return torch.from_dlpack(array)


class _Writeable:
    """A read-only array without its lock, because torch has no read-only tensors and warns of them."""

    def __init__(self, array: np.ndarray):
        self.array = array  # keeps the memory
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def give_back(result: Any, kind: str) -> Any:
    if isinstance(result, tuple):
        return tuple(give_back(part, kind) for part in result)
    if not isinstance(result, torch.Tensor):
        return result
    # What is no array library, or one that only gives, gets a tensor.
    take = getattr(sys.modules.get(kind), "from_dlpack", torch.from_dlpack)
    return result.numpy() if kind == "numpy" else take(result)
