from __future__ import annotations

import pytest
import torch

from hubert_ecg.config import RunError, UserError
from hubert_ecg.train import machine


def test_auto_takes_what_is_there():
    found = machine.device("auto")
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert found.type == expected
    assert machine.device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "cpu:1", "gpu", ""])
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(UserError, match="device: "):
        machine.device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_cuda_says_what_to_do():
    with pytest.raises(UserError, match=r"cuda is not available .*--device cpu"):
        machine.device("cuda")


def test_precision_follows_the_device():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert machine.dtype("auto", cpu) == torch.float32
    assert machine.dtype("auto", cuda) == torch.bfloat16
    assert machine.dtype("float16", cuda) == torch.float16
    with pytest.raises(UserError, match="float16 needs a CUDA device"):
        machine.dtype("float16", cpu)
    with pytest.raises(UserError, match="precision: must be auto"):
        machine.dtype("int8", cpu)


def test_what_gives_other_bits_each_time_is_refused_where_the_same_are_wanted(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with machine.same_bits(False):
        assert not torch.are_deterministic_algorithms_enabled()
    values, index = torch.ones(4), torch.zeros(4, dtype=torch.int64)
    # Which of the values stays, torch leaves open, also on a CPU.
    with pytest.raises(RunError, match=r"^deterministic: put_.*; leave --deterministic out$"), machine.same_bits(True):
        values.put_(index, values)
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match="another"), machine.same_bits(True):
        raise RuntimeError("another")
