"""The training guide's door to :func:`hubert_ecg.prepare_ecg_for_inference`."""

from hubert_ecg.signal import prepare_ecg_for_inference

__all__ = ["prepare_ecg_for_inference"]
