from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hubert_ecg.config import UserError
from hubert_ecg.train import checkpoint


def test_a_state_comes_back_bit_for_bit(tmp_path):
    tied = torch.tensor([0.1, math.nan, math.inf, -0.0])
    state = {
        "model": {"a.weight": tied, "a.tied": tied, "b": torch.randn(3, 4).t(), "half": torch.ones(2).bfloat16()},
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7),
        "array": np.arange(6, dtype=np.float64).reshape(2, 3)[:, ::2],
        "nested": [1, 0.1 + 0.2, None, True, "ÄÖ", {"deep": torch.tensor([True, False])}],
        "number": np.float64(0.1),
    }
    path = tmp_path / "new" / "c.safetensors"
    checkpoint.save(path, state)
    loaded = checkpoint.load(path)
    for name, tensor in state["model"].items():
        assert loaded["model"][name].dtype == tensor.dtype
        assert loaded["model"][name].contiguous().view(torch.uint8).equal(tensor.contiguous().view(torch.uint8)), name
    assert loaded["empty"].shape == (0, 3)
    assert loaded["scalar"].item() == 7
    np.testing.assert_array_equal(loaded["array"], state["array"])
    assert loaded["array"].dtype == np.float64
    assert loaded["nested"][:5] == state["nested"][:5]
    assert loaded["nested"][5]["deep"].tolist() == [True, False]
    assert loaded["number"] == 0.1
    assert [p.name for p in path.parent.iterdir()] == ["c.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, {"x": torch.ones(3)})
    before = path.read_bytes()

    def half(tensors, target, metadata):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, {"x": torch.zeros(3)})
    assert path.read_bytes() == before


def test_damage_is_named(tmp_path):
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, {"x": torch.arange(1000.0), "step": 3})
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-100] ^= 1
    for damaged in (whole[:-1], whole[:50], b"", b"no checkpoint at all", bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"c\.safetensors is damaged .*without --resume"):
            checkpoint.load(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(UserError, match="must be a training checkpoint"):
        checkpoint.load(path)
    with pytest.raises(UserError, match="does not exist"):
        checkpoint.load(tmp_path / "none")


def test_the_differing_field_is_named(tmp_path):
    saved = {"batch_size": 4, "seed": 0, "device": "cuda"}
    checkpoint.check_same(saved, {**saved, "device": "cpu"}, frozenset({"device"}), tmp_path)
    with pytest.raises(UserError, match=r"resume: batch_size must be 4 .* got 8"):
        checkpoint.check_same(saved, {**saved, "batch_size": 8}, frozenset({"device"}), tmp_path)
