"""Rows of benchmarks are kept by name, compared with those before, and drawn."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest


@pytest.fixture
def rows(monkeypatch, tmp_path):
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "rows.py"
    spec = importlib.util.spec_from_file_location("rows", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    return module


def a_run(path, gpu=None, **seconds):
    """What ``--benchmark-json`` writes, of one point of a curve for each name."""
    benchmarks = [
        {
            "name": name,
            "stats": {"median": ours, "iqr": 0.0, "rounds": 3},
            "extra_info": {
                "unit": "records",
                "count": 10,
                "median_s": {"ours": ours, "peer": 0.01},
                "ratio": {"peer": 0.01 / ours},
                "curve": "this against batch",
                "x": i + 1,
            },
        }
        for i, (name, ours) in enumerate(seconds.items())
    ]
    machine = {"machine_info": {"gpu": gpu}} if gpu else {}
    path.write_text(json.dumps({"benchmarks": benchmarks} | machine))
    return str(path)


def test_a_run_replaces_rows_of_its_own_names_and_draws_all(rows, tmp_path):
    rows.main("keep", a_run(tmp_path / "first.json", a=0.001, b=0.002))
    rows.main("keep", a_run(tmp_path / "second.json", b=0.004))
    kept = rows.load(rows.RESULTS / f"{rows.device()}.json")
    assert {row["name"]: row["median"] for row in kept} == {"a": 0.001, "b": 0.004}
    assert all(row["versions"]["torch"] for row in kept)
    drawn = rows.RESULTS / f"{rows.device()}.svg"
    first = drawn.read_bytes()
    rows.main("keep", a_run(tmp_path / "second.json", b=0.004))
    assert drawn.read_bytes() == first


def test_the_rows_of_a_gpu_are_its_own(rows, tmp_path, capsys):
    rows.main("keep", a_run(tmp_path / "first.json", a=0.001))
    rows.main("keep", a_run(tmp_path / "second.json", gpu="NVIDIA H100 80GB HBM3", a=0.002))
    on_gpu = rows.RESULTS / "nvidia-h100-80gb-hbm3.json"
    assert [row["median"] for row in rows.load(on_gpu)] == [0.002]
    assert [row["median"] for row in rows.load(rows.RESULTS / f"{rows.device()}.json")] == [0.001]
    run = a_run(tmp_path / "third.json", gpu="NVIDIA H100 80GB HBM3", test_front_end=0.004)
    named = json.loads(Path(run).read_text())
    named["benchmarks"][0]["extra_info"]["ratio"] = {"another": 3.0, "eager PyTorch": 2.0}
    named["benchmarks"][0]["extra_info"]["median_s"] |= {"eager PyTorch": 0.008}
    Path(run).write_text(json.dumps(named))
    rows.main("keep", run)
    capsys.readouterr()
    rows.main("table", str(on_gpu))
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| convolutions | 10 records | 4 ms | eager PyTorch | 8 ms | 2.0 x |"
    ]


def test_a_run_is_shown_beside_the_rows_before_it(rows, tmp_path, capsys):
    run = a_run(tmp_path / "first.json", a=0.001)
    rows.main("compare", run)
    assert "nothing to compare with" in capsys.readouterr().out
    rows.main("keep", run)
    rows.main("compare", a_run(tmp_path / "second.json", a=0.002, new=0.005))
    _, a, new = capsys.readouterr().out.splitlines()
    assert a.split() == ["a", "2", "ms", "1", "ms", "5.0", "x", "(10", "x)", "peer"]
    assert new.split() == ["new", "5", "ms", "-", "2.0", "x", "(-)", "peer"]


@pytest.mark.parametrize(
    "args", [("compare",), ("keep",), ("keep", "one.json", "two.json"), ("table", "one.json", "two.json"), ("",)]
)
def test_says_how_it_is_used(rows, args):
    with pytest.raises(SystemExit, match=r"(?s)^usage:.*rows.py compare FILE"):
        rows.main(*args)
