"""The Python of the README and of the pages in docs/ runs and prints what it shows; commands are understood."""

from __future__ import annotations

import doctest
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from hubert_ecg import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
COMMANDS = [line for text in (README, *PAGES.values()) for line in text.splitlines() if line.startswith("hubert-ecg ")]
WITH_PYTHON = {name: text for name, text in {"README.md": README, **PAGES}.items() if "```python\n" in text}


def test_the_readme_has_examples():
    assert README.count(">>> ") >= 10


@pytest.mark.parametrize("name", WITH_PYTHON)
def test_python_prints_what_it_shows(name):
    examples = "\n".join(re.findall(r"```python\n(.*?)```", WITH_PYTHON[name], re.DOTALL))
    test = doctest.DocTestParser().get_doctest(examples, {}, name, name, 0)
    said = []
    assert doctest.DocTestRunner().run(test, out=said.append).failed == 0, "".join(said)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line):
    _, command, *argv = shlex.split(line)
    cli.parse(command, argv)


def test_speed_table_is_made_from_rows():
    spec = importlib.util.spec_from_file_location("rows", ROOT / "benchmarks" / "rows.py")
    rows = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rows)
    tables = [rows.table(rows.load(path)) for path in rows.RESULTS.glob("*.json")]
    assert any(table in README and table.count("\n") > 4 for table in tables)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^make (\w+)", README, re.MULTILINE)) | set(re.findall(r"`make (\w+)`", README))
    assert {"demo", "test", "bench"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_links_lead_somewhere():
    for folder, text in ((ROOT, README), *((ROOT / "docs", page) for page in PAGES.values())):
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert link.startswith("https://") or (folder / link).exists(), link
