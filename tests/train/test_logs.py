from __future__ import annotations

import csv
import importlib.util
import math

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from hubert_ecg.config import UserError
from hubert_ecg.train.logs import Logs, MetricsFile, check_wandb

COLUMNS = ("step", "epoch", "split", "loss", "lr")


def row(step, **values):
    return {"step": step, "epoch": step / 4, "split": "train", "loss": 0.1 + step, **values}


def test_rows_beyond_the_checkpoint_and_half_rows_go(tmp_path):
    path = tmp_path / "metrics.csv"
    log = MetricsFile(path, COLUMNS)
    for step in (2, 4, 6):
        log.write(row(step))
    log.close()
    first = path.read_text().splitlines()
    with path.open("a") as file:
        file.write("8,2.0,tr")
    log = MetricsFile(path, COLUMNS, last_step=4)
    log.write(row(6, loss=9.0))
    log.close()
    lines = path.read_text().splitlines()
    assert lines[:3] == first[:3]
    assert lines[3:] == ["6,1.5,train,9.0,"]


def test_numbers_keep_all_their_digits(tmp_path):
    log = MetricsFile(tmp_path / "m.csv", COLUMNS)
    log.write(row(1, loss=0.1 + 0.2, lr=math.nan))
    log.close()
    with (tmp_path / "m.csv").open() as file:
        (read,) = csv.DictReader(file)
    assert float(read["loss"]) == 0.1 + 0.2
    assert read["lr"] == ""


def test_a_new_run_starts_new_files(tmp_path):
    for _ in range(2):
        with Logs(tmp_path, COLUMNS, 8) as logs:
            logs.row(row(1))
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 2
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1


def test_tensorboard_has_the_numbers(tmp_path):
    with Logs(tmp_path, COLUMNS, 8) as logs:
        logs.row(row(4, lr=0.5))
    (events,) = tmp_path.glob("events.out.tfevents.*")
    values = {
        (value.tag, event.step): value.tensor.float_val[0] if value.HasField("tensor") else value.simple_value
        for event in EventFileLoader(str(events)).Load()
        for value in event.summary.value
    }
    assert values[("train/loss", 4)] == pytest.approx(4.1)
    assert values[("train/lr", 4)] == 0.5


def test_lines_where_there_is_no_terminal(tmp_path, capsys):
    with Logs(tmp_path, COLUMNS, 8, title="[run]") as logs:
        logs.row(row(1))
        logs.row(row(2))
        logs.row({"step": 2, "epoch": 0.5, "split": "validation", "loss": 0.25})
    lines = capsys.readouterr().out.splitlines()
    # The second training row comes too soon after the first.
    assert len(lines) == 2
    assert lines[0].startswith("[run]: step 1/8  train  loss 1.1")
    assert lines[1] == "[run]: step 2/8  validation  loss 0.25"


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_that_is_asked_for_and_missing_says_how_to_get_it():
    check_wandb(False)
    with pytest.raises(UserError, match="pip install wandb"):
        check_wandb(True)
