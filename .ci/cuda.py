"""Compiles every csrc/*.cu for the GPUs that wheels are built for, and prints what each kernel takes.

Fails on a compiler warning, and where a thread spills more than MOST_SPILLED bytes of registers to memory. Takes the
nvcc on PATH, else the one of NVIDIA's wheels, installed beside the environment: neither needs a GPU.

    python .ci/cuda.py [FOLDER FOR NVCC]
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("sm_80", "sm_90", "sm_100")
# Loads and stores together. A few numbers that a loop leaves alone may wait in memory; a loop's own may not.
MOST_SPILLED = 160
WHEELS = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
]

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?, (\d+) bytes smem)?")


def find_nvcc(folder: Path) -> Path:
    found = shutil.which("nvcc")
    if found:
        return Path(found)
    if not list(folder.glob("**/bin/nvcc")):
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", folder, *WHEELS], check=True)
    (nvcc,) = folder.glob("**/bin/nvcc")
    return nvcc


def compile_one(nvcc: Path, source: Path) -> str:
    """What ptxas says of each kernel of ``source``."""
    targets = [f"-gencode=arch=compute_{t[3:]},code={t}" for t in TARGETS]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-std=c++17", "-O3", "-Xptxas=-v", "--Werror=all-warnings", *targets, "-c", source]
        done = subprocess.run([*command, "-o", Path(folder) / "unit.o"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{source.name} does not compile:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def kernels(said: str):
    """(kernel, target, registers, static shared bytes, bytes spilled)"""
    name = target = spilled = None
    for line in said.splitlines():
        if entry := ENTRY.search(line):
            name, target = entry.groups()
        elif spills := SPILLS.search(line):
            spilled = sum(map(int, spills.groups()))
        elif used := USED.search(line):
            yield readable(name), target, int(used[1]), int(used[2] or 0), spilled


def readable(symbol: str) -> str:
    """``kernel<64, true>`` of a mangled name."""
    names = {"f": "float", "d": "double", "l": "int64_t", "Lb0E": "false", "Lb1E": "true"}
    names |= {"6__half": "half", "13__nv_bfloat16": "bfloat16"}
    at, parts = symbol.index("N") + 1, []
    while match := re.match(r"\d+", symbol[at:]):
        begin = at + len(match[0])
        at = begin + int(match[0])
        parts.append(symbol[begin:at])
    argument = r"L[a-z]\d+E|6__half|13__nv_bfloat16|[a-z]"
    arguments = re.match(f"I((?:{argument})+)E", symbol[at:])
    if not arguments:
        return parts[-1]
    given = re.findall(argument, arguments[1])
    return f"{parts[-1]}<{', '.join(names.get(a) or re.sub(r'[^0-9]', '', a) for a in given)}>"


def main() -> None:
    nvcc = find_nvcc(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / ".venv" / "nvcc"))
    sources = sorted(ROOT.glob("csrc/*.cu"), key=lambda path: -path.stat().st_size)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        said = list(pool.map(lambda source: compile_one(nvcc, source), sources))
    print(f"{'kernel':<42}{'target':<9}{'registers':>9}{'shared':>8}{'spilled':>9}")
    rows = [row for text in said for row in kernels(text)]
    for kernel, target, registers, shared, spilled in rows:
        print(f"{kernel:<42}{target:<9}{registers:>9}{shared:>8}{spilled:>9}")
    if not rows:
        raise SystemExit(f"{nvcc} says nothing of its kernels")
    guilty = [f"{kernel} for {target}: {spilled}" for kernel, target, _, _, spilled in rows if spilled > MOST_SPILLED]
    if guilty:
        raise SystemExit(f"more than {MOST_SPILLED} bytes spilled by a thread: {'; '.join(guilty)}")


if __name__ == "__main__":
    main()
