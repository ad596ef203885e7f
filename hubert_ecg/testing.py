"""What tests and benchmarks share: comparison that names the tensor, poisoned memory, peers, large stores."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib.util
import math
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hubert_ecg.data import Store


def assert_close(actual: Any, expected: Any, *, rtol: float, atol: float, name: str = "output") -> None:
    """Asserts that tensors, or tuples of them, are equal within ``atol + rtol |expected|``; integers exactly.

    Raises:
        AssertionError: naming the tensor, its worst element, and both values there.
    """
    if isinstance(expected, (tuple, list)):
        assert len(actual) == len(expected), f"{name}: {len(actual)} tensors, expected {len(expected)}"
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert_close(a, e, rtol=rtol, atol=atol, name=f"{name}[{i}]")
        return
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if not expected.is_floating_point():
        assert actual.dtype == expected.dtype, f"{name}: {actual.dtype}, expected {expected.dtype}"
    # Where both are, if they are in one place: large ones take long to copy.
    where_both_are = expected.device if actual.device == expected.device else torch.device("cpu")
    a, e = (x.detach().to(where_both_are).double() for x in (actual, expected))
    equal = (a == e) | (a.isnan() & e.isnan())
    excess = torch.where(equal, 0, ((a - e).abs() - atol - rtol * e.abs()).nan_to_num(nan=math.inf))
    if not expected.is_floating_point():
        excess = torch.where(equal, 0.0, math.inf)
    if bool((excess > 0).any()):
        worst = int(excess.argmax())
        where = [int(i) for i in torch.unravel_index(torch.tensor(worst), excess.shape)]
        raise AssertionError(
            f"{name}{where}: got {a.flatten()[worst].item()!r}, expected {e.flatten()[worst].item()!r} "
            f"(rtol {rtol:g}, atol {atol:g}); {int((excess > 0).sum())} of {excess.numel()} elements are off"
        )


def assert_same_clusters(
    actual: Tensor, expected: Tensor, points: Tensor, centroids: Tensor, rounding: Tensor, *, name: str = "labels"
) -> None:
    """Asserts that labels are equal, but for points whose nearest centroids are equally far within rounding.

    A point that moves by e changes how much farther centroid a is than b, both squared, by ``2 |e| |a - b|`` at most.

    Args:
        actual: labels, ``[N] int64``.
        expected: labels, ``[N] int64``.
        points: what was labelled, ``[N, D] float64``.
        centroids: ``[K, D]``.
        rounding: how far off each point may have been, ``[N]``.

    Raises:
        AssertionError: naming the point, its labels and how far they are from the nearest centroid.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == torch.int64, f"{name}: {actual.dtype}, expected int64"
    exact = centroids.double()
    for i in (actual != expected).nonzero()[:, 0].tolist():
        distances = (points[i] - exact).square().sum(1)
        nearest = int(distances.argmin())
        for label in (int(actual[i]), int(expected[i])):
            gap = float(distances[label] - distances[nearest])
            tie = float(2 * rounding[i] * (exact[label] - exact[nearest]).norm())
            assert gap <= tie, (
                f"{name}[{i}]: got {int(actual[i])}, expected {int(expected[i])}; {label} is farther than {nearest} "
                f"by {gap:.3g}, and rounding explains {tie:.3g}"
            )


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside the block, ``torch.empty`` and its like hold NaN, or the largest integer: what is never written shows."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)  # which fills what it does not initialise
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])


def strided(x: Tensor) -> Tensor:
    """The same values, none next to another in memory, with NaN (or the largest integer, or True) in between."""
    fill = math.nan if x.is_floating_point() else True if x.dtype == torch.bool else torch.iinfo(x.dtype).max
    apart = torch.full((*x.shape, 2), fill, dtype=x.dtype, device=x.device)
    apart[..., 0] = x
    return apart[..., 0]


def torchaudio_parts() -> types.SimpleNamespace:
    """``kaldi`` (the module ``torchaudio.compliance.kaldi``) and ``compute_deltas`` of torchaudio.

    They are plain Python, but ``import torchaudio`` fails beside a torch of another build, and so do libraries that
    import it where it is installed. So it is unpacked where nobody looks, by ``make``, and these parts are read from
    their files; or from those of a torchaudio that is installed.

    Raises:
        ImportError: torchaudio is not there.
    """
    root = Path(sys.prefix, "torchaudio", "torchaudio")
    installed = importlib.util.find_spec("torchaudio")
    if not root.is_dir() and (installed is None or installed.origin is None):
        raise ImportError(f"no torchaudio: pip install --no-deps --target {root.parent} torchaudio==2.7.1")
    if not root.is_dir():
        root = Path(installed.origin).parent  # type: ignore[union-attr, arg-type]
    path = root / "functional" / "functional.py"
    wanted = ("create_dct", "compute_deltas")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    functional = types.ModuleType("torchaudio.functional")
    vars(functional).update(torch=torch, math=math, Tensor=Tensor, Optional=Optional)
    exec(compile(tree, str(path), "exec"), vars(functional))

    package = types.ModuleType("torchaudio")
    package.functional = functional  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("_torchaudio_kaldi", root / "compliance" / "kaldi.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"torchaudio has no compliance/kaldi.py in {root}")
    kaldi = importlib.util.module_from_spec(spec)
    before = sys.modules.get("torchaudio")
    sys.modules["torchaudio"] = package
    try:
        spec.loader.exec_module(kaldi)
    finally:
        if before is None:
            del sys.modules["torchaudio"]
        else:
            sys.modules["torchaudio"] = before
    return types.SimpleNamespace(kaldi=kaldi, compute_deltas=functional.compute_deltas)


def torchaudio_mfcc(kaldi: Any, frames: Tensor, sample_rate_hz: float = 100.0, **options: Any) -> Tensor:
    """Coefficients of ``frames`` [F, S] by one call of torchaudio: frames joined, ``frame_shift`` their length."""
    # A hundredth of a sample more, because torchaudio cuts the number of samples off to a whole one.
    length_ms = (frames.shape[-1] + 0.01) / sample_rate_hz * 1000
    return kaldi.mfcc(
        frames.reshape(1, -1),
        sample_frequency=sample_rate_hz,
        frame_length=length_ms,
        frame_shift=length_ms,
        dither=0.0,
        use_energy=False,
        **options,
    )


def tiled_store(folder: Path, num_records: int, duration_s: float, num_tiled: int = 64) -> Store:
    """A store of many records without labels, at 100 Hz: a few of the synthetic cohort, over and over.

    What is packed, shard by shard, is as many records as asked for; only reading and filtering, which would take hours
    for a million, are done once for each of the few.
    """
    from unittest import mock

    from hubert_ecg.data import Dataset, Entry, Record, build, packing
    from hubert_ecg.data.synthetic import Cohort

    class Short(Cohort):
        def read(self, entry: Entry) -> Record:
            record = super().read(entry)
            return record.replace(signal=record.signal[:, : round(duration_s * record.sampling_rate_hz)])

    class Tiled(Dataset):
        name = "tiled"

        def __init__(self) -> None:
            pass

        def entries(self) -> list[Entry]:
            names = (f"{i:08d}" for i in range(num_records))
            return [Entry(name, Path(f"recordings/{name}.npy"), f"{name}.npy", f"p{name}") for name in names]

        def fingerprint(self) -> str:
            return f"{num_records} {duration_s} {num_tiled}"

    cohort = Short(num_records=num_tiled)
    ((_, tiles),) = packing.packed_chunks(cohort, packing.Settings(), [(0, cohort.entries())], num_workers=0)

    def tiled_chunks(dataset: Any, settings: Any, chunks: Any, num_workers: int) -> Iterator[Any]:
        for position, entries in chunks:
            yield position, [_as_entry(tiles[int(entry.record_id) % num_tiled], entry) for entry in entries]

    with mock.patch.object(build, "packed_chunks", tiled_chunks):
        return build.build(Tiled(), folder)


def _as_entry(packed: Any, entry: Any) -> Any:
    row = {name: value for name, value in packed.row.items() if not name.startswith("labels_")}
    own = {name: getattr(entry, name) for name in ("record_id", "source", "patient_id", "fold")}
    return dataclasses.replace(packed, row=row | own)
