"""How far long work is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
import time
from types import TracebackType
from typing import Any

# In logs; a bar moves as often as it likes.
SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Shows on standard error how much is done and how long the rest takes, as fast as it goes since this began.

    Args:
        title: What is done.
        total: How much there is.
        done: How much an earlier run has done: it says nothing of the speed.
        shown: False shows nothing.
    """

    def __init__(self, title: str, total: int, done: int = 0, shown: bool = True) -> None:
        self.title, self.total, self.done, self.shown = title, total, done, shown
        self._first, self._began = done, time.monotonic()
        self._last_line, self._last_done = self._began, -1
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self.shown and (out := console()).is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            what = TextColumn("{task.description}", markup=False)
            self._bar = Bar(what, BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[times]}"), console=out)
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.done, times="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.shown and self.done != self._last_done:
            self._print()

    def advance(self, count: int) -> None:
        """So much more is done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, times=self._times())
        elif self.shown and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._print()

    def seconds_left(self) -> float:
        """How long the rest takes at the mean speed since this began; NaN before anything is done."""
        newly = self.done - self._first
        return (time.monotonic() - self._began) / newly * (self.total - self.done) if newly else math.nan

    def _times(self) -> str:
        taken = clock(time.monotonic() - self._began)
        return f"{taken}  left {clock(self.seconds_left())}" if self.done < self.total else taken

    def _print(self) -> None:
        self._last_line, self._last_done = time.monotonic(), self.done
        say(f"{self.title}: {self.done}/{self.total}  {self._times()}")


def clock(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> clock(3725.4), clock(float("nan"))
    ('1:02:05', '?')
    """
    if math.isnan(seconds):
        return "?"
    seconds = round(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def console() -> Any:
    """Standard error."""
    from rich.console import Console

    return Console(stderr=True)


def say(line: str) -> None:
    """One line on standard error, as it is."""
    console().print(line, highlight=False, markup=False, soft_wrap=True)
