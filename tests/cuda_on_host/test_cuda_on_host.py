"""The CUDA kernels, compiled for the CPU from the same sources and checked against the references.

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

from hubert_ecg.ops import OPS, attention_reference, label_reference
from hubert_ecg.ops._checked import CUDA_CHECKS

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
ENTRY = re.compile(r'm\.def\("(\w+)_(cpu|cuda)"')
READS_STRIDES = ("masked_span_attention", "masked_span_attention_backward")
# Sanitizers are slow, and find at edges what they find; attention takes every pair of tokens.
MOST_SANITIZED = dict.fromkeys(READS_STRIDES, 2_000)

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
    # The one entry that is no op, and so has no device.
    sources = [CSRC / "gather.cpp", *sorted(CSRC.glob("*.cu"))]
    with ThreadPoolExecutor(2) as pool:
        units = list(pool.map(lambda path: compile_one(path, folder, *flags), sources))
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
                assert tensor.is_contiguous() or op in READS_STRIDES
        entry(*(to_dlpack(a) if isinstance(a, torch.Tensor) else a for a in args), 0)

    return lambda *args: allocate_and_run(kernel, *args)


def of_dtype(args, dtype):
    """Half precision stays where it is compared with itself in float64."""

    def convert(a):
        if not isinstance(a, torch.Tensor) or not a.is_floating_point() or a.dtype == dtype:
            return a
        if a.itemsize == 2 and dtype == torch.float32:
            return a
        return a.to(dtype)

    return tuple(map(convert, args))


def beside(x):
    """The numbers of ``x`` at an address that no wide read may begin at."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def more_samples(op: str):
    """What only the kernels' own limits make special: tile edges, fallbacks, odd addresses, doubtful frames, types."""
    random = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=random)

    if op == "mfcc":
        t = torch.arange(64) / 100
        waves = torch.sin(
            (0.1 + 20 * torch.rand(70, 1, generator=random)) * t + 6 * torch.rand(70, 1, generator=random)
        )
        for scale in (1e-20, 1.0, 1e12, 1e30):
            yield scale * waves, 100.0, 0.5, 50.0
        yield beside(waves), 100.0, 0.5, 50.0
        yield normal(300, 64), 100.0, 0.5, 50.0, 70, 16
        for num_samples in (40, 61, 128):
            yield beside(normal(33, num_samples)), 100.0, 0.5, 50.0
    elif op == "time_freq":
        for num_samples in (32, 64, 66):
            yield (beside(normal(33, num_samples)),)
        yield (normal(300, 64),)
    elif op in ("kmeans_assign", "kmeans_step"):
        for n, k, d in [(300, 64, 16), (129, 65, 47), (200, 128, 48), (130, 129, 49), (257, 200, 96), (5, 3, 4100)]:
            yield beside(normal(n, d)), beside(normal(k, d))
        # Scores within their rounding of each other: two centroids, and then more, that are nearly one.
        centroids = normal(10, 60)
        for times in (2, 5):
            near = centroids.repeat(times, 1) * (1 + 1e-6 * normal(10 * times, 1))
            yield centroids[torch.arange(200) % 10] + 0.1 * normal(200, 60), near
        yield 1e3 + normal(100, 20), 1e3 + normal(90, 20)
    elif op == "kmeans_accumulate":
        for n, k, d in [(300, 500, 70), (1000, 400, 65), (500, 1, 33)]:
            yield beside(normal(n, d)), torch.randint(0, k, (n,), generator=random), k
    elif op == "masked_span_attention":
        yield from attention_samples(normal)
    elif op == "masked_span_attention_backward":
        for q, k, v, *how in attention_samples(normal):
            out, logsumexp = attention_reference.masked_span_attention(q, k, v, *how)
            yield normal(*out.shape), q, k, v, out, logsumexp, *how
    elif op == "frame_assign":
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            how = (9, 23, 64, [12, 11], 100.0, 0.5, 50.0, True)
            for feature_type, width in label_reference.WIDTHS.items():
                ecg = beside(normal(3, 1500).cumsum(1).sin().to(dtype))
                x = label_reference.features(ecg.double(), None, feature_type, *how).flatten(0, 1)
                yield (
                    ecg,
                    None,
                    label_reference._apart(x, (x[:20] + 0.01 * normal(20, width)).float()),
                    feature_type,
                    *how,
                )


def attention_samples(normal):
    """Tile edges, the most tokens and numbers, rows of one token in several tiles; odd strides and addresses."""
    seed, row = torch.tensor(2**40 + 7), torch.arange(53)
    for T, D in [(16, 16), (17, 65), (12, 129), (48, 40), (128, 128)]:
        spans = torch.tensor([[[0, T // 3], [T // 2, T - 1]]])
        q, k, v = normal(1, T, 3, 1, D).unbind(2)
        k[0, T - 1], v[0, T - 1] = torch.nan, torch.inf
        if T < 128:
            yield q, k, v, spans, None, 0.2, seed, None
        yield q, k, v, spans, (row * 7 % (T + 2) - 1)[None] // 2, 0.0, None, None
    packed = normal(2, 20, 3, 2, 72)
    yield packed[:, 2:, :, :, 8:], None, None, None, None, 0.0, None, None
    yield packed[:, 2:, :, :, 1:65], None, None, torch.zeros(2, 0, 2, dtype=torch.int64), None, 0.1, seed, None
    q, k, v = (x.transpose(1, 2) for x in normal(3, 2, 2, 19, 32))
    yield q, k, v, None, torch.tensor([[5], [-1]]), 0.0, None, -2.0
    yield normal(1, 0, 3, 2, 8), None, None, None, torch.tensor([[0, 1]]), 0.0, None, None


def check(module, op: str, most: int | None = None) -> int:
    """Compares an op with its reference in float64 on its samples, of up to ``most`` numbers; returns how many."""
    run, count = runner(module, op), 0
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
    try:
        for sample in (*OPS[op].samples(), *more_samples(op)):
            if most is not None and sample[0].numel() > most:
                continue
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


def test_what_is_checked_here_is_said():
    assert {op for op, how in CUDA_CHECKS.items() if "host build" in how} == set(kernels())


@pytest.mark.parametrize("op", ["kmeans_accumulate", "kmeans_step", "masked_span_attention_backward"])
def test_sums_are_the_same_bits_in_any_order(op, host_module, monkeypatch):
    run = runner(host_module, op)
    for sample in (*OPS[op].samples(), *more_samples(op)):
        monkeypatch.setenv("CUDA_ON_HOST_ORDER", "forward")
        want = run(*sample)
        monkeypatch.setenv("CUDA_ON_HOST_ORDER", "reverse")
        torch.testing.assert_close(run(*sample), want, rtol=0, atol=0, equal_nan=True)


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
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
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
        (5, "wrong"),
        (6, "does not begin at a multiple of 32 bytes"),
        (7, "right"),
    ],
    ids=["barrier", "race", "shuffle", "mask", "overflow", "wait", "tile", "none"],
)
@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_mistakes_are_found(which, said, order, mistakes):
    environment = {**os.environ, "CUDA_ON_HOST_ORDER": order}
    done = subprocess.run([mistakes, str(which)], env=environment, capture_output=True, text=True)
    assert said in done.stdout + done.stderr


if __name__ == "__main__":
    built = load(Path(sys.argv[1]))
    for name in kernels():
        check(built, name, most=MOST_SANITIZED.get(name, 60_000))
        print(name)
    print("clean")
