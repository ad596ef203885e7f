from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import pytest

from hubert_ecg import cli
from hubert_ecg.config import PRETRAIN_PRESETS, RunError, UserError


def error_line(capsys, *argv: str) -> str:
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["pretrian"], "pretrian"),
        (["pretrain"], "data_path"),
        (["pretrain", "--data_path", "x", "--num_epoch", "3"], "--num_epoch"),
        (["pretrain", "--data_path", "x", "--num_epochs", "three"], "num_epochs"),
        (["pretrain", "--data_path", "x", "--num_epochs", "0"], "--num_epochs must be at least 1, got 0"),
        (["pretrain", "--data_path", "x", "--mask_prob", "1.5"], "--mask_prob"),
        (["pretrain", "--data_path", "x", "--learning_rate", "nan"], "--learning_rate"),
        (["pretrain", "--data_path", "x", "--feature_type", "mfc"], "feature_type"),
        (["pretrain", "--data_path", "x", "--max_steps", "many"], "--max_steps must be int, got many"),
        (
            ["pretrain", "--data_path", "x", "--preset", "ours"],
            "--preset must be one of ['published', 'corrected'], got ours",
        ),
        (["pretrain", "--data_path", "x", "--crop_s", "0.05"], "--crop_s must be at least 0.1 seconds"),
        (["pretrain", "--data_path", "/no/such/folder"], "/no/such/folder"),
        (["extract", "--data_path", "/no/such/folder", "--output_path", "f.pkl"], "/no/such/folder"),
        (["cluster", "--features_path", "/no/such/file.pkl", "--output_path", "k.pkl"], "/no/such/file.pkl"),
        (["finetune", "--dataset", "ptbx", "--task", "all", "--pretrained_model", "m.pt"], "ptbx"),
        (["finetune", "--dataset", "synthetic", "--task", "al", "--pretrained_model", "random:tiny"], "al"),
        (["finetune", "--dataset", "ptbxl", "--task", "all", "--pretrained_model", "/no/m.pt"], "ptbxl"),
        (["evaluate", "--dataset", "synthetic", "--task", "all", "--model_path", "/no/m.pt"], "/no/m.pt"),
        (["demo", "--data_path", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(argv, named, capsys):
    assert named in error_line(capsys, *argv)


def test_a_folder_that_cannot_be_written_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch):
    def write(config):
        (config.output_dir / "model").mkdir(parents=True)

    (tmp_path / "file").touch()
    monkeypatch.setattr(cli.Command, "function", lambda self: write)
    line = error_line(capsys, "pretrain", "--data_path", "x", "--output_dir", str(tmp_path / "file"))
    assert line == f"hubert-ecg: error: {tmp_path / 'file' / 'model'}: Not a directory"


def test_a_run_that_cannot_go_on_is_one_line_and_exit_code_1(capsys, monkeypatch):
    def stop(config):
        raise RunError("the loss is not finite,\non the batch of records a, b")

    monkeypatch.setattr(cli.Command, "function", lambda self: stop)
    assert cli.main(["pretrain", "--data_path", "x"]) == 1
    assert capsys.readouterr().err == "hubert-ecg: error: the loss is not finite, on the batch of records a, b\n"


def test_the_package_is_the_command_too():
    done = subprocess.run([sys.executable, "-m", "hubert_ecg", "pretrian"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("hubert-ecg: error: unknown command 'pretrian'; the commands are prepare, ")
    assert len(done.stderr.splitlines()) == 1


def test_a_switch_needs_no_value():
    assert cli.parse("pretrain", ["--data_path", "x", "--resume"]).resume is True
    assert cli.parse("pretrain", ["--resume", "--data_path", "x"]).resume is True
    assert cli.parse("pretrain", ["--data_path", "x", "--resume", "false"]).resume is False


def test_a_preset_sets_its_recipe_and_flags_beside_it_win():
    config = cli.parse("pretrain", ["--preset", "published", "--data_path", "x", "--batch_size", "64"])
    assert config.batch_size == 64
    assert config.mask_prob == PRETRAIN_PRESETS["published"]["mask_prob"] == 0.33
    assert config.max_steps == 80_000
    # 100 epochs of a small data set would be fewer.
    assert config.num_epochs >= config.max_steps
    assert config.compat == "published"


def test_a_config_file_gives_values_and_flags_win(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("data_path: records\nnum_clusters: 7\nbatch_size: 5\n")
    config = cli.parse("pretrain", ["--config", str(file), "--batch_size", "6"])
    assert (str(config.data_path), config.num_clusters, config.batch_size) == ("records", 7, 6)
    file.write_text("data_path: records\nnum_cluster: 7\n")
    with pytest.raises(UserError, match="num_cluster"):
        cli.parse("pretrain", ["--config", str(file)])


@pytest.mark.parametrize("command", [c for c in cli.COMMANDS if c != "info"])
def test_help_has_a_meaning_and_a_type_for_every_flag(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split("options:")[1].split())
    for field in dataclasses.fields(cli.COMMANDS[command].config):
        (entry,) = re.findall(rf"--{field.name} (?:{field.name.upper()}|{{[^}}]*}}) (.*?\((?:required, )?type: )", text)
        assert len(entry.split()) > 3, entry


def test_help_shows_choices_that_may_be_left_out(capsys):
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "--help"])
    out = capsys.readouterr().out
    assert out.count("--preset {published,corrected}") == 2
    assert "--teacher TEACHER" in out


def test_info_names_every_op_and_why_a_backend_is_missing(capsys):
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {"mfcc", "deltas", "time_freq", "kmeans_assign", "kmeans_accumulate"} <= set(facts["ops"])
    for devices in facts["ops"].values():
        for row in devices.values():
            assert row["default"] in row["backends"]
            assert row["why"]
            assert all(row["missing"].values())
    assert cli.main(["info"]) == 0
    assert "mfcc" in capsys.readouterr().out
