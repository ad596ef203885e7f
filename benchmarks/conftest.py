"""A race between ours and peers: in turns, in one process, on the same data, the answers checked first."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch

from hubert_ecg.testing import torchaudio_parts

from .ceilings import best_of_a_turn, finished, floor_s


def pytest_addoption(parser):
    parser.addoption("--rounds", type=int, metavar="N", help="at most N rounds of each race, for a quick look")
    parser.addoption(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where ours and the peers run, at sizes for it"
    )


def pytest_configure(config):
    if config.getoption("device") == "cuda":
        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: torch finds no CUDA device")
        # What is float32 is meant so: answers are compared.
        torch.backends.cudnn.allow_tf32 = False


def pytest_collection_modifyitems(config, items):
    """What does not ask for a device runs on a CPU, whatever stands beside it."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            # What peers, and the compiler, warn of is no error of ours.
            item.add_marker(pytest.mark.filterwarnings("default"))
    if config.getoption("device") == "cpu":
        return
    elsewhere = [item for item in items if "device" not in item.fixturenames]
    config.hook.pytest_deselected(items=elsewhere)
    items[:] = [item for item in items if item not in elsewhere]


def pytest_benchmark_update_machine_info(config, machine_info):
    if config.getoption("device") == "cuda":
        machine_info["gpu"] = torch.cuda.get_device_name()


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    return torch.device(request.config.getoption("device"))


@pytest.fixture(scope="session")
def torchaudio():
    """The parts of torchaudio that are plain Python."""
    try:
        return torchaudio_parts()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture
def race(benchmark, capsys, request, device) -> Callable[..., dict[str, float]]:
    """``race(ours, {name: peer}, unit, count)`` times ours, then all in turns; prints and stores ratios.

    A peer that is not here is the reason why, a string; so is one that fails, as where memory does not hold it.
    ``curve=(what, x)`` makes the row a point of a plot. With the bytes that must be ``moved`` at least and the
    ``operations`` of products in ``dtype``, the row says how much of the time of ours is their floor. On a GPU it has
    the most memory that each took. Peers that take minutes may run ``once`` alone.

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
        moved: float = 0,
        operations: float = 0,
        dtype: torch.dtype = torch.float32,
        once: Collection[str] = (),
    ):
        rounds = min(rounds, request.config.getoption("rounds") or rounds)
        benchmark.pedantic(finished(ours, device), rounds=rounds, warmup_rounds=2)
        if benchmark.disabled:
            return {}
        runners, absent, peak_bytes = {}, {}, {}
        for name, runner in {"ours": ours, **peers}.items():
            if isinstance(runner, str):
                absent[name] = runner
                continue
            runner = finished(runner, device)
            try:
                peak_bytes[name] = memory_of(runner, device)
            except Exception as error:
                if name.startswith("ours"):
                    raise
                absent[name] = said_by(error)
            else:
                runners[name] = runner
        times: dict[str, list[float]] = {name: [] for name in runners}
        shares = []
        for turn in range(rounds):
            for name, runner in runners.items():
                if turn == 0 or name not in once:
                    times[name].append(best_of_a_turn(runner))
            # The speed of a machine that others use, too, is another one in the next minute.
            shares.append(floor_s(device, moved, operations, dtype) / times["ours"][-1])
        medians = {name: statistics.median(found) for name, found in times.items()}
        ratios = {
            name: statistics.median(peer / own for peer, own in zip(times[name], times["ours"], strict=False))
            for name in runners
            if name != "ours"
        }
        benchmark.extra_info.update(
            unit=unit, count=count, median_s=medians, ratio={name: round(ratio, 2) for name, ratio in ratios.items()}
        )
        if curve:
            benchmark.extra_info.update(curve=curve[0], x=curve[1])
        if moved or operations:
            share = statistics.median(shares)
            benchmark.extra_info.update(moved=moved, operations=operations, share_of_floor=round(share, 3))
        if device.type == "cuda":
            benchmark.extra_info.update(peak_bytes=peak_bytes)
        with capsys.disabled():
            print(f"\n{request.node.name}")
            for name, median in medians.items():
                ratio = f"  ours is {ratios[name]:.1f} times as fast" if name in ratios else ""
                gigabytes = f" {peak_bytes[name] / 1e9:6.2f} GB" if device.type == "cuda" else ""
                print(f"  {name:36} {1e3 * median:9.2f} ms{gigabytes} {count / median:12,.0f} {unit}/s{ratio}")
            for name, reason in absent.items():
                print(f"  {name:36} {reason}")
            if moved or operations:
                print(f"  of the time of ours, {100 * share:.0f} % is its floor on this device")
        return ratios

    return run


@pytest.fixture(scope="session")
def checked() -> Callable[..., dict[str, Callable[[], Any] | str]]:
    """``checked(runs, check)`` are the runs, of each of which ``check(name, answer)`` holds.

    A peer that fails by itself is the reason why.
    """

    def run(
        runs: dict[str, Callable[[], Any] | str], check: Callable[[str, Any], None]
    ) -> dict[str, Callable[[], Any] | str]:
        found = dict(runs)
        for name, runner in runs.items():
            if isinstance(runner, str):
                continue
            try:
                answer = runner()
            except Exception as error:
                if name.startswith("ours"):
                    raise
                found[name] = said_by(error)
            else:
                check(name, answer)
        return found

    return run


def said_by(error: Exception) -> str:
    """The first line of an error, for a row of what a peer did not do."""
    return (str(error).splitlines() or [type(error).__name__])[0][:100]


def memory_of(run: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a run takes beyond what is there already; 0 on a CPU, where nothing counts them."""
    if device.type != "cuda":
        return 0
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        run()
        return torch.cuda.max_memory_allocated(device) - before
    finally:
        torch.cuda.empty_cache()


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
