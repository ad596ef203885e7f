"""The CUDA kernels of the data side, compiled for the CPU from the same sources and checked against the references.

Every ``csrc/*.cu`` is compiled, and every ``<op>_cuda`` of ``module.cpp`` is run on the samples of its op: a new kernel
is covered when it exists. As a script, this file checks the module that it is given: so runs the sanitized build.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.dlpack import to_dlpack

from hubert_ecg.ops import OPS

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
ENTRY = re.compile(r'm\.def\("(\w+)_(cpu|cuda)"')

pytestmark = pytest.mark.slow


def kernels() -> list[str]:
    """Ops that ``module.cpp`` names a CUDA kernel for."""
    return [op for op, device in ENTRY.findall((CSRC / "module.cpp").read_text()) if device == "cuda"]


def compile_one(source: Path, folder: Path, *flags: str) -> Path:
    import pybind11

    unit = folder / f"{source.name}.o"
    includes = [f"-I{path}" for path in (CSRC, HERE, pybind11.get_include(), sysconfig.get_paths()["include"])]
    command = [
        "g++",
        "-std=c++17",
        "-fPIC",
        "-fvisibility=hidden",
        "-DHUBERT_ECG_CUDA",
        "-Wall",
        "-Wno-unknown-pragmas",
    ]
    done = subprocess.run(
        [*command, *includes, *flags, "-x", "c++", "-c", source, "-o", unit], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return unit


def build(entry: Path, folder: Path, *flags: str) -> Path:
    """``_C`` out of the compiled ``entry`` and all kernels, compiled by the host's compiler."""
    with ThreadPoolExecutor(2) as pool:
        units = list(pool.map(lambda path: compile_one(path, folder, *flags), sorted(CSRC.glob("*.cu"))))
    module = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    done = subprocess.run(["g++", "-shared", *flags, entry, *units, "-o", module], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return module


def load(path: Path):
    loader = importlib.machinery.ExtensionFileLoader("_C", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C", loader))
    loader.exec_module(module)
    return module


def runner(module, op: str):
    """The op with its host-built CUDA kernel, on CPU tensors."""
    allocate_and_run = OPS[op].backends["cpu"]["native"].func
    entry = getattr(module, f"{op}_cuda")

    def kernel(*args):
        for tensor in args:
            if isinstance(tensor, torch.Tensor):
                assert tensor.is_contiguous()
        entry(*(to_dlpack(a) if isinstance(a, torch.Tensor) else a for a in args), 0)

    return lambda *args: allocate_and_run(kernel, *args)


def of_dtype(args, dtype):
    return tuple(a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)


def check(module, op: str) -> int:
    """Compares an op with its reference in float64 on all its samples; returns how many there were."""
    run, count = runner(module, op), 0
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
    try:
        for sample in OPS[op].samples():
            for dtype, (rtol, atol) in OPS[op].tolerance.items():
                args = of_dtype(sample, dtype)
                got, want = run(*args), OPS[op].reference(*of_dtype(args, torch.float64))
                torch.testing.assert_close(got, want, rtol=rtol, atol=atol, equal_nan=True, check_dtype=False)
                count += 1
    finally:
        torch.use_deterministic_algorithms(False)
    return count


@pytest.fixture(scope="session")
def entry(tmp_path_factory) -> Path:
    """``module.cpp`` with its CUDA half alone, compiled."""
    folder = tmp_path_factory.mktemp("entry")
    lines = (CSRC / "module.cpp").read_text().splitlines()
    source = folder / "module.cpp"
    source.write_text("\n".join(line for line in lines if not (ENTRY.search(line) and "_cpu" in line)))
    return compile_one(source, folder, "-O0")


@pytest.fixture(scope="session")
def host_module(entry, tmp_path_factory):
    return load(build(entry, tmp_path_factory.mktemp("cuda_on_host"), "-O1"))


def test_every_cuda_source_has_an_entry():
    stems = {path.stem for path in CSRC.glob("*.cu")}
    assert stems, f"no CUDA sources in {CSRC}"
    declared = {stem: (CSRC / f"{stem}.h").read_text() for stem in stems}
    reached = {stem for stem, text in declared.items() if any(f"{op}_cuda(" in text for op in kernels())}
    assert reached == stems


@pytest.mark.parametrize("op", kernels())
@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_kernel_agrees_with_the_reference(op, order, host_module, monkeypatch):
    monkeypatch.setenv("CUDA_ON_HOST_ORDER", order)
    assert check(host_module, op) > 0


def test_kernels_are_clean_under_sanitizers(entry, tmp_path):
    module = build(entry, tmp_path, "-O1", *SANITIZERS)
    runtime = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(Path(__file__).resolve()), str(module)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == [*kernels(), "clean"]


@pytest.fixture(scope="session")
def mistakes(tmp_path_factory) -> Path:
    program = tmp_path_factory.mktemp("mistakes") / "mistakes"
    source = ["-x", "c++", HERE / "mistakes.cu", "-o", program]
    done = subprocess.run(
        ["g++", "-std=c++17", "-O0", "-fsanitize=address", f"-I{CSRC}", f"-I{HERE}", *source], text=True
    )
    assert done.returncode == 0
    return program


@pytest.mark.parametrize(
    ("which", "said"),
    [
        (0, "wait at a barrier or shuffle that the others never reach"),
        (1, "wrong"),
        (2, "wait at a barrier or shuffle that the others never reach"),
        (3, "a shuffle reads a lane that takes no part"),
        (4, "heap-buffer-overflow"),
        (5, "right"),
    ],
    ids=["barrier", "race", "shuffle", "mask", "overflow", "none"],
)
@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_mistakes_are_found(which, said, order, mistakes):
    environment = {**os.environ, "CUDA_ON_HOST_ORDER": order}
    done = subprocess.run([mistakes, str(which)], env=environment, capture_output=True, text=True)
    assert said in done.stdout + done.stderr


if __name__ == "__main__":
    built = load(Path(sys.argv[1]))
    for name in kernels():
        check(built, name)
        print(name)
    print("clean")
