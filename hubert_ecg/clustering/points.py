"""Rows to cluster, block by block, wherever they lie: arrays of any kind, memory maps, sources of blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from hubert_ecg import ops
from hubert_ecg.clustering.ranks import Ranks
from hubert_ecg.files import forget_pages, memory_map
from hubert_ecg.ops._op import check_dense, give_back, kind_of, to_tensor

#: A NumPy, CuPy or torch array, or (as scikit-learn takes them) nested lists.
ArrayLike = Any
T = TypeVar("T")

# Numbers in a block. The partition into blocks decides the order of sums, so it depends on the shape alone.
_BLOCK = {"cpu": 1 << 22, "cuda": 1 << 26}
# Numbers at a time where float64 copies are made of them: they stay in the cache.
_CHUNK = {"cpu": 1 << 19, "cuda": 1 << 24}
# Rows that need conversion or scaling are kept so, up to this many bytes; beyond, they are prepared on every pass.
_KEPT_BYTES = 1 << 30
# Rows taken out of a memory map at a time: each may bring 64 KiB of its file with it.
_MAPPED_ROWS = 64


class BlockSource(Protocol):
    """Points that are read in order, a block at a time, as often as they are asked for.

    Two attributes may be there besides: ``device``, where to compute (default: the CPU), and ``take(indices)``, the
    rows ``[m, D]`` at ascending ``[m] int64`` places; with it, mini-batches are drawn from all rows.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, D)``."""

    @property
    def dtype(self) -> Any:
        """NumPy's or torch's."""

    def blocks(self, rows: int) -> Iterator[ArrayLike]:
        """All rows in order, best in arrays ``[rows, D]``; called once for each pass, in a thread of its own."""


class Block(NamedTuple):
    """Rows as they are clustered."""

    first: int
    x: Tensor
    weight: Tensor | None

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + len(self.x))


class Points:
    """The rows of this process, checked, in the dtype they are clustered in, and of length 1 where that is asked.

    Args:
        op: Whose argument it is, for errors.
        x: ``[N, D]``: an array, a memory map or a :class:`BlockSource`.
        normalize: Scale rows to length 1.
        weight: ``[N]``, or None.
        width: D where it is given.
        ranks: The processes that hold the other rows.

    Attributes:
        num_rows: N.
        width: D.
        dtype: float32 or float64.
        device: Where blocks are.
        streamed: The rows are not in memory.
        first: Place of the first row among those of all ranks.
        total: Rows of all ranks.
        on_rows: Told, after each block, how many rows of this pass were used.

    Raises:
        ValueError: ``x`` or ``weight`` is of a wrong kind, dtype or shape, or not finite. Rows that are not in memory
            are checked when they are read.
    """

    def __init__(
        self,
        op: str,
        x: ArrayLike | BlockSource,
        *,
        normalize: bool,
        weight: ArrayLike | None = None,
        width: int | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.op, self.normalize, self.ranks = op, normalize, ranks or Ranks(op)
        with self.ranks.together():
            self._reader = reader = _reader(op, x)
            if len(reader.shape) != 2 or reader.shape[1] != (width or reader.shape[1]) or not reader.shape[1]:
                want = f"[N, {width}]" if width else "[N, D] with D > 0"
                raise ValueError(f"{op}: x must be {want}, got shape {list(reader.shape)}")
            self.num_rows, self.width = reader.shape
            self.device, self.streamed = reader.device, reader.streamed
            self.dtype = _compute_dtype(op, reader.dtype)
            self.block_rows = max(1, _of_device(_BLOCK, self.device) // self.width)
            self._kept = None if self.streamed else self._check_and_keep()
            self._weight = None if weight is None else _weights(op, weight, self.num_rows)
        self.on_rows: Callable[[int], Any] | None = None
        self._meet()

    @property
    def weighted(self) -> bool:
        return self._weight is not None

    def blocks(self) -> Iterator[Block]:
        """All rows of this process, in order."""
        return self._with_weights(self._prepared_blocks(self.block_rows))

    def take(self, rows: np.ndarray) -> Block:
        """The rows at these ascending places of this process, as if they were a block."""
        places = torch.from_numpy(rows)
        if self._kept is not None:
            x = self._kept[places.to(self.device)]
        elif self.has_random_rows:
            x = self._reader.take(places)
            self._check(x, rows)
            x = self._prepare(x.to(self.device))
        else:
            x = self._picked(rows)
        weight = None if self._weight is None else self._weight[places.to(self._weight.device)]
        return Block(0, x, None if weight is None else weight.to(self.device, torch.float64))

    def take_of_all(self, rows: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """The rows ``[m, D]`` at these ascending places among those of all ranks, and their weights, on every rank."""
        with self.ranks.together():
            here = (rows >= self.first) & (rows < self.first + self.num_rows)
            block = self.take(rows[here] - self.first)
        x = torch.cat(self.ranks.gather(block.x))
        return x, None if block.weight is None else torch.cat(self.ranks.gather(block.weight))

    def weights(self, first: int, count: int) -> np.ndarray | None:
        """Weights of some rows of this process, float64."""
        return None if self._weight is None else self._weight[first : first + count].double().cpu().numpy()

    @property
    def has_random_rows(self) -> bool:
        """Rows can be taken without a pass over all of them."""
        return self._reader.has_take

    def batches_in_order(self, rows: int) -> Iterator[Block]:
        """All rows of this process, this many at a time."""
        return self._with_weights(self._prepared_blocks(rows))

    def _with_weights(self, blocks: Iterator[tuple[int, Tensor]]) -> Iterator[Block]:
        for first, x in blocks:
            weight = None if self._weight is None else self._weight[first : first + len(x)]
            yield Block(first, x, None if weight is None else weight.to(self.device, torch.float64))
            if self.on_rows is not None:
                self.on_rows(first + len(x))

    def _prepared_blocks(self, rows: int) -> Iterator[tuple[int, Tensor]]:
        if self._kept is not None:
            for first in range(0, self.num_rows, rows):
                yield first, self._kept[first : first + rows]
            return
        first = 0
        blocks = self._reader.blocks(rows)
        for x in ahead(blocks) if self.streamed else blocks:
            if self.streamed:
                self._check(x, first)
            yield first, self._prepare(x.to(self.device))
            first += len(x)

    @property
    def _prepares(self) -> bool:
        return self.normalize or self._reader.dtype != self.dtype

    def _prepare(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        return unit_rows(x) if self.normalize else x

    def _check_and_keep(self) -> Tensor | None:
        """The rows of an array in memory as they are clustered, or None where that copy would be too large."""
        kept: Tensor | None = None
        if not self._prepares:
            kept = self._reader.x
        elif self.num_rows * self.width * self.dtype.itemsize <= _KEPT_BYTES:
            kept = torch.empty(self.num_rows, self.width, dtype=self.dtype, device=self.device)
        first = 0
        for x in self._reader.blocks(self.block_rows):
            self._check(x, first)
            if kept is not None and self._prepares:
                kept[first : first + len(x)] = self._prepare(x)
            first += len(x)
        return kept

    def _check(self, x: Tensor, places: int | np.ndarray) -> None:
        # A sum over finite numbers may overflow: only then is each one looked at.
        if not x.is_floating_point() or math.isfinite(float(x.sum())):
            return
        finite = torch.isfinite(x).all(1)
        if not finite.all():
            row = int((~finite).nonzero()[0])
            row = int(places[row]) if isinstance(places, np.ndarray) else places + row
            where = f"row {row}" if self.ranks.size == 1 else f"row {row} of rank {self.ranks.rank}"
            raise ValueError(f"{self.op}: x must be finite, got NaN or infinity in {where}; drop or fill such rows")

    def _picked(self, rows: np.ndarray) -> Tensor:
        """Rows out of a source that can only be read from its beginning."""
        parts = [torch.empty(0, self.width, dtype=self.dtype, device=self.device)]
        for first, x in self._prepared_blocks(self.block_rows):
            begin, end = np.searchsorted(rows, [first, first + len(x)])
            parts.append(x[torch.from_numpy(rows[begin:end] - first).to(self.device)])
        return torch.cat(parts)

    def _meet(self) -> None:
        """Finds the place of this rank's rows among those of all; all must be of one kind."""
        mine = torch.tensor([self.num_rows, self.width, self.dtype == torch.float64, self.weighted], dtype=torch.int64)
        all_ranks = torch.stack(self.ranks.gather(mine))
        kinds = all_ranks[:, 1:]
        if not torch.equal(kinds, kinds[:1].expand_as(kinds)):
            said = "; ".join(f"D {d}, {'float64' if f else 'float32'}, weights {bool(w)}" for d, f, w in kinds.tolist())
            raise ValueError(f"{self.op}: x must have one D, one dtype and weights or none on all ranks, got {said}")
        counts = all_ranks[:, 0]
        self.first, self.total = int(counts[: self.ranks.rank].sum()), int(counts.sum())
        if self._weight is not None:
            own = sum(float(part.double().sum()) for part in self._weight.split(1 << 20))
            total = torch.tensor([own], dtype=torch.float64)
            self.ranks.sum(total)
            if self.total and not 0 < float(total) < math.inf:
                want = "above 0 somewhere, and finite added up"
                raise ValueError(f"{self.op}: sample_weight must be {want}, got a sum of {float(total)}")


def as_given(result: Tensor, x: ArrayLike | BlockSource) -> ArrayLike:
    """A result as an array of the kind of ``x``; NumPy's for lists and sources."""
    if isinstance(x, Tensor):
        return result.to(x.device)
    kind = kind_of(x) if hasattr(x, "__dlpack__") else "numpy"
    return give_back(result.cpu() if kind == "numpy" else result, kind)


def as_tensor(what: str, x: ArrayLike) -> Tensor:
    """An array of any kind, or nested lists, as a tensor; in the same memory where that can be."""
    if isinstance(x, Tensor):
        check_dense(what, x)
        if x.is_meta:
            raise ValueError(f"{what} must hold numbers, got a meta tensor, which has none")
        return x.detach()
    if isinstance(x, Sequence):
        try:
            x = np.asarray(x)
        except ValueError as error:
            raise ValueError(f"{what} must have rows of one length, got {error}") from error
    elif not hasattr(x, "__dlpack__") and hasattr(x, "__array__"):
        x = np.asarray(x)
    return to_tensor(x, what)


def chunks(x: Tensor) -> Iterator[slice]:
    """Slices of the rows of ``x``, small enough for copies in float64."""
    rows = max(1, _of_device(_CHUNK, x.device) // max(x.shape[1], 1))
    return (slice(first, first + rows) for first in range(0, len(x), rows))


def unit_rows(x: Tensor) -> Tensor:
    """Rows scaled to Euclidean length 1, however short or long they are; a row of zeros stays."""
    unit = torch.empty_like(x)
    for part in chunks(x):
        rows = x[part].double()
        if x.dtype == torch.float64:
            # The squares of these may leave the range of float64; those of float32 do not.
            largest = rows.abs().amax(1, keepdim=True)
            rows = rows / largest.where(largest > 0, 1)
        length = rows.square().sum(1, keepdim=True).sqrt_()
        unit[part] = rows / length.where(length > 0, 1)
    return unit


def squared_distances(x: Tensor, centers: Tensor, labels: Tensor) -> Tensor:
    """Squared distances ``[N] float64`` of rows to their own centres."""
    exact = centers.double()
    parts = [(x[part].double() - exact[labels[part]]).square().sum(1) for part in chunks(x)]
    return torch.cat(parts) if parts else x.new_zeros(0, dtype=torch.float64)


def ordered_sum(x: Tensor) -> Tensor:
    """The sum of float64 numbers ``[N]``, added in an order that does not depend on the number of threads."""
    sums, _ = ops.kmeans_accumulate(x[:, None], torch.zeros(len(x), dtype=torch.int64, device=x.device), 1)
    return sums[0, 0]


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, each made in a thread while the one before it is in use."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1, thread_name_prefix="hubert-ecg-blocks") as pool:
        pending = pool.submit(next, iterator, end)
        while (item := pending.result()) is not end:
            pending = pool.submit(next, iterator, end)
            yield item  # type: ignore[misc]


class _InMemory:
    """A tensor."""

    streamed, has_take = False, True

    def __init__(self, x: Tensor) -> None:
        self.x, self.shape, self.dtype, self.device = x, tuple(x.shape), x.dtype, x.device

    def blocks(self, rows: int) -> Iterator[Tensor]:
        return (self.x[first : first + rows] for first in range(0, len(self.x), rows))

    def take(self, rows: Tensor) -> Tensor:
        return self.x[rows.to(self.device)]


class _Mapped:
    """A NumPy array that lies in a file: copied out a block at a time, and its pages given back to the system."""

    streamed, has_take = True, True

    def __init__(self, op: str, x: np.ndarray) -> None:
        self.x, self.shape, self.device = x, x.shape, torch.device("cpu")
        self.dtype = to_tensor(x[:0].copy(), f"{op}: x").dtype

    def blocks(self, rows: int) -> Iterator[Tensor]:
        return (self._copy(slice(first, first + rows)) for first in range(0, len(self.x), rows))

    def take(self, rows: Tensor) -> Tensor:
        parts = [self._copy(part) for part in np.split(rows.numpy(), range(_MAPPED_ROWS, len(rows), _MAPPED_ROWS))]
        return torch.cat(parts)

    def _copy(self, rows: slice | np.ndarray) -> Tensor:
        block = to_tensor(np.array(self.x[rows]), "x")
        forget_pages(self.x)
        return block


class _Source:
    """A :class:`BlockSource`, cut into blocks of the size that is asked for."""

    streamed = True

    def __init__(self, op: str, source: BlockSource) -> None:
        self._op, self._source, self.dtype = op, source, source.dtype
        self.shape = tuple(int(n) for n in source.shape)
        self.device = torch.device(getattr(source, "device", "cpu"))
        self.has_take = callable(getattr(source, "take", None))

    def blocks(self, rows: int) -> Iterator[Tensor]:
        parts: list[Tensor] = []
        waiting = given = 0
        for array in self._source.blocks(rows):
            # A source may fill the same memory again for its next block, which is read ahead of time.
            x = self._rows(array).clone()
            given += len(x)
            while waiting + len(x) >= rows:
                parts.append(x[: rows - waiting])
                x = x[rows - waiting :]
                yield parts[0] if len(parts) == 1 else torch.cat(parts)
                parts, waiting = [], 0
            if len(x):
                parts.append(x)
                waiting += len(x)
        if given != self.shape[0]:
            want = f"give the {self.shape[0]} rows of its shape on every pass"
            raise ValueError(f"{self._op}: x must {want}, got {given} from blocks({rows})")
        if parts:
            yield torch.cat(parts)

    def take(self, rows: Tensor) -> Tensor:
        return self._rows(self._source.take(rows.numpy()))  # type: ignore[attr-defined]

    def _rows(self, array: ArrayLike) -> Tensor:
        x = as_tensor(f"{self._op}: x", array)
        if x.ndim != 2 or x.shape[1] != self.shape[1]:
            raise ValueError(f"{self._op}: x must give blocks [rows, {self.shape[1]}], got shape {list(x.shape)}")
        return x


def _reader(op: str, x: ArrayLike | BlockSource) -> Any:
    if not isinstance(x, Tensor | np.ndarray) and callable(getattr(x, "blocks", None)):
        return _Source(op, x)
    if isinstance(x, np.ndarray) and memory_map(x) is not None:
        return _Mapped(op, x)
    return _InMemory(as_tensor(f"{op}: x", x))


def _compute_dtype(op: str, dtype: Any) -> torch.dtype:
    """float32 for it and for half precision, else float64."""
    if not isinstance(dtype, torch.dtype):
        dtype = to_tensor(np.empty(0, dtype), f"{op}: x").dtype
    if dtype.is_complex:
        raise ValueError(f"{op}: x must hold numbers, got dtype {dtype}")
    return torch.float32 if dtype.is_floating_point and dtype.itemsize <= 4 else torch.float64


def _weights(op: str, weight: ArrayLike, num_rows: int) -> Tensor:
    given = as_tensor(f"{op}: sample_weight", weight)
    wrong = f"shape {list(given.shape)}" if given.shape != (num_rows,) or given.is_complex() else None
    for first in range(0, 0 if wrong else num_rows, 1 << 20):
        part = given[first : first + (1 << 20)].double()
        good = (part >= 0) & torch.isfinite(part)
        if not good.all():
            row = int((~good).nonzero()[0])
            wrong = f"{float(part[row])} in row {first + row}"
            break
    if wrong:
        raise ValueError(f"{op}: sample_weight must be finite and not negative, [{num_rows}], got {wrong}")
    return given


def _of_device(numbers: dict[str, int], device: torch.device) -> int:
    return numbers.get(device.type, numbers["cpu"])
