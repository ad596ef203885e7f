"""The training guide's name for the fine-tuning model."""

from hubert_ecg.models import HubertECGConfig, HubertECGForClassification

__all__ = ["HubertECGConfig", "HubertECGForClassification"]
