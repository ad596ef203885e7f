"""The training loop: what pretraining and fine-tuning share, and nothing of either.

A step is an optimiser step; the batches accumulated in it are micro-batches. Everything is counted in steps. What
follows a checkpoint is a pure function of it and of the settings, so a run that was killed and resumed ends with the
same weights, bit for bit (on a CPU in float32).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import platform
import signal
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hubert_ecg import __version__
from hubert_ecg.config import FinetuneConfig, PretrainConfig, RunError, to_json
from hubert_ecg.files import write_json
from hubert_ecg.models.encoder import Encoder
from hubert_ecg.models.hubert_ecg import Backbone
from hubert_ecg.train import distributed, sharded_checkpoint, throughput
from hubert_ecg.train.logs import Logs, NoLogs, say
from hubert_ecg.train.machine import autocast
from hubert_ecg.train.objective import Batches, Objective
from hubert_ecg.train.optimiser import adamw, load_moments
from hubert_ecg.train.parallel import Parallel
from hubert_ecg.train.regularisation import DynamicRegularisation
from hubert_ecg.train.resuming import check_same
from hubert_ecg.train.schedule import DROPOUT, LAYERDROP, WarmupLinear, seed_of
from hubert_ecg.train.stopping import Interrupted, StopAskedError, StopSignals

_COLUMNS = ("step", "epoch", "split", "loss")
_RATES = ("lr", "grad_norm", *throughput.COLUMNS)
# Later than any step: no loss was bad so far.
_NEVER = 2**62


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
        batches: Training micro-batches, each with an `index [B]` of its records; those of this rank.
        folder: Where checkpoint.safetensors (of a sharded model: checkpoint/) and the logs go.
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
        self.parallel = Parallel(config, objective, device, dtype)
        self.checkpoint_path = folder / ("checkpoint" if self.parallel.sharded else "checkpoint.safetensors")
        self.parameters = {n: p for n, p in objective.model.named_parameters() if p.requires_grad}
        self.optimiser = adamw(self.parameters, config.weight_decay, betas, eps)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.regularisation = None
        if config.dynamic_regularisation:
            self.regularisation = DynamicRegularisation(objective.model, self.optimiser, config.patience)
        self.encoders = [module for module in objective.model.modules() if isinstance(module, Encoder)]
        for encoder in self.encoders:
            encoder.gradient_checkpointing = config.activation_checkpointing
        for module in objective.model.modules():
            if config.compile and isinstance(module, Backbone):
                module.compile_layers()
        self.rank, self.num_ranks = distributed.rank(), distributed.num_ranks()
        self.gradients = self.parallel.gradient_sum(self.parameters.values())
        self.progress = Progress()
        self.interval = throughput.Interval(device, dtype)
        self._flops_per_record: int | None = None
        self._bad_step = torch.full((), _NEVER, dtype=torch.int64, device=device)
        # Records of the steps whose losses have not been looked at yet.
        self._unseen: list[tuple[int, np.ndarray]] = []
        self._signals = StopSignals()

    def run(self) -> Progress:
        """Train to the end, or to the signal that stops it.

        Raises:
            Interrupted: After SIGINT or SIGTERM, once a checkpoint is written.
            RunError: If a loss or gradient is not finite, with the records of its batch.
            UserError: If the run cannot be resumed as asked.
        """
        try:
            return self._run()
        except distributed.RankLostError as error:
            saved = sharded_checkpoint.find(self.folder)
            kept = f"continue with --resume from {saved}" if saved else "there is no checkpoint yet"
            step = f"{self.progress.step}/{self.total_steps}"
            raise RunError(f"{self.title}: after step {step}, {error}; {kept}") from error

    def _run(self) -> Progress:
        resumed, news = self._resume()
        if self.progress.finished:
            say(news)
            return self.progress
        with contextlib.ExitStack() as stack:
            self.logs: Logs | NoLogs = NoLogs()
            if self.rank == 0:
                self._write_settings()
                columns = (*_COLUMNS, *self.objective.metrics, *_RATES)
                wandb = to_json(self.config) if self.config.wandb else None
                last_step = self.progress.step if resumed else None
                logs = Logs(self.folder, columns, self.total_steps, last_step=last_step, title=self.title, wandb=wandb)
                self.logs = stack.enter_context(logs)
            stack.enter_context(self._signals.heard())
            if news:
                self.logs.say(news)
            try:
                self._train()
                self._signals.finish()
            except StopAskedError:
                self._save()
                name = signal.Signals(self._signals.asked).name
                self.logs.say(
                    f"{self.title}: stopped by {name} after step {self.progress.step}/{self.total_steps}; "
                    f"continue with --resume from {self.checkpoint_path}"
                )
                # The end of one rank is the end of all: not before rank 0 has written.
                distributed.agreed(None)
                raise Interrupted(128 + self._signals.asked) from None
        return self.progress

    def _train(self) -> None:
        self.objective.train_mode()
        self.interval.start()
        # Stopped between a step and its validation: what was left to do after it comes first.
        if self._validate_if_due():
            self._keep(validated=True)
        while not self.progress.finished:
            epoch, steps_done = divmod(self.progress.step, self.steps_per_epoch)
            source = self.batches.batches(epoch, start=steps_done * self.config.accumulate_steps)
            with contextlib.closing(_groups(source, self.config.accumulate_steps)) as groups:
                for group in self._awaited(groups):
                    self._step(group)
                    self._after_step()
                    if self.progress.finished:
                        return

    def _awaited(self, groups: Iterable[list[Any]]) -> Iterator[list[Any]]:
        """The groups, with a watch on how long each let the loop wait."""
        groups, began = iter(groups), time.monotonic()
        for group in groups:
            self.interval.waited += time.monotonic() - began
            yield group
            began = time.monotonic()

    def _step(self, group: Sequence[Any]) -> None:
        step = self.progress.step
        lr = self.schedule(step)
        for parameters in self.optimiser.param_groups:
            parameters["lr"] = lr
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        self.optimiser.zero_grad(set_to_none=True)
        for micro, (batch, share) in enumerate(zip(group, self._shares(group), strict=True)):
            self._seed(step, micro)
            with autocast(self.device, self.dtype):
                loss, metrics = self.objective.loss(batch, step, micro)
            if len(batch.index) == 0:
                # Means over nothing; this rank still takes its part in the collectives of the backward pass.
                loss, metrics = loss.nan_to_num(), {name: value.nan_to_num() for name, value in metrics.items()}
            loss = (loss * share).sum()
            self.interval.add({"loss": loss})
            # Tensor ranks count a micro-batch once each, and their gradients are those of one.
            loss = loss * self.config.tensor_ranks
            last = micro + 1 == len(group)
            with self.gradients.last_backward(self._dropped()) if last else contextlib.nullcontext():
                self.scaler.scale(loss).backward()
            finite &= loss.detach().isfinite()
            self.interval.add(metrics, share[0])
        self.scaler.unscale_(self.optimiser)
        norm = self.parallel.clip(self.parameters.values(), self.config.clip_norm)
        if not self.scaler.is_enabled():
            # The scaler skips a step whose gradient overflows, and mends the cause. Without one nothing would mend it:
            # the step is skipped on the device, and the run ends as soon as the host looks.
            finite &= norm.isfinite()
            self.optimiser.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self.interval.add({"grad_norm": norm}, 1 / self.num_ranks)
        records = np.concatenate([np.asarray(batch.index) for batch in group])
        self._unseen.append((step + 1, records))
        self._bad_step = torch.where(finite, self._bad_step, self._bad_step.clamp_max(step + 1))
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.progress.step = step + 1
        self.interval.num_steps += 1
        self.interval.num_records += len(records) / self.config.tensor_ranks
        if self._flops_per_record is None and hasattr(group[0], "ecg"):
            num_samples = group[0].ecg.shape[1:].numel()
            self._flops_per_record = throughput.training_flops(self.objective.model, num_samples)

    def _shares(self, group: Sequence[Any]) -> Tensor:
        """What each part of the loss of each micro-batch counts in the step: ``[micro-batches, P]``, P or 1 columns.

        The step's loss is then the mean over all its terms, however they are spread over micro-batches and ranks.
        """
        if len(group) == self.num_ranks == 1:
            return torch.ones(1, 1, device=self.device)
        counts = []
        for micro, batch in enumerate(group):
            found = torch.as_tensor(self.objective.counts(batch, self.progress.step, micro))
            counts.append(found.to(self.device, torch.float32, non_blocking=True))
        mine = torch.stack(counts)
        # Divided on the device, so that the host need not wait for what the others have.
        total = distributed.add_up(mine.sum(0))
        return mine / torch.where(total > 0, total, 1)

    def _seed(self, step: int, micro: int) -> None:
        """Random numbers follow from the place of a micro-batch in the run: dropout's on each rank, LayerDrop's on all.

        Nothing about them needs to be saved, whatever the number of ranks that go on.
        """
        torch.manual_seed(seed_of(self.config.seed, DROPOUT, step, micro, distributed.data_rank()))
        for encoder in self.encoders:
            encoder.layerdrop_seed = seed_of(self.config.seed, LAYERDROP, step, micro)

    def _dropped(self) -> Iterator[nn.Parameter]:
        return itertools.chain.from_iterable(encoder.dropped_parameters() for encoder in self.encoders)

    def _after_step(self) -> None:
        """Log, validate, write a checkpoint, stop: in this order, so that a checkpoint has all rows up to its step."""
        step = self.progress.step
        if step % self.config.log_every == 0 or step == self.total_steps:
            self._log()
        self.logs.advance(step)
        self._signals.poll()
        self._keep(validated=self._validate_if_due())

    def _keep(self, validated: bool) -> None:
        """Write what is due after a step and its validation."""
        step, progress = self.progress.step, self.progress
        if step == self.total_steps:
            progress.finished = progress.finished or "all steps are taken"
        if progress.finished:
            with self.parallel.portable():
                if self.rank == 0:
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
        with torch.no_grad(), autocast(self.device, self.dtype), self.parallel.gathered():
            metrics = distributed.agreed(self.objective.validate(self._signals.poll))
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
            with self.parallel.portable():
                if self.rank == 0:
                    self.objective.save_best()
        if self.regularisation is not None:
            self.regularisation.after_validation(progress.bad_validations)
        self.logs.row({"step": step, "epoch": self._epoch(), "split": "validation", **metrics})
        if self.config.patience and progress.bad_validations >= self.config.patience:
            progress.finished = f"{progress.bad_validations} validations without a better {self.objective.monitor}"
        self.interval.since += time.monotonic() - began
        return True

    def _epoch(self) -> float:
        return round(self.progress.step / self.steps_per_epoch, 4)

    def _log(self) -> None:
        self._check_finite()
        step = self.progress.step
        row = {"step": step, "epoch": self._epoch(), "split": "train", "lr": self.schedule(step - 1)}
        self.logs.row(row | self.interval.end(self._flops_per_record or 0))

    def _check_finite(self) -> None:
        """Look whether any rank met a loss that is not finite: the host waits for the device here.

        Raises:
            RunError: On rank 0, if one did; the others end silently.
        """
        bad_step = int(distributed.lowest(self._bad_step))
        if bad_step < _NEVER:
            mine = [records for step, records in self._unseen if step == bad_step]
            records = np.concatenate([found for rank in distributed.gather_parts(mine) for found in rank])
            if self.rank > 0:
                raise SystemExit(1)
            names = ", ".join(str(name) for name in self.record_names(records))
            kept = sharded_checkpoint.find(self.folder) or "none yet"
            raise RunError(
                f"{self.title}: the loss or its gradient is not finite at step {bad_step}, on the batch of records "
                f"{names}; look at these records, or try a lower --learning_rate or --precision float32 "
                f"(last checkpoint: {kept})"
            )
        self._unseen.clear()

    def _save(self) -> None:
        self._check_finite()
        interval = self.interval.state()
        if self.rank > 0 and not self.parallel.sharded:
            return
        self.logs.flush()
        progress = self.progress
        epoch, steps_done = divmod(progress.step, self.steps_per_epoch)
        state = {
            "progress": dataclasses.asdict(progress),
            "epoch": epoch,
            "position": steps_done * self.config.accumulate_steps,
            "total_steps": self.total_steps,
            "config": to_json(self.config),
            "num_ranks": distributed.num_data_ranks(),
            "data_key": self.data_key,
            "model": self.objective.model.state_dict(),
            "optimiser": {name: self.optimiser.state[p] for name, p in self.parameters.items()},
            "scaler": self.scaler.state_dict(),
            "regularisation": None if self.regularisation is None else self.regularisation.state(),
            "interval": interval,
            "objective": self.objective.state(),
        }
        sharded_checkpoint.save(self.checkpoint_path, state)

    def _resume(self) -> tuple[bool, str]:
        """Take up the last checkpoint if that is asked for: whether it was, and what to tell the user."""
        # Asked of one rank before it moves the file away.
        path = distributed.agreed(sharded_checkpoint.find(self.folder))
        if path is None:
            missing = f"{self.title}: no {self.checkpoint_path} to resume from; starting anew"
            return False, missing if self.config.resume else ""
        if not self.config.resume:
            # Never continued by accident later, and not lost either.
            old = sharded_checkpoint.put_away(path)
            return False, f"{self.title}: starting anew; the checkpoint of an earlier run is now {old}"
        state = sharded_checkpoint.load(path, self._layouts())
        check_same(state, self.config, self.data_key, path)
        self.objective.load_state(state["objective"])
        self.objective.model.load_state_dict(state["model"])
        load_moments(self.optimiser, self.parameters, state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        if self.regularisation is not None:
            self.regularisation.load_state(state["regularisation"])
        self.interval.load_state(state["interval"])
        progress = self.progress = Progress(**state["progress"])
        if progress.finished:
            return True, f"{self.title}: already finished at step {progress.step} ({progress.finished}); nothing to do"
        return True, f"{self.title}: resumed after step {progress.step}/{self.total_steps} from {path}"

    def _layouts(self) -> dict[str, Tensor]:
        """Tensors of the model and of the optimiser by their paths in a checkpoint, to be laid out as here."""
        layouts = {f"model/{name}": value for name, value in self.objective.model.state_dict().items()}
        for name, parameter in self.parameters.items():
            layouts |= {f"optimiser/{name}/{moment}": parameter.detach() for moment in ("exp_avg", "exp_avg_sq")}
        return layouts

    def _write_settings(self) -> None:
        """Write settings.json: all that was decided for the run, for people."""
        settings = {
            "config": to_json(self.config),
            "device": str(self.device),
            "precision": str(self.dtype).removeprefix("torch."),
            "steps_per_epoch": self.steps_per_epoch,
            "total_steps": self.total_steps,
            "num_ranks": self.num_ranks,
            "warmup_steps": self.schedule.warmup_steps,
            "trained_parameters": sum(p.numel() for p in self.parameters.values()),
            "versions": {"hubert_ecg": __version__, "torch": torch.__version__, "python": platform.python_version()},
            **self.facts,
        }
        write_json(self.folder / "settings.json", settings)


def _groups(source: Generator[Any, None, None], size: int) -> Generator[list[Any], None, None]:
    # Closed with the epoch, so that readers ahead of it stop too.
    with contextlib.closing(source):
        while group := list(itertools.islice(source, size)):
            yield group
