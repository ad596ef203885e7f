from __future__ import annotations

import itertools

import pytest

from hubert_ecg.train.schedule import WarmupLinear


@pytest.mark.parametrize("total", [1, 2, 3, 12, 13, 1000])
@pytest.mark.parametrize("warmup", [0.0, 0.08, 0.5, 0.99])
def test_every_step_has_a_positive_rate_and_the_schedule_ends_with_the_run(total, warmup):
    schedule = WarmupLinear(1e-3, total, warmup)
    rates = [schedule(k) for k in range(total)]
    assert min(rates) > 0
    assert max(rates) == 1e-3
    assert rates.index(1e-3) == schedule.warmup_steps
    falling = rates[schedule.warmup_steps :]
    # The rate after the last step would be 0: the last rate is one decrement.
    assert falling[-1] == pytest.approx(1e-3 / len(falling), rel=1e-12)
    assert all(a > b for a, b in itertools.pairwise(falling))
    rising = rates[: schedule.warmup_steps + 1]
    assert all(a < b for a, b in itertools.pairwise(rising))


def test_known_rates():
    schedule = WarmupLinear(6.0, 5, 0.4)
    assert [schedule(k) for k in range(5)] == [2.0, 4.0, 6.0, 4.0, 2.0]


def test_there_is_no_step_beyond_the_end():
    schedule = WarmupLinear(1.0, 3)
    for step in (-1, 3):
        with pytest.raises(ValueError, match=r"step must be in \[0, 3\)"):
            schedule(step)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((1.0, 0, 0.1), "total_steps"), ((1.0, 5, 1.0), "warmup"), ((0.0, 5, 0.1), "learning_rate")],
)
def test_impossible_schedules_name_the_argument(arguments, named):
    with pytest.raises(ValueError, match=named):
        WarmupLinear(*arguments)
