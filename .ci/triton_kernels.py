"""Compiles every Triton kernel that training launches, for the GPUs of .ci/cuda.py, and prints what each takes.

Models of two widths train for a step whose kernels are compiled and never run, so that no GPU is needed. Fails where
one does not compile, and where it wants more shared memory than the GPU has. Registers that are spilled to memory are
shown and bound nothing: of the same kernel, each version of Triton makes another program.

    python .ci/triton_kernels.py [TARGET ...]
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from cuda import TARGETS
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hubert_ecg import ops
from hubert_ecg.models import HubertECGConfig, HubertECGForPretraining
from hubert_ecg.ops import OPS, use_backend

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
USED = re.compile(r"REG:(\d+) STACK:(\d+)")
# Shared memory of a block, from NVIDIA's tables of compute capabilities.
MOST_SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
BATCH = 2


class Nowhere:
    """A driver of a GPU that is not there."""

    def __init__(self, target: str) -> None:
        self.target = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def kernels_of(target: str) -> list[tuple[str, str, int, int, int]]:
    """Of every kernel that steps launch: its name, what launched it, registers, shared memory and spilled bytes."""
    for op in OPS.values():
        if "triton" in op.backends["cuda"]:
            op.backends["cpu"]["triton"] = op.backends["cuda"]["triton"]
    found: dict[str, tuple[str, str, int, int, int]] = {}
    launch, what = JITFunction.run, ""

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in found:
            registers, spilled = used(kernel)
            found[kernel.hash] = kernel.metadata.name, what, registers, kernel.metadata.shared, spilled
        return kernel

    driver.set_active(Nowhere(target))
    JITFunction.run = compile_only
    for size in ("base", "large"):
        for dtype in (torch.bfloat16, torch.float32):
            what = f"{size}, {str(dtype).removeprefix('torch.')}"
            step(size, dtype)
    return list(found.values())


def step(size: str, dtype: torch.dtype) -> None:
    """Forward and backward of two layers, of records of 5 s, and in half precision of padded ones of 20 s.

    The first layer computes all tokens, the last one those that are masked. Numbers mean nothing.
    """
    for seconds in (5,) if dtype == torch.float32 else (5, 20):
        config = HubertECGConfig.preset(size, vocab_sizes=[500], layerdrop=0.0, num_hidden_layers=2)
        model = HubertECGForPretraining(config).train()
        ecg = torch.zeros(BATCH, 12, 100 * seconds)
        lengths = None if seconds == 5 else torch.tensor([100 * seconds, 700])
        tokens = 93 if seconds == 5 else 374
        mask = ops.span_mask(BATCH, tokens, 0.33, seed=0)
        labels = torch.zeros(BATCH, tokens, dtype=torch.int64)
        half = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
        with use_backend("triton"), half:
            model(ecg, lengths=lengths, labels=labels, mask_indices=mask).loss.backward()


def used(kernel: Any) -> tuple[int, int]:
    """Registers, and bytes that a thread spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        said = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = USED.search(said).groups()  # type: ignore[union-attr]
    return int(registers), int(stack)


def main(*targets: str) -> None:
    targets = targets or TARGETS
    guilty = []
    print(f"{'kernel':<50}{'in':<18}{'target':<9}{'registers':>9}{'shared':>9}{'spilled':>9}")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for target, kernels in zip(targets, pool.map(kernels_of, targets), strict=True):
            for name, what, registers, shared, spilled in kernels:
                print(f"{name:<50}{what:<18}{target:<9}{registers:>9}{shared:>9}{spilled:>9}")
                if shared > MOST_SHARED.get(target, shared):
                    guilty.append(f"{name} ({what}) for {target}: {shared} bytes")
            if not kernels:
                raise SystemExit(f"no kernel was launched for {target}")
    if guilty:
        raise SystemExit("\n".join(["more shared memory than there is:", *guilty]))


if __name__ == "__main__":
    main(*sys.argv[1:])
