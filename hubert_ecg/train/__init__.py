"""Training: the pretrain and finetune commands, and prediction with their models."""

from hubert_ecg.train.finetune import finetune
from hubert_ecg.train.machine import device
from hubert_ecg.train.predict import predict
from hubert_ecg.train.pretrain import pretrain

__all__ = ["device", "finetune", "predict", "pretrain"]
