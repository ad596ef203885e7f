"""Training: the commands from features to evaluation, and prediction with their models."""

from hubert_ecg.train.audit import audit
from hubert_ecg.train.evaluate import evaluate
from hubert_ecg.train.extract import cluster_features, extract_features
from hubert_ecg.train.finetune import finetune
from hubert_ecg.train.iterations import pretrain
from hubert_ecg.train.label import write_labels
from hubert_ecg.train.machine import device
from hubert_ecg.train.predict import predict
from hubert_ecg.train.prepare import prepare

__all__ = [
    "audit",
    "cluster_features",
    "device",
    "evaluate",
    "extract_features",
    "finetune",
    "predict",
    "prepare",
    "pretrain",
    "write_labels",
]
