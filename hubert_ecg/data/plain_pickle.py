"""Pickles of plain containers and NumPy arrays: any reader opens them, and reading one here runs no code."""

from __future__ import annotations

import os
import pickle
import re
from typing import Any

import numpy as np

from hubert_ecg.config import UserError
from hubert_ecg.files import replacing

# Arrays of these kinds hold values, not references: bool, signed, unsigned, float, complex, bytes, text, dates.
_KINDS = "biufcSUmM"
_CONTAINERS = (dict, list, tuple, set, frozenset)
_SCALARS = (type(None), bool, int, float, complex, str, bytes)


def dump(obj: Any, path: str | os.PathLike[str]) -> None:
    """Pickles ``obj`` (protocol 4) so that ``path`` holds either the whole of it or what it held before.

    Args:
        obj: None, bool, int, float, complex, str, bytes, NumPy arrays and scalars of numbers, text or dates, and dict,
            list, tuple, set and frozenset of those.
        path: file to write; missing folders are made.

    Raises:
        ValueError: something else is inside ``obj``; the message says where.
    """
    plain = _plain(obj, "dump: obj", {})
    with replacing(path) as unfinished, open(unfinished, "wb") as file:
        pickle.dump(plain, file, protocol=4)


def load(path: str | os.PathLike[str]) -> Any:
    """Reads a pickle of plain containers and NumPy arrays, whoever wrote it.

    Nothing that a pickle names is imported or called, except the few functions that rebuild NumPy arrays.

    Raises:
        UserError: no such file, no whole pickle, or anything else inside; the message names file and object.
    """
    try:
        with open(path, "rb") as file:
            obj = _Plain(file).load()
        return _plain(obj, "it", {})
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except _RefusedError as refused:
        why = f"it holds {refused}, and only plain containers and NumPy arrays are read"
        raise UserError(f"{path} is refused: {why}") from None
    except Exception as error:  # damaged bytes make the unpickler raise nearly anything
        raise UserError(f"{path} is no readable pickle of plain containers and arrays: {error}") from error


class _RefusedError(Exception):
    """Says what the pickle holds that is not plain."""


class _Call:
    """A function that a pickle may call, and do nothing else with."""

    __slots__ = ("_function",)

    def __init__(self, function: Any) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise _RefusedError("a change to a function")


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # NumPy 2 moved numpy.core to numpy._core, and protocols 0 to 2 use the names of Python 2.
        module = module.replace("numpy._core", "numpy.core", 1).replace("__builtin__", "builtins", 1)
        allowed = _ALLOWED.get((module, name))
        if allowed is None:
            raise _RefusedError(f"{module}.{name}")
        return allowed

    def persistent_load(self, pid: Any) -> Any:
        raise _RefusedError("a persistent reference")


class _Dtype:
    """A NumPy dtype of plain values, out of what a pickle says of it: it never holds one of NumPy's own."""

    __slots__ = ("_name", "dtype")

    def __init__(self, *args: Any) -> None:
        name = args[0] if args else None
        if not isinstance(name, str) or not re.fullmatch(r"[biufcSUmM]\d{1,9}", name):
            raise _RefusedError(f"a NumPy dtype {name!r}")
        self._name = name
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        match state:
            case (3, ("<" | ">" | "|" | "=") as order, None, None, None, int(), int(), int()):
                self.dtype = np.dtype(self._name).newbyteorder(order)
            case (4, ("<" | ">") as order, None, None, None, -1, -1, 0, (_, (bytes() as unit, int() as number, 1, 1))):
                unit_name = unit.decode("ascii", "replace")
                if self._name not in ("m8", "M8") or not re.fullmatch(r"[A-Za-z]{1,7}", unit_name):
                    raise _RefusedError(f"a NumPy dtype {self._name!r} of unit {unit!r}")
                generic = unit_name == "generic"
                self.dtype = np.dtype(self._name if generic else f"{self._name}[{number}{unit_name}]").newbyteorder(
                    order
                )
            case _:
                raise _RefusedError(f"a NumPy dtype {self._name!r} with the state {state!r:.100}")


class _Array:
    """A NumPy array of plain values, out of what a pickle says of it."""

    __slots__ = ("array",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, kind: Any, shape: Any, typecode: Any) -> None:
        if kind is not _NDARRAY:
            raise _RefusedError("an array subclass")
        self.array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        match state:
            case (1, tuple() as shape, _Dtype() as dtype, (bool() | int()) as fortran, bytes() as data):
                self.array = _from_bytes(data, dtype, shape, "F" if fortran else "C")
            case _:
                raise _RefusedError("an array of something else than plain values")


def _from_bytes(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(data, bytes | bytearray) or not isinstance(dtype, _Dtype):
        raise _RefusedError("an array of something else than plain values")
    shape = (shape,) if isinstance(shape, int) else shape
    if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape) or order not in "CF":
        raise _RefusedError(f"an array of shape {shape!r:.100}")
    array = np.ndarray(shape, dtype.dtype, order=order) if 0 in shape or not dtype.dtype.itemsize else None
    if array is None:
        array = np.frombuffer(data, dtype.dtype).reshape(shape, order=order).copy(order)
    return array


def _scalar(dtype: Any, data: Any = b"") -> Any:
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes) or len(data) != dtype.dtype.itemsize:
        raise _RefusedError("a NumPy scalar of something else than a plain value")
    return np.frombuffer(data, dtype.dtype, count=1)[0] if data else dtype.dtype.type()


def _encode(text: Any, encoding: Any) -> bytes:
    """How Python pickles bytes at protocols 0 to 2."""
    if type(text) is not str or encoding != "latin1":
        raise _RefusedError("bytes in an odd encoding")
    return text.encode("latin1")


def _no_call(*args: Any) -> Any:
    raise _RefusedError("a direct call of numpy.ndarray")


_NDARRAY = _Call(_no_call)
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Call(_Dtype),
    ("numpy.core.multiarray", "_reconstruct"): _Call(_Array),
    ("numpy.core.multiarray", "scalar"): _Call(_scalar),
    ("numpy.core.numeric", "_frombuffer"): _Call(_from_bytes),
    ("_codecs", "encode"): _Call(_encode),
    ("builtins", "bytes"): _Call(lambda: b""),
    ("builtins", "set"): _Call(set),
    ("builtins", "frozenset"): _Call(frozenset),
    ("builtins", "complex"): _Call(complex),
}


def _plain(obj: Any, where: str, done: dict[int, Any]) -> Any:
    """``obj``, checked to the bottom, in new containers; ``done`` holds by id what was met before."""
    kind = type(obj)
    if kind in _SCALARS:
        return obj
    if kind is _Array and obj.array is not None:
        return obj.array
    if kind is np.ndarray:
        if obj.dtype.kind not in _KINDS:
            raise ValueError(f"{where} must hold plain values, got an array of dtype {obj.dtype}")
        return obj
    if isinstance(obj, np.generic) and obj.dtype.kind in _KINDS and kind.__module__ == "numpy":
        return obj
    if kind not in _CONTAINERS:
        name = f"{kind.__module__}.{kind.__qualname__}"
        raise ValueError(f"{where} must hold plain containers, numbers, text and NumPy arrays, got {name}")
    if id(obj) in done:
        if done[id(obj)] is _UNDER_WAY:
            raise ValueError(f"{where} must not contain itself")
        return done[id(obj)]
    done[id(obj)] = _UNDER_WAY
    if kind is dict:
        new: Any = {
            _plain(key, f"a key of {where}", done): _plain(value, f"{where}[{key!r:.40}]", done)
            for key, value in obj.items()
        }
    elif kind in (list, tuple):
        new = kind([_plain(value, f"{where}[{index}]", done) for index, value in enumerate(obj)])
    else:
        new = kind([_plain(value, f"an element of {where}", done) for value in obj])
    done[id(obj)] = new
    return new


_UNDER_WAY = object()
