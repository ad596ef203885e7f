"""What a training loop runs on: batches, and an objective over them."""

from __future__ import annotations

import abc
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn


class Batches(Protocol):
    """A source of micro-batches whose order depends on (seed, epoch) alone; `data.Loader` is one.

    Of several ranks, each gets its part of the same batches, and all get equally many; a part may be empty.
    """

    @property
    def num_batches(self) -> int: ...

    def batches(self, epoch: int, start: int = 0) -> Generator[Any, None, None]: ...


class Objective(abc.ABC):
    """What a run optimises and watches.

    Attributes:
        model: The model; what requires a gradient at the start is trained.
        metrics: Columns of the log beside the loss.
        monitor: The validation metric that chooses the best model and stops early.
        higher_is_better: Direction of `monitor`.
    """

    model: nn.Module
    metrics: tuple[str, ...] = ()
    monitor: str = "loss"
    higher_is_better: bool = False

    def train_mode(self) -> None:
        """Put the model into training mode."""
        self.model.train()

    def counts(self, batch: Any, step: int, micro: int) -> Sequence[float] | Tensor:
        """How much a micro-batch counts in each of the P parts of its loss: how many terms that is a mean of.

        Called for all micro-batches of a step before their losses, where there are several or several ranks; the host
        must not wait for the device in it.
        """
        return (len(batch.index),)

    @abc.abstractmethod
    def loss(self, batch: Any, step: int, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of a micro-batch, and further scalars to log. Runs under autocast.

        Returns:
            ``[]``, or ``[P]`` where the loss is a sum of P means over different numbers of terms, see :meth:`counts`;
            and scalars, which count like the first of these means.
        """

    @abc.abstractmethod
    def validate(self, poll: Callable[[], None]) -> dict[str, float]:
        """Metrics on the validation records, `monitor` among them; those of rank 0 count, on all ranks.

        Args:
            poll: To be called between batches, equally often on all ranks; raises when the run shall stop.
        """

    @abc.abstractmethod
    def save_best(self) -> None:
        """Keep the model as it is now: its last validation was the best so far. Called on rank 0."""

    @abc.abstractmethod
    def save_last(self) -> None:
        """Keep the model as it is at the end of the run. Called on rank 0."""

    def state(self) -> dict[str, Any]:
        """What else belongs in the checkpoint."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027 (nothing to do where there is no state)
        """Take up what :meth:`state` gave, before the model's weights are loaded.

        Raises:
            UserError: If the run cannot go on from it.
        """
