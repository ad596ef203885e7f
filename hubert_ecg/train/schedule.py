"""What follows from the number of a step alone, so that a resumed run needs no state for it."""

from __future__ import annotations

import dataclasses

import numpy as np

# Streams of random numbers of a run; masks take the streams 0 (training) and 1 (validation).
DROPOUT, LAYERDROP = 2, 3


def seed_of(*key: int) -> int:
    """A seed that depends on the key alone, so that nothing about it needs to be saved."""
    (seed,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return int(seed)


@dataclasses.dataclass(frozen=True)
class WarmupLinear:
    """Rise linearly to the peak, then fall linearly to the 0 that would follow the last step.

    With W = round(warmup * total_steps) warm-up steps, step k = 0 ... total_steps - 1 has

        peak * (k + 1) / (W + 1)                          for k < W
        peak * (total_steps - k) / (total_steps - W)      from W on

    No step is taken at learning rate 0: neither the first nor the last one is wasted.

    Args:
        peak: Learning rate of step W.
        total_steps: Optimiser steps of the whole run.
        warmup: Share of the steps over which the rate rises, in [0, 1).
    """

    peak: float
    total_steps: int
    warmup: float = 0.08

    def __post_init__(self) -> None:
        if self.total_steps < 1:
            raise ValueError(f"schedule: total_steps must be at least 1, got {self.total_steps}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"schedule: warmup must be a share in [0, 1), got {self.warmup}")
        if not self.peak > 0:
            raise ValueError(f"schedule: learning_rate must be positive, got {self.peak}")

    @property
    def warmup_steps(self) -> int:
        """Steps below the peak at the start."""
        return min(round(self.warmup * self.total_steps), self.total_steps - 1)

    def __call__(self, step: int) -> float:
        """Learning rate of the step with this number, counted from 0.

        Raises:
            ValueError: If the run has no such step.
        """
        if not 0 <= step < self.total_steps:
            raise ValueError(f"schedule: step must be in [0, {self.total_steps}), got {step}")
        rising = self.warmup_steps
        if step < rising:
            return self.peak * (step + 1) / (rising + 1)
        return self.peak * (self.total_steps - step) / (self.total_steps - rising)
