"""Every command of the training guide is understood, letter for letter."""

from __future__ import annotations

import dataclasses
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hubert_ecg import cli
from hubert_ecg.config import EvaluateConfig, FinetuneConfig, PretrainConfig

ROOT = Path(__file__).resolve().parents[1]
DOORS = {
    "training/pretrain.py": "pretrain",
    "training/finetune.py": "finetune",
    "tools/feature_extraction.py": "extract",
    "tools/clustering.py": "cluster",
    "tools/test.py": "evaluate",
}
COMMANDS = """
python training/pretrain.py --data_path /path/to/ecg/data --output_dir ./pretrained_models --num_epochs 100 --batch_size 32
python training/pretrain.py --data_path /path/to/ecg/data --output_dir ./pretrained_models --num_epochs 100 --batch_size 32 --learning_rate 1e-4 --mask_prob 0.15 --num_clusters 100 --feature_type mfcc
python training/finetune.py --dataset ptbxl --task all --pretrained_model ./pretrained_models/hubert_ecg.pt --output_dir ./finetuned_models --num_epochs 50 --batch_size 16 --learning_rate 1e-5
python training/finetune.py --dataset chapman --task rhythm --pretrained_model ./pretrained_models/hubert_ecg.pt --output_dir ./finetuned_models --num_epochs 30 --batch_size 16
python training/finetune.py --dataset ptbxl --task all --pretrained_model hubert_ecg_base --batch_size 16 --learning_rate 1e-5 --num_epochs 50 --output_dir ./results/ptbxl_all
python tools/feature_extraction.py --data_path /path/to/ecg/data --feature_type mfcc --output_path ./features/mfcc_features.pkl
python tools/feature_extraction.py --data_path /path/to/ecg/data --feature_type time_freq --output_path ./features/tf_features.pkl
python tools/clustering.py --features_path ./features/mfcc_features.pkl --num_clusters 100 --output_path ./clusters/kmeans_model.pkl
python tools/test.py --model_path ./finetuned_models/ptbxl_all.pt --dataset ptbxl --task all --test_split test
""".strip().splitlines()  # noqa: E501


@pytest.mark.parametrize("line", COMMANDS)
def test_each_flag_reaches_its_field(line):
    _, script, *argv = shlex.split(line)
    config = cli.parse(DOORS[script], argv)
    for flag, text in zip(argv[::2], argv[1::2], strict=True):
        value = getattr(config, flag.removeprefix("--"))
        assert value == type(value)(text), flag


def test_the_list_above_is_the_guide(shared_data):
    guide = (shared_data.parent / "TRAINING_GUIDE.md").read_text().replace("\\\n", " ")
    lines = [line for line in guide.splitlines() if line.startswith("python ")]
    assert len(lines) >= 9
    assert {tuple(shlex.split(line)) for line in lines} == {tuple(shlex.split(line)) for line in COMMANDS}


def test_defaults_are_the_guides():
    pretrain = cli.parse("pretrain", ["--data_path", "x"])
    assert pretrain == PretrainConfig(
        Path("x"),
        output_dir=Path("./models"),
        num_epochs=100,
        batch_size=32,
        learning_rate=1e-4,
        mask_prob=0.15,
        num_clusters=100,
        feature_type="mfcc",
    )
    finetune = cli.parse("finetune", ["--dataset", "ptbxl", "--task", "all", "--pretrained_model", "m.pt"])
    assert finetune == FinetuneConfig(
        "ptbxl",
        "all",
        pretrained_model="m.pt",
        output_dir=Path("./models"),
        num_epochs=50,
        batch_size=16,
        learning_rate=1e-5,
        freeze_encoder=False,
    )
    evaluate = cli.parse("evaluate", ["--model_path", "m.pt", "--dataset", "ptbxl", "--task", "all"])
    assert evaluate == EvaluateConfig("ptbxl", "all", model_path="m.pt", test_split="test")


@pytest.mark.parametrize(
    ("command", "required"),
    [
        ("pretrain", {"data_path"}),
        ("finetune", {"dataset", "task", "pretrained_model"}),
        ("extract", {"data_path", "output_path"}),
        ("cluster", {"features_path", "output_path"}),
        ("evaluate", {"model_path", "dataset", "task"}),
        ("prepare", {"output_dir"}),
    ],
)
def test_required_flags(command, required):
    fields = dataclasses.fields(cli.COMMANDS[command].config)
    assert required == {
        f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }


@pytest.mark.parametrize("script", DOORS)
def test_doors_open_from_the_root_without_data(script):
    help_text = subprocess.run(
        [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert f"hubert-ecg {DOORS[script]}" in help_text
    assert "--seed" in help_text


@pytest.mark.parametrize("script", ["code/finetune.sh", "code/test.sh"])
def test_shell_scripts_say_what_is_missing_in_one_line(script, tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "HUBERT_ECG_DATA": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([f"./{script}"], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 2
    assert len(run.stderr.strip().splitlines()) == 1
    assert "data set ptbxl not found" in run.stderr
    assert str(tmp_path) in run.stderr
