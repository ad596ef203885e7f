"""How a run is asked to stop, and that it did."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from hubert_ecg.train import distributed


class Interrupted(SystemExit):
    """The run was asked to stop, and did so after writing a checkpoint. Ends the process with 128 + signal number."""


class StopAskedError(Exception):
    """A signal has asked the run to stop."""


class StopSignals:
    """Lets SIGINT and SIGTERM end a run after the step in hand, all ranks after the same one.

    Attributes:
        asked: Number of the signal that stops the run; 0 for none.
    """

    def __init__(self) -> None:
        self.asked = 0
        self._votes = distributed.Votes()

    def poll(self) -> None:
        """Ask whether any rank shall stop; equally often on all of them.

        Raises:
            StopAskedError: If one shall.
        """
        asked = self._votes(self.asked)
        if asked:
            self.asked = asked
            raise StopAskedError

    def finish(self) -> None:
        """Hear what the others have sent, at the end of the run."""
        self._votes.read()

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Signals inside stop the run; a second one ends it at once.

        Of several ranks, each may be told twice, by the terminal or SLURM and by torchrun: that changes nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            self.asked = number
            if distributed.num_ranks() > 1:
                return
            for asked, handler in before.items():
                signal.signal(asked, handler or signal.SIG_DFL)

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        after = before
        try:
            yield
        except distributed.RankLostError:
            # torchrun is about to end this rank, too: not before it has said why.
            after = dict.fromkeys(before, signal.SIG_IGN)
            raise
        finally:
            for number, handler in after.items():
                signal.signal(number, handler or signal.SIG_DFL)
