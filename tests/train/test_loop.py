from __future__ import annotations

import csv
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from hubert_ecg.config import UserError
from hubert_ecg.train import checkpoint
from hubert_ecg.train.loop import Loop
from hubert_ecg.train.optimiser import adamw
from hubert_ecg.train.stopping import Interrupted

from .toy import NUM_RECORDS, ToyBatches, ToyObjective, config, make_loop, rows

CPU = torch.device("cpu")


def weights(loop: Loop) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in loop.objective.model.state_dict().items()}


def assert_same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that goes through: 4 epochs of 5 steps."""
    folder = tmp_path_factory.mktemp("straight")
    loop = make_loop(folder)
    progress = loop.run()
    assert progress.step == 20
    assert progress.finished == "all steps are taken"
    return weights(loop), rows(folder), progress


def kill_after(step: int, number: int):
    def on_step(at, batch):
        if at == step - 1:
            os.kill(os.getpid(), number)

    return on_step


# 5 ends an epoch, 8 is a checkpoint of its own, 7 falls between log rows, 20 is the last step.
@pytest.mark.parametrize(
    ("stop", "number"), [(5, signal.SIGTERM), (7, signal.SIGINT), (8, signal.SIGTERM), (20, signal.SIGTERM)]
)
def test_a_stopped_run_continues_bit_for_bit(tmp_path, straight, capsys, stop, number):
    with pytest.raises(Interrupted) as stopped:
        make_loop(tmp_path, on_step=kill_after(stop, number)).run()
    assert stopped.value.code == 128 + number
    assert f"stopped by {signal.Signals(number).name} after step {stop}/20" in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "checkpoint.safetensors")["progress"]["step"] == stop
    loop = make_loop(tmp_path, resume=True)
    torch.rand(3)
    progress = loop.run()
    assert f"resumed after step {stop}/20" in capsys.readouterr().out
    assert_same_weights(weights(loop), straight[0])
    assert rows(tmp_path) == straight[1]
    assert progress == straight[2]


def test_a_run_killed_at_a_random_moment_continues_bit_for_bit(processes, tmp_path, straight):
    wait = random.Random().uniform(0.0, 0.8)
    settings = map(json.dumps, ({"resume": True}, 0.1, torch.get_num_threads(), None))
    run = processes.start(0, Path(__file__).with_name("toy.py"), tmp_path, *settings)
    # The first step it takes, after what it says about resuming.
    run.wait_until(lambda: any(line.isdigit() for line in run.out.splitlines()))
    time.sleep(wait)
    run.kill()
    loop = make_loop(tmp_path, resume=True)
    loop.run()
    assert_same_weights(weights(loop), straight[0])
    assert rows(tmp_path) == straight[1], f"killed after {wait} s"


def test_a_stop_during_validation_repeats_that_validation(tmp_path, straight):
    loop = make_loop(tmp_path)
    validate = loop.objective.validate

    def stopped_validate(poll):
        os.kill(os.getpid(), signal.SIGTERM)
        return validate(poll)

    loop.objective.validate = stopped_validate
    with pytest.raises(Interrupted):
        loop.run()
    state = checkpoint.load(tmp_path / "checkpoint.safetensors")["progress"]
    assert (state["step"], state["validated_step"]) == (5, 0)
    loop = make_loop(tmp_path, resume=True)
    loop.run()
    assert_same_weights(weights(loop), straight[0])
    assert rows(tmp_path) == straight[1]


def test_a_second_signal_has_its_usual_effect(tmp_path):
    def twice(step, batch):
        # Two that wait at once would be one.
        signal.raise_signal(signal.SIGINT)
        while signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            time.sleep(0.001)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        make_loop(tmp_path, on_step=twice).run()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_finished_run_does_nothing(tmp_path, capsys):
    first = make_loop(tmp_path, max_steps=3)
    first.run()
    log = (tmp_path / "metrics.csv").read_bytes()

    def never(step, batch):
        raise AssertionError("a finished run took a step")

    again = make_loop(tmp_path, max_steps=3, resume=True, on_step=never)
    assert again.run().step == 3
    assert "already finished at step 3" in capsys.readouterr().out
    assert_same_weights(weights(again), weights(first))
    assert (tmp_path / "metrics.csv").read_bytes() == log


def test_resume_without_a_checkpoint_starts_anew(tmp_path, straight, capsys):
    loop = make_loop(tmp_path, resume=True)
    loop.run()
    assert "starting anew" in capsys.readouterr().out
    assert_same_weights(weights(loop), straight[0])


def test_a_new_run_does_not_continue_the_old_one_and_does_not_lose_it(tmp_path, straight, capsys):
    make_loop(tmp_path, max_steps=4, learning_rate=0.5).run()
    loop = make_loop(tmp_path)
    loop.run()
    assert "checkpoint of an earlier run" in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "checkpoint.old.safetensors")["progress"]["step"] == 4
    assert_same_weights(weights(loop), straight[0])
    assert rows(tmp_path) == straight[1]


@pytest.mark.parametrize(("field", "value"), [("batch_size", 4), ("learning_rate", 0.5), ("max_steps", 7), ("seed", 9)])
def test_resume_under_other_settings_names_the_field(tmp_path, field, value):
    make_loop(tmp_path, max_steps=3).run()
    with pytest.raises(UserError, match=f"resume: {field} must be .* got {value}"):
        make_loop(tmp_path, **{"max_steps": 3, "resume": True, field: value}).run()


def test_resume_on_other_records_is_refused(tmp_path):
    make_loop(tmp_path, max_steps=3).run()
    loop = make_loop(tmp_path, max_steps=3, resume=True)
    loop.data_key = "others"
    with pytest.raises(UserError, match="the records must be those of"):
        loop.run()


def test_settings_that_change_nothing_may_change(tmp_path, straight):
    with pytest.raises(Interrupted):
        make_loop(tmp_path, on_step=kill_after(6, signal.SIGTERM)).run()
    loop = make_loop(tmp_path, resume=True, num_workers=7, checkpoint_every=100)
    loop.run()
    assert_same_weights(weights(loop), straight[0])


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_accumulated_micro_batches_equal_one_big_batch(tmp_path, clip_norm):
    # 22 records: 11 + 11 against 4 + 4 + 3 cannot be had by averaging means, as 4, 4, 4, ... 2 shows.
    fields = {"dropout": 0.0, "num_epochs": 3, "clip_norm": clip_norm, "learning_rate": 0.01}
    big = make_loop(tmp_path / "big", batch_size=NUM_RECORDS, **fields)
    small = make_loop(tmp_path / "small", batch_size=4, accumulate_steps=6, **fields)
    for loop in (big, small):
        loop.objective.model.double()
        loop.objective.all.x, loop.objective.all.y = loop.objective.all.x.double(), loop.objective.all.y.double()
        loop.batches.x, loop.batches.y = loop.batches.x.double(), loop.batches.y.double()
        assert loop.run().step == 3
    for name, value in weights(big).items():
        torch.testing.assert_close(weights(small)[name], value, rtol=1e-9, atol=1e-12, msg=name)


def test_a_step_is_an_optimiser_step(tmp_path):
    micro_batches = []
    loop = make_loop(tmp_path, accumulate_steps=2, num_epochs=2, on_step=lambda step, _: micro_batches.append(step))
    assert loop.total_steps == 6
    assert loop.run().step == 6
    # 5 micro-batches an epoch: the last step of each epoch has one, and none crosses an epoch.
    assert micro_batches == [0, 0, 1, 1, 2, 3, 3, 4, 4, 5]


def test_the_rate_of_every_step_is_logged_and_positive(tmp_path):
    loop = make_loop(tmp_path, log_every=1, num_epochs=2)
    loop.run()
    with (tmp_path / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    rates = [float(row["lr"]) for row in table if row["split"] == "train"]
    assert rates == [loop.schedule(k) for k in range(10)]
    assert min(rates) > 0
    assert max(rates) == 0.02


def test_the_log_averages_over_its_interval(tmp_path):
    make_loop(tmp_path / "one", log_every=1).run()
    make_loop(tmp_path / "four", log_every=4).run()

    def losses(folder):
        with (folder / "metrics.csv").open() as file:
            return {int(r["step"]): float(r["loss"]) for r in csv.DictReader(file) if r["split"] == "train"}

    one, four = losses(tmp_path / "one"), losses(tmp_path / "four")
    assert sorted(four) == [4, 8, 12, 16, 20]
    for step, value in four.items():
        assert value == pytest.approx(sum(one[k] for k in range(step - 3, step + 1)) / 4, rel=1e-5)


def test_the_log_has_one_validation_after_each_epoch(straight):
    table = list(csv.DictReader(straight[1]))
    assert [int(r["step"]) for r in table if r["split"] == "validation"] == [5, 10, 15, 20]
    assert [float(r["epoch"]) for r in table if r["split"] == "validation"] == [1, 2, 3, 4]


def test_a_loss_that_is_not_finite_names_the_records_and_keeps_the_checkpoint(tmp_path):
    seen = {}

    def poison(step, batch):
        if step == 6:
            seen["index"] = batch.index
            batch.x.fill_(float("nan"))

    loop = make_loop(tmp_path, on_step=poison)
    loop.record_names = lambda index: [f"record-{i}" for i in index]
    with pytest.raises(RuntimeError, match="not finite at step 7") as failed:
        loop.run()
    for i in seen["index"]:
        assert f"record-{i}" in str(failed.value)
    state = checkpoint.load(tmp_path / "checkpoint.safetensors")
    assert state["progress"]["step"] == 6
    assert all(value.isfinite().all() for value in state["model"].values())
    assert all(value.isfinite().all() for value in weights(loop).values())


def test_a_late_look_still_names_the_right_batch(tmp_path, monkeypatch):
    # As on a GPU, where the host looks once in log_every steps.
    batches = {}

    def poison(step, batch):
        batches[step] = batch.index
        if step == 1:
            batch.x.fill_(float("nan"))

    loop = make_loop(tmp_path, on_step=poison, log_every=4, checkpoint_every=100)
    look, steps = loop._check_finite, iter(range(100))
    monkeypatch.setattr(loop, "_check_finite", lambda: look() if next(steps) >= 3 else None)
    with pytest.raises(RuntimeError, match="not finite at step 2") as failed:
        loop.run()
    assert f"records {', '.join(map(str, batches[1]))};" in str(failed.value)
    assert max(batches) >= 3


def test_early_stopping_counts_validations_and_survives_a_resume(tmp_path):
    def run(folder, **fields):
        loop = make_loop(folder, patience=3, validate_every=2, num_epochs=10, **fields)
        values = iter([5.0, 3.0, float("nan"), 4.0, 2.0, 2.0, 2.5, 7.0, 1.0])
        skip = checkpoint.load(loop.checkpoint_path)["progress"]["step"] // 2 if fields.get("resume") else 0
        for _ in range(skip):
            next(values)
        loop.objective.validate = lambda poll: {"loss": next(values), "error": 0.0}
        return loop.run()

    progress = run(tmp_path / "a")
    assert (progress.step, progress.best, progress.best_step, progress.bad_validations) == (16, 2.0, 10, 3)
    assert progress.finished == "3 validations without a better loss"
    with pytest.raises(Interrupted):
        run(tmp_path / "b", on_step=kill_after(13, signal.SIGTERM))
    assert run(tmp_path / "b", resume=True) == progress


@pytest.mark.parametrize("stop", [4, 20])
def test_a_run_that_ends_with_the_validation_it_was_stopped_before_takes_no_further_step(tmp_path, stop):
    def run(**fields):
        loop = make_loop(tmp_path, patience=1, validate_every=2 if stop == 4 else 0, **fields)
        values = iter([1.0, 2.0] if stop == 4 else [4.0, 3.0, 2.0, 1.0])
        if fields.get("resume"):
            values = iter([list(values)[-1]])
        loop.objective.validate = lambda poll: {"loss": next(values), "error": 0.0}
        return loop.run()

    def never(step, batch):
        raise AssertionError("a finished run took a step")

    with pytest.raises(Interrupted):
        run(on_step=kill_after(stop, signal.SIGTERM))
    progress = run(resume=True, on_step=never)
    assert (progress.step, progress.validated_step) == (stop, stop)
    assert progress.finished
    assert (tmp_path / "last.pt").is_file()
    assert checkpoint.load(tmp_path / "checkpoint.safetensors")["progress"]["finished"] == progress.finished


def test_the_best_and_the_last_are_kept(tmp_path):
    loop = make_loop(tmp_path, patience=0, dropout=0.0)
    values = iter([3.0, 1.0, 2.0, 4.0])
    at_validation = []

    def validate(poll):
        at_validation.append(weights(loop))
        return {"loss": next(values), "error": 0.0}

    loop.objective.validate = validate
    loop.run()
    assert_same_weights(torch.load(tmp_path / "best.pt", weights_only=True), at_validation[1])
    assert_same_weights(torch.load(tmp_path / "last.pt", weights_only=True), weights(loop))


def test_biases_norms_and_scales_do_not_decay():
    model = nn.Sequential(nn.Conv1d(3, 4, 5), nn.LayerNorm(4), nn.Linear(4, 2))
    model.register_parameter("masked_spec_embed", nn.Parameter(torch.ones(4)))
    model.register_parameter("scale", nn.Parameter(torch.ones(1, 1, 5)))
    names = {p: n for n, p in model.named_parameters()}
    optimiser = adamw(dict(model.named_parameters()), 0.1, (0.9, 0.98), 1e-8)
    decays = {names[p]: g["weight_decay"] for g in optimiser.param_groups for p in g["params"]}
    assert {n for n, decay in decays.items() if decay} == {"0.weight", "2.weight"}
    assert decays.keys() == set(names.values())


def test_parameters_that_are_frozen_stay(tmp_path):
    settings = config(tmp_path, max_steps=4)
    objective = ToyObjective(tmp_path)
    objective.model[0].requires_grad_(False)
    loop = Loop(settings, objective, ToyBatches(5), folder=tmp_path, device=CPU)
    before = weights(loop)
    loop.run()
    after = weights(loop)
    assert torch.equal(before["0.weight"], after["0.weight"])
    assert not torch.equal(before["3.weight"], after["3.weight"])


def test_bfloat16_trains(tmp_path):
    loop = make_loop(tmp_path, num_epochs=8, dropout=0.0, dtype=torch.bfloat16)
    seen = []
    loop.objective.model[3].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    loop.run()
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in loop.objective.model.parameters())
    losses = [float(r["loss"]) for r in csv.DictReader(rows(tmp_path)) if r["split"] == "validation"]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_trains_and_resumes(tmp_path, dtype):
    fields = {"device": "cuda:0", "dtype": dtype, "num_epochs": 8}
    straight = make_loop(tmp_path / "a", **fields)
    straight.run()
    losses = [float(r["loss"]) for r in csv.DictReader(rows(tmp_path / "a")) if r["split"] == "validation"]
    assert losses[-1] < 0.7 * losses[0]
    with pytest.raises(Interrupted):
        make_loop(tmp_path / "b", on_step=kill_after(7, signal.SIGTERM), **fields).run()
    resumed = make_loop(tmp_path / "b", resume=True, **fields)
    resumed.run()
    # The order of additions on a GPU is free; dropout and the scaler are not.
    for name, value in weights(straight).items():
        torch.testing.assert_close(weights(resumed)[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.cuda
def test_a_gpu_names_the_bad_batch_afterwards(tmp_path):
    def poison(step, batch):
        if step == 1:
            batch.x.fill_(float("nan"))

    loop = make_loop(tmp_path, on_step=poison, device="cuda:0", log_every=4, checkpoint_every=100)
    with pytest.raises(RuntimeError, match="not finite at step 2"):
        loop.run()
    assert not loop.checkpoint_path.exists()
