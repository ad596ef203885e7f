"""Every command for several processes in docs/ is understood as it is written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from hubert_ecg import cli

DOCS = Path(__file__).resolve().parents[1] / "docs"
TEXT = "".join((DOCS / name).read_text(encoding="utf-8") for name in ("distributed.md", "datasets.md"))
COMMANDS = re.findall(r"^.*\btorchrun (.+)$", "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.S)), re.M)


@pytest.mark.parametrize("line", COMMANDS)
def test_each_command_is_understood(line):
    launch = get_args_parser().parse_args(shlex.split(line))
    assert launch.module
    assert launch.training_script == "hubert_ecg"
    command, *argv = launch.training_script_args
    config = cli.parse(command, argv)
    for word in argv:
        if word.startswith("--"):
            assert hasattr(config, word.removeprefix("--")), word
    # 448 records in a batch of all processes, as it says.
    if command == "pretrain" and config.size == "base":
        machines = 4 if launch.nnodes.startswith("$") else 1
        assert config.batch_size * int(launch.nproc_per_node) * machines == 448


def test_there_are_commands():
    assert len(COMMANDS) >= 5
