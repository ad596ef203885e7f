"""What may import what, and what `import hubert_ecg` may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hubert_ecg

ROOT = Path(hubert_ecg.__file__).parent
PATH = ["config", "files", "native", "ops", "signal", "data", "features", "clustering", "models", "evaluation", "train"]
PATH += ["info", "demo", "cli", "__main__"]
# The package's own table of public names stands before the path; testing serves tests and benchmarks alone.
OUTSIDE = {"__init__", "testing"}
HEAVY = ["triton", "matplotlib", "wfdb", "pandas", "sklearn", "cupy", "transformers", "tensorboard", "jsonargparse"]


def imported(path: Path):
    """Modules of hubert_ecg that a file imports, each as the parts after `hubert_ecg.`, with its line."""
    package = ("hubert_ecg", *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, [base, node.module]))
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "hubert_ecg" else [base]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "hubert_ecg":
                yield name.split(".")[1:], node.lineno


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_what_lies_before_it(path):
    me = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if me in OUTSIDE:
        return
    assert me in PATH, f"{path.name} has no place on the path of one record: {' < '.join(PATH)}"
    allowed = {"_C", "__version__", *PATH[: PATH.index(me) + 1]}
    for parts, line in imported(path):
        assert parts, f"{path}:{line} imports hubert_ecg itself"
        assert parts[0] in allowed, f"{path}:{line}: {me} imports {parts[0]}, which comes after it"
        assert parts[0] != "_C" or me == "native", f"{path}:{line}: only native.py opens the compiled module"


@pytest.mark.parametrize("path", sorted(ROOT.glob("ops/*_reference.py")), ids=lambda path: path.name)
def test_a_reference_imports_nothing_of_ours_but_references(path):
    for parts, line in imported(path):
        assert parts[0] == "ops", f"{path}:{line}"
        assert parts[1].endswith("_reference") or parts[1] == "_dropout", f"{path}:{line}"


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """What is loaded after each of these imports, one after another in a process of their own."""
    names = ["hubert_ecg", "hubert_ecg.ops", "hubert_ecg.models", "hubert_ecg.train"]
    code = (
        "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n    print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    return {name: {m.split(".")[0] for m in line.split()} for name, line in zip(names, lines, strict=True)}


def test_import_is_light(loaded):
    assert not loaded["hubert_ecg"].intersection([*HEAVY, "torch"])


def test_ops_load_nothing_heavy(loaded):
    assert not loaded["hubert_ecg.ops"].intersection(HEAVY)


def test_models_load_nothing_heavy(loaded):
    assert not loaded["hubert_ecg.models"].intersection(["matplotlib", "wfdb", "sklearn"])


def test_training_loads_neither_plots_nor_readers(loaded):
    unwanted = {"matplotlib", "wfdb", "sklearn", "pandas", "tensorboard", "wandb"}
    assert not loaded["hubert_ecg.train"] & unwanted
    assert {"torch", "numpy"} <= loaded["hubert_ecg.train"]
