from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from hubert_ecg.evaluation import bootstrap, evaluate


@pytest.mark.parametrize("decimals", [0, 1, 2, 15])
@pytest.mark.parametrize("prevalence", [0.02, 0.5, 0.97])
def test_replicates_equal_scikit_learn_with_ties(decimals, prevalence):
    rng = np.random.default_rng(round(100 * prevalence) + decimals)
    positive = rng.random(151) < prevalence
    positive[:2] = True, False
    scores = np.round(rng.normal(size=151) + positive, decimals)
    ranking = bootstrap.Ranking(positive, scores)
    checked = 0
    for weights in bootstrap.resample(151, 70, seed=1):
        auroc, auprc = ranking(weights)
        for r, w in list(enumerate(weights.T))[::4]:
            if 0 < w[positive].sum() < w.sum():
                assert auroc[r] == pytest.approx(roc_auc_score(positive, scores, sample_weight=w), abs=1e-12)
                assert auprc[r] == pytest.approx(average_precision_score(positive, scores, sample_weight=w), abs=1e-12)
                checked += 1
            else:
                assert np.isnan([auroc[r], auprc[r]]).all()
    assert checked > 10


def test_equal_scores_of_all_records_are_chance():
    positive = np.arange(10) < 3
    auroc, auprc = bootstrap.Ranking(positive, np.zeros(10))(np.ones((10, 1)))
    assert auroc == 0.5
    assert auprc == pytest.approx(0.3)


def test_no_positive_gives_nan():
    assert np.isnan(bootstrap.Ranking(np.zeros(4, bool), np.arange(4.0))(np.ones((4, 3)))).all()


def test_draws_are_of_full_size_and_do_not_depend_on_chunks(monkeypatch):
    whole = np.concatenate(list(bootstrap.resample(30, 150, seed=2)), axis=1)
    assert whole.shape == (30, 150)
    assert (whole.sum(0) == 30).all()
    assert abs(whole.var() - 29 / 30) < 0.05
    monkeypatch.setattr(bootstrap, "_CHUNK", 7)
    np.testing.assert_array_equal(np.concatenate(list(bootstrap.resample(30, 150, seed=2)), axis=1), whole)


def test_groups_are_drawn_whole():
    groups = np.array(["b", "a", "b", "c", "c", "c"])
    weights = np.concatenate(list(bootstrap.resample(6, 80, groups=groups)), axis=1)
    for group in "abc":
        assert (weights[groups == group] == weights[groups == group][0]).all()
    first = [int(np.flatnonzero(groups == group)[0]) for group in "abc"]
    assert (weights[first].sum(0) == 3).all()


def test_repeated_records_of_a_patient_do_not_narrow_a_patient_interval():
    rng = np.random.default_rng(0)
    targets = rng.random((60, 1)) < 0.4
    scores = np.clip(0.25 * targets + rng.random((60, 1)) * 0.7, 0, 1)
    patient = np.arange(60)

    def width(*arguments, **options):
        found = evaluate(*arguments, ["a"], num_bootstrap=400, **options).macro["auroc"]
        return found.high - found.low

    once = width(targets, scores)
    copies = [np.tile(values, (8, 1)) for values in (targets, scores)]
    assert width(*copies) < 0.6 * once
    assert width(*copies, groups=np.tile(patient, 8)) == pytest.approx(once, rel=0.15)


def test_f1_and_accuracy_replicates_equal_scikit_learn():
    rng = np.random.default_rng(9)
    targets = rng.random((90, 1)) < 0.3
    scores = rng.random((90, 1))
    found = evaluate(targets, scores, ["a"], thresholds=0.4, num_bootstrap=50, seed=3)
    y, decided = targets[:, 0], scores[:, 0] >= 0.4
    weights = np.concatenate(list(bootstrap.resample(90, 50, seed=3)), axis=1).T
    f1 = [f1_score(y, decided, sample_weight=w) for w in weights]
    accuracy = [np.average(y == decided, weights=w) for w in weights]
    for metric, values in (("f1", f1), ("accuracy", accuracy)):
        low, high = np.quantile(values, [0.025, 0.975])
        assert found.labels["a"][metric].low == pytest.approx(low, abs=1e-12)
        assert found.labels["a"][metric].high == pytest.approx(high, abs=1e-12)


def test_a_wider_level_gives_a_wider_interval_that_holds_the_value():
    replicates = np.random.default_rng(0).normal(0.7, 0.05, 500)
    narrow, wide = (bootstrap.interval(replicates, 0.7, level) for level in (0.5, 0.99))
    assert wide[0] < narrow[0] < 0.7 < narrow[1] < wide[1]
    assert bootstrap.interval(replicates, 0.99, 0.95)[1] == 0.99
    assert np.isnan(bootstrap.interval(np.array([np.nan, 0.5]), 0.5, 0.95)).all()


@pytest.fixture(scope="module")
def coverage():
    """How often 90 % intervals of 80 test sets hold the truth; AUROC is Phi(1.2 / sqrt 2) for normal scores."""
    num_labels, hits = 16, {"label": [], "macro auroc": [], "macro auprc": []}
    rng = np.random.default_rng(12)
    prevalence = np.geomspace(0.04, 0.4, num_labels)

    def draw(num_records):
        targets = rng.random((num_records, num_labels)) < prevalence
        return targets, 1.2 * targets + rng.normal(size=targets.shape)

    true_auroc = 0.8019
    true_auprc = np.mean([average_precision_score(y, s) for y, s in zip(*(x.T for x in draw(100_000)), strict=True)])
    for seed in range(80):
        targets, scores = draw(250)
        replicates = [[], []]
        for weights in bootstrap.resample(250, 128, seed=seed):
            both = [bootstrap.Ranking(targets[:, c], scores[:, c])(weights) for c in range(num_labels)]
            for k in range(2):
                replicates[k].append(np.stack([pair[k] for pair in both], axis=1))
        auroc, auprc = (np.concatenate(of) for of in replicates)
        ones = np.ones((250, 1))
        values = np.array([bootstrap.Ranking(targets[:, c], scores[:, c])(ones) for c in range(num_labels)])[..., 0]
        for c in range(num_labels):
            low, high = bootstrap.interval(auroc[:, c], values[c, 0], 0.9)
            hits["label"].append(low <= true_auroc <= high)
        for name, of, truth, k in (("macro auroc", auroc, true_auroc, 0), ("macro auprc", auprc, true_auprc, 1)):
            low, high = bootstrap.interval(of.mean(1), values[:, k].mean(), 0.9, unbias=True)
            hits[name].append(low <= truth <= high)
    return {name: np.mean(of) for name, of in hits.items()}


@pytest.mark.parametrize("name", ["label", "macro auroc", "macro auprc"])
def test_intervals_hold_the_truth_about_as_often_as_they_say(coverage, name):
    assert 0.80 <= coverage[name] <= 0.97
