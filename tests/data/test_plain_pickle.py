"""The guide's .pkl files: what we write any reader opens, and what anybody wrote runs nothing here."""

from __future__ import annotations

import collections
import os
import pickle
import pickletools
import subprocess

import numpy as np
import pytest

from hubert_ecg.config import UserError
from hubert_ecg.data import plain_pickle

PLAIN = {
    "nothing": None,
    "numbers": [True, -3, 1 << 80, 2.5, float("inf"), 1 + 2j],
    "text": ("a", "é", b"\x00\xff", ""),
    "sets": [{1, 2}, frozenset("ab"), set()],
    ("nested", 1): {"a": [{"b": ([],)}]},
}
ARRAYS = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.arange(12)[::-3],
    np.zeros((0, 3), np.int8),
    np.array(2.5, np.float16),
    np.array([1, 2], ">i4"),
    np.array([True, False]),
    np.array(["normal", "é"]),
    np.array([b"ab", b"c"]),
    np.array(["2020-01-02", "NaT"], "M8[D]"),
    np.array([3, 4], "m8[25us]"),
    np.array([1 + 2j], np.complex64),
]


def same(a, b):
    assert type(a) is type(b)
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


def test_plain_containers_come_back_equal(tmp_path):
    plain_pickle.dump(PLAIN, tmp_path / "x.pkl")
    assert plain_pickle.load(tmp_path / "x.pkl") == PLAIN
    assert pickle.loads((tmp_path / "x.pkl").read_bytes()) == PLAIN
    assert next(pickletools.genops((tmp_path / "x.pkl").read_bytes()))[1] == 4


@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype.str}{list(a.shape)}")
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_arrays_of_any_protocol_come_back_equal_and_writable(array, protocol, tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"x": [array, array]}, protocol=protocol))
    first, second = plain_pickle.load(tmp_path / "x.pkl")["x"]
    same(first, array)
    same(second, array)
    assert first.flags.writeable
    plain_pickle.dump([array, array.reshape(-1)[:1]], tmp_path / "x.pkl")
    same(plain_pickle.load(tmp_path / "x.pkl")[0], array)
    np.testing.assert_array_equal(pickle.loads((tmp_path / "x.pkl").read_bytes())[0], array)


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_both_spellings_of_numpy_are_read(module, tmp_path):
    written = pickle.dumps(np.arange(3.0), protocol=0)
    for spelling in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
        written = written.replace(b"c" + spelling, b"c" + module)
    (tmp_path / "x.pkl").write_bytes(written)
    same(plain_pickle.load(tmp_path / "x.pkl"), np.arange(3.0))


@pytest.mark.parametrize(
    "scalar", [np.float32(1.5), np.int64(-7), np.bool_(True), np.str_("ab"), np.datetime64("2020-01-02")]
)
def test_numpy_scalars_come_back_equal(scalar, tmp_path):
    plain_pickle.dump([scalar], tmp_path / "x.pkl")
    assert plain_pickle.load(tmp_path / "x.pkl") == [scalar]
    assert type(plain_pickle.load(tmp_path / "x.pkl")[0]) is type(scalar)


@pytest.mark.parametrize(
    ("obj", "said"),
    [
        ([object()], r"dump: obj\[0\] must hold .*, got builtins\.object"),
        (
            {"a": {"b": np.array([None])}},
            r"dump: obj\['a'\]\['b'\] must hold plain values, got an array of dtype object",
        ),
        (np.zeros(2, [("a", int)]), r"got an array of dtype \[\('a'"),
        (collections.OrderedDict(), r"got collections\.OrderedDict"),
        (np.ma.zeros(3), r"got numpy\.ma\.MaskedArray"),
        ((len,), r"got builtins\.builtin_function_or_method"),
    ],
    ids=["object", "object array", "structured array", "subclass", "masked array", "function"],
)
def test_dump_refuses_what_is_not_plain_and_keeps_the_old_file(obj, said, tmp_path):
    plain_pickle.dump("old", tmp_path / "x.pkl")
    with pytest.raises(ValueError, match=said):
        plain_pickle.dump(obj, tmp_path / "x.pkl")
    assert plain_pickle.load(tmp_path / "x.pkl") == "old"
    assert os.listdir(tmp_path) == ["x.pkl"]


def test_dump_refuses_an_object_that_contains_itself(tmp_path):
    loop = []
    loop.append(loop)
    with pytest.raises(ValueError, match=r"must not contain itself"):
        plain_pickle.dump(loop, tmp_path / "x.pkl")


def test_dump_that_fails_half_way_keeps_the_old_file(tmp_path, monkeypatch):
    plain_pickle.dump("old", tmp_path / "x.pkl")

    def full(obj, file, protocol):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plain_pickle.pickle, "dump", full)
    with pytest.raises(OSError, match="No space"):
        plain_pickle.dump("new", tmp_path / "x.pkl")
    assert plain_pickle.load(tmp_path / "x.pkl") == "old"
    assert os.listdir(tmp_path) == ["x.pkl"]


class Calls:
    """Unpickles as ``function(*args)``."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


def hostile(marker):
    shell = f"touch {marker}"
    write = f"open({str(marker)!r}, 'w').close()"
    dtype = np.dtype("i8")
    rebuild, rebuild_args, state = np.arange(3).__reduce__()
    yield "os.system", Calls(os.system, shell), r"(posix|nt)\.system"
    yield "subprocess", Calls(subprocess.Popen, ["touch", str(marker)]), r"(subprocess|commands)\.Popen"
    yield "eval", Calls(eval, write), r"builtins\.eval"
    yield "exec", {"features": [1, (Calls(exec, write),)]}, r"builtins\.exec"
    yield "getattr", Calls(getattr, [], "__class__"), r"builtins\.getattr"
    yield "class", collections.Counter("a"), r"collections\.Counter"
    yield "numpy.load", Calls(np.load, str(marker)), r"numpy\.load"
    yield "numpy.fromfile", Calls(np.loadtxt, str(marker)), r"numpy.*loadtxt"
    yield "object array", np.array([Calls(os.system, shell)], dtype=object), r"dtype 'O8'|system"
    yield "structured array", np.zeros(2, [("a", "O")]), r"dtype 'V8'"
    yield "dtype of objects", Calls(np.dtype, "O"), r"dtype 'O'"
    yield "dtype of a structure", Calls(np.dtype, "i4,O"), r"dtype 'i4,O'"
    yield (
        "dtype turned",
        Calls(np.dtype, "i8", False, True, state=(3, "|", None, ("a",), {"a": (dtype, 0)}, 8, 1, 27)),
        r"state",
    )
    yield "array turned", Calls(rebuild, *rebuild_args, state=(1, (1,), np.dtype("O"), False, [1])), r"dtype 'O8'"
    yield "array of a list", Calls(rebuild, *rebuild_args, state=(*state[:4], [1, 2, 3])), r"an array of something else"
    yield "array of a negative shape", Calls(rebuild, *rebuild_args, state=(1, (-3,), *state[2:])), r"an array of shape"
    yield "array call", Calls(np.ndarray, (2,)), r"direct call of numpy\.ndarray"
    yield "array subclass", Calls(rebuild, dict, (0,), b"b"), r"builtins\.dict|an array subclass"
    yield "function turned", Calls(rebuild, np.dtype, (0,), b"b"), r"an array subclass"
    yield "bytes decoder", Calls(__import__("_codecs").encode, "a", "rot13"), r"odd encoding"
    yield "scalar too short", Calls(np.float32(1).__reduce__()[0], dtype, b"1"), r"a NumPy scalar"


@pytest.mark.parametrize("name", [name for name, _, _ in hostile("")])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_hostile_pickles_are_refused_and_run_nothing(name, protocol, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "x.pkl"
    obj, said = next((obj, said) for n, obj, said in hostile(marker) if n == name)
    path.write_bytes(pickle.dumps(obj, protocol=protocol))
    with pytest.raises(UserError, match=said) as error:
        plain_pickle.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not marker.exists()


RAW = {
    "memo": b"cposix\nsystem\np0\n0g0\n(S'true'\ntR.",
    "inst": b"(S'true'\niposix\nsystem\n.",
    "obj": b"(cbuiltins\neval\nS'1'\no.",
    "newobj": b"\x80\x02cbuiltins\nset\n)\x81.",
    "newobj of a dtype": b"\x80\x02cnumpy\ndtype\nX\x02\x00\x00\x00i8\x85\x81.",
    "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x13ndarray.__subclasses__\x93)R.",
    "dotted set": b"\x80\x04\x8c\x08builtins\x8c\x0dset.__class__\x93)R.",
    "build on a function": b"\x80\x02cnumpy\ndtype\nN}X\x0c\x00\x00\x00__defaults__)s\x86b.",
    "extension": b"\x80\x02\x82\x01.",
    "persistent": b"\x80\x02K\x01Q.",
    "persistent by name": b"Pabc\n.",
    "empty": b"",
    "text": b"not a pickle at all\n",
    "stack underflow": b"\x80\x04a.",
    "promises more than there is": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x0f.",
    "too deep": b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "array as a key": b"\x80\x02}cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85c_codecs\nencode\n"
    b"X\x01\x00\x00\x00bX\x06\x00\x00\x00latin1\x86R\x87RK\x01s.",
    "half an array": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85K\x01\x87R.",
    "itself": b"\x80\x02]q\x00h\x00a.",
}


@pytest.mark.parametrize("name", RAW)
def test_hand_made_pickles_are_refused(name, tmp_path):
    (tmp_path / "x.pkl").write_bytes(RAW[name])
    with pytest.raises(UserError, match=r"x\.pkl is (refused|no readable pickle)"):
        plain_pickle.load(tmp_path / "x.pkl")


def test_every_truncation_is_refused(tmp_path):
    whole = pickle.dumps({"x": np.arange(4.0), "y": ["a", 1.5]}, protocol=4)
    for size in range(len(whole)):
        (tmp_path / "x.pkl").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"no readable pickle"):
            plain_pickle.load(tmp_path / "x.pkl")


def test_shared_containers_do_not_multiply(tmp_path):
    obj = [0]
    for _ in range(100):
        obj = [obj, obj]
    plain_pickle.dump(obj, tmp_path / "x.pkl")
    loaded = plain_pickle.load(tmp_path / "x.pkl")
    assert loaded[0] is loaded[1]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*nothing\.pkl: No such file"):
        plain_pickle.load(tmp_path / "nothing.pkl")
