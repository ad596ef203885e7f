from __future__ import annotations

import json

import numpy as np
import pytest
from rich.console import Console
from sklearn import metrics as sk

from hubert_ecg.evaluation import Estimate, Evaluation, choose_thresholds, compare_table, evaluate


def problem(num_records=200, num_labels=4, seed=0, ties=True):
    rng = np.random.default_rng(seed)
    targets = rng.random((num_records, num_labels)) < np.linspace(0.1, 0.6, num_labels)
    scores = 1 / (1 + np.exp(-(1.2 * targets + rng.normal(size=targets.shape) - 0.6)))
    return targets, np.round(scores, 2) if ties else scores


def names(count):
    return [f"L{i}" for i in range(count)]


def text(table, width=80):
    console = Console(width=width, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_multilabel_values_are_those_of_scikit_learn():
    targets, scores = problem()
    thresholds = [0.3, 0.5, 0.6, 0.7]
    found = evaluate(targets, scores, names(4), thresholds=thresholds, num_bootstrap=0)
    decisions = scores >= thresholds
    want = {
        "auroc": sk.roc_auc_score(targets, scores, average=None),
        "auprc": sk.average_precision_score(targets, scores, average=None),
        "f1": sk.f1_score(targets, decisions, average=None),
        "accuracy": (targets == decisions).mean(0),
    }
    for metric, values in want.items():
        np.testing.assert_allclose([found.labels[name][metric].value for name in names(4)], values, rtol=1e-13)
        assert found.macro[metric].value == pytest.approx(np.mean(values), rel=1e-13)
        assert found.macro[metric].low is None
    assert found.support == dict(zip(names(4), targets.sum(0).tolist(), strict=True))
    assert list(found.thresholds.values()) == thresholds


def test_multiclass_values_are_those_of_scikit_learn():
    rng = np.random.default_rng(3)
    classes = rng.integers(3, size=150)
    scores = rng.dirichlet([1, 1, 1], 150) + 0.3 * np.eye(3)[classes]
    scores /= scores.sum(1, keepdims=True)
    found = evaluate(classes, scores, "abc", "multiclass", num_bootstrap=50)
    decided = scores.argmax(1)
    assert found.macro["auroc"].value == pytest.approx(sk.roc_auc_score(classes, scores, multi_class="ovr"), rel=1e-13)
    assert found.macro["auprc"].value == pytest.approx(
        sk.average_precision_score(np.eye(3)[classes], scores), rel=1e-13
    )
    assert found.macro["f1"].value == pytest.approx(sk.f1_score(classes, decided, average="macro"), rel=1e-13)
    assert found.macro["accuracy"].value == sk.accuracy_score(classes, decided)
    assert found.macro["accuracy"].low < found.macro["accuracy"].value < found.macro["accuracy"].high
    assert found == evaluate(np.eye(3)[classes], scores, "abc", "multiclass", num_bootstrap=50)


def test_regression_values_are_those_of_scikit_learn_far_from_zero():
    rng = np.random.default_rng(4)
    targets = 1e6 + rng.normal(size=(80, 2))
    scores = targets + rng.normal(size=(80, 2))
    found = evaluate(targets, scores, "ab", "regression", num_bootstrap=200)
    for c, name in enumerate("ab"):
        y, x = targets[:, c], scores[:, c]
        want = {
            "mae": sk.mean_absolute_error(y, x),
            "rmse": sk.root_mean_squared_error(y, x),
            "r2": sk.r2_score(y, x),
            "pearson": np.corrcoef(y, x)[0, 1],
        }
        for metric, value in want.items():
            estimate = found.labels[name][metric]
            assert estimate.value == pytest.approx(value, rel=1e-9), metric
            assert estimate.low < estimate.value < estimate.high
    assert found.thresholds == {}


def test_constant_regression_target_is_undefined_where_it_has_to_be():
    targets = np.c_[np.full(10, 0.1), np.arange(10.0)]
    scores = np.c_[np.arange(10.0), np.full(10, 0.3)]
    found = evaluate(targets, scores, ["flat", "guess"], "regression", num_bootstrap=100)
    assert found.labels["flat"]["r2"].value is None
    assert found.labels["flat"]["pearson"].value is None
    assert found.labels["flat"]["mae"].value == pytest.approx(4.42)
    assert found.labels["guess"]["pearson"].value is None
    assert found.labels["guess"]["r2"].value == pytest.approx(sk.r2_score(targets[:, 1], scores[:, 1]))
    assert found.macro["r2"].value == found.labels["guess"]["r2"].value
    assert set(found.undefined) == {"flat", "guess"}


def test_undefined_labels_are_named_and_count_for_nothing():
    targets, scores = problem(num_labels=5)
    targets[:, 1], targets[:, 3] = False, True
    found = evaluate(targets, scores, names(5), num_bootstrap=100)
    assert found.undefined == {"L1": "no positive record", "L3": "no negative record"}
    kept = evaluate(targets[:, [0, 2, 4]], scores[:, [0, 2, 4]], ["L0", "L2", "L4"], num_bootstrap=100)
    assert found.macro == kept.macro
    assert found.labels["L1"] == dict.fromkeys(found.metrics, Estimate(None))
    shown = text(found.table())
    assert "L1 (no positive record); L3 (no negative record)" in " ".join(shown.split())
    assert shown.count("undefined") == 8


def test_nothing_defined():
    found = evaluate(np.zeros((5, 2)), np.full((5, 2), 0.5), "ab", num_bootstrap=20)
    assert found.macro == dict.fromkeys(found.metrics, Estimate(None))
    assert "undefined" in text(found.table())


def test_one_record_and_one_positive():
    assert evaluate([[1]], [[0.5]], "a", num_bootstrap=10).undefined == {"a": "no negative record"}
    targets = np.zeros((40, 1))
    targets[7] = 1
    scores = np.linspace(0, 1, 40)[:, None]
    found = evaluate(targets, scores, ["rare"], num_bootstrap=200)
    # A third of the replicates lack the positive; the others still give an interval.
    assert 0 <= found.labels["rare"]["auroc"].low <= found.labels["rare"]["auroc"].value == pytest.approx(7 / 39)


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others():
    targets, scores = problem()
    first = evaluate(targets, scores, names(4), num_bootstrap=130, seed=5)
    assert first == evaluate(targets, scores, names(4), num_bootstrap=130, seed=5)
    other = evaluate(targets, scores, names(4), num_bootstrap=130, seed=6)
    assert first.macro["auroc"].value == other.macro["auroc"].value
    assert first.macro["auroc"].low != other.macro["auroc"].low


def test_order_of_labels_does_not_matter():
    targets, scores = problem()
    forward = evaluate(targets, scores, names(4), num_bootstrap=100)
    backward = evaluate(targets[:, ::-1], scores[:, ::-1], names(4)[::-1], num_bootstrap=100)
    assert {name: forward.labels[name] for name in names(4)} == {name: backward.labels[name] for name in names(4)}


def test_json_round_trip_is_exact_and_strict():
    targets, scores = problem()
    targets[:, 0] = 0
    found = evaluate(targets, scores, names(4), num_bootstrap=50)
    written = json.dumps(found.to_json(), allow_nan=False)
    assert Evaluation.from_json(json.loads(written)) == found
    with pytest.raises(ValueError, match="must have the keys"):
        Evaluation.from_json({"labels": {}})


def test_thresholds_maximise_f1_and_lie_between_scores():
    targets, scores = problem(num_labels=3, ties=True)
    chosen = choose_thresholds(targets, scores)
    for c in range(3):
        candidates = [sk.f1_score(targets[:, c], scores[:, c] >= value) for value in np.unique(scores[:, c])]
        assert sk.f1_score(targets[:, c], scores[:, c] >= chosen[c]) == pytest.approx(max(candidates), rel=1e-14)
        assert chosen[c] not in scores[:, c]


def test_thresholds_of_hard_cases():
    above = np.nextafter(0.5, 1)
    # Neighbouring floats have no middle: the threshold must still tell them apart.
    assert choose_thresholds([[0], [1]], [[0.5], [above]])[0] == above
    # All positive is best: the threshold is the lowest score.
    assert choose_thresholds([[1], [1], [0], [1]], [[0.9], [0.8], [0.7], [0.1]])[0] == 0.1
    assert choose_thresholds([[0], [0]], [[0.1], [0.9]], default=0.4).tolist() == [0.4]
    assert choose_thresholds([[0], [1]], [[-1e308], [1e308]])[0] == 0


def test_thresholds_by_name_and_one_for_all():
    targets, scores = problem(num_labels=2)
    one = evaluate(targets, scores, "ab", thresholds=0.25, num_bootstrap=0)
    assert one == evaluate(targets, scores, "ab", thresholds={"b": 0.25, "a": 0.25, "else": 1}, num_bootstrap=0)
    with pytest.raises(ValueError, match="must name every label, got none for b"):
        evaluate(targets, scores, "ab", thresholds={"a": 0.5})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": np.full((6, 2), 2)}, "targets must be 0 or 1, got \\[2\\]"),
        ({"targets": np.zeros((6, 3))}, "targets must be \\[6, 2\\] as scores, got \\[6, 3\\]"),
        ({"targets": np.full((6, 2), np.nan)}, "targets must be finite"),
        ({"targets": np.full((6, 2), "1")}, "targets must be numbers"),
        ({"scores": np.array([[0.5, np.nan]] * 6)}, "scores must be finite, got nan at \\[0, 1\\]"),
        ({"scores": np.zeros((0, 2))}, "at least one record"),
        ({"scores": np.full((6, 2), 3.0)}, "apply a sigmoid, or pass thresholds"),
        ({"label_names": "abc"}, "label_names must be 2 names"),
        ({"label_names": "aa"}, "label_names must be distinct"),
        ({"problem": "multi"}, "problem must be one of multilabel, multiclass, regression, got 'multi'"),
        ({"problem": "multiclass"}, "must have one class for each record, got 0 for record 0"),
        ({"problem": "multiclass", "targets": np.full(6, 2)}, "must be class numbers 0 to 1, got \\[2\\]"),
        ({"problem": "multiclass", "targets": np.zeros(6), "thresholds": 0.5}, "highest score decides"),
        ({"confidence": 95}, "confidence must be between 0 and 1, got 95"),
        ({"num_bootstrap": -1}, "num_bootstrap must be 0 or more"),
        ({"thresholds": [0.1, 0.2, 0.3]}, "thresholds must be one number or 2"),
        ({"thresholds": np.nan}, "thresholds must be numbers, got NaN"),
        ({"groups": [1, 2]}, "groups must be \\[6\\]"),
    ],
)
def test_wrong_input_is_named(change, message):
    arguments = {"targets": np.zeros((6, 2)), "scores": np.full((6, 2), 0.5), "label_names": "ab", **change}
    with pytest.raises(ValueError, match=message):
        evaluate(**arguments)


def test_table_keeps_all_numbers_in_80_columns_and_does_not_obey_names():
    targets, scores = problem(num_labels=2)
    found = evaluate(targets, scores, ["[red]bold[/red]", "x" * 40], num_bootstrap=60)
    shown = text(found.table("Title"))
    assert max(map(len, shown.splitlines())) <= 80
    for of in (*found.labels.values(), found.macro):
        for estimate in of.values():
            value, interval = str(estimate).split(" ")
            assert value in shown
            assert interval in shown
    assert "[red]bold" in shown.replace("\n", "")


def test_compare_table_has_a_row_for_each_run():
    targets, scores = problem()
    runs = {
        "one": evaluate(targets, scores, names(4), num_bootstrap=40),
        "[b]two": evaluate(targets, 1 - scores, names(4)),
    }
    shown = text(compare_table(runs), width=140)
    for name, run in runs.items():
        row = next(line for line in shown.splitlines() if name in line)
        assert all(str(estimate) in row for estimate in run.macro.values())
    narrow = text(compare_table(runs))
    for run in runs.values():
        assert all(part in narrow for estimate in run.macro.values() for part in str(estimate).split())
    with pytest.raises(ValueError, match="one kind of problem"):
        compare_table({**runs, "three": evaluate(targets * 1.0, scores, names(4), "regression", num_bootstrap=0)})


def test_estimates_are_written_without_ambiguity():
    assert str(Estimate(0.5)) == "0.500"
    assert str(Estimate(-0.1, -0.2, 0.05)) == "-0.100 [-0.200, 0.050]"
    assert str(Estimate(123.456, 120.0, 131.0)) == "123.5 [120-131]"
