"""Metrics per label and macro, each with a bootstrap interval.

A label without a positive or without a negative has no AUROC. Such a label is *undefined*: it counts as neither 0 nor
0.5, stays out of the macro mean, and is named in the result. Values are scikit-learn's; intervals come from
:mod:`hubert_ecg.evaluation.bootstrap`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hubert_ecg.evaluation import bootstrap

if TYPE_CHECKING:
    from rich.table import Table

# Metric -> how it is written in tables, in their order.
CLASSIFICATION = {"auroc": "AUROC", "auprc": "AUPRC", "f1": "F1", "accuracy": "Accuracy"}
REGRESSION = {"mae": "MAE", "rmse": "RMSE", "r2": "R²", "pearson": "Pearson r"}
_BOUNDS = {"mae": (0.0, math.inf), "rmse": (0.0, math.inf), "r2": (-math.inf, 1.0), "pearson": (-1.0, 1.0)}
PROBLEMS = {"multilabel": CLASSIFICATION, "multiclass": CLASSIFICATION, "regression": REGRESSION}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value and its interval; None where it is undefined.

    >>> str(Estimate(0.912, 0.893, 0.931))
    '0.912 [0.893-0.931]'
    """

    value: float | None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.value is None:
            return "undefined"
        if self.low is None or self.high is None:
            return _digits(self.value)
        between = "-" if self.low >= 0 else ", "
        return f"{_digits(self.value)} [{_digits(self.low)}{between}{_digits(self.high)}]"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found.

    Args:
        problem: "multilabel", "multiclass" or "regression".
        labels: label -> metric -> estimate, labels in the order of the model's outputs.
        macro: metric -> estimate of the mean over the labels where it is defined. The accuracy of a multiclass problem
            is the share of records in the right class.
        support: label -> number of positive records (regression: of records).
        thresholds: label -> a score at or above it is a positive decision; empty where decisions need none.
        undefined: label -> why it has no value.
        num_records: Number of records N.
        settings: How intervals were made.
    """

    problem: str
    labels: dict[str, dict[str, Estimate]]
    macro: dict[str, Estimate]
    support: dict[str, int]
    thresholds: dict[str, float]
    undefined: dict[str, str]
    num_records: int
    settings: dict[str, Any]

    @property
    def metrics(self) -> dict[str, str]:
        """Metric -> how it is written."""
        return PROBLEMS[self.problem]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; an undefined number is null."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Evaluation:
        """The evaluation that :meth:`to_json` wrote."""
        names = {field.name for field in dataclasses.fields(cls)}
        if set(values) != names:
            raise ValueError(f"Evaluation: values must have the keys {sorted(names)}, got {sorted(values)}")

        def estimates(of: Mapping[str, Any]) -> dict[str, Estimate]:
            return {metric: Estimate(**estimate) for metric, estimate in of.items()}

        return cls(
            **{
                **values,
                "labels": {label: estimates(of) for label, of in values["labels"].items()},
                "macro": estimates(values["macro"]),
            }
        )

    def table(self, title: str | None = None) -> Table:
        """A table for the terminal: one row a label, then the macro row."""
        from rich.text import Text

        table = _table(title, "Label", ["N" if self.problem == "regression" else "Pos."], self.metrics)
        for label, of in self.labels.items():
            cells = [
                Text(str(of[metric]), style="" if of[metric].value is not None else "dim") for metric in self.metrics
            ]
            table.add_row(Text(label), str(self.support[label]), *cells)
        table.add_section()
        cells = [Text(str(self.macro[metric])) for metric in self.metrics]
        table.add_row(Text(self._macro_name()), str(self.num_records), *cells, style="bold")
        if self.undefined:
            named = "; ".join(f"{label} ({reason})" for label, reason in self.undefined.items())
            table.caption = Text(f"Undefined, not in the macro mean: {named}", style="dim italic")
        return table

    def _macro_name(self) -> str:
        defined = len(self.labels) - len(self.undefined)
        return f"Macro ({defined} of {len(self.labels)} labels)" if self.undefined else f"Macro ({defined})"


def compare_table(runs: Mapping[str, Evaluation], title: str | None = None) -> Table:
    """Macro metrics of several runs on the same records, one row a run.

    Args:
        runs: name -> evaluation; all of the same kind of problem.
        title: Title of the table.
    """
    from rich.text import Text

    metrics = _common_metrics(runs)
    table = _table(title, "Run", [], metrics)
    for name, run in runs.items():
        table.add_row(Text(name), *(Text(str(run.macro[metric])) for metric in metrics))
    return table


def choose_thresholds(targets: np.ndarray, scores: np.ndarray, default: float = 0.5) -> np.ndarray:
    """For each label the threshold with the highest F1 on these records: use validation records, never test records.

    The threshold lies midway between the last score that is taken for positive and the next lower one. Of thresholds
    with equal F1 the highest is taken. A label without a positive or without a negative keeps the default.

    Args:
        targets: [N, C] 0 or 1.
        scores: [N, C] float, higher means more likely positive.
        default: Threshold of labels for which none can be chosen.

    Returns:
        [C] float64; a score at or above it is a positive decision.
    """
    targets, scores = check_scores("choose_thresholds", targets, scores, "multilabel")
    thresholds = np.full(scores.shape[1], float(default))
    for c in np.flatnonzero(targets.any(0) & ~targets.all(0)):
        order = np.argsort(-scores[:, c], kind="stable")
        ranked = scores[order, c]
        last = np.flatnonzero(np.r_[ranked[1:] != ranked[:-1], True])
        true_positives = np.cumsum(targets[order, c])[last]
        best = int(np.argmax(2 * true_positives / (last + 1 + targets[:, c].sum())))
        high = ranked[last[best]]
        if last[best] + 1 < len(ranked):
            middle = high / 2 + ranked[last[best] + 1] / 2
            # Between neighbouring floats there is nothing: their middle is one of them.
            high = middle if middle > ranked[last[best] + 1] else high
        thresholds[c] = high
    return thresholds


def evaluate(
    targets: np.ndarray,
    scores: np.ndarray,
    label_names: Sequence[str],
    problem: str = "multilabel",
    thresholds: float | Mapping[str, float] | Sequence[float] | np.ndarray | None = None,
    num_bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    groups: Sequence[Any] | np.ndarray | None = None,
) -> Evaluation:
    """Metrics of all labels, and of their macro mean, with bootstrap intervals.

    Records are drawn with replacement, or whole groups of them. A replicate in which a label is undefined is left out
    for that label; the macro mean of a replicate is over the labels defined in it.

    Args:
        targets: [N, C] 0 or 1 (multilabel); [N] class numbers or [N, C] one-hot (multiclass); [N, C] float
            (regression).
        scores: [N, C] float: probabilities, or predicted values for regression.
        label_names: C names.
        problem: "multilabel", "multiclass" (one against the rest; the decision is the highest score) or "regression".
        thresholds: For multilabel: one for all, C of them, or by name. Default: 0.5.
        num_bootstrap: Replicates; 0 gives no intervals.
        confidence: Level of the intervals.
        seed: Seed of the draws.
        groups: [N] the patient of each record, so that whole patients are drawn.

    Raises:
        ValueError: for arguments that do not fit together, NaN scores or targets that are not 0 or 1.
    """
    names = [str(name) for name in label_names]
    if len(set(names)) != len(names):
        raise ValueError(f"evaluate: label_names must be distinct, got {names}")
    targets, scores = check_scores("evaluate", targets, scores, problem)
    if len(names) != scores.shape[1]:
        raise ValueError(
            f"evaluate: label_names must be {scores.shape[1]} names, as scores has columns, got {len(names)}"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"evaluate: confidence must be between 0 and 1, got {confidence}")
    if num_bootstrap < 0:
        raise ValueError(f"evaluate: num_bootstrap must be 0 or more, got {num_bootstrap}")
    if groups is not None:
        groups = np.asarray(groups)
        if groups.shape != (len(scores),):
            raise ValueError(f"evaluate: groups must be [{len(scores)}], one for each record, got {list(groups.shape)}")
    draws = bootstrap.resample(len(scores), num_bootstrap, seed, groups)

    used: np.ndarray | None = None
    if problem == "regression":
        values, replicates, macro_values, macro_replicates, undefined = _regression(targets, scores, draws)
        support = [len(scores)] * len(names)
    else:
        if problem == "multilabel":
            used = _thresholds(thresholds, names, scores)
            decisions = scores >= used
        else:
            if thresholds is not None:
                raise ValueError(
                    "evaluate: thresholds must be None for a multiclass problem, where the highest score decides"
                )
            decisions = np.arange(scores.shape[1]) == scores.argmax(1)[:, None]
        values, replicates, macro_values, macro_replicates, undefined = _classification(
            targets, scores, decisions, draws, one_of_many=problem == "multiclass"
        )
        support = targets.sum(0).tolist()

    # Accuracy is a mean over records and has no bias; the mean over one label is that label.
    biased = {metric for metric in values if metric != "accuracy" and len(names) - len(undefined) > 1}

    def estimate(metric: str, value: float, of: np.ndarray, unbias: bool = False) -> Estimate:
        low, high = bootstrap.interval(of, value, confidence, unbias=unbias, bounds=_BOUNDS.get(metric, (0.0, 1.0)))
        return Estimate(_none_if_nan(value), _none_if_nan(low), _none_if_nan(high))

    return Evaluation(
        problem=problem,
        labels={
            name: {metric: estimate(metric, values[metric][c], replicates[metric][:, c]) for metric in values}
            for c, name in enumerate(names)
        },
        macro={
            metric: estimate(metric, macro_values[metric], macro_replicates[metric], metric in biased)
            for metric in values
        },
        support=dict(zip(names, support, strict=True)),
        thresholds={} if used is None else dict(zip(names, used.tolist(), strict=True)),
        undefined={names[c]: reason for c, reason in undefined.items()},
        num_records=len(scores),
        settings={
            "interval": "bootstrap: percentile for labels, percentile less twice the bias for the macro mean",
            "confidence": confidence,
            "num_bootstrap": num_bootstrap,
            "seed": seed,
            "resampled": "records" if groups is None else "groups",
            "num_resampled": len(scores) if groups is None else len(np.unique(groups)),
        },
    )


def check_scores(function: str, targets: np.ndarray, scores: np.ndarray, problem: str) -> tuple[np.ndarray, np.ndarray]:
    """Targets as [N, C] bool (regression: float64) and scores as [N, C] float64, or a clear error.

    Args:
        function: Named in errors.
        targets: As for :func:`evaluate`.
        scores: As for :func:`evaluate`; a single column may be [N].
        problem: "multilabel", "multiclass" or "regression".
    """
    if problem not in PROBLEMS:
        raise ValueError(f"{function}: problem must be one of {', '.join(PROBLEMS)}, got {problem!r}")
    targets, scores = np.asarray(targets), np.asarray(scores)
    if scores.dtype.kind not in "fiub":
        raise ValueError(f"{function}: scores must be numbers, got {scores.dtype}")
    scores = scores.astype(np.float64)
    if scores.ndim == 1 and problem != "multiclass":
        scores = scores[:, None]
    if scores.ndim != 2 or 0 in scores.shape:
        raise ValueError(
            f"{function}: scores must be [N, C] with at least one record and label, got {list(scores.shape)}"
        )
    _check_finite(function, "scores", scores)
    if targets.dtype.kind not in "fiub":
        raise ValueError(f"{function}: targets must be numbers, got {targets.dtype}")
    _check_finite(function, "targets", targets)
    if targets.ndim == 1 and problem == "multiclass":
        classes = targets.astype(np.int64)
        if (classes != targets).any() or (classes < 0).any() or (classes >= scores.shape[1]).any():
            seen = np.unique(targets)[:8].tolist()
            raise ValueError(f"{function}: targets must be class numbers 0 to {scores.shape[1] - 1}, got {seen}")
        targets = np.arange(scores.shape[1]) == classes[:, None]
    if targets.ndim == 1 and scores.shape[1] == 1:
        targets = targets[:, None]
    if targets.shape != scores.shape:
        raise ValueError(f"{function}: targets must be {list(scores.shape)} as scores, got {list(targets.shape)}")
    if problem == "regression":
        return targets.astype(np.float64), scores
    if not np.isin(targets, (0, 1)).all():
        wrong = np.unique(targets[~np.isin(targets, (0, 1))])[:5].tolist()
        raise ValueError(f"{function}: targets must be 0 or 1, got {wrong}")
    targets = targets.astype(bool)
    if problem == "multiclass" and (targets.sum(1) != 1).any():
        record = int(np.flatnonzero(targets.sum(1) != 1)[0])
        raise ValueError(
            f"{function}: targets must have one class for each record, got {targets[record].sum()} for record {record}"
        )
    return targets, scores


def _classification(targets, scores, decisions, draws, one_of_many):
    """Values [C] and replicates [R, C] of each metric, then the same for the macro mean, then the undefined labels."""
    from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

    num_labels = scores.shape[1]
    undefined = {int(c): "no positive record" for c in np.flatnonzero(~targets.any(0))}
    undefined |= {int(c): "no negative record" for c in np.flatnonzero(targets.all(0))}
    defined = [c for c in range(num_labels) if c not in undefined]
    values = {metric: np.full(num_labels, np.nan) for metric in CLASSIFICATION}
    for c in defined:
        values["auroc"][c] = roc_auc_score(targets[:, c], scores[:, c])
        values["auprc"][c] = average_precision_score(targets[:, c], scores[:, c])
        values["f1"][c] = f1_score(targets[:, c], decisions[:, c], zero_division=0.0)
        values["accuracy"][c] = (targets[:, c] == decisions[:, c]).mean()

    rankings = {c: bootstrap.Ranking(targets[:, c], scores[:, c]) for c in defined}
    chunks: dict[str, list[np.ndarray]] = {metric: [] for metric in CLASSIFICATION}
    right_chunks = []
    hits, right = (targets & decisions).astype(np.float64), (targets == decisions).astype(np.float64)
    either = targets.astype(np.float64) + decisions
    all_right = right.all(1).astype(np.float64)
    for weights in draws:
        auroc = np.full((weights.shape[1], num_labels), np.nan)
        auprc = auroc.copy()
        for c, ranking in rankings.items():
            auroc[:, c], auprc[:, c] = ranking(weights)
        total = weights.sum(0)
        usable = np.isfinite(auroc)
        with np.errstate(invalid="ignore"):
            f1 = 2 * (weights.T @ hits) / (weights.T @ either)
        chunks["auroc"].append(auroc)
        chunks["auprc"].append(auprc)
        chunks["f1"].append(np.where(usable, f1, np.nan))
        chunks["accuracy"].append(np.where(usable, (weights.T @ right) / total[:, None], np.nan))
        right_chunks.append(weights.T @ all_right / total)
    replicates = {metric: _stack(of, num_labels) for metric, of in chunks.items()}
    macro_values = {metric: _mean_of_defined(of) for metric, of in values.items()}
    macro_replicates = {metric: _mean_of_defined(of) for metric, of in replicates.items()}
    if one_of_many:
        macro_values["accuracy"] = all_right.mean()
        macro_replicates["accuracy"] = np.concatenate(right_chunks) if right_chunks else np.empty(0)
    return values, replicates, macro_values, macro_replicates, undefined


def _regression(targets, scores, draws):
    """As :func:`_classification`; every metric is made of weighted sums over records."""
    num_labels = scores.shape[1]
    constant_targets, constant_scores = np.ptp(targets, axis=0) == 0, np.ptp(scores, axis=0) == 0
    # Centred and scaled, so that sums of squares lose no digits; errors keep their unit.
    centre, scale = targets.mean(0), np.where(constant_targets, 1.0, targets.std(0))
    y, s = (targets - centre) / scale, (scores - centre) / scale
    s_centre, s_scale = s.mean(0), np.where(constant_scores, 1.0, s.std(0))
    x = (s - s_centre) / s_scale
    error = scores - targets
    sums = [np.abs(error), error**2, (y - s) ** 2, y, y**2, x, x**2, x * y]

    def metrics(weights: np.ndarray) -> dict[str, np.ndarray]:
        total = weights.sum(0)[:, None]
        mae, mse, unexplained, my, myy, mx, mxx, mxy = (weights.T @ column / total for column in sums)
        y_variance, x_variance = myy - my**2, mxx - mx**2
        # Full variances are 1 by the scaling: what is left far below that is rounding of a constant.
        y_constant = constant_targets | (y_variance < 1e-12)
        x_constant = constant_scores | (x_variance < 1e-12)
        with np.errstate(divide="ignore", invalid="ignore"):
            r2 = np.where(y_constant, np.nan, 1 - unexplained / y_variance)
            pearson = (mxy - mx * my) / np.sqrt(y_variance * x_variance)
        pearson = np.where(y_constant | x_constant, np.nan, np.clip(pearson, -1, 1))
        return {"mae": mae, "rmse": np.sqrt(mse), "r2": r2, "pearson": pearson}

    values = {metric: of[0] for metric, of in metrics(np.ones((len(scores), 1))).items()}
    chunks = [metrics(weights) for weights in draws]
    replicates = {metric: _stack([chunk[metric] for chunk in chunks], num_labels) for metric in REGRESSION}
    undefined = {int(c): "constant prediction: no Pearson r" for c in np.flatnonzero(constant_scores)}
    undefined |= {int(c): "constant target: no R², no Pearson r" for c in np.flatnonzero(constant_targets)}
    macro_values = {metric: _mean_of_defined(of) for metric, of in values.items()}
    macro_replicates = {metric: _mean_of_defined(of) for metric, of in replicates.items()}
    return values, replicates, macro_values, macro_replicates, undefined


def _thresholds(thresholds, names: list[str], scores: np.ndarray) -> np.ndarray:
    if thresholds is None:
        if scores.min() < 0 or scores.max() > 1:
            raise ValueError(
                "evaluate: scores must be probabilities in [0, 1] where no thresholds are given, "
                f"got {scores.min():g} to {scores.max():g}: apply a sigmoid, or pass thresholds"
            )
        thresholds = 0.5
    if isinstance(thresholds, Mapping):
        missing = [name for name in names if name not in thresholds]
        if missing:
            raise ValueError(f"evaluate: thresholds must name every label, got none for {', '.join(missing[:5])}")
        thresholds = [thresholds[name] for name in names]
    values = np.asarray(thresholds, dtype=np.float64)
    if values.shape not in ((), (len(names),)):
        raise ValueError(f"evaluate: thresholds must be one number or {len(names)}, got {list(values.shape)}")
    if np.isnan(values).any():
        raise ValueError("evaluate: thresholds must be numbers, got NaN")
    return np.broadcast_to(values, (len(names),))


def _check_finite(function: str, name: str, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        place = np.argwhere(~np.isfinite(values))[0].tolist()
        raise ValueError(f"{function}: {name} must be finite, got {values[tuple(place)]} at {place}")


def _common_metrics(runs: Mapping[str, Evaluation]) -> dict[str, str]:
    problems = {run.problem for run in runs.values()}
    metrics = [PROBLEMS[problem] for problem in problems]
    if not metrics or any(other != metrics[0] for other in metrics):
        raise ValueError(f"compare_table: runs must be of one kind of problem, got {sorted(problems)}")
    return metrics[0]


def _mean_of_defined(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis without NaN; NaN where there is nothing else."""
    defined = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(defined, values, 0.0).sum(-1) / defined.sum(-1)


def _stack(chunks: list[np.ndarray], num_labels: int) -> np.ndarray:
    return np.concatenate(chunks) if chunks else np.empty((0, num_labels))


def _none_if_nan(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _digits(value: float) -> str:
    """Three decimals, or four digits where the value is large (an error in mmHg, ms, ...)."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def _table(title: str | None, first: str, counts: list[str], metrics: Mapping[str, str]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=None if title is None else Text(title, style="bold"),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column(first, overflow="fold")
    for count in counts:
        table.add_column(count, justify="right")
    for name in metrics.values():
        # Wide enough for an interval below its value, where a terminal of 80 columns cannot hold both in one line.
        table.add_column(name, justify="right", overflow="fold", min_width=13)
    return table
