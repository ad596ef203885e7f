from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from hubert_ecg.evaluation import write_predictions


@pytest.mark.parametrize("format", ["csv", "parquet"])
def test_predictions_come_back_bit_for_bit(tmp_path, format):
    rng = np.random.default_rng(0)
    scores, targets = rng.random((5, 2)), rng.integers(0, 2, (5, 2))
    ids = ["001", "a,b", 'q"', "é", " x"]
    path = write_predictions(tmp_path / "new" / f"p.{format}", ids, ["A", "B, c"], scores, targets)
    if format == "csv":
        # Read as text: old pandas rounds numbers on the way in.
        back = pd.read_csv(path, dtype=str, keep_default_na=False)
        back[back.columns[1:]] = back[back.columns[1:]].astype(float)
    else:
        back = pd.read_parquet(path)
    assert list(back.columns) == ["record_id", "score_A", "score_B, c", "target_A", "target_B, c"]
    assert back["record_id"].tolist() == ids
    np.testing.assert_array_equal(back[["score_A", "score_B, c"]], scores)
    np.testing.assert_array_equal(back[["target_A", "target_B, c"]], targets)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_format_wins_over_suffix_and_targets_may_be_missing_or_classes(tmp_path):
    path = write_predictions(tmp_path / "p.out", ["r"], ["a", "b"], np.ones((1, 2)), format="parquet")
    assert list(pd.read_parquet(path).columns) == ["record_id", "score_a", "score_b"]
    path = write_predictions(tmp_path / "p.csv", ["r"], ["a", "b"], np.ones((1, 2)), np.array([1]))
    assert pd.read_csv(path)["target"].tolist() == [1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["r"], ["a"], np.zeros((2, 1))), "scores must be \\[1, 1\\], a row for each record"),
        ((["r"], ["a", "a"], np.zeros((1, 2))), "label_names must be distinct"),
        ((["r"], ["a"], np.zeros((1, 1)), np.zeros((2, 1))), "targets must be \\[1, 1\\]"),
        ((["r"], ["a"], np.zeros((1, 1)), None, "xlsx"), "format must be csv or parquet, got 'xlsx'"),
    ],
)
def test_wrong_predictions_are_named_and_nothing_is_written(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        write_predictions(tmp_path / "p.csv", *arguments)
    assert [file for file in tmp_path.iterdir() if file.is_file()] == []
