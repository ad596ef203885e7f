from __future__ import annotations

import pytest
import torch

from hubert_ecg import train
from hubert_ecg.config import EvaluateConfig, ExtractConfig, UserError
from hubert_ecg.models import HubertECGConfig, HubertECGForClassification


def config(cohort, path, **fields) -> EvaluateConfig:
    return EvaluateConfig(
        "synthetic", "all", data_path=cohort.path, model_path=str(path), device="cpu", num_workers=0, **fields
    )


def test_a_threshold_is_for_multilabel_models(cohort, tmp_path):
    torch.manual_seed(0)
    names = cohort.label_names("all")
    shape = HubertECGConfig.preset("tiny")
    HubertECGForClassification(shape, label_names=names, problem="multiclass").save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"threshold is for multilabel models, got 0\.3 for multiclass"):
        train.evaluate(config(cohort, tmp_path / "model", threshold=0.3))
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"compat": "published", "crop_s": 10.0}, "crop_s must be 5 with compat published"),
        ({"downsampling_factor": 7}, "downsampling_factor 7"),
    ],
)
def test_features_that_cannot_be_are_named_before_anything_is_packed(tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        train.extract_features(ExtractConfig(tmp_path, output_path=tmp_path / "f.pkl", device="cpu", **fields))
    assert not list(tmp_path.iterdir())
