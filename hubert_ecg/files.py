"""Files that appear whole or not at all, and files mapped into memory."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# What the system says when it takes no more of a file.
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextlib.contextmanager
def naming(path: str | os.PathLike[str], *temporary: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of the system that leave the block name this file, in place of none or of a temporary one.

    A full disk is an OSError whatever library wrote: some hide it in errors of their own.
    """
    try:
        yield
    except Exception as error:
        if (number := _full(error)) is not None:
            raise OSError(number, os.strerror(number), os.fspath(path)) from error
        if isinstance(error, OSError) and error.filename in (None, *(os.fspath(name) for name in temporary)):
            raise OSError(error.errno or errno.EIO, error.strerror or str(error), os.fspath(path)) from error
        raise


def _full(error: BaseException | None) -> int | None:
    while error is not None:
        # Rust's libraries have it in their message alone.
        said = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(said[1]) if said else None
        if number in FULL:
            return number
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file to write beside ``path``, which takes its place, durably, when the block ends well.

    Until then ``path`` holds what it held before, also after a crash; a block that raises leaves nothing behind.
    Missing parent folders are made. Errors of the system name ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # One fixed name: what a killed run left behind is overwritten, not piled up.
    temporary = path.with_name(f".{path.name}.tmp")
    with naming(path, temporary):
        temporary.unlink(missing_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            yield temporary
            # Some writers make files that only their owner may read.
            temporary.chmod(mode)
            _sync(temporary, os.O_RDWR)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


def new_array(path: str | os.PathLike[str], dtype: npt.DTypeLike, shape: tuple[int, ...]) -> np.memmap:
    """An .npy file to fill through memory.

    Its space is taken beforehand: a disk that is full while it is filled would end the process without a word (SIGBUS).
    """
    with naming(path):
        try:
            values = np.lib.format.open_memmap(path, "w+", dtype, shape)
            if hasattr(os, "posix_fallocate"):
                with open(path, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        except OSError:
            Path(path).unlink(missing_ok=True)
            raise
    return values


def sync_folder(path: Path) -> None:
    """Make durable which files a folder has."""
    if os.name == "posix":
        _sync(path, os.O_RDONLY)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], values: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def forget_pages(x: np.ndarray) -> None:
    """Gives what was read of a memory map back to the system; it is read again when it is looked at again."""
    mapped = memory_map(x)
    # What was changed in a private map exists nowhere else.
    if mapped is not None and mapped.mode != "c" and hasattr(mmap, "MADV_DONTNEED"):
        mapped._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]


def memory_map(x: np.ndarray) -> np.memmap | None:
    """The memory map whose file holds this array, if it is such a view."""
    base: Any = x
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap) and isinstance(getattr(base, "_mmap", None), mmap.mmap):
            return base
        base = base.base
    return None


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
