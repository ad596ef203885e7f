"""A race between ours and peers: in turns, in one process, on the same data, the answers checked first."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest

from hubert_ecg.testing import torchaudio_parts


def pytest_addoption(parser):
    parser.addoption("--rounds", type=int, metavar="N", help="at most N rounds of each race, for a quick look")


@pytest.fixture(scope="session")
def torchaudio():
    """The parts of torchaudio that are plain Python."""
    try:
        return torchaudio_parts()
    except ImportError as error:
        pytest.skip(str(error))


def best_of_a_turn(run: Callable[[], Any], turn_s: float = 0.2) -> float:
    """Seconds of the fastest run: what ran before leaves other data in the caches, and threads that still spin."""
    found: list[float] = []
    while sum(found) < turn_s:
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


@pytest.fixture
def race(benchmark, capsys, request) -> Callable[..., dict[str, float]]:
    """``race(ours, {name: peer}, unit, count)`` times ours, then all in turns; prints and stores ratios.

    A peer that is not here is the reason why, a string. ``curve=(what, x)`` makes the row a point of a plot.

    Returns the median over the rounds of each peer's seconds over ours, of the best run in each turn; nothing where
    benchmarks are disabled.
    """

    def run(
        ours: Callable[[], Any],
        peers: dict[str, Callable[[], Any] | str],
        unit: str,
        count: int,
        rounds: int = 5,
        curve: tuple[str, int] | None = None,
    ):
        rounds = min(rounds, request.config.getoption("rounds") or rounds)
        benchmark.pedantic(ours, rounds=rounds, warmup_rounds=2)
        if benchmark.disabled:
            return {}
        runners = {"ours": ours, **{name: peer for name, peer in peers.items() if not isinstance(peer, str)}}
        absent = {name: peer for name, peer in peers.items() if isinstance(peer, str)}
        times: dict[str, list[float]] = {name: [] for name in runners}
        for _ in range(rounds):
            for name, runner in runners.items():
                times[name].append(best_of_a_turn(runner))
        medians = {name: statistics.median(found) for name, found in times.items()}
        ratios = {
            name: statistics.median(peer / own for peer, own in zip(times[name], times["ours"], strict=True))
            for name in runners
            if name != "ours"
        }
        benchmark.extra_info.update(
            unit=unit, count=count, median_s=medians, ratio={name: round(ratio, 2) for name, ratio in ratios.items()}
        )
        if curve:
            benchmark.extra_info.update(curve=curve[0], x=curve[1])
        with capsys.disabled():
            print(f"\n{request.node.name}")
            for name, median in medians.items():
                ratio = f"  ours is {ratios[name]:.1f} times as fast" if name in ratios else ""
                print(f"  {name:36} {1e3 * median:9.2f} ms {count / median:12,.0f} {unit}/s{ratio}")
            for name, reason in absent.items():
                print(f"  {name:36} {reason}")
        return ratios

    return run


@pytest.fixture(scope="session")
def peer() -> Callable[..., Callable[[], Any] | str]:
    """``peer(package, make)`` is ``make(module)``, or why there is no such peer here."""

    def build(package: str, make: Callable[[Any], Callable[[], Any]]) -> Callable[[], Any] | str:
        try:
            module = importlib.import_module(package.replace("-", "_").removesuffix("_cpu"))
        except ImportError:
            return f'not here; pip install {package}, or ".[bench]" for every peer'
        return make(module)

    return build
