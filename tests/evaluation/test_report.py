from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from hubert_ecg.evaluation import EcgExample, Evaluation, evaluate, write_json, write_report

EVIL = "<script>alert('x')</script>"
VOID = {"meta", "br", "line", "use", "path"}


class Page(HTMLParser):
    """Tags, text and what a page would fetch; fails on tags that do not match."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.words, self.fetched, self.open = [], [], [], []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "srcset", "href", "xlink:href", "data", "action") and not value.startswith("#"):
                self.fetched.append(value)
            assert not name.startswith("on"), f"{name} would run a script"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    names = [EVIL, "AFIB & flutter", "NORM", "never"]
    targets = rng.random((120, 4)) < [0.05, 0.3, 0.5, 0]
    scores = 1 / (1 + np.exp(-(2 * targets + rng.normal(size=targets.shape) - 1)))
    return names, targets, scores, evaluate(targets, scores, names, num_bootstrap=80, seed=3)


@pytest.fixture(scope="module")
def everything(data, tmp_path_factory):
    names, targets, scores, evaluation = data
    folder = tmp_path_factory.mktemp("report")
    history = pd.DataFrame({"step": [1, 2, 2], "split": ["train", "train", "validation"], "loss": [2.0, 1.0, 1.5]})
    history.to_csv(folder / "metrics.csv", index=False)
    signal = np.sin(np.linspace(0, 60, 1000)) * np.ones((12, 1))
    arguments = {
        "title": f"Report {EVIL}",
        "evaluation": evaluation,
        "runs": {"pretrained": evaluation, f"random {EVIL}": evaluate(targets, 1 - scores, names, num_bootstrap=80)},
        "cluster_counts": np.array([5, 3, 0, 9]),
        "cluster_scores": {"davies_bouldin": 1.8234, "inertia": float("nan")},
        "facts": {"records": 12345, "Model": {"size": "tiny", "frozen": False, "weights": EVIL}},
        "skipped": [("a/b.dat", f"ends early {EVIL}")],
    }
    pictures = {
        "ecgs": [
            EcgExample("record 17", signal, 100.0, labels=["NORM"], probabilities={"NORM": 0.83, EVIL: 0.1}),
            (f"tuple {EVIL}", signal[:2], 100.0, ("I", EVIL)),
        ],
        "history": {"Pretraining": folder / "metrics.csv", "Fine-tuning": history},
        "targets": targets,
        "scores": scores,
        "label_names": names,
    }
    path = write_report(folder / "new folder" / "report.html", **arguments, **pictures)
    write_json(folder / "report.json", **arguments)
    return path.read_text(encoding="utf-8"), json.loads((folder / "report.json").read_text(encoding="utf-8")), folder


def test_page_stands_alone(everything):
    source, _, folder = everything
    page = Page(source)
    assert page.fetched == []
    assert "script" not in page.tags
    assert not re.search(r"url\((?!#)|@import", source)
    assert len(source) < 5_000_000
    assert sorted(path.name for path in (folder / "new folder").iterdir()) == ["report.html"]
    ids = re.findall(r'\bid="([^"]+)"', source)
    assert len(ids) == len(set(ids))


def test_hostile_names_are_shown_as_they_are_and_never_run(everything):
    source, _, _ = everything
    assert "<script" not in source
    assert Page(source).text.count(EVIL) >= 8


def test_page_holds_every_number(everything, data):
    source, _, _ = everything
    evaluation = data[3]
    text = Page(source).text
    for of in (*evaluation.labels.values(), evaluation.macro):
        for estimate in of.values():
            if estimate.value is not None:
                assert f"{estimate.value:.3f}" in text
                assert f"{estimate.low:.3f}–{estimate.high:.3f}" in text
    assert "never (no positive record)" in text
    assert "95 % intervals from 80 bootstrap samples (seed 3): 120 records" in text
    assert "NORM 0.83" in text
    assert "davies bouldin 1.823" in text
    assert "a/b.dat" in text
    assert "records 12 345" in text
    assert "frozen no" in text


def test_page_has_every_picture(everything):
    source, _, _ = everything
    labels = re.findall(r'aria-label="([^"]+)"', source)
    assert labels == [
        "ROC curves",
        "Precision-recall curves",
        "ECG of record 17",
        "ECG of tuple &lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;",
        "Training curves Pretraining",
        "Training curves Fine-tuning",
        "Cluster use",
    ]
    assert source.count("<svg xmlns:xlink") == 7


def test_json_holds_the_same_numbers(everything, data):
    _, written, _ = everything
    assert Evaluation.from_json(written["evaluation"]) == data[3]
    assert set(written["runs"]) == {"pretrained", f"random {EVIL}"}
    assert written["cluster_counts"] == [5, 3, 0, 9]
    assert written["cluster_scores"] == {"davies_bouldin": 1.8234, "inertia": None}
    assert written["skipped"] == [{"source": "a/b.dat", "reason": f"ends early {EVIL}"}]


def test_sections_without_data_are_not_there(tmp_path):
    page = write_report(tmp_path / "bare.html", title="Bare").read_text(encoding="utf-8")
    assert Page(page).tags.count("section") == 0
    facts = write_report(tmp_path / "facts.html", title="Facts", facts={"rate": 99.5}).read_text(encoding="utf-8")
    assert re.findall(r'<section id="(\w+)"', facts) == ["facts"]
    empty = pd.DataFrame({"step": [], "split": [], "loss": []})
    assert "Training" not in write_report(tmp_path / "e.html", title="E", history=empty).read_text(encoding="utf-8")


@pytest.mark.parametrize("problem", ["multiclass", "regression"])
def test_other_problems_have_reports_too(tmp_path, problem):
    rng = np.random.default_rng(1)
    scores = rng.dirichlet([1, 1, 1], 60)
    targets = rng.integers(3, size=60) if problem == "multiclass" else scores + rng.normal(size=scores.shape)
    evaluation = evaluate(targets, scores, ["a", "b", "c"], problem, num_bootstrap=30, groups=np.arange(60) // 2)
    path = write_report(tmp_path / "r.html", title="T", evaluation=evaluation, targets=targets, scores=scores)
    page = Page(path.read_text(encoding="utf-8"))
    assert "30 groups, with all records of each" in page.text
    assert str(evaluation.macro["accuracy" if problem == "multiclass" else "mae"].value)[:5] in page.text
    assert ("ROC and precision-recall curves" in page.text) == (problem == "multiclass")
    assert "Threshold" not in page.text


def test_labels_of_few_positives_are_marked(tmp_path, data):
    evaluation = data[3]
    page = Page(write_report(tmp_path / "r.html", title="T", evaluation=evaluation).read_text(encoding="utf-8"))
    assert evaluation.support[EVIL] < 10
    assert f"{evaluation.support[EVIL]}*" in page.text
    assert "Fewer than 10 positives" in page.text
    many = dataclasses.replace(evaluation, support=dict.fromkeys(evaluation.support, 50))
    assert "Fewer than" not in write_report(tmp_path / "m.html", title="T", evaluation=many).read_text(encoding="utf-8")


def test_a_failed_report_leaves_the_old_one_and_nothing_else(tmp_path, data, monkeypatch):
    path = write_report(tmp_path / "r.html", title="Old")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="signal must be"):
        write_report(path, title="New", ecgs=[EcgExample("x", np.zeros(5), 100.0)])
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(path, title="New")
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["r.html"]


def test_runs_of_different_kinds_do_not_mix(tmp_path, data):
    other = evaluate(np.arange(6.0), np.arange(6.0), ["a"], "regression", num_bootstrap=0)
    with pytest.raises(ValueError, match="runs must be of one kind of problem"):
        write_report(tmp_path / "r.html", title="T", runs={"a": data[3], "b": other})
