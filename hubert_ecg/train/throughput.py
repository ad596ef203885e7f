"""How fast a run is, and how much of its device it uses."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hubert_ecg.models import HubertECGConfig, num_tokens
from hubert_ecg.train import distributed

# TFLOP/s of dense bfloat16 products, from the makers' data sheets (halved where those count sparsity).
# What a device's name begins with; longer names come first.
_PEAK_TFLOPS = {
    "NVIDIA B200": 2250.0,
    "NVIDIA GH200": 989.4,
    "NVIDIA H200": 989.4,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H100 PCIe": 756.5,
    "NVIDIA H100": 989.4,
    "NVIDIA A100": 312.0,
    "NVIDIA A30": 165.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA L4": 121.0,
}

# Of all ranks together, but for the memory, which is that of rank 0.
COLUMNS = ("records_per_s", "data_wait_share", "tflops_per_s", "mfu", "peak_memory_gb")


def forward_flops(config: HubertECGConfig, num_samples: int) -> dict[str, int]:
    """Floating-point operations of a model's forward pass on one record, by part.

    A multiplication and an addition are two. Matrix products and convolutions are counted, for all tokens: what a
    step saves by computing only the tokens that reach the loss shows as speed.

    Args:
        config: Shape of the model. Its codebooks, or else its labels, are the head.
        num_samples: Samples of all leads together.

    Returns:
        ``extractor``, ``projection``, ``positions``, ``layers`` (of which ``attention``) and ``head``.
    """
    tokens, width = num_tokens(config, num_samples), config.hidden_size
    taps, groups = config.num_conv_pos_embeddings, config.num_conv_pos_embedding_groups
    extractor, length, channels = 0, num_samples, 1
    for out, kernel, stride in zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True):
        length = max(0, (length - kernel) // stride + 1)
        extractor += 2 * length * out * channels * kernel
        channels = out
    attention = config.num_hidden_layers * 2 * 2 * tokens**2 * width
    products = config.num_hidden_layers * 2 * tokens * width * (4 * width + 2 * config.intermediate_size)
    if config.id2label:
        head = 2 * width * len(config.id2label)
    else:
        head = sum(2 * tokens * config.classifier_proj_size * (width + size) for size in config.vocab_sizes)
    return {
        "extractor": extractor,
        "projection": 2 * tokens * channels * width,
        "positions": 2 * tokens * width * taps * width // groups,
        "layers": products + attention,
        "attention": attention,
        "head": head,
    }


def training_flops(model: nn.Module, num_samples: int) -> int:
    """Operations of a training step for one record: three forward passes, but one for parts that are not trained.

    Args:
        model: A model with a HubertECGConfig as ``config``; 0 for any other.
        num_samples: Samples of all leads together.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, HubertECGConfig):
        return 0
    parts = forward_flops(config, num_samples)
    extractor, attention = parts.pop("extractor"), parts.pop("attention")
    assert attention <= parts["layers"]
    trained = {
        name.removeprefix("hubert_ecg.").split(".")[0] for name, p in model.named_parameters() if p.requires_grad
    }
    head, encoder = parts.pop("head"), sum(parts.values())
    flops = extractor * (3 if "feature_extractor" in trained else 1)
    flops += encoder * (3 if trained & {"feature_extractor", "feature_projection", "encoder"} else 1)
    return flops + 3 * head


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """What the device could do at most in this precision, TFLOP/s; NaN where that is not known."""
    if device.type != "cuda" or dtype == torch.float32:
        return float("nan")
    name = torch.cuda.get_device_name(device)
    return next((peak for start, peak in _PEAK_TFLOPS.items() if name.startswith(start)), float("nan"))


def peak_memory_gb(device: torch.device) -> float:
    """The most memory in use so far, 1e9 bytes: of the device where it counts, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        return float("nan")
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024) / 1e9


class Interval:
    """What happened since the last row of the log.

    Scalars stay on the device, weighted so that their sum over micro-batches and ranks is a mean over the step.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.peak_tflops = peak_tflops(device, dtype)
        self.sums: dict[str, Tensor] = {}
        self.num_steps = 0
        self.start()

    def start(self) -> None:
        """Begin to measure time."""
        self.num_records, self.waited, self.since = 0.0, 0.0, time.monotonic()

    def add(self, values: Mapping[str, Tensor], share: float | Tensor = 1.0) -> None:
        """Take in the scalars of a micro-batch that has this share in its step."""
        for name, value in values.items():
            value = value.detach().float() * share
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def end(self, flops_per_record: int) -> dict[str, float]:
        """Means over the interval on all ranks and the speed, which looks at the device; the next interval begins."""
        seconds = max(time.monotonic() - self.since, 1e-9)
        self._add_up_ranks()
        names = list(self.sums)
        means = dict(zip(names, (torch.stack([self.sums[n] for n in names]) / self.num_steps).tolist(), strict=True))
        heard = distributed.gather((self.num_records, self.waited))
        speed = sum(records for records, _ in heard) / seconds
        tflops = speed * flops_per_record / 1e12 if flops_per_record else float("nan")
        values = (
            speed,
            sum(waited for _, waited in heard) / len(heard) / seconds,
            tflops,
            tflops / len(heard) / self.peak_tflops,
            peak_memory_gb(self.device),
        )
        self.sums, self.num_steps = {}, 0
        self.start()
        return means | dict(zip(COLUMNS, values, strict=True))

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to write the same row; for all ranks together, on rank 0."""
        self._add_up_ranks()
        return {"sums": self.sums, "steps": self.num_steps}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up a state; on every rank."""
        mine = float(distributed.rank() == 0)
        self.sums = {name: value.to(self.device) * mine for name, value in state["sums"].items()}
        self.num_steps = state["steps"]

    def _add_up_ranks(self) -> None:
        """Rank 0 gets the sums of all."""
        if distributed.num_ranks() == 1 or not self.sums:
            return
        total = distributed.add_up(torch.stack(list(self.sums.values())))
        mine = float(distributed.rank() == 0)
        self.sums = dict(zip(self.sums, (total * mine).unbind(), strict=True))
