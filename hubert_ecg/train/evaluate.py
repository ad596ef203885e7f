"""The evaluate command: a fine-tuned model, records it has not seen, numbers with intervals, a page."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console

from hubert_ecg import __version__, data, evaluation
from hubert_ecg.config import EvaluateConfig, UserError, to_json
from hubert_ecg.models import HubertECGForClassification
from hubert_ecg.train import distributed
from hubert_ecg.train.logs import say
from hubert_ecg.train.predict import predict
from hubert_ecg.train.records import open_records

if TYPE_CHECKING:
    from hubert_ecg.data import Record, Store
    from hubert_ecg.evaluation import EcgExample, Evaluation

_NUM_EXAMPLES = 3


@dataclasses.dataclass(frozen=True)
class Assessment:
    """Scores of a model on labelled records, and what they are worth.

    Args:
        store: Where the records are.
        records: ``[N] int64`` positions in the store.
        targets: ``[N, C] float32``.
        scores: ``[N, C] float32``.
        label_names: C names.
        result: Metrics with intervals.
    """

    store: Store
    records: np.ndarray
    targets: np.ndarray
    scores: np.ndarray
    label_names: tuple[str, ...]
    result: Evaluation


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Run the evaluate command: a table, and ``report.html``, ``report.json`` and predictions in the output folder.

    Under torchrun, each process scores a share of the records, and the first one writes.

    Raises:
        UserError: the model or the data cannot be read, or do not fit together.
    """
    with distributed.ranks(config.device) as (_, rank, _):
        found = assess(config)
        if rank == 0:
            _write(config, found)
    return found.result


def _write(config: EvaluateConfig, found: Assessment) -> None:
    base = Path(config.model_path).expanduser()
    base = base if base.is_dir() else base.with_suffix("")
    folder = Path(config.output_dir) if config.output_dir else base / config.test_split
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{config.dataset} {config.task}: {config.test_split}"
    unlabelled = {"keep": "kept as negatives", "drop": "left out"}[config.unlabelled]
    names, counts = np.unique(found.store.datasets[found.records], return_counts=True)
    sources = [f"{count} of {name}" for name, count in zip(names, counts, strict=True)]
    page: dict[str, Any] = {
        "title": title,
        "evaluation": found.result,
        "facts": {
            "Data": {
                "source": found.store.dataset if len(sources) == 1 else ", ".join(sources),
                "records": len(found.records),
                "records without a label of the task": unlabelled,
                "splits": str(config.splits_from) if config.splits_from else found.store.splits,
            },
            "Settings": to_json(config),
            "Versions": versions(),
        },
        "skipped": found.store.skipped,
    }
    ids = found.store.column("record_id")[found.records]
    predictions = folder / f"predictions.{config.predictions_format}"
    evaluation.write_predictions(predictions, ids, found.label_names, found.scores, found.targets)
    evaluation.write_json(folder / "report.json", **page)
    history = base / "metrics.csv"
    evaluation.write_report(
        folder / "report.html",
        **page,
        ecgs=examples(found),
        history=history if history.is_file() else None,
        targets=found.targets,
        scores=found.scores,
    )
    Console().print(found.result.table(title))
    say(f"evaluate: report.html, report.json and {predictions.name} in {folder}")


def assess(config: EvaluateConfig) -> Assessment:
    """Score the records of a split and measure the scores; nothing is written.

    Raises:
        UserError: the model or the data cannot be read, or do not fit together.
    """
    data.check_task(config.dataset, config.data_path, config.task)
    model = HubertECGForClassification.from_pretrained(config.model_path)
    shape = model.config
    if config.threshold is not None and shape.problem != "multilabel":
        raise UserError(f"evaluate: threshold is for multilabel models, got {config.threshold:g} for {shape.problem}")
    with distributed.rank_0_first():
        store = open_records(config, round(500 / shape.sampling_rate_hz), shape.compat)
    records, targets = labelled_records(store, model, config)
    scores = predict(
        model,
        store,
        records,
        batch_size=config.batch_size,
        num_crops=config.num_crops or shape.extra.get("num_crops", 3),
        crop_s=shape.extra.get("crop_s", 5.0),
        device=config.device,
        num_workers=config.num_workers,
    )
    patients = store.column("patient_id")[records]
    result = evaluation.evaluate(
        targets,
        scores,
        model.label_names,
        shape.problem,
        groups=patients if all(patient == patient and patient is not None for patient in patients) else None,
        thresholds=config.threshold if config.threshold is not None else shape.thresholds,
        num_bootstrap=config.num_bootstrap,
        confidence=config.confidence,
        seed=config.seed,
    )
    return Assessment(store, records, targets, scores, model.label_names, result)


def versions() -> dict[str, str]:
    """What a report says it was made with."""
    return {"hubert-ecg": __version__, "torch": torch.__version__, "python": platform.python_version()}


def labelled_records(
    store: Store, model: HubertECGForClassification, config: EvaluateConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Positions ``[N]`` of the records to evaluate on, and their targets ``[N, C]`` in the model's order of labels.

    Raises:
        UserError: no record, or no label that both the model and the data know.
    """
    known, names = store.label_names(config.task), model.label_names
    common = [name for name in names if name in known]
    if not common:
        raise UserError(
            f"the model's labels ({', '.join(names[:5])}, ...) do not occur in {config.dataset} {config.task} "
            f"({', '.join(known[:5])}, ...): is it a model for another task?"
        )
    unknown = [name for name in known if name not in names]
    if unknown:
        say(f"evaluate: the model does not know {', '.join(unknown)}")
    all_targets = store.targets(config.task)
    targets = np.zeros((len(store), len(names)), dtype=np.float32)
    targets[:, [names.index(name) for name in common]] = all_targets[:, [known.index(name) for name in common]]
    records = store.split(config.test_split)
    # A data set without the task says nothing of its records.
    records = records[np.isfinite(all_targets[records]).all(1)]
    if model.config.problem == "multiclass":
        records = records[targets[records].sum(1) == 1]
    elif config.unlabelled == "drop":
        records = records[all_targets[records].sum(1) > 0]
    if len(records) == 0:
        raise UserError(f"{config.dataset} has no {config.test_split} record for the task {config.task}")
    return records, targets[records]


def examples(found: Assessment) -> list[EcgExample]:
    """A few recordings to show: each next one is the first with a label that was not shown yet."""
    shown: set[str] = set()
    chosen: list[EcgExample] = []
    for position, target, score in zip(found.records, found.targets, found.scores, strict=True):
        labels = {name for name, value in zip(found.label_names, target, strict=True) if value == 1}
        if len(chosen) == _NUM_EXAMPLES or not labels - shown:
            continue
        shown |= labels
        record = found.store[int(position)]
        probabilities = dict(zip(found.label_names, score.tolist(), strict=True))
        chosen.append(example(record, sorted(labels), probabilities))
    return chosen


def example(record: Record, labels: Sequence[str] = (), probabilities: Mapping[str, float] | None = None) -> EcgExample:
    """A record of a store as the report shows it."""
    return evaluation.EcgExample(
        record.record_id,
        record.signal,
        record.sampling_rate_hz,
        record.lead_names,
        labels,
        probabilities or {},
        unit="scaled",
    )
