"""The models: encoder, masked prediction, classification, and their weights."""

from hubert_ecg.models.encoder import ModelOutput
from hubert_ecg.models.hubert_ecg import HubertECG, HubertECGForPretraining
from hubert_ecg.models.hubert_ecg_classification import HubertECGForClassification
from hubert_ecg.models.pretrained import load_file, save_file
from hubert_ecg.models.shape import HubertECGConfig, num_tokens, padding_lengths, token_mask

__all__ = [
    "HubertECG",
    "HubertECGConfig",
    "HubertECGForClassification",
    "HubertECGForPretraining",
    "ModelOutput",
    "load_file",
    "num_tokens",
    "padding_lengths",
    "save_file",
    "token_mask",
]
