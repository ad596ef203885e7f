"""An op is one object: its schema, its reference, and the backends that must agree with it.

Dispatch, tests, benchmarks and ``hubert-ecg info`` all walk :data:`OPS`, so a new backend is found by all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from hubert_ecg import native

LIBRARY = torch.library.Library("hubert_ecg", "DEF")
OPS: dict[str, Op] = {}
DEVICES = ("cpu", "cuda")
_forced: list[str] = []


class Op:
    """One operator of ``torch.ops.hubert_ecg``.

    Args:
        schema: the torch schema, ``"name(Tensor x, ...) -> Tensor"``.
        reference: the plain PyTorch truth, run wherever nothing faster exists.
    """

    def __init__(self, schema: str, reference: Callable[..., Any]):
        self.name = schema.split("(", 1)[0]
        self.reference = reference
        self.backends: dict[str, dict[str, Callable[..., Any]]] = {d: {"reference": reference} for d in DEVICES}
        self.missing: dict[str, dict[str, str]] = {d: {} for d in DEVICES}
        LIBRARY.define(schema)
        LIBRARY.impl(self.name, lambda *args: self.pick("cpu")(*args), "CPU")
        LIBRARY.impl(self.name, lambda *args: self.pick("cuda")(*args), "CUDA")
        self.call = getattr(torch.ops.hubert_ecg, self.name).default
        OPS[self.name] = self

    def native(self, allocate_and_run: Callable[..., Any]) -> None:
        """The C++ and CUDA backend: ``fn(kernel, *args)`` allocates the outputs and runs ``kernel`` into them."""
        for device in DEVICES:
            kernel = native.find(self.name, device)
            if kernel is not None:
                self.backends[device]["native"] = lambda *args, kernel=kernel: allocate_and_run(kernel, *args)
            else:
                self.missing[device]["native"] = native.why_missing or f"built without {device} kernels for this op"

    def fake(self, fn: Callable[..., Any]) -> None:
        """Shapes and dtypes of the outputs, for tracing."""
        torch.library.register_fake(f"hubert_ecg::{self.name}", fn, lib=LIBRARY)

    def autograd(self, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
        """Ties the backward, itself an op, to this op."""
        torch.library.register_autograd(
            f"hubert_ecg::{self.name}", backward, setup_context=setup_context, lib=LIBRARY
        )

    def pick(self, device: str) -> Callable[..., Any]:
        """The backend that serves ``device`` now: the forced one where the op has it, else the fastest."""
        table = self.backends[device]
        if _forced and _forced[-1] in table:
            return table[_forced[-1]]
        return next(reversed(table.values()))  # registered from slow to fast


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Inside the block, every op that has the backend ``name`` runs it."""
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()
