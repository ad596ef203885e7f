"""Ranks that share a model, against one process that has it alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hubert_ecg.config import FinetuneConfig, UserError
from hubert_ecg.models.encoder import Attention, FeedForward
from hubert_ecg.models.tensor_ranks import dropout_seed
from hubert_ecg.train import parallel, sharded_checkpoint

from . import shared_model
from .processes import Processes

FSDP, TENSOR = {"parallel": "fsdp"}, {"parallel": "tensor", "tensor_ranks": 2}
# Steps are 0 to 3; a checkpoint is written after 2, 3 (the end of an epoch, which is validated) and 4.
STOP = {"stop_before": 3}


def launch(processes: Processes, num_ranks: int, folder: Path, jobs: dict[str, dict]) -> None:
    """Run jobs, each in the folder of its name, on several ranks."""
    jobs = [{"folder": str(folder / name), **job} for name, job in jobs.items()]
    processes.run(num_ranks, shared_model.__file__, json.dumps(jobs))


def alone(folder: Path, **job) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    shared_model.run(str(folder), **job)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, processes) -> Path:
    """Straight and stopped runs: of one process, and of two that share in each way."""
    folder = tmp_path_factory.mktemp("runs")
    alone(folder / "one")
    alone(folder / "stopped_one", **STOP)
    jobs = {
        "fsdp": FSDP | {"activation_checkpointing": True, "validate_first": True},
        "stopped_fsdp": FSDP | STOP,
        "tensor": TENSOR | {"validate_first": True},
        "stopped_tensor": TENSOR | STOP,
        "fsdp_to_tensor": TENSOR | {"resume_from": str(folder / "stopped_fsdp")},
        "one_to_fsdp": FSDP | {"resume_from": str(folder / "stopped_one")},
        "dropout": TENSOR | {"shape": {"hidden_dropout": 0.2, "attention_dropout": 0.2, "activation_dropout": 0.2}},
        "bfloat16": FSDP | {"precision": "bfloat16"},
        "compiled_fsdp": FSDP | {"compile": True},
        "compiled_tensor": TENSOR | {"compile": True},
    }
    launch(processes, 2, folder, jobs)
    return folder


def assert_same_model(a: Path, b: Path, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    for first, second in zip(saved(a), saved(b), strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            torch.testing.assert_close(second[name], value, rtol=rtol, atol=atol, msg=lambda t, n=name: f"{n}: {t}")
    assert (a / "last" / "config.json").read_text() == (b / "last" / "config.json").read_text()


def saved(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    best = torch.load(folder / "best.pt", weights_only=True)
    assert best["class"] == "HubertECGForPretraining"
    return load_file(folder / "last" / "model.safetensors"), best["state_dict"]


def losses(folder: Path) -> list[list[str]]:
    return [line.split(",")[:5] for line in (folder / "metrics.csv").read_text().splitlines()]


@pytest.mark.parametrize("how", ["fsdp", "tensor", "fsdp_to_tensor", "one_to_fsdp"])
def test_two_ranks_that_share_train_as_one_does(runs, how):
    assert_same_model(runs / "one", runs / how)
    for one, many in zip(losses(runs / "one"), losses(runs / how), strict=True):
        assert one[:3] == many[:3]
        assert one[3:] == many[3:] or [float(x or 0) for x in one[3:]] == pytest.approx(
            [float(x or 0) for x in many[3:]], rel=1e-5
        )


@pytest.mark.parametrize("how", ["fsdp", "tensor"])
def test_a_sharded_checkpoint_is_that_of_one_process(runs, how):
    one, many = (sharded_checkpoint.load(sharded_checkpoint.find(runs / f"stopped_{x}")) for x in ("one", how))
    assert many["progress"]["step"] == one["progress"]["step"] == 3
    assert torch.equal(one["objective"]["kmeans"]["centres"], many["objective"]["kmeans"]["centres"])
    for part in ("model", "optimiser"):
        assert one[part].keys() == many[part].keys()
    for name, value in one["model"].items():
        torch.testing.assert_close(many["model"][name], value, rtol=1e-4, atol=1e-5)
    for name, moments in one["optimiser"].items():
        assert many["optimiser"][name].keys() == moments.keys()
        for moment, value in moments.items():
            torch.testing.assert_close(many["optimiser"][name][moment], value, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("how", ["fsdp", "tensor"])
def test_one_process_goes_on_from_the_checkpoint_of_two(runs, tmp_path, how):
    alone(tmp_path / "run", resume_from=str(runs / f"stopped_{how}"))
    assert_same_model(runs / "one", tmp_path / "run")
    # It wrote its own checkpoint, and nothing of the other one is left.
    assert (tmp_path / "run" / "checkpoint.safetensors").is_file()
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_four_ranks_share_and_go_on_from_the_checkpoint_of_two(processes, runs, tmp_path):
    jobs = {
        "two_by_two": TENSOR,
        "fsdp": FSDP | {"resume_from": str(runs / "stopped_fsdp")},
        "tensor": TENSOR | {"resume_from": str(runs / "stopped_tensor")},
    }
    launch(processes, 4, tmp_path, jobs)
    for name in jobs:
        assert_same_model(runs / "one", tmp_path / name)


@pytest.mark.parametrize("how", ["compiled_fsdp", "compiled_tensor"])
def test_compiled_layers_may_be_shared(runs, how):
    assert_same_model(runs / "one", runs / how, rtol=1e-3, atol=1e-4)


def test_layers_in_half_precision_learn_the_same(runs):
    assert_same_model(runs / "one", runs / "bfloat16", rtol=0, atol=0.05)


def test_dropout_leaves_tensor_ranks_in_agreement(runs):
    # The runs themselves hold the ranks to that; here, that anything was dropped.
    one, dropped = (float(losses(runs / name)[-1][3]) for name in ("one", "dropout"))
    assert one != pytest.approx(dropped, rel=1e-4)


def test_tensor_ranks_drop_different_elements():
    class Ranks:
        def __init__(self, rank):
            self.rank = rank

    seeds = []
    for rank in range(4):
        torch.manual_seed(3)
        seeds.append(int(dropout_seed(0.1, torch.device("cpu"), Ranks(rank))))
    assert len(set(seeds)) == 4
    assert min(seeds) >= 0
    assert dropout_seed(0.0, torch.device("cpu"), Ranks(1)) is None


def test_the_last_good_checkpoint_stays_until_the_next_one_is_whole(runs, tmp_path):
    path = tmp_path / "checkpoint"
    sharded_checkpoint.save(path, {"x": torch.arange(3.0), "step": 1})
    before = {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(TypeError, match="not JSON serializable"):
        sharded_checkpoint.save(path, {"x": torch.arange(4.0), "step": object()})
    for name, content in before.items():
        assert (path / name).read_bytes() == content
    assert sharded_checkpoint.load(path)["step"] == 1
    sharded_checkpoint.save(path, {"x": torch.arange(5.0), "step": 2})
    assert sharded_checkpoint.load(path)["x"].tolist() == [0, 1, 2, 3, 4]
    assert len(list(path.glob("shards-*"))) == 1


@pytest.mark.parametrize("damage", ["shorter", "other", "missing", "state"])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    path = tmp_path / "checkpoint"
    sharded_checkpoint.save(path, {"x": torch.arange(300.0)})
    (file,) = path.glob("shards-*/*")
    content = bytearray(file.read_bytes())
    if damage == "shorter":
        file.write_bytes(content[:-8])
    elif damage == "other":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "missing":
        file.unlink()
    else:
        (path / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"damaged; delete .*checkpoint, or start without --resume"):
        sharded_checkpoint.load(path)


def test_no_file_of_a_checkpoint_is_a_pickle(runs):
    files = [file for file in (runs / "stopped_fsdp" / "checkpoint").rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".json", ".safetensors"}
    assert len(files) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parallel": "tensor"}, "--tensor_ranks must be at least 2 with --parallel tensor, got 1"),
        ({"tensor_ranks": 2}, "--tensor_ranks must be 1 with --parallel ddp, not --parallel tensor, got 2"),
        (TENSOR, "--tensor_ranks must divide the number of processes, 1, got 2; start them with torchrun"),
        (FSDP | {"precision": "float16"}, "--precision must not be float16 with --parallel fsdp"),
        ({"tensor_ranks": 0}, "--tensor_ranks must be at least 1, got 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(UserError) as refused:
        parallel.check(FinetuneConfig(dataset="toy", task="all", pretrained_model="none", **fields))
    assert message in str(refused.value)


@pytest.mark.parametrize(("layer", "message"), [(Attention, "the 4 heads"), (FeedForward, "the 64 feed-forward")])
def test_layers_that_cannot_be_split_are_refused(layer, message):
    shape = {"intermediate_size": 64, **({"num_attention_heads": 4} if layer is Attention else {})}
    model = layer(shared_model.HubertECGConfig.preset("tiny", **shape))
    with pytest.raises(UserError, match=rf"--tensor_ranks must divide {message}.*, got 3"):
        parallel.split(nn.Sequential(model), None, 3)


def test_fsdp_without_torchrun_is_one_process(tmp_path, runs):
    alone(tmp_path / "run", **FSDP)
    assert_same_model(runs / "one", tmp_path / "run", rtol=0, atol=0)
    assert (tmp_path / "run" / "checkpoint.safetensors").is_file()
