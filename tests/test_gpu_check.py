"""What runs the checks on a GPU tells what failed and what took too long, and goes on."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest


@pytest.fixture
def gpu(monkeypatch):
    path = Path(__file__).resolve().parents[1] / ".ci" / "gpu.py"
    spec = importlib.util.spec_from_file_location("gpu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_part_is_said_with_its_outcome(gpu, monkeypatch, capsys):
    heard = []
    parts = {
        "build": heard.append,
        "fails": lambda more: gpu.run([sys.executable, "-c", "raise SystemExit(3)"]),
        "absent": lambda more: gpu.run(["no-such-program"]),
        "late": lambda more: gpu.run([sys.executable, "-c", "import time; time.sleep(60)"], 0.5),
    }
    monkeypatch.setattr(gpu, "PARTS", parts)
    start = time.monotonic()
    assert gpu.main("build", "fails", "absent", "late", "--", "-k", "mfcc") == 1
    assert time.monotonic() - start < 30
    assert heard == [["-k", "mfcc"]]
    lines = [line.split(maxsplit=3) for line in capsys.readouterr().out.splitlines() if " s  " in line]
    assert [(name, outcome) for name, _, _, outcome in lines] == [
        ("build", "passed"),
        ("fails", "failed, exit code 3"),
        ("absent", "failed, no-such-program is not on PATH"),
        ("late", "stopped after 8 minutes"),
    ]
    assert gpu.main("build") == 0


def test_nothing_follows_a_build_that_failed(gpu, monkeypatch):
    def fail(more):
        raise subprocess.CalledProcessError(1, ["pip"])

    monkeypatch.setattr(gpu, "PARTS", {"build": fail, "tests": lambda more: pytest.fail("it went on")})
    assert gpu.main() == 1


def test_a_part_that_does_not_exist_is_named(gpu):
    with pytest.raises(SystemExit, match="benchmarks is no part; parts are build, cuda, tests"):
        gpu.main("benchmarks")


def test_parts_name_benchmarks_that_are_there(gpu):
    for stem in (*gpu.FEATURES, *gpu.MODEL, *gpu.STEPS, *gpu.USE):
        assert (gpu.ROOT / "benchmarks" / f"test_{stem}.py").is_file(), stem


def test_the_sanitizer_gets_its_options_before_the_program(gpu, monkeypatch):
    commands = []
    monkeypatch.setattr(gpu, "run", lambda command, *_, **variables: commands.append(list(map(str, command))))
    gpu.PARTS["memcheck"](["-x"])
    gpu.PARTS["racecheck"]([])
    memcheck, racecheck = commands
    program = memcheck.index(str(gpu.PYTEST[0]))
    assert memcheck[memcheck.index("--padding") + 1] == "64"
    assert memcheck.index("--padding") < program
    assert memcheck[-1] == "-x"
    assert "--padding" not in racecheck
