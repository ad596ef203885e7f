"""The training loop: what pretraining and fine-tuning share, and nothing of either.

A step is an optimiser step; the batches accumulated in it are micro-batches. Everything is counted in steps. What
follows a checkpoint is a pure function of it and of the settings, so a run that was killed and resumed ends with the
same weights, bit for bit (on a CPU in float32).
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import itertools
import math
import platform
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from hubert_ecg import __version__
from hubert_ecg.config import FinetuneConfig, PretrainConfig, RunError, UserError, to_json
from hubert_ecg.files import write_json
from hubert_ecg.train import checkpoint
from hubert_ecg.train.logs import Logs, say
from hubert_ecg.train.machine import autocast
from hubert_ecg.train.schedule import WarmupLinear

# Settings that a resumed run may change: they alter neither what is computed nor in which order.
_MAY_DIFFER = frozenset(
    {
        "cache_dir",
        "checkpoint_every",
        "data_path",
        "device",
        "log_every",
        "num_workers",
        "output_dir",
        "resume",
        "wandb",
    }
)
_COLUMNS = ("step", "epoch", "split", "loss")
_RATES = ("lr", "grad_norm", "records_per_s")


class Interrupted(SystemExit):
    """The run was asked to stop, and did so after writing a checkpoint. Ends the process with 128 + signal number."""


class Batches(Protocol):
    """A source of micro-batches whose order depends on (seed, epoch) alone; `data.Loader` is one."""

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

    @abc.abstractmethod
    def loss(self, batch: Any, step: int, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of a micro-batch over its records, and further scalars to log. Runs under autocast."""

    @abc.abstractmethod
    def validate(self, poll: Callable[[], None]) -> dict[str, float]:
        """Metrics on the validation records, `monitor` among them; must not touch a global random generator.

        Args:
            poll: To be called between batches; raises when the run shall stop.
        """

    @abc.abstractmethod
    def save_best(self) -> None:
        """Keep the model as it is now: its last validation was the best so far."""

    @abc.abstractmethod
    def save_last(self) -> None:
        """Keep the model as it is at the end of the run."""

    def state(self) -> dict[str, Any]:
        """What else belongs in the checkpoint."""
        return {}


@dataclasses.dataclass
class Progress:
    """Where a run stands; all of it is in the checkpoint."""

    step: int = 0
    validated_step: int = 0
    best: float | None = None
    best_step: int = 0
    best_metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    bad_validations: int = 0
    finished: str = ""


class Loop:
    """Run an objective over batches.

    Args:
        config: Settings of the run.
        objective: What to optimise.
        batches: Training micro-batches, each with an `index [B]` of its records.
        folder: Where checkpoint.safetensors and the logs go.
        device: Where the model is.
        dtype: What autocast runs in.
        record_names: Names of the records with these indices, for messages; default: the indices.
        data_key: Identifies the records of the run: a resumed one must have the same.
        betas: Decay rates of AdamW.
        eps: Epsilon of AdamW.
        title: Name of the run in messages.
        facts: More to write into settings.json.
    """

    def __init__(
        self,
        config: PretrainConfig | FinetuneConfig,
        objective: Objective,
        batches: Batches,
        *,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        record_names: Callable[[np.ndarray], Sequence[str]] | None = None,
        data_key: str = "",
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        title: str = "train",
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        if batches.num_batches < 1:
            raise ValueError(f"{title}: training needs at least one batch of records, got none")
        self.config = config
        self.objective = objective
        self.batches = batches
        self.folder = folder
        self.checkpoint_path = folder / "checkpoint.safetensors"
        self.device = device
        self.dtype = dtype
        self.record_names = record_names or (lambda index: index.tolist())
        self.data_key = data_key
        self.title = title
        self.facts = dict(facts or {})

        self.steps_per_epoch = -(-batches.num_batches // config.accumulate_steps)
        steps = config.num_epochs * self.steps_per_epoch
        self.total_steps = steps if config.max_steps is None else min(steps, config.max_steps)
        self.schedule = WarmupLinear(config.learning_rate, self.total_steps, config.warmup)
        self.parameters = {n: p for n, p in objective.model.named_parameters() if p.requires_grad}
        self.optimiser = adamw(self.parameters, config.weight_decay, betas, eps, fused=device.type == "cuda")
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.progress = Progress()
        self._bad_step = torch.zeros((), dtype=torch.int64, device=device)
        self._sums: dict[str, Tensor] = {}
        self._num_summed = 0
        self._num_records = 0
        self._since = 0.0
        # Records of the steps whose losses have not been looked at yet.
        self._unseen: list[tuple[int, np.ndarray]] = []
        self._stop_signal = 0

    def run(self) -> Progress:
        """Train to the end, or to the signal that stops it.

        Raises:
            Interrupted: After SIGINT or SIGTERM, once a checkpoint is written.
            RunError: If a loss or gradient is not finite, with the records of its batch.
            UserError: If the run cannot be resumed as asked.
        """
        resumed, news = self._resume()
        if self.progress.finished:
            say(news)
            return self.progress
        self._write_settings()
        columns = (*_COLUMNS, *self.objective.metrics, *_RATES)
        wandb = to_json(self.config) if self.config.wandb else None
        last_step = self.progress.step if resumed else None
        with (
            Logs(
                self.folder, columns, self.total_steps, last_step=last_step, title=self.title, wandb=wandb
            ) as self.logs,
            self._signals(),
        ):
            if news:
                self.logs.say(news)
            try:
                self._train()
            except _StopAskedError:
                self._save()
                name = signal.Signals(self._stop_signal).name
                self.logs.say(
                    f"{self.title}: stopped by {name} after step {self.progress.step}/{self.total_steps}; "
                    f"continue with --resume from {self.checkpoint_path}"
                )
                raise Interrupted(128 + self._stop_signal) from None
        return self.progress

    def _train(self) -> None:
        self.objective.train_mode()
        self._since = time.monotonic()
        # Stopped between a step and its validation: what was left to do after it comes first.
        if self._validate_if_due():
            self._keep(validated=True)
        while not self.progress.finished:
            epoch, steps_done = divmod(self.progress.step, self.steps_per_epoch)
            source = self.batches.batches(epoch, start=steps_done * self.config.accumulate_steps)
            with contextlib.closing(_groups(source, self.config.accumulate_steps)) as groups:
                for group in groups:
                    self._step(group)
                    self._after_step()
                    if self.progress.finished:
                        return

    def _step(self, group: Sequence[Any]) -> None:
        step = self.progress.step
        lr = self.schedule(step)
        for parameters in self.optimiser.param_groups:
            parameters["lr"] = lr
        records = np.concatenate([np.asarray(batch.index) for batch in group])
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        self.optimiser.zero_grad(set_to_none=True)
        for micro, batch in enumerate(group):
            with autocast(self.device, self.dtype):
                loss, metrics = self.objective.loss(batch, step, micro)
            # By records, so that the sum is the mean of one big batch even where the last micro-batch is small.
            share = len(batch.index) / len(records)
            self.scaler.scale(loss * share).backward()
            finite &= loss.detach().isfinite()
            self._add({"loss": loss, **metrics}, share)
        self.scaler.unscale_(self.optimiser)
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip_norm or math.inf)
        if not self.scaler.is_enabled():
            # The scaler skips a step whose gradient overflows, and mends the cause; without one, nothing would.
            finite &= norm.isfinite()
        self._add({"grad_norm": norm}, 1.0)
        self._unseen.append((step + 1, records))
        self._bad_step = torch.where(finite | (self._bad_step > 0), self._bad_step, step + 1)
        if self.device.type == "cpu":
            self._check_finite()
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.progress.step = step + 1
        self._num_summed += 1
        self._num_records += len(records)

    def _after_step(self) -> None:
        """Log, validate, write a checkpoint, stop: in this order, so that a checkpoint has all rows up to its step."""
        step = self.progress.step
        if step % self.config.log_every == 0 or step == self.total_steps:
            self._log()
        self.logs.advance(step)
        self._poll()
        self._keep(validated=self._validate_if_due())
        self._poll()

    def _keep(self, validated: bool) -> None:
        """Write what is due after a step and its validation."""
        step, progress = self.progress.step, self.progress
        if step == self.total_steps:
            progress.finished = progress.finished or "all steps are taken"
        if progress.finished:
            self.objective.save_last()
        if validated or progress.finished or step % self.config.checkpoint_every == 0:
            self._save()

    def _validate_if_due(self) -> bool:
        step, progress = self.progress.step, self.progress
        every = self.config.validate_every or self.steps_per_epoch
        if step == progress.validated_step or (step % every and step != self.total_steps):
            return False
        self._check_finite()
        began = time.monotonic()
        self.objective.model.eval()
        with torch.no_grad(), autocast(self.device, self.dtype):
            metrics = self.objective.validate(self._poll)
        self.objective.train_mode()
        value, best = metrics[self.objective.monitor], progress.best
        first = progress.validated_step == 0
        progress.validated_step = step
        progress.bad_validations += 1
        if not math.isnan(value) and (
            best is None or (value > best if self.objective.higher_is_better else value < best)
        ):
            progress.best, progress.bad_validations = value, 0
        if first or progress.bad_validations == 0:
            progress.best_step, progress.best_metrics = step, metrics
            self.objective.save_best()
        self.logs.row({"step": step, "epoch": self._epoch(), "split": "validation", **metrics})
        if self.config.patience and progress.bad_validations >= self.config.patience:
            progress.finished = f"{progress.bad_validations} validations without a better {self.objective.monitor}"
        self._since += time.monotonic() - began
        return True

    def _poll(self) -> None:
        if self._stop_signal and not self.progress.finished:
            raise _StopAskedError

    def _epoch(self) -> float:
        return round(self.progress.step / self.steps_per_epoch, 4)

    def _add(self, values: Mapping[str, Tensor], share: float) -> None:
        # Stays on the device: the host looks only once in log_every steps.
        for name, value in values.items():
            value = value.detach().float() * share
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def _log(self) -> None:
        self._check_finite()
        means = (torch.stack(list(self._sums.values())) / self._num_summed).tolist()
        step, now = self.progress.step, time.monotonic()
        row = {"step": step, "epoch": self._epoch(), "split": "train", **dict(zip(self._sums, means, strict=True))}
        row["lr"] = self.schedule(step - 1)
        row["records_per_s"] = self._num_records / max(now - self._since, 1e-9)
        self.logs.row(row)
        self._sums = {}
        self._num_summed = self._num_records = 0
        self._since = now

    def _check_finite(self) -> None:
        bad_step = int(self._bad_step)
        if bad_step:
            records = next(records for step, records in self._unseen if step == bad_step)
            names = ", ".join(str(name) for name in self.record_names(records))
            kept = self.checkpoint_path if self.checkpoint_path.is_file() else "none yet"
            raise RunError(
                f"{self.title}: the loss or its gradient is not finite at step {bad_step}, on the batch of records "
                f"{names}; look at these records, or try a lower --learning_rate or --precision float32 "
                f"(last checkpoint: {kept})"
            )
        self._unseen.clear()

    def _save(self) -> None:
        self._check_finite()
        self.logs.flush()
        progress = self.progress
        epoch, steps_done = divmod(progress.step, self.steps_per_epoch)
        state = {
            "progress": dataclasses.asdict(progress),
            "epoch": epoch,
            "position": steps_done * self.config.accumulate_steps,
            "total_steps": self.total_steps,
            "config": to_json(self.config),
            "data_key": self.data_key,
            "model": self.objective.model.state_dict(),
            "optimiser": {name: self.optimiser.state[p] for name, p in self.parameters.items()},
            "scaler": self.scaler.state_dict(),
            "random": checkpoint.random_state(self.device),
            "interval": {"sums": self._sums, "steps": self._num_summed},
            "objective": self.objective.state(),
        }
        checkpoint.save(self.checkpoint_path, state)

    def _resume(self) -> tuple[bool, str]:
        """Take up the last checkpoint if that is asked for: whether it was, and what to tell the user."""
        path = self.checkpoint_path
        if not path.is_file():
            return False, f"{self.title}: no {path} to resume from; starting anew" if self.config.resume else ""
        if not self.config.resume:
            # Never continued by accident later, and not lost either.
            old = path.replace(path.with_name("checkpoint.old.safetensors"))
            return False, f"{self.title}: starting anew; the checkpoint of an earlier run is now {old}"
        state = checkpoint.load(path)
        checkpoint.check_same(state["config"], to_json(self.config), _MAY_DIFFER, path)
        if state["data_key"] != self.data_key:
            raise UserError(f"resume: the records must be those of {path}, got others; give the same data_path")
        self.objective.model.load_state_dict(state["model"])
        optimiser = self.optimiser.state_dict()
        optimiser["state"] = {i: state["optimiser"][name] for i, name in enumerate(self._optimised_names())}
        self.optimiser.load_state_dict(optimiser)
        self.scaler.load_state_dict(state["scaler"])
        self._sums = {name: value.to(self.device) for name, value in state["interval"]["sums"].items()}
        self._num_summed = state["interval"]["steps"]
        progress = self.progress = Progress(**state["progress"])
        checkpoint.set_random_state(state["random"], self.device)
        if progress.finished:
            return True, f"{self.title}: already finished at step {progress.step} ({progress.finished}); nothing to do"
        return True, f"{self.title}: resumed after step {progress.step}/{self.total_steps} from {path}"

    def _optimised_names(self) -> list[str]:
        """Names of the parameters in the optimiser's own order."""
        names = {parameter: name for name, parameter in self.parameters.items()}
        return [names[parameter] for group in self.optimiser.param_groups for parameter in group["params"]]

    def _write_settings(self) -> None:
        """Write settings.json: all that was decided for the run, for people."""
        settings = {
            "config": to_json(self.config),
            "device": str(self.device),
            "precision": str(self.dtype).removeprefix("torch."),
            "steps_per_epoch": self.steps_per_epoch,
            "total_steps": self.total_steps,
            "warmup_steps": self.schedule.warmup_steps,
            "trained_parameters": sum(p.numel() for p in self.parameters.values()),
            "versions": {"hubert_ecg": __version__, "torch": torch.__version__, "python": platform.python_version()},
            **self.facts,
        }
        write_json(self.folder / "settings.json", settings)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM end the run after the step in hand; a second one ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            self._stop_signal = number
            for asked, handler in before.items():
                signal.signal(asked, handler or signal.SIG_DFL)

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)


class _StopAskedError(Exception):
    """A signal has asked the run to stop."""


def adamw(
    parameters: Mapping[str, nn.Parameter], weight_decay: float, betas: tuple[float, float], eps: float, fused: bool
) -> torch.optim.AdamW:
    """AdamW that decays matrices and kernels only.

    A parameter with at most one axis longer than 1 is a bias, the scale of a norm or the embedding of the mask: pulling
    those to zero is no regularisation.
    """
    matrices = [p for p in parameters.values() if sum(n > 1 for n in p.shape) > 1]
    others = [p for p in parameters.values() if sum(n > 1 for n in p.shape) <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, eps=eps, fused=fused or None)


def _groups(source: Generator[Any, None, None], size: int) -> Generator[list[Any], None, None]:
    # Closed with the epoch, so that readers ahead of it stop too.
    with contextlib.closing(source):
        while group := list(itertools.islice(source, size)):
            yield group
