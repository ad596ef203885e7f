"""The compiled module is loaded, and knows nothing of torch."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch

from hubert_ecg import native
from hubert_ecg.ops import OPS, _op, use_backend


def symbols(*flags):
    if not sys.platform.startswith("linux") or shutil.which("nm") is None:
        pytest.skip("needs nm (binutils)")
    return subprocess.run(
        ["nm", "-D", "-C", *flags, native._C.__file__], capture_output=True, text=True, check=True
    ).stdout


def test_is_loaded():
    assert native._C is not None, native.why_missing
    assert native.why_missing == ""


def test_has_every_op_on_the_cpu():
    # A mask is the model's, though it has no gradient.
    data_side = [op for op in OPS.values() if op.public and not op.differentiable and op.name != "span_mask"]
    assert data_side
    assert [op.name for op in data_side if "native" not in op.backends["cpu"]] == []


def test_has_no_symbol_of_torch():
    found = symbols()
    assert "PyInit__C" in found
    assert not [line for line in found.splitlines() if "at::" in line or "c10::" in line or "torch" in line]


def test_shows_nothing_but_its_entry():
    ours = [line for line in symbols("--defined-only").splitlines() if "hubert_ecg::" in line]
    assert ours == []


def test_refuses_what_is_no_tensor():
    with pytest.raises(TypeError, match="mfcc_cpu"):
        native._C.mfcc_cpu(1, 2, 3, 4, 5, 6)


def test_a_missing_backend_says_why():
    for op in OPS.values():
        for device, table in op.backends.items():
            assert not set(table) & set(op.missing[device])
            assert all(op.missing[device].values())


@pytest.fixture
def new_op(monkeypatch):
    """An op with a kernel for each device, unknown to the table of checks until the test names it there."""
    monkeypatch.setattr(_op, "LIBRARY", torch.library.Library("hubert_ecg", "FRAGMENT"))
    monkeypatch.setattr(_op, "OPS", {})
    monkeypatch.setattr(native, "find", lambda op, device: lambda *args: None)

    def make(name):
        op = _op.Op(f"{name}(Tensor x) -> Tensor", lambda x: x)
        op.native(lambda kernel, x: x)
        return op

    return make


def test_a_cuda_kernel_that_was_never_checked_is_not_the_default(new_op):
    op = new_op("never_checked")
    assert op.picked("cpu") == "native"
    assert op.picked("cuda") == "reference"
    assert op.why("cuda") == "native was never checked, on a GPU or in the host build"
    with use_backend("native"):
        assert op.picked("cuda") == "native"
        assert op.why("cuda") == "asked for by use_backend"


def test_a_checked_cuda_kernel_is_the_default_and_says_how(new_op, monkeypatch):
    monkeypatch.setitem(_op.CUDA_CHECKS, "once_checked", "host build")
    op = new_op("once_checked")
    assert op.picked("cuda") == "native"
    assert op.why("cuda") == "preferred; values checked: host build"
