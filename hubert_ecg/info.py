"""What this installation can do: versions, devices, and who serves each op."""

from __future__ import annotations

import importlib.util
import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from hubert_ecg import __version__, native
from hubert_ecg.config import InfoConfig
from hubert_ecg.ops import OPS

OPTIONAL = {
    "triton": "gpu",
    "cupy": "gpu",
    "huggingface_hub": "hub",
    "h5py": "formats",
    "onnx": "onnx",
    "onnxruntime": "onnx",
}


def collect() -> dict[str, Any]:
    """Versions, devices, optional packages and op backends as plain JSON values."""
    ops = {}
    for name, op in sorted(OPS.items()):
        ops[name] = {
            device: {
                "default": op.picked(device),
                "why": op.why(device),
                "backends": list(table),
                "missing": op.missing[device],
            }
            for device, table in op.backends.items()
        }
    packages = ("torch", "numpy", "scipy", "pandas", "pyarrow", "scikit-learn", "wfdb", "safetensors")
    return {
        "hubert-ecg": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in packages},
        "cpu_threads": torch.get_num_threads(),
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "native_module": native.why_missing or str(native._C.__file__),
        "native_cuda": any(name.endswith("_cuda") for name in dir(native._C)),
        "optional": {
            name: "installed" if importlib.util.find_spec(name) else f"missing (pip install hubert-ecg[{extra}])"
            for name, extra in OPTIONAL.items()
        },
        "ops": ops,
    }


def info(config: InfoConfig) -> None:
    """Prints :func:`collect` as a table or as JSON."""
    facts = collect()
    if config.json:
        print(json.dumps(facts, indent=2))
        return

    from rich.console import Console
    from rich.table import Table

    # Redirected, it is read by people and programs alike: nothing is cut.
    console = Console(width=None if sys.stdout.isatty() else 160)
    for key in ("hubert-ecg", "python", "machine", "cpu_threads", "native_module"):
        console.print(f"{key:<14} {facts[key]}", highlight=False, soft_wrap=True)
    console.print(f"{'cuda devices':<14} {', '.join(facts['cuda_devices']) or 'none'}", highlight=False)
    kernels = "built" if facts["native_cuda"] else "not built: nvcc was not on PATH; put it there and install again"
    if native.why_missing:
        kernels = "not built, as the native module"
    console.print(f"{'cuda kernels':<14} {kernels}", highlight=False, soft_wrap=True)
    for key, value in {**facts["packages"], **facts["optional"]}.items():
        console.print(f"  {key:<16} {value}", highlight=False, markup=False)
    table = Table(title="ops")
    for column in ("op", "device", "default", "why", "backends", "missing, and why"):
        table.add_column(column, no_wrap=column in ("op", "device", "default"))
    for name, devices in facts["ops"].items():
        for device, row in devices.items():
            missing = "; ".join(f"{backend}: {reason}" for backend, reason in row["missing"].items())
            table.add_row(name, device, row["default"], row["why"], ", ".join(row["backends"]), missing)
    console.print(table)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"
