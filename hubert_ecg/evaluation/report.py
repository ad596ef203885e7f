"""The report: one HTML page that needs nothing beside itself, and the same numbers as JSON."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hubert_ecg.evaluation.metrics import Estimate, Evaluation, check_scores
from hubert_ecg.files import write_text

if TYPE_CHECKING:
    import pandas as pd
    from markupsafe import Markup
    from matplotlib.figure import Figure

# Below this many positives a percentile interval says little; the report marks such labels.
_FEW_POSITIVES = 10
_MAX_PROBABILITIES = 6
# Rows of a task's labels in an audit.
_MAX_LABELS = 15
_TOLD = ("share", "chance", "chance_sd", "bits")


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
    from hubert_ecg.evaluation import plots

    path = Path(path)
    picture = pictures()
    examples = [example if isinstance(example, EcgExample) else EcgExample(*example) for example in ecgs]

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

    write_page(
        path,
        "report.html.j2",
        title=title,
        evaluation=evaluation,
        runs=_comparable(runs),
        facts=grouped(facts),
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
    return path


def pictures() -> Callable[[Figure], Markup]:
    """What turns the figures of one page into SVG elements that share no id."""
    from markupsafe import Markup

    from hubert_ecg.evaluation import plots

    number = itertools.count(1)
    return lambda figure: Markup(plots.svg(figure, f"f{next(number)}"))


def write_page(path: Path, template: str, **values: Any) -> None:
    """Write a page from one of the templates beside this module, whole or not at all."""
    import jinja2

    folder = resources.files(__package__)
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8")),
    )
    environment.filters |= {"number": _number, "estimate": _estimate}
    write_text(path, environment.get_template(template).render(**values))


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
    write_text(path, to_text(content))
    return path


def to_text(content: Any) -> str:
    """Numbers of any kind as strict JSON: arrays as lists, and null for what is no number."""
    return json.dumps(_plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_audit(
    path: str | Path, found: Mapping[str, Any], *, title: str, max_clusters: int, facts: Mapping[str, Any]
) -> None:
    """Write what :meth:`hubert_ecg.evaluation.audit.ClusterAudit.result` found, as a page and as JSON.

    Args:
        path: Of both files, which add .html and .json.
        found: The numbers, and ``stability``: name -> share of the tokens that keep their cluster.
        title: Heading.
        max_clusters: Clusters that are drawn, by falling use; the JSON file has all of them.
        facts: Heading -> {name -> value}.
    """
    from hubert_ecg.evaluation import audit, audit_plots, plots

    path, picture = Path(path), pictures()
    unit = "scaled units"
    drawn = [cluster for cluster in found["clusters"][:max_clusters] if cluster["num_tokens"]]
    step = audit_plots.CLUSTERS_IN_PICTURE
    told = found["information"]
    tasks = {task: of for task, of in told["tasks"].items() if of["labels"]}
    bars = [("lead", told["lead"]), ("position in the beat", told["beat"])]
    bars += [(f"labels: {task}", audit.Information(*(of[name] for name in _TOLD))) for task, of in tasks.items()]
    write_page(
        path.with_suffix(".html"),
        "audit.html.j2",
        title=title,
        found=found,
        facts=grouped(facts),
        stability=list(found["stability"].items()),
        agreement_by_chance=sum(cluster["share"] ** 2 for cluster in found["clusters"]),
        notes=audit.remarks(found),
        use_picture=picture(plots.cluster_use(np.array([cluster["num_tokens"] for cluster in found["clusters"]]))),
        information_picture=picture(audit_plots.information_bars(bars)),
        drawn=drawn,
        num_drawn=len(drawn),
        num_examples=audit.NUM_EXAMPLES,
        num_phases=audit.NUM_PHASES,
        max_labels=_MAX_LABELS,
        token_s=len(found["axes"]["time_s"]) * (found["axes"]["time_s"][1] - found["axes"]["time_s"][0]),
        unit=unit,
        cluster_pictures=[
            picture(audit_plots.cluster_rows(drawn[first : first + step], found["axes"], unit))
            for first in range(0, len(drawn), step)
        ],
    )
    clusters = [{key: value for key, value in of.items() if key != "examples"} for of in found["clusters"]]
    content = {"title": title, **found, "clusters": clusters, "facts": dict(facts)}
    write_text(path.with_suffix(".json"), to_text(content))


def _comparable(runs: Mapping[str, Evaluation] | None) -> dict[str, Evaluation]:
    runs = dict(runs or {})
    metrics = [run.metrics for run in runs.values()]
    if any(other != metrics[0] for other in metrics):
        problems = sorted({run.problem for run in runs.values()})
        raise ValueError(f"write_report: runs must be of one kind of problem, got {problems}")
    return runs


def grouped(facts: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
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
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int) or value is None else str(value)
