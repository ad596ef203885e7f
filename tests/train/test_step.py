"""One step of training: what it asks of the host, and the options that change how it is computed."""

from __future__ import annotations

import contextlib
import copy
import csv
import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hubert_ecg import train
from hubert_ecg.data import Loader
from hubert_ecg.models import HubertECGConfig, HubertECGForClassification, HubertECGForPretraining
from hubert_ecg.models.hubert_ecg import Backbone
from hubert_ecg.train import checkpoint, loop
from hubert_ecg.train.pretrain import MaskedPrediction
from hubert_ecg.train.pseudo_labels import PseudoLabels
from hubert_ecg.train.records import random_crops
from hubert_ecg.train.regularisation import DynamicRegularisation
from hubert_ecg.train.run import open_run
from hubert_ecg.train.targets import find_targets
from hubert_ecg.train.throughput import forward_flops, peak_memory_gb, peak_tflops, training_flops

from .tiny import settings

CPU = torch.device("cpu")


class Copies(TorchDispatchMode):
    """Refuses copies from the host to the device that the host waits for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
            waits = not (kwargs.get("non_blocking") or args[2:] == (True,))
            assert not (waits and len({x.device.type for x in tensors}) > 1), f"the host waits for a copy: {tensors}"
        return result


class Numbers(TorchFunctionMode):
    """Refuses tensors made from numbers of the host on the device: the host waits for that copy, too."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor):
            assert str(kwargs.get("device") or "cpu") == "cpu", f"the host waits for a copy of {args}"
        return func(*args, **kwargs)


def pretraining_loop(cohort, folder, device, **fields):
    config = settings(folder, cohort.path, batch_size=4, **fields)
    run = open_run(config, "pretrain", CPU)
    labels = PseudoLabels(dataclasses.replace(run, device=device).featuriser, find_targets(run))
    torch.manual_seed(0)
    shape = dataclasses.replace(run.shape, vocab_sizes=[8])
    objective = MaskedPrediction(config, shape, labels, run.store, run.validation, device)
    loader = random_crops(run.store, run.train, config, shuffle=True, device=device)
    return loop.Loop(config, objective, loader, folder=folder, device=device)


# With crops of 12 s every record is padded. Without values, on the device "meta", whatever looks at one fails.
@pytest.mark.parametrize(("crop_s", "alpha"), [(5.0, 1.0), (12.0, 1.0), (12.0, 0.5)])
@pytest.mark.parametrize("accumulate_steps", [1, 2])
def test_the_host_of_a_step_never_waits_for_the_device(cohort, tmp_path, monkeypatch, crop_s, alpha, accumulate_steps):
    for module in (torch, loop):
        monkeypatch.setattr(module, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *args: False)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda kind, enabled: Scaler())
    monkeypatch.setattr(loop, "adamw", lambda parameters, *args: Optimiser(parameters.values()))
    fields = {"crop_s": crop_s, "alpha": alpha, "accumulate_steps": accumulate_steps, "dropout": 0.1}
    run = pretraining_loop(cohort, tmp_path, torch.device("meta"), **fields)
    run.objective.train_mode()
    groups = loop._groups(run.batches.batches(0), accumulate_steps)
    run._step(next(groups))
    with Copies(), Numbers():
        for _ in range(2):
            run._step(next(groups))
    groups.close()
    assert run.progress.step == 3
    assert all(p.grad is not None for name, p in run.parameters.items() if "layers" not in name)
    # What this test would find.
    with pytest.raises(RuntimeError, match="meta tensors"):
        run._check_finite()
    with Copies(), pytest.raises(AssertionError, match="waits for a copy"):
        torch.ones(2).to("meta")


class Optimiser(torch.optim.SGD):
    def step(self, closure=None):
        """Fused kernels know no device without values."""


class Scaler:
    def scale(self, loss):
        return loss

    def unscale_(self, optimiser):
        pass

    def is_enabled(self):
        return False

    def step(self, optimiser):
        optimiser.step()

    def update(self):
        pass


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("crop_s", [5.0, 12.0])
def test_no_step_on_a_gpu_waits_for_it(cohort, tmp_path, crop_s):
    device = torch.device("cuda:0")
    run = pretraining_loop(cohort, tmp_path, device, crop_s=crop_s, accumulate_steps=2)
    run.objective.train_mode()
    groups = loop._groups(run.batches.batches(0), 2)
    run._step(next(groups))
    batches = [next(groups) for _ in range(2)]
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for group in batches:
            run._step(group)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        groups.close()


def test_an_empty_part_of_a_batch_gives_gradients_of_zero(cohort, tmp_path):
    run = pretraining_loop(cohort, tmp_path, CPU, layerdrop=0.0, alpha=0.5)
    loader = Loader(cohort, np.arange(1), 1, num_workers=0, rank=1, num_ranks=2)
    (batch,) = loader.batches(0)
    assert len(batch) == 0
    run.objective.train_mode()
    loss, _ = run.objective.loss(batch, 0, 0)
    loss.nan_to_num().sum().backward()
    for name, parameter in run.parameters.items():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_the_flops_of_the_published_sizes():
    # Forward and with the backward pass, GFLOP a record.
    figures = ("small", 100, 7.4, 22.1), ("base", 100, 19.2, 57.5), ("large", 1000, 37.2, 111.5)
    for size, num_clusters, forward, both in figures:
        parts = forward_flops(HubertECGConfig.preset(size, vocab_sizes=[num_clusters]), 6000)
        attention = parts.pop("attention")
        assert round(sum(parts.values()) / 1e9, 1) == forward
        assert round(3 * sum(parts.values()) / 1e9, 1) == both
        if size == "base":
            assert round(parts["extractor"] / 1e9, 2) == 2.07
            assert round(parts["positions"] / 1e9, 2) == 0.88
            assert round(parts["layers"] / 1e9, 1) == 16.1
            assert round(attention / 1e9, 2) == 0.32


def test_what_is_frozen_costs_one_forward_pass():
    shape = HubertECGConfig.preset("tiny")
    model = HubertECGForClassification(shape, label_names=["a", "b"])
    parts = forward_flops(model.config, 6000)
    assert parts["head"] == 2 * 128 * 2
    del parts["attention"]
    total = sum(parts.values())
    assert training_flops(model, 6000) == 3 * total
    model.hubert_ecg.feature_extractor.requires_grad_(False)
    assert training_flops(model, 6000) == 3 * total - 2 * parts["extractor"]
    model.hubert_ecg.requires_grad_(False)
    assert training_flops(model, 6000) == total + 2 * parts["head"]
    assert training_flops(nn.Linear(2, 2), 6000) == 0
    assert training_flops(HubertECGForPretraining(shape), 6000) > 3 * (total - parts["head"])


def test_the_peak_of_a_device_is_known_by_its_name(monkeypatch):
    assert math.isnan(peak_tflops(CPU, torch.bfloat16))
    names = {
        "NVIDIA H100 80GB HBM3": 989.4,
        "NVIDIA H100 PCIe": 756.5,
        "NVIDIA A100-SXM4-80GB": 312.0,
        "NVIDIA L40S": 362.0,
        "NVIDIA L4": 121.0,
        "Tesla T4": float("nan"),
    }
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_tflops(torch.device("cuda:0"), torch.bfloat16) == pytest.approx(peak, nan_ok=True)
        assert math.isnan(peak_tflops(torch.device("cuda:0"), torch.float32))


def test_the_speed_is_logged(cohort, tmp_path):
    run = pretraining_loop(cohort, tmp_path, CPU, max_steps=2, log_every=1)
    run.run()
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
    flops = training_flops(run.objective.model, 6000)
    for row in rows:
        assert float(row["tflops_per_s"]) == pytest.approx(float(row["records_per_s"]) * flops / 1e12)
        assert 0 < float(row["data_wait_share"]) < 1
        assert 0.05 < float(row["peak_memory_gb"]) <= peak_memory_gb(CPU)
        assert row["mfu"] == ""


@pytest.fixture(scope="module")
def plain(tmp_path_factory, cohort):
    """Weights after a few steps, computed as always."""
    folder = tmp_path_factory.mktemp("plain")
    train.pretrain(settings(folder, cohort.path, max_steps=4))
    return checkpoint.load(folder / "hubert_ecg" / "checkpoint.safetensors")["model"]


# The compiler looks at gradients of tensors that have none, and hides the warning of it from users alone.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("option", ["compile", "activation_checkpointing"])
def test_options_of_speed_and_memory_change_no_weight(cohort, tmp_path, plain, monkeypatch, option):
    if option == "compile":
        # The default backend's code takes a compiler and a minute; what it computes is for its makers to test.
        compiled = functools.partialmethod(Backbone.compile_layers, backend="aot_eager")
        monkeypatch.setattr(Backbone, "compile_layers", compiled)
    recomputed = []
    monkeypatch.setattr(
        "hubert_ecg.models.encoder.checkpoint",
        lambda layer, *args, **kwargs: (
            recomputed.append(layer) or torch.utils.checkpoint.checkpoint(layer, *args, **kwargs)
        ),
    )
    train.pretrain(settings(tmp_path, cohort.path, max_steps=4, **{option: True}))
    found = checkpoint.load(tmp_path / "hubert_ecg" / "checkpoint.safetensors")["model"]
    assert bool(recomputed) == (option == "activation_checkpointing")
    for name, value in plain.items():
        if option == "compile":
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=name)
        else:
            assert torch.equal(found[name], value), name


def test_regularisation_follows_the_validations():
    shape = HubertECGConfig.preset("tiny", hidden_dropout=0.2, attention_dropout=0.0, activation_dropout=0.12)
    model = HubertECGForPretraining(shape)
    optimiser = torch.optim.AdamW([{"params": [nn.Parameter(torch.ones(1))], "weight_decay": w} for w in (0.2, 0.0)])
    groups = optimiser.param_groups
    dynamic = DynamicRegularisation(model, optimiser, patience=10)

    def values():
        layer = model.encoder.layers[1]
        return (
            round(groups[0]["weight_decay"], 6),
            *(model.encoder.dropout.p, layer.dropout, layer.attention.dropout, layer.feed_forward.dropout),
        )

    found = []
    for bad_validations in (0, 0, 0, 1, 2, 3, 4, 0):
        dynamic.after_validation(bad_validations)
        found.append(values())
    assert found == [
        (0.04, 0.15, 0.15, 0.0, 0.1),
        (0.01, 0.1, 0.1, 0.0, 0.1),
        (0.01, 0.1, 0.1, 0.0, 0.1),
        (0.01, 0.1, 0.1, 0.0, 0.1),
        (0.05, 0.15, 0.15, 0.05, 0.15),
        (0.05, 0.15, 0.15, 0.05, 0.15),
        (0.25, 0.2, 0.2, 0.1, 0.2),
        (0.05, 0.15, 0.15, 0.1, 0.15),
    ]
    assert groups[1]["weight_decay"] == 0
    other = HubertECGForPretraining(shape)
    again = DynamicRegularisation(other, copy.deepcopy(optimiser), patience=10)
    again.load_state(dynamic.state())
    assert again.state() == dynamic.state()
    assert other.encoder.layers[1].feed_forward.dropout == 0.15


def test_dynamic_regularisation_is_resumed(cohort, tmp_path):
    fields = {"dynamic_regularisation": True, "patience": 4, "validate_every": 1, "weight_decay": 0.1}
    straight = pretraining_loop(cohort, tmp_path / "a", CPU, max_steps=4, **fields)
    straight.run()
    decay = straight.optimiser.param_groups[0]["weight_decay"]
    assert decay != 0.1
    state = checkpoint.load(straight.checkpoint_path)["regularisation"]
    assert state["weight_decay"] == [decay]
    resumed = pretraining_loop(cohort, tmp_path / "a", CPU, max_steps=4, resume=True, **fields)
    resumed._resume()
    assert resumed.optimiser.param_groups[0]["weight_decay"] == decay
    assert resumed.regularisation.state() == straight.regularisation.state()
