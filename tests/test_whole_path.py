"""Real recordings through every command, from the files as they were published to the report."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from hubert_ecg import HubertECG, KMeans, cli
from hubert_ecg.data import Store

TINY = ["--size", "tiny", "--batch_size", "8", "--device", "cpu", "--num_workers", "0"]


def run(*argv: object) -> None:
    assert cli.main([str(word) for word in argv]) == 0


@pytest.mark.slow
def test_ptbxl_from_wfdb_to_report(shared_data, tmp_path, capsys):
    source, models = shared_data / "ptbxl", tmp_path / "models"
    features, clusters = tmp_path / "features" / "mfcc.pkl", tmp_path / "clusters" / "kmeans.pkl"
    run("prepare", "--data_path", source, "--output_dir", tmp_path / "store", "--num_workers", 0)
    store = Store(tmp_path / "store")
    assert (len(store), store.dataset, store.skipped) == (78, "ptbxl", [])

    run("extract", "--data_path", store.path, "--feature_type", "mfcc", "--output_path", features)
    # Any pickle reader opens it.
    with features.open("rb") as file:
        plain = pickle.load(file)
    assert plain["features"].shape == (78, 93, 39)
    assert np.isfinite(plain["features"]).all()
    run("cluster", "--features_path", features, "--num_clusters", 20, "--output_path", clusters)
    assert KMeans.load(clusters).cluster_centers_.shape == (20, 39)
    assert "<svg" in clusters.with_suffix(".html").read_text()

    run(
        "pretrain",
        "--data_path",
        store.path,
        "--output_dir",
        models,
        "--kmeans_path",
        clusters,
        "--max_steps",
        4,
        *TINY,
    )
    pretrained = HubertECG.from_pretrained(str(models / "hubert_ecg.pt"))
    assert pretrained.config.num_hidden_layers == 4

    task = ["--dataset", "ptbxl", "--task", "diag_superclass", "--data_path", source]
    start = ["--pretrained_model", models / "hubert_ecg.pt", "--output_dir", models, "--max_steps", 4]
    run("finetune", *task, *start, *TINY[2:])
    run("evaluate", *task, "--model_path", models / "ptbxl_diag_superclass.pt", "--num_bootstrap", 50)

    report = models / "ptbxl_diag_superclass" / "test"
    numbers = json.loads((report / "report.json").read_text())["evaluation"]
    assert set(numbers["labels"]) == {"CD", "HYP", "MI", "NORM", "STTC"}
    assert numbers["num_records"] == len(store.split("test"))
    for name, metrics in numbers["labels"].items():
        assert (metrics["auroc"]["value"] is None) == (name in numbers["undefined"])
    assert "Macro" in capsys.readouterr().out
    assert "<svg" in (report / "report.html").read_text()
    assert len((report / "predictions.csv").read_text().splitlines()) == numbers["num_records"] + 1


@pytest.mark.slow
def test_mixed_rates_and_lengths_train_together(shared_data, tmp_path):
    """Georgia headers that wfdb refuses, 10 to 58 s, 500 and 1000 Hz."""
    models = tmp_path / "models"
    run("pretrain", "--data_path", shared_data / "cinc2021", "--output_dir", models, "--max_steps", 2, *TINY)
    assert (models / "hubert_ecg.pt").is_file()
