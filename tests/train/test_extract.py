"""The extract and cluster commands: files, folders, and several processes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hubert_ecg import KMeans, cli
from hubert_ecg.config import UserError
from hubert_ecg.train import clusters
from hubert_ecg.train.token_features import TokenFeatures, ValidTokens

ROOT = Path(__file__).resolve().parents[2]


def some_features(num_records=60, tokens=20, width=5):
    random = np.random.default_rng(0)
    features = random.normal(size=(num_records, tokens, width)).astype(np.float32)
    valid = np.arange(tokens) < random.integers(0, tokens + 1, size=num_records)[:, None]
    # What padding gives is not looked at.
    features[~valid] = np.nan
    return TokenFeatures(features, valid, [f"r{i}" for i in range(num_records)], {"feature_type": "mfcc"})


@pytest.mark.parametrize("name", ["f.pkl", "f.npz", "f"])
def test_features_are_read_as_they_were_written(name, tmp_path):
    path, given = tmp_path / "made" / name, some_features()
    given.save(path)
    loaded = TokenFeatures.load(path)
    np.testing.assert_array_equal(loaded.features, given.features)
    np.testing.assert_array_equal(loaded.valid, given.valid)
    assert (loaded.record_ids, loaded.settings) == (given.record_ids, given.settings)
    assert isinstance(loaded.features, np.memmap) == (name == "f")
    assert not [file.name for file in path.parent.rglob(".*")]


def test_a_folder_is_filled_and_appears_last(tmp_path):
    given, path = some_features(), tmp_path / "f"
    features, valid = TokenFeatures.allocate(path, given.features.shape)
    features[:], valid[:] = given.features, given.valid
    with pytest.raises(UserError, match=r"f are unfinished or none: no records\.json in it"):
        TokenFeatures.load(path)
    TokenFeatures(features, valid, given.record_ids, given.settings).save(path)
    np.testing.assert_array_equal(TokenFeatures.load(path).features, given.features)
    TokenFeatures.allocate(path, given.features.shape)
    with pytest.raises(UserError, match="unfinished"):
        TokenFeatures.load(path)


def test_what_holds_no_features_is_refused(tmp_path):
    (tmp_path / "f.pkl").write_bytes(b"\x00" * 9)
    given = some_features()
    TokenFeatures(given.features[0], given.valid, given.record_ids, {}).save(tmp_path / "flat.npz")
    (tmp_path / "dots.bin").write_text("")
    for name, said in (
        ("f.pkl", "f.pkl is no"),
        ("missing", "no features at .*missing; make them with"),
        ("flat.npz", "does not hold features"),
        ("dots.bin", r"must end in \.pkl or \.npz, or be a folder"),
    ):
        with pytest.raises(UserError, match=said):
            TokenFeatures.load(tmp_path / name)


@pytest.mark.parametrize("records", [(0, 60), (7, 31), (5, 5)])
@pytest.mark.parametrize("rows", [1, 33, 10_000])
def test_valid_tokens_are_read_in_order_and_by_place(records, rows):
    given = some_features()
    tokens = ValidTokens(given, *records, torch.device("cpu"))
    wanted = given.features[slice(*records)][given.valid[slice(*records)]]
    assert tokens.shape == wanted.shape
    np.testing.assert_array_equal(np.concatenate([np.empty((0, 5), np.float32), *tokens.blocks(rows)]), wanted)
    np.testing.assert_array_equal(tokens.read(), wanted)
    some = np.flatnonzero(np.random.default_rng(0).random(len(wanted)) < 0.4)
    np.testing.assert_array_equal(tokens.take(some), wanted[some])


def cluster(features, output, *flags):
    return ["--features_path", str(features), "--output_path", str(output), "--device", "cpu", *flags]


FLAGS = [
    ["--num_clusters", "6"],
    ["--num_clusters", "6", "--init", "k-means||", "--num_init", "2", "--tol", "0", "--max_iter", "9"],
    ["--num_clusters", "6", "--init", "random", "--batch_size", "100", "--seed", "3", "--max_iter", "9"],
]


@pytest.mark.parametrize("flags", FLAGS)
def test_files_and_streamed_folders_give_one_model(flags, tmp_path, monkeypatch):
    given = some_features()
    found = {}
    for name in ("f.pkl", "f"):
        given.save(tmp_path / name)
        monkeypatch.setattr(clusters, "IN_MEMORY_BYTES", 0 if name == "f" else 1 << 30)
        assert cli.main(["cluster", *cluster(tmp_path / name, tmp_path / f"{name}.safetensors", *flags)]) == 0
        report = json.loads((tmp_path / f"{name}.json").read_text())
        found[name] = (KMeans.load(tmp_path / f"{name}.safetensors"), report)
    (one, its_report), (other, other_report) = found.values()
    np.testing.assert_array_equal(one.cluster_centers_, other.cluster_centers_)
    assert its_report["cluster_counts"] == other_report["cluster_counts"]
    assert its_report["cluster_scores"] == other_report["cluster_scores"]
    wanted = KMeans(**one.get_params()).fit(given.features[given.valid])
    np.testing.assert_array_equal(one.cluster_centers_, wanted.cluster_centers_)
    assert its_report["cluster_counts"] == wanted.cluster_sizes_.tolist()


def test_ranks_give_the_model_of_one_process(processes, tmp_path):
    some_features().save(tmp_path / "f")
    assert cli.main(["cluster", *cluster(tmp_path / "f", tmp_path / "one.pkl", *FLAGS[0])]) == 0
    flags = cluster(tmp_path / "f", tmp_path / "two.pkl", *FLAGS[0])
    run = processes.run(2, ROOT / "tools" / "clustering.py", *flags)
    assert run.out.count("cluster: 6 clusters of") == 1
    one, two = (KMeans.load(tmp_path / f"{name}.pkl") for name in ("one", "two"))
    np.testing.assert_allclose(two.cluster_centers_, one.cluster_centers_, rtol=1e-5, atol=1e-6)
    assert two.inertia_ == pytest.approx(one.inertia_, rel=1e-9)
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["cluster_counts"] == two["cluster_counts"]
    assert one["cluster_scores"] == pytest.approx(two["cluster_scores"], rel=1e-6)


def test_bad_features_are_named(tmp_path, capsys):
    given = some_features()
    given.features[:][given.valid] = np.nan
    given.save(tmp_path / "f.npz")
    assert cli.main(["cluster", *cluster(tmp_path / "f.npz", tmp_path / "k.pkl", *FLAGS[0])]) == 2
    assert "f.npz cannot be clustered (KMeans.fit: x must be finite, got NaN" in capsys.readouterr().err
    assert cli.main(["cluster", *cluster(tmp_path / "f.npz", tmp_path / "k.pkl", "--num_clusters", "9999")]) == 2
    assert "--num_clusters must be at most the number of tokens" in capsys.readouterr().err


def test_extract_writes_a_folder_or_a_file_of_the_same(tmp_path):
    random = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        (tmp_path / "records").mkdir(exist_ok=True)
        np.save(tmp_path / "records" / f"{name}.npy", random.normal(size=(12, 2500)).astype(np.float32))
    for name in ("f", "f.npz"):
        argv = ["extract", "--data_path", tmp_path / "records", "--output_path", tmp_path / name, "--num_workers", "0"]
        assert cli.main(list(map(str, argv))) == 0
    folder, file = TokenFeatures.load(tmp_path / "f"), TokenFeatures.load(tmp_path / "f.npz")
    assert folder.features.shape == (3, 93, 39)
    np.testing.assert_array_equal(folder.features, file.features)
    np.testing.assert_array_equal(folder.valid, file.valid)
    assert folder.record_ids == file.record_ids
