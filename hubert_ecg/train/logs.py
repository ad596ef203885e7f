"""What a run says: a CSV file, TensorBoard events, a progress bar or plain lines, Weights & Biases if asked."""

from __future__ import annotations

import csv
import importlib.util
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hubert_ecg.config import UserError
from hubert_ecg.data.progress import SECONDS_BETWEEN_LINES, clock
from hubert_ecg.files import naming, replacing
from hubert_ecg.train import distributed


class MetricsFile:
    """The CSV log: one row per training interval or validation, empty where a column does not apply.

    Args:
        path: The .csv file.
        columns: Header.
        last_step: Continue the file, dropping the rows of later steps (a killed run logs further than its last
            checkpoint reaches). None starts a new file.
    """

    def __init__(self, path: Path, columns: Sequence[str], last_step: int | None = None) -> None:
        self.path = path
        self.columns = tuple(columns)
        kept: list[dict[str, str]] = []
        if last_step is not None and path.is_file():
            text = path.read_text(encoding="utf-8")
            # A killed run may leave half a row at the end.
            whole = text[: text.rfind("\n") + 1]
            kept = [row for row in csv.DictReader(whole.splitlines()) if int(row["step"]) <= last_step]
        with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, self.columns, lineterminator="\n")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; it is on disk for other readers when this returns."""
        with naming(self.path):
            self._writer.writerow({key: _text(value) for key, value in row.items()})
            self._file.flush()

    def close(self) -> None:
        with naming(self.path):
            self._file.close()


class Logs:
    """All logs of a run. Use as a context manager.

    Args:
        folder: Where metrics.csv and the TensorBoard events go.
        columns: Header of the CSV file.
        total_steps: Optimiser steps of the whole run.
        last_step: Step that a resumed run continues from; None for a new run.
        title: What the progress bar says.
        wandb: Also log to Weights & Biases, under this configuration; None does not.
    """

    def __init__(
        self,
        folder: Path,
        columns: Sequence[str],
        total_steps: int,
        *,
        last_step: int | None = None,
        title: str = "train",
        wandb: Mapping[str, Any] | None = None,
    ) -> None:
        # Imported on use: TensorBoard takes a second to load.
        from torch.utils.tensorboard import SummaryWriter

        self.console = Console(soft_wrap=True)
        self.total_steps = total_steps
        folder.mkdir(parents=True, exist_ok=True)
        if last_step is None:
            for events in folder.glob("events.out.tfevents.*"):
                events.unlink()
        self.file = MetricsFile(folder / "metrics.csv", columns, last_step)
        self._board = SummaryWriter(str(folder), purge_step=None if last_step is None else last_step + 1)
        self._wandb = None if wandb is None else start_wandb(folder, title, wandb)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[news]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._bar = self._progress.add_task(title, total=total_steps, completed=last_step or 0, news="")
        self._title = title
        self._started = (time.monotonic(), last_step or 0)
        self._last_line = -math.inf

    def __enter__(self) -> Logs:
        if self.console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._progress.stop()
        self.file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)

    def say(self, line: str) -> None:
        """Print one line, above the progress bar where there is one."""
        say(line, self.console)

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        self._progress.update(self._bar, completed=step)

    def row(self, row: Mapping[str, Any]) -> None:
        """Log one row everywhere. It holds at least step, epoch and split."""
        self.file.write(row)
        step, split = int(row["step"]), row["split"]
        numbers = {
            f"{split}/{key}": float(value)
            for key, value in row.items()
            if key not in ("step", "split") and isinstance(value, (int, float))
        }
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)
        self._print(row)

    def flush(self) -> None:
        """Write the events out; called before each checkpoint."""
        self._board.flush()

    def _print(self, row: Mapping[str, Any]) -> None:
        news = "  ".join(
            f"{key} {value:.4g}"
            for key, value in row.items()
            if isinstance(value, float) and key not in ("epoch", "grad_norm") and not math.isnan(value)
        )
        if row["split"] == "train":
            self._progress.update(self._bar, completed=row["step"], news=news)
            now = time.monotonic()
            # Validation rows are printed always.
            if self.console.is_terminal or now - self._last_line < SECONDS_BETWEEN_LINES:
                return
            self._last_line = now
            news += f"  left {self._remaining(int(row['step']), now)}"
        self.say(f"{self._title}: step {row['step']}/{self.total_steps}  {row['split']}  {news}")

    def _remaining(self, step: int, now: float) -> str:
        since, first = self._started
        return clock((now - since) / max(step - first, 1) * (self.total_steps - step))


class NoLogs:
    """What ranks other than 0 log to."""

    def say(self, line: str) -> None:
        """Say nothing."""

    def advance(self, step: int) -> None:
        """Show nothing."""

    def row(self, row: Mapping[str, Any]) -> None:
        """Keep nothing."""

    def flush(self) -> None:
        """Write nothing."""


def say(line: str, console: Console | None = None) -> None:
    """Print one line as it is; of several ranks, rank 0 alone does."""
    if distributed.rank() == 0:
        (console or Console(soft_wrap=True)).print(line, markup=False, highlight=False)


def check_wandb(wanted: bool) -> None:
    """Fail before the work starts, not after.

    Raises:
        UserError: If Weights & Biases is asked for and not installed.
    """
    if wanted and importlib.util.find_spec("wandb") is None:
        raise UserError("wandb: --wandb needs the wandb package, which is not installed: pip install wandb")


def start_wandb(folder: Path, title: str, config: Mapping[str, Any]) -> Any:
    """Start a Weights & Biases run."""
    check_wandb(True)
    import wandb

    return wandb.init(project="hubert-ecg", name=title, dir=str(folder), config=dict(config))


def _text(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else repr(value)
    return value
