"""The report: one HTML page that needs nothing beside itself, and the same numbers as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hubert_ecg.evaluation.metrics import Estimate, Evaluation, check_scores
from hubert_ecg.files import replacing

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# Below this many positives a percentile interval says little; the report marks such labels.
_FEW_POSITIVES = 10
_MAX_PROBABILITIES = 6


@dataclasses.dataclass(frozen=True)
class EcgExample:
    """A recording to show in the report.

    Args:
        title: What it is, for instance its record id.
        signal: [L, T] float.
        rate_hz: Sampling rate.
        lead_names: L names. Default: the standard twelve.
        labels: Its true labels.
        probabilities: label -> predicted probability; the highest are shown.
        unit: "mV", or what the samples are in instead ("scaled").
    """

    title: str
    signal: np.ndarray
    rate_hz: float
    lead_names: Sequence[str] | None = None
    labels: Sequence[str] = ()
    probabilities: Mapping[str, float] = dataclasses.field(default_factory=dict)
    unit: str = "mV"


def write_report(
    path: str | Path,
    *,
    title: str,
    evaluation: Evaluation | None = None,
    runs: Mapping[str, Evaluation] | None = None,
    ecgs: Sequence[EcgExample | tuple[Any, ...]] = (),
    history: pd.DataFrame | str | Path | Mapping[str, pd.DataFrame | str | Path] | None = None,
    cluster_counts: np.ndarray | None = None,
    cluster_scores: Mapping[str, float] | None = None,
    targets: np.ndarray | None = None,
    scores: np.ndarray | None = None,
    label_names: Sequence[str] | None = None,
    facts: Mapping[str, Any] | None = None,
    skipped: Sequence[tuple[str, str]] = (),
) -> Path:
    """Write the report as one HTML page without scripts or outside resources. What is not given is not in it.

    Args:
        path: The .html file; it appears whole or not at all.
        title: Heading.
        evaluation: Shown in full.
        runs: name -> evaluation, compared by their macro metrics.
        ecgs: Recordings to draw: :class:`EcgExample`, or tuples of its fields.
        history: Training logs (columns step, split, numbers): a table, a CSV file, or several by name.
        cluster_counts: [K] number of tokens of each cluster.
        cluster_scores: Name -> value of clustering quality.
        targets: [N, C] for ROC and precision-recall curves; with scores and label_names.
        scores: [N, C] float.
        label_names: C names. Default: those of the evaluation.
        facts: Name -> value, or heading -> {name -> value}: data, model, settings, versions.
        skipped: (source, reason) of each record that could not be read.

    Returns:
        The path.
    """
    import jinja2
    from markupsafe import Markup

    from hubert_ecg.evaluation import plots

    path = Path(path)
    examples = [example if isinstance(example, EcgExample) else EcgExample(*example) for example in ecgs]
    num_figures = 0

    def picture(figure: Figure) -> Markup:
        nonlocal num_figures
        num_figures += 1
        return Markup(plots.svg(figure, f"f{num_figures}"))

    curves = []
    if targets is not None and scores is not None:
        names = label_names if label_names is not None else list(evaluation.labels) if evaluation else None
        if names is None:
            raise ValueError("write_report: label_names must be given with targets and scores, got None")
        if evaluation is None or evaluation.problem != "regression":
            problem = "multilabel" if evaluation is None else evaluation.problem
            targets, scores = check_scores("write_report", targets, scores, problem)
            if (targets.any(0) & ~targets.all(0)).any():
                curves = [picture(draw(targets, scores, names)) for draw in (plots.roc_curves, plots.pr_curves)]

    papers = [
        plots.ecg_paper(example.signal, example.rate_hz, example.lead_names or plots.LEADS, unit=example.unit)
        for example in examples
    ]
    # One scale for all: the paper of a short record is narrower than that of a long one.
    widest = max((paper.get_figwidth() for paper in papers), default=1.0)

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": _number, "estimate": _estimate}
    template = resources.files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    html = environment.from_string(template).render(
        title=title,
        evaluation=evaluation,
        runs=_comparable(runs),
        facts=_grouped(facts),
        examples=[
            {
                "title": example.title,
                "labels": list(example.labels),
                "probabilities": _highest(example),
                "share": f"{min(1.0, paper.get_figwidth() / widest):.3f}",
                "picture": picture(paper),
            }
            for example, paper in zip(examples, papers, strict=True)
        ],
        histories=[(name, picture(plots.training_curves(of))) for name, of in _histories(history).items()],
        cluster_picture=None if cluster_counts is None else picture(plots.cluster_use(cluster_counts)),
        cluster_scores=dict(cluster_scores or {}),
        curves=curves,
        skipped=list(skipped),
        few_positives=_FEW_POSITIVES,
    )
    with replacing(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return path


def write_json(
    path: str | Path,
    *,
    title: str,
    evaluation: Evaluation | None = None,
    runs: Mapping[str, Evaluation] | None = None,
    cluster_counts: np.ndarray | None = None,
    cluster_scores: Mapping[str, float] | None = None,
    facts: Mapping[str, Any] | None = None,
    skipped: Sequence[tuple[str, str]] = (),
) -> Path:
    """Write the report's numbers as strict JSON: an undefined number is null. Arguments as for :func:`write_report`."""
    from hubert_ecg.evaluation.plots import perplexity

    path = Path(path)
    content: dict[str, Any] = {"title": title}
    if evaluation is not None:
        content["evaluation"] = evaluation.to_json()
    if runs:
        content["runs"] = {name: run.to_json() for name, run in runs.items()}
    if cluster_counts is not None:
        content["cluster_counts"] = np.asarray(cluster_counts)
        content["cluster_perplexity"] = perplexity(cluster_counts)
    if cluster_scores:
        content["cluster_scores"] = dict(cluster_scores)
    if facts:
        content["facts"] = dict(facts)
    if skipped:
        content["skipped"] = [{"source": source, "reason": reason} for source, reason in skipped]
    with replacing(path) as temporary:
        text = json.dumps(_plain(content), indent=2, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")
    return path


def _comparable(runs: Mapping[str, Evaluation] | None) -> dict[str, Evaluation]:
    runs = dict(runs or {})
    metrics = [run.metrics for run in runs.values()]
    if any(other != metrics[0] for other in metrics):
        problems = sorted({run.problem for run in runs.values()})
        raise ValueError(f"write_report: runs must be of one kind of problem, got {problems}")
    return runs


def _grouped(facts: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Facts under headings; those without one come first."""
    grouped: dict[str, dict[str, Any]] = {}
    for name, value in (facts or {}).items():
        if isinstance(value, Mapping):
            grouped.setdefault(name, {}).update(value)
        else:
            grouped.setdefault("", {})[name] = value
    return dict(sorted(grouped.items(), key=lambda item: item[0] != ""))


def _histories(history: Any) -> dict[str, pd.DataFrame]:
    """Training logs by name. A log without a row, of a run that ended before its first, is left out."""
    import pandas as pd

    if history is None:
        return {}
    named = history if isinstance(history, Mapping) else {"": history}
    tables = {str(name): pd.read_csv(of) if isinstance(of, str | Path) else of for name, of in named.items()}
    return {name: table for name, table in tables.items() if len(table)}


def _highest(example: EcgExample) -> list[tuple[str, float, bool]]:
    """The highest probabilities and those of the true labels: (label, probability, is true)."""
    true = set(example.labels)
    ranked = sorted(example.probabilities.items(), key=lambda item: -item[1])
    shown = [(name, float(p), name in true) for rank, (name, p) in enumerate(ranked) if rank < _MAX_PROBABILITIES]
    rest = [(name, float(p), True) for name, p in ranked[_MAX_PROBABILITIES:] if name in true]
    return shown + rest


def _number(value: Any) -> str:
    """A fact as people write it: few digits for floats, yes and no for flags, a dash for what is missing."""
    if value is None:
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{int(value):,}".replace(",", "\u2009") if abs(value) >= 10_000 else str(int(value))
    if isinstance(value, float | np.floating):
        return f"{float(value):.4g}" if math.isfinite(value) else "–"
    if isinstance(value, list | tuple):
        return ", ".join(_number(item) for item in value)
    return str(value)


def _estimate(estimate: Estimate) -> dict[str, str]:
    """The parts of an estimate as the table sets them."""
    if estimate.value is None:
        return {"value": "–", "interval": ""}
    value, _, interval = str(estimate).partition(" ")
    interval = interval.strip("[]")
    return {"value": value, "interval": interval if "," in interval else interval.replace("-", "–")}


def _plain(value: Any) -> Any:
    """Plain JSON values, with null for numbers that are none."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int) or value is None else str(value)
