"""The training guide's name for the pretraining model."""

from hubert_ecg.models import HubertECG, HubertECGConfig, HubertECGForPretraining

__all__ = ["HubertECG", "HubertECGConfig", "HubertECGForPretraining"]
