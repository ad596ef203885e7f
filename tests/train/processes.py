"""Processes that begin at once: forked from one that has imported what they need.

Imports are most of the time that a small run takes. So one process imports, before the first test that needs it, and
forks the ranks of every run that a test asks for. They find what torchrun would give them: its environment, its store,
one output for all; and where one fails, the others are told to end. Tests of torchrun itself start it as users do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# How long a test waits for a run, however busy the machine is.
LIMIT_S = 300


@dataclasses.dataclass
class Run:
    """Processes that work together.

    Attributes:
        folder: Where their output goes: ``out`` and ``err``.
        pids: Their numbers.
    """

    folder: Path
    pids: list[int] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        # For writing too: to open it for reading alone would wait for the writer.
        self._told, self._heard = os.open(self.folder / "told", os.O_RDWR), b""
        self.pids = self._hear()

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()

    def wait(self, fails: bool = False) -> Run:
        """Wait for all to end, and check whether any failed."""
        codes = self._hear()
        os.close(self._told)
        assert any(codes) == fails, f"{codes}\n{self.out}\n{self.err}"
        return self

    def kill(self) -> None:
        """End all at once."""
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
        self.wait(fails=True)

    def wait_until(self, holds: Callable[[], bool]) -> None:
        """Wait for what the processes do."""
        end = time.monotonic() + LIMIT_S
        while not holds():
            assert time.monotonic() < end, f"not there after {LIMIT_S} s\n{self.out}\n{self.err}"
            time.sleep(0.01)

    def _hear(self) -> list[int]:
        while b"\n" not in self._heard:
            if not select.select([self._told], [], [], LIMIT_S)[0]:
                for pid in self.pids:
                    os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"not done after {LIMIT_S} s\n{self.out}\n{self.err}")
            self._heard += os.read(self._told, 4096)
        line, self._heard = self._heard.split(b"\n", 1)
        return json.loads(line)


class Processes:
    """Starts runs.

    Args:
        folder: Where their outputs go.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        # A fork has the thread that forked alone: there must be no other one.
        threads = {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
        environment = {**os.environ, **threads, "PYTHONPATH": str(ROOT)}
        self._server = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._server.stdout.readline() == "ready\n"

    def start(self, num_ranks: int, *argv: object) -> Run:
        """Start ranks, or with 0 of them one process without any group.

        Args:
            num_ranks: How many.
            argv: A script and its arguments; or -m, a module and its arguments.
        """
        from torch.distributed import TCPStore

        folder = self._folder / str(self._count)
        self._count += 1
        folder.mkdir()
        os.mkfifo(folder / "told")
        job = {"argv": list(map(str, argv)), "environment": dict(os.environ), "num_ranks": num_ranks}
        if num_ranks:
            # In the test's process, which is not forked.
            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            job["environment"] |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self._store.port),
                "TORCHELASTIC_RUN_ID": "test",
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "WORLD_SIZE": str(num_ranks),
            }
        (folder / "job.json").write_text(json.dumps(job))
        print(folder, file=self._server.stdin, flush=True)
        return Run(folder)

    def run(self, num_ranks: int, *argv: object, fails: bool = False) -> Run:
        """Start ranks as `start` does, and wait for their end."""
        return self.start(num_ranks, *argv).wait(fails)

    def close(self) -> None:
        """End the server, once the runs are done."""
        self._server.communicate()


def serve() -> list[str]:
    """Fork an agent for each run that is asked for; returns in its ranks, with what they shall run."""
    for line in sys.stdin:
        if os.fork() == 0:
            return lead(Path(line.strip()))
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    raise SystemExit


def lead(folder: Path) -> list[str]:
    """Fork the ranks of a run and wait for them, as torchrun's agent does; returns in the ranks."""
    job = json.loads((folder / "job.json").read_text())
    outputs = [os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for name in ("out", "err")]
    pids = []
    for rank in range(max(job["num_ranks"], 1)):
        pids.append(os.fork())
        if pids[-1] == 0:
            for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), *outputs)):
                os.dup2(file, number)
            os.environ.clear()
            os.environ.update(job["environment"], RANK=str(rank), LOCAL_RANK=str(rank))
            return job["argv"]
    with (folder / "told").open("w") as told:
        print(json.dumps(pids), file=told, flush=True)
        codes: dict[int, int] = {}
        while len(codes) < len(pids):
            pid, status = os.wait()
            if status and not any(codes.values()):
                for other in set(pids) - {pid} - codes.keys():
                    os.kill(other, signal.SIGTERM)
            codes[pid] = os.waitstatus_to_exitcode(status)
        print(json.dumps([codes[pid] for pid in pids]), file=told, flush=True)
    os._exit(0)


def load() -> None:
    """Import what runs need, also what they would on first use."""
    others = ("jsonargparse", "pandas", "pytest", "rich.progress", "sklearn.metrics", "torch._dynamo")
    ours = ("data.build", "data.datasets", "evaluation.plots", "evaluation.report", "train")
    for name in (*others, "torch.utils.tensorboard", *(f"hubert_ecg.{module}" for module in ours)):
        importlib.import_module(name)

    threads = Path("/proc/self/task")
    assert not threads.is_dir() or len(list(threads.iterdir())) == 1


def main(argv: Sequence[str]) -> None:
    if argv[0] == "-m":
        sys.argv = list(argv[1:])
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(argv)
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    load()
    print("ready", flush=True)
    main(serve())
