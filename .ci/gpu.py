"""What only a GPU can show: right values on it, no memory errors and no races, and how fast it is.

    python .ci/gpu.py [PART ...] [-- MORE FOR PYTEST]

Takes the Python that it runs in, whose torch finds a CUDA device, and nvcc, cmake and ninja; it asks no network and
installs nothing but this checkout. All parts run in their order, or those that are named:

    build       compiles C++ and CUDA, and installs the package in place, without its dependencies
    cuda        the tests that need a GPU
    tests       the whole suite, which fails where it finds no CUDA device
    features    benchmarks: ceilings of the device, features, labels, k-means
    model       benchmarks: attention, convolutions, norms, loss
    steps       benchmarks: steps of pretraining and fine-tuning
    use         benchmarks: inference, padding, the label command
    memcheck    compute-sanitizer looks for accesses out of bounds, in small cases of every kernel
    racecheck   and for races in shared memory

Each part is stopped after eight minutes. Rows of benchmarks end up in benchmarks/results/, in a file of the device; the
table at the end shows what was measured now beside what was there before.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 480
# How long what is stopped may take to write down what it has.
PATIENCE_S = 20
# Of tests; each has a few threads, and all share the GPU.
NUM_PROCESSES = max(1, min(8, (os.cpu_count() or 1) // 2))
FEATURES = ("ceilings", "mfcc", "time_freq", "label", "kmeans", "kmeans_curves")
MODEL = ("attention", "codebook_loss", "conv_norm_gelu", "positional_conv", "add_norm", "bias_gelu")
STEPS = ("pretrain_step", "finetune_step")
USE = ("inference", "padding", "label")
# In the mangled names of kernels: those of CUDA stand in a namespace, those of Triton are called after their ops.
KERNELS = (
    "hubert_ecg",
    "_add_norm",
    "_bias_gelu",
    "_codebook",
    "_conv_norm",
    "_mask_embedding",
    "_masked_span",
    "_moments",
)
PYTEST = [sys.executable, "-m", "pytest", "-q"]

READY = """
import torch
from hubert_ecg import native
assert torch.cuda.is_available(), "torch finds no CUDA device"
assert native.find("mfcc", "cuda"), "built without CUDA: nvcc must be on PATH"
"""

Part = Callable[[list[str]], None]


def run(command: list[str | Path], limit_s: float | None = None, **variables: str) -> None:
    """Raises CalledProcessError where it fails, and TimeoutExpired where it is late and was ended."""
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=os.environ | variables, start_new_session=True)
    try:
        code = process.wait(limit_s or LIMIT_S)
    except BaseException:
        # Pytest writes down what it has measured until then.
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if code:
        raise subprocess.CalledProcessError(code, command)


def build(more: list[str]) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "install", "--no-build-isolation", "--no-deps", "-v", "-e", "."])
    # What is missing is said here, and fails where it is used.
    subprocess.run([*pip, "check"], cwd=ROOT)
    run([sys.executable, "-c", READY])


def suite(*options: str) -> Part:
    def part(more: list[str]) -> None:
        threads = str(max(1, (os.cpu_count() or 1) // NUM_PROCESSES))
        command = [*PYTEST, "-n", str(NUM_PROCESSES), *options, *more]
        run(command, FAIL_WITHOUT_CUDA="1", OMP_NUM_THREADS=threads)

    return part


def sanitize(tool: str, *options: str) -> Part:
    def part(more: list[str]) -> None:
        command = [
            "compute-sanitizer",
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            "--target-processes",
            "application-only",
        ]
        # Those of torch and its libraries would only make it slow.
        command += [word for kernel in KERNELS for word in ("--kernel-name", f"kns={kernel}")]
        kernels = "(agrees_with_reference or gradients_agree) and cuda and (native or triton)"
        cases = [*PYTEST, "tests/ops/test_every_op.py", "-k", kernels, *more]
        # Each tensor is an allocation of its own, so that what lies beside it belongs to nobody.
        run([*command, *options, *cases], FAIL_WITHOUT_CUDA="1", PYTORCH_NO_CUDA_MEMORY_CACHING="1")

    return part


def benchmarks(part: str, stems: tuple[str, ...], *options: str) -> Part:
    def measure(more: list[str]) -> None:
        found = ROOT / "build" / "gpu" / f"{part}.json"
        found.parent.mkdir(parents=True, exist_ok=True)
        found.unlink(missing_ok=True)
        files = [f"benchmarks/test_{stem}.py" for stem in stems]
        how = ["-s", "--device", "cuda", "--rounds", "3", "--benchmark-columns", "median", "--benchmark-json", found]
        try:
            run([*PYTEST, *files, *how, *options, *more])
        finally:
            if found.is_file() and found.stat().st_size:
                compared = subprocess.run(
                    [sys.executable, "benchmarks/rows.py", "compare", found], cwd=ROOT, capture_output=True, text=True
                )
                table.append(compared.stdout or compared.stderr)
                run([sys.executable, "benchmarks/rows.py", "keep", found])

    return measure


table: list[str] = []
PARTS: dict[str, Part] = {
    "build": build,
    # Compiling Triton's kernels takes longest: the cases of one file are shared among processes.
    "cuda": suite("-m", "cuda", "--dist", "worksteal"),
    "tests": suite("--dist", "loadfile"),
    "features": benchmarks("features", FEATURES, "-k", "not test_command"),
    "model": benchmarks("model", MODEL),
    "steps": benchmarks("steps", STEPS),
    "use": benchmarks("use", USE, "-k", "not test_label or test_command"),
    "memcheck": sanitize("memcheck", "--padding", "64"),
    "racecheck": sanitize("racecheck"),
}


def main(*arguments: str) -> int:
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    names, more = list(arguments), []
    if "--" in names:
        more = names[names.index("--") + 1 :]
        names = names[: names.index("--")]
    if unknown := [name for name in names if name not in PARTS]:
        raise SystemExit(f"gpu.py: {unknown[0]} is no part; parts are {', '.join(PARTS)}\n{__doc__}")
    said = []
    for name in names or PARTS:
        print(f"\n== {name}", flush=True)
        start, outcome = time.monotonic(), "passed"
        try:
            PARTS[name](more)
        except subprocess.CalledProcessError as error:
            outcome = f"failed, exit code {error.returncode}"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {LIMIT_S // 60} minutes"
        except FileNotFoundError as error:
            outcome = f"failed, {error.filename} is not on PATH"
        said.append((name, outcome, time.monotonic() - start))
        if name == "build" and outcome != "passed":
            break
    print(*["", *table], sep="\n")
    for name, outcome, seconds in said:
        print(f"{name:<12}{seconds:6.0f} s  {outcome}")
    return int(any(outcome != "passed" for _, outcome, _ in said))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
