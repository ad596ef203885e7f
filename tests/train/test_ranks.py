"""Several ranks against one, and what happens to the others when one is stopped or killed."""

from __future__ import annotations

import concurrent.futures
import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from hubert_ecg import cli
from hubert_ecg.config import UserError
from hubert_ecg.train import checkpoint, distributed

from .toy import NUM_RECORDS, make_loop

ROOT = Path(__file__).resolve().parents[2]
TOY = str(Path(__file__).with_name("toy.py"))


def toy(folder: Path, killed: list[int] | None = None, seconds: float = 0.0, **fields: object) -> list[object]:
    folder.mkdir(exist_ok=True)
    return [TOY, folder, *map(json.dumps, (fields, seconds, 1, killed))]


def torchrun(num_ranks: int, *command: object) -> subprocess.Popen[str]:
    """Ranks as users start them; its output is read to the end."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", num_ranks, *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        list(map(str, launch)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / "checkpoint.safetensors")["model"]


def assert_same(a: Path, b: Path) -> None:
    first, second = (checkpoint.load(folder / "checkpoint.safetensors") for folder in (a, b))
    assert first["progress"] == second["progress"]
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name


def assert_close(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)


@pytest.fixture
def one_thread():
    """Sums are split among threads: as many as a rank has here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, processes):
    """A run of two ranks that goes through: 4 epochs of 4 steps, with dropout."""
    folder = tmp_path_factory.mktemp("straight")
    processes.run(2, *toy(folder, batch_size=3))
    return folder


@pytest.mark.parametrize(("num_ranks", "batch_size", "accumulate_steps"), [(2, 2, 2), (3, 7, 1)])
def test_ranks_train_as_one_does(processes, tmp_path, num_ranks, batch_size, accumulate_steps):
    # 22 records: of 3 ranks with 7 each, two have none in the second batch.
    fields = {"dropout": 0.0, "accumulate_steps": accumulate_steps, "batch_size": batch_size}
    processes.run(num_ranks, *toy(tmp_path / "many", **fields))
    make_loop(tmp_path / "one", **{**fields, "batch_size": num_ranks * batch_size}).run()
    assert_close(tmp_path / "one", tmp_path / "many")
    logs = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("one", "many")]
    for one, many in zip(*logs, strict=True):
        one, many = (line.split(",")[:7] for line in (one, many))
        assert one[:3] == many[:3]
        if one[0] != "step":
            numbers = ([float(value) for value in line[3:] if value] for line in (one, many))
            np.testing.assert_allclose(*numbers, rtol=1e-4)


def test_a_signal_to_one_rank_stops_all_after_the_same_step(processes, tmp_path, straight):
    # In the middle of an epoch, and between two checkpoints.
    stopped = processes.run(2, *toy(tmp_path, [1, 5, signal.SIGTERM], batch_size=3), fails=True)
    assert stopped.out.count("stopped by SIGTERM after step 7/16; continue with --resume") == 1
    assert checkpoint.load(tmp_path / "checkpoint.safetensors")["progress"]["step"] == 7
    resumed = processes.run(2, *toy(tmp_path, batch_size=3, resume=True))
    assert resumed.out.count("resumed after step 7/16") == 1
    assert_same(tmp_path, straight)


def test_a_killed_rank_ends_the_run_with_a_clear_message(processes, tmp_path, straight):
    # The other one ends by itself within the time limit of a run, or the test fails.
    ended = processes.run(2, *toy(tmp_path, [1, 5, signal.SIGKILL], batch_size=3), fails=True)
    assert "another process of the run has ended or does not answer" in ended.err
    assert f"continue with --resume from {tmp_path / 'checkpoint.safetensors'}" in ended.err
    assert checkpoint.load(tmp_path / "checkpoint.safetensors")["progress"]["step"] == 4
    processes.run(2, *toy(tmp_path, batch_size=3, resume=True))
    assert_same(tmp_path, straight)


def test_torchrun_restarts_what_was_killed_and_passes_a_signal_on(tmp_path):
    """The killed one is started again with the other one, and then all are stopped by a signal to torchrun itself."""
    # Longer than any machine takes to pass the signal on.
    fields = {"batch_size": 3, "num_epochs": 1000, "patience": 1000, "resume": True}
    command = toy(tmp_path, [1, 5, signal.SIGKILL], 0.05, **fields)
    out, told = "", False
    with torchrun(2, "--max-restarts", 1, *command) as process:
        for line in process.stdout:
            out += line
            # Only those that were started again come so far.
            if line == "9\n" and not told:
                process.terminate()
                told = True
        err = process.stderr.read()
    assert process.returncode, err
    assert "another process of the run has ended or does not answer" in err
    assert out.count("resumed after step 4/4000") == 1, err
    step = checkpoint.load(tmp_path / "checkpoint.safetensors")["progress"]["step"]
    assert out.count(f"stopped by SIGTERM after step {step}/4000; continue with --resume") == 1, err
    assert 9 < step < 4000


def test_ranks_that_are_started_again_do_not_read_what_the_first_ones_wrote(monkeypatch):
    store = torch.distributed.HashStore()
    number = threading.local()
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(store, number.value, 3)]))

    def meet(rank: int) -> torch.distributed.Store:
        number.value = rank
        return distributed._meet()[0]

    met = []
    for order in [0, 1, 2], [0, 2, 1], [2, 1, 0]:
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            # The first one to come has time to find what is old.
            started = {order[0]: pool.submit(meet, order[0])}
            time.sleep(0.1)
            started |= {rank: pool.submit(meet, rank) for rank in order[1:]}
            stores = [started[rank].result() for rank in range(3)]
        stores[2].set("address", str(len(met)))
        met.append(stores)
    for start, stores in enumerate(met):
        assert [one.get("address") for one in stores] == [str(start).encode()] * 3


def test_another_number_of_ranks_goes_on_with_the_same_batches(processes, tmp_path):
    fields = {"dropout": 0.0, "num_epochs": 2}
    processes.run(2, *toy(tmp_path / "two", [0, 4, signal.SIGTERM], batch_size=3, **fields), fails=True)
    assert checkpoint.load(tmp_path / "two" / "checkpoint.safetensors")["progress"]["step"] == 6
    with pytest.raises(UserError, match=r"batch_size must be 6 on 1 rank\(s\), as in .* \(3 on 2\), got 3"):
        make_loop(tmp_path / "two", batch_size=3, resume=True, **fields).run()
    make_loop(tmp_path / "two", batch_size=6, resume=True, **fields).run()
    make_loop(tmp_path / "one", batch_size=6, **fields).run()
    assert_close(tmp_path / "one", tmp_path / "two")


def test_a_loss_that_is_not_finite_ends_all_ranks_and_names_the_records_of_all(processes, tmp_path):
    run_toy = toy(tmp_path, batch_size=3, learning_rate=1e38, clip_norm=0.0, num_epochs=30)
    ended = processes.run(2, *run_toy, fails=True)
    (line,) = [line for line in ended.err.splitlines() if "not finite at step" in line and "RunError:" in line]
    assert len(line.split("records ")[1].split(";")[0].split(", ")) in (4, 6)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """27 recordings of 2 to 6 s, so that crops of 5 s are padded by different numbers of tokens."""
    folder, random = tmp_path_factory.mktemp("recordings"), np.random.default_rng(0)
    for number in range(27):
        signal_ = np.cumsum(random.normal(size=(12, random.integers(1000, 3000))), 1)
        np.save(folder / f"r{number:02d}.npy", signal_.astype(np.float32))
    return folder


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_pretraining_on_two_ranks_gives_the_weights_of_one(processes, recordings, tmp_path, alpha):
    flags = {
        "data_path": recordings,
        "cache_dir": tmp_path / "cache",
        "size": "tiny",
        "accumulate_steps": 2,
        "max_steps": 5,
        "validate_every": 3,
        "log_every": 2,
        "learning_rate": 1e-3,
        # With a smaller one, rounding alone would move what has no gradient, such as the biases of keys.
        "adam_eps": 1e-4,
        "mask_prob": 0.33,
        "num_clusters": 8,
        "layerdrop": 0.3,
        "dropout": 0.0,
        "alpha": alpha,
        "validation_share": 0.2,
        "num_workers": 0,
        "device": "cpu",
    }
    argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    assert cli.main(["pretrain", *argv, "--output_dir", str(tmp_path / "1"), "--batch_size", "4"]) == 0
    mine = ["--output_dir", tmp_path / "2", "--batch_size", 2]
    done = processes.run(2, "-m", "hubert_ecg", "pretrain", *argv, *mine)
    assert done.out.count("8 clusters of") == 1
    one, two = (tmp_path / str(n) / "hubert_ecg" for n in (1, 2))
    assert_close(one, two)
    first, second = (checkpoint.load(folder / "checkpoint.safetensors")["progress"] for folder in (one, two))
    assert first["best_metrics"] == pytest.approx(second["best_metrics"], rel=1e-4)
    assert first["step"] == second["step"] == 5
    speeds = []
    for folder in (one, two):
        with (folder / "metrics.csv").open() as file:
            speeds += [row for row in csv.DictReader(file) if row["split"] == "train"]
    # Operations of a record are the same however many ranks there are.
    per_record = [float(row["tflops_per_s"]) / float(row["records_per_s"]) for row in speeds]
    assert per_record == pytest.approx(per_record[:1] * 6)


def test_evaluation_on_two_ranks_gives_the_numbers_of_one(processes, cohort, tmp_path, one_thread):
    common = ["--dataset", "synthetic", "--task", "all", "--data_path", cohort.path, "--device", "cpu"]
    settings = ["--pretrained_model", "random:tiny", "--max_steps", 3, "--output_dir", tmp_path, "--batch_size", 4]
    tuned = processes.run(2, "-m", "hubert_ecg", "finetune", *common, *settings, "--num_crops", 2)
    assert tuned.out.count("step 3/3  validation") == 1
    # 40 records in batches of 7: six batches, the last one not full.
    some = ["--model_path", tmp_path / "synthetic_all.pt", "--test_split", "all", "--batch_size", 7]
    command = ["evaluate", *common, *some, "--num_bootstrap", 10, "--output_dir"]
    assert cli.main([*map(str, command), str(tmp_path / "1")]) == 0
    done = processes.run(2, "-m", "hubert_ecg", *command, tmp_path / "2")
    assert done.out.count("report.html, report.json") == 1
    one, two = ((tmp_path / str(n) / "predictions.csv").read_bytes() for n in (1, 2))
    assert one == two
    assert len(one.splitlines()) == 41


def test_one_process_is_a_rank_of_its_own():
    assert (distributed.rank(), distributed.num_ranks()) == (0, 1)
    assert distributed.gather("x") == ["x"]
    assert distributed.agreed("x") == "x"
    share = distributed.Share(np.arange(NUM_RECORDS), 5)
    polls = []
    assert list(share.polled("abcde", lambda: polls.append(1))) == list("abcde")
    assert len(polls) == 5
    assert share.indices.tolist() == list(range(NUM_RECORDS))
