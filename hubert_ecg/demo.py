"""The main job in one command: from a folder of ECGs, or a generated cohort, to a table and a report."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from hubert_ecg import data, evaluation, train
from hubert_ecg.config import DemoConfig, EvaluateConfig, FinetuneConfig, PretrainConfig, UserError
from hubert_ecg.train.evaluate import Assessment, assess, example, examples, versions

# Chosen so that two cores finish within the README's time, and the comparison shows what pretraining is for.
PRETRAIN: dict[str, Any] = {
    "size": "tiny",
    "max_steps": 260,
    "batch_size": 32,
    "learning_rate": 2e-3,
    "mask_prob": 0.33,
}
FINETUNE: dict[str, Any] = {
    "batch_size": 32,
    "learning_rate": 1e-3,
    "freeze_extractor": False,
    "patience": 0,
    "num_crops": 2,
}
ALL_LABELS_STEPS = 120
FEW_LABELS_STEPS = 80
FEW_LABELS_SHARE = 0.1
_PREFERRED_TASKS = ("diag_superclass", "all")


def demo(config: DemoConfig) -> Path:
    """Run the demo command. Returns the path of the report.

    Raises:
        UserError: the data cannot be read, or has no such task.
    """
    console = Console()
    started = time.monotonic()
    folder = Path(config.output_dir)
    source: dict[str, Any] = {
        "data_path": config.data_path,
        "dataset": "auto" if config.data_path else "synthetic",
        "sampling_rate": config.sampling_rate,
        "lead_names": config.lead_names,
    }
    store = data.open_store(**source)
    task = choose_task(store, config.task)
    console.print(f"{len(store)} records of {store.dataset}; task: {task or 'none, there are no labels'}")

    console.rule("pretraining, without labels")
    source |= {"data_path": store.path, "dataset": store.dataset, "seed": config.seed}
    pretrained = train.pretrain(
        PretrainConfig(**source, **PRETRAIN, output_dir=folder, num_epochs=10**6, validate_every=130, log_every=20)
    )
    clusters = json.loads(Path(pretrained["clusters"]).read_text())
    page: dict[str, Any] = {
        "title": f"HuBERT-ECG on {store.dataset}",
        "cluster_counts": clusters["counts"],
        "cluster_scores": clusters["scores"],
        "facts": {
            "Data": {"source": store.dataset, "records": len(store), "task": task},
            "Pretraining": PRETRAIN | pretrained["metrics"],
            "Versions": versions(),
        },
        "skipped": store.skipped,
    }
    history = {"Pretraining": pretrained["metrics_csv"]}
    pictures: dict[str, Any] = {"ecgs": [example(store[i]) for i in range(min(3, len(store)))]}

    if task is not None:
        runs, history["Fine-tuning, all labels"] = _finetune_and_compare(config, source, task, pretrained["model"])
        found = next(iter(runs.values()))
        results = {name: run.result for name, run in runs.items()}
        page |= {"evaluation": found.result, "runs": results}
        pictures = {"ecgs": examples(found), "targets": found.targets, "scores": found.scores}
        console.print(found.result.table(f"{store.dataset} {task}, held-out records"))
        console.print(evaluation.compare_table(results, "What pretraining gives"))
    else:
        for name, value in pretrained["metrics"].items():
            console.print(f"{name:<20}{value:.4g}")
    page["facts"]["Demo"] = {"minutes": (time.monotonic() - started) / 60, "seed": config.seed}
    evaluation.write_json(folder / "report.json", **page)
    report = evaluation.write_report(folder / "report.html", **page, **pictures, history=history)
    console.print(f"report: {report}   ({(time.monotonic() - started) / 60:.1f} minutes)", soft_wrap=True)
    return report


def choose_task(store: data.Store, wanted: str | None) -> str | None:
    """The task to fine-tune for: the wanted one, else a preferred one, else the first; None without labels."""
    if wanted is not None and wanted not in store.tasks:
        raise UserError(f"{store.dataset} has no task {wanted!r}; its tasks: {', '.join(store.tasks) or 'none'}")
    return wanted or next((t for t in (*_PREFERRED_TASKS, *store.tasks) if t in store.tasks), None)


def _finetune_and_compare(
    config: DemoConfig, source: dict[str, Any], task: str, pretrained: Path
) -> tuple[dict[str, Assessment], Path]:
    """Fine-tunes with all labels, and with few labels from pretrained and from random weights at equal steps."""
    few = f"{FEW_LABELS_SHARE:.0%} of labels"
    plans = {
        "pretrained, all labels": (str(pretrained), 1.0, ALL_LABELS_STEPS),
        f"pretrained, {few}": (str(pretrained), FEW_LABELS_SHARE, FEW_LABELS_STEPS),
        f"random weights, {few}": ("random:tiny", FEW_LABELS_SHARE, FEW_LABELS_STEPS),
    }
    runs, histories = {}, []
    for name, (weights, share, steps) in plans.items():
        Console().rule(f"fine-tuning: {name}, {steps} steps")
        labelled = source | {"task": task}
        done = train.finetune(
            FinetuneConfig(
                **labelled,
                **FINETUNE,
                pretrained_model=weights,
                label_share=share,
                max_steps=steps,
                num_epochs=10**6,
                validate_every=steps // 4,
                log_every=20,
                output_dir=Path(config.output_dir) / name.replace(", ", "-").replace(" ", "_").replace("%", "_percent"),
            )
        )
        histories.append(done["metrics_csv"])
        runs[name] = assess(EvaluateConfig(**labelled, model_path=str(done["model"])))
    return runs, histories[0]
