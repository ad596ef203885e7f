"""Peers, and a race between them and ours: in turns, in one process, on the same data, the answers checked first."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hubert_ecg.testing import torchaudio_parts


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """With --benchmark-json, rows also go where this device's rows are kept."""
    spec = importlib.util.spec_from_file_location("rows", Path(__file__).with_name("rows.py"))
    rows = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rows)
    rows.save(output_json["benchmarks"])


@pytest.fixture(scope="session")
def torchaudio():
    """The parts of torchaudio that are plain Python."""
    try:
        return torchaudio_parts()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture
def race(benchmark, capsys, request) -> Callable[..., dict[str, float]]:
    """``race(ours, {name: peer}, unit, count)`` times ours, then all in turns; prints and stores ratios.

    Returns median seconds of each peer over ours, round by round; nothing where benchmarks are disabled.
    """

    def run(ours: Callable[[], Any], peers: dict[str, Callable[[], Any]], unit: str, count: int, rounds: int = 11):
        benchmark.pedantic(ours, rounds=rounds, warmup_rounds=2)
        if benchmark.disabled:
            return {}
        runners = {"ours": ours, **peers}
        times: dict[str, list[float]] = {name: [] for name in runners}
        for _ in range(rounds):
            for name, runner in runners.items():
                start = time.perf_counter()
                runner()
                times[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(found) for name, found in times.items()}
        ratios = {
            name: statistics.median(peer / own for peer, own in zip(times[name], times["ours"], strict=True))
            for name in peers
        }
        benchmark.extra_info.update(
            unit=unit, count=count, median_s=medians, ratio={name: round(ratio, 2) for name, ratio in ratios.items()}
        )
        with capsys.disabled():
            print(f"\n{request.node.name}")
            for name, median in medians.items():
                ratio = f"  ours is {ratios[name]:.1f} times as fast" if name in ratios else ""
                print(f"  {name:28} {1e3 * median:9.2f} ms {count / median:12,.0f} {unit}/s{ratio}")
        return ratios

    return run
