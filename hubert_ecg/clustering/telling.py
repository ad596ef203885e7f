"""What a fit says while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from hubert_ecg.clustering.lloyd import Told
from hubert_ecg.clustering.points import Points


@contextlib.contextmanager
def telling(
    points: Points, verbose: bool, num_starts: int, max_iter: int, progress: Told | None
) -> Iterator[Told | None]:
    """What is to be told of each iteration goes to ``progress``, and with ``verbose`` to standard error.

    A terminal shows how far the pass over the points is, and the inertia; elsewhere there is a line per iteration.
    """
    if not verbose or points.ranks.rank:
        yield progress
        return
    console = Console(stderr=True, soft_wrap=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    starts = 0

    def told(iteration: int, inertia: float) -> None:
        nonlocal starts
        starts += iteration == 1
        line = f"k-means: start {starts} of {num_starts}, iteration {iteration} of {max_iter}, inertia {inertia:.6g}"
        if console.is_terminal:
            bar.update(task, description=line)
        else:
            console.print(line, markup=False, highlight=False)
        if progress is not None:
            progress(iteration, inertia)

    with bar:
        task = bar.add_task("k-means: first centres", total=points.num_rows)
        points.on_rows = lambda num_rows: bar.update(task, completed=num_rows)
        try:
            yield told
        finally:
            points.on_rows = None
