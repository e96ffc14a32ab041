"""Pickles that are read without being run: plain values as pickle has them, the rest described, nothing called."""

import io
import pickle
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embpack.formats.pickled import Made, Named, Outside, PickleError, read_pickle

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner) | st.tuples(inner) | st.tuples(inner, inner, inner, inner) | st.dictionaries(st.text(), inner)
    ),
)


def read(raw, **arguments):
    return read_pickle(io.BytesIO(raw), **arguments)


@dataclass
class Config:
    rate: float
    path: Path


@dataclass(frozen=True)
class Key:
    name: str


class Settings(dict):
    """As Lightning's AttributeDict: a dict of a class of its own."""


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return ("outside", str(value)) if isinstance(value, Path) else None


@pytest.mark.parametrize("protocol", PROTOCOLS)
@given(value=PLAIN)
def test_plain_values(protocol, value):
    assert read(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", range(3, 6))
def test_bytes(protocol):
    value = [b"short", b"\0" * 1000, bytearray(b"xyz")] if protocol == 5 else [b"short", b"\0" * 1000]
    assert read(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_is_there_twice_is_one_value(protocol):
    inner = [1, 2]
    found = read(pickle.dumps({"a": inner, "b": (inner,)}, protocol))
    assert found["a"] is found["b"][0]
    inner.append(inner)
    found = read(pickle.dumps(inner, protocol))
    assert found[2] is found


@pytest.mark.parametrize("protocol", range(2, 6))
def test_objects_are_described(protocol):
    value = {
        "config": Config(0.1, Path("x")),
        "settings": Settings(lr=0.1),
        "ordered": OrderedDict(a=1, b=2),
        "default": defaultdict(list, a=[3]),
        "counter": Counter("aab"),
        "deque": deque([1, 2]),
        "set": {1, 2},
        "frozen": frozenset([3]),
        "complex": 2j,
        "class": Path,
        "function": read_pickle,
        "exception": ValueError("x"),
        ("a", "tuple"): 1,
        Key("x"): 2,
    }
    found = read(pickle.dumps(value, protocol))
    described = {str(key): str(item) for key, item in found.items()}
    assert described["config"] == "test_pickled.Config object"
    assert found["settings"].items == {"lr": 0.1}
    assert found["ordered"].items == {"a": 1, "b": 2}
    assert found["ordered"].maker == Named("collections", "OrderedDict")
    assert found["default"].items == {"a": [3]}
    assert isinstance(found["deque"], Made)
    assert found["class"] == Named("pathlib", "Path")
    assert found["function"] == Named("embpack.formats.pickled", "read_pickle")
    assert found["complex"].arguments == (0.0, 2.0)
    assert described["set"] in ("builtins.set object", "__builtin__.set object")
    assert described["builtins.tuple object"] == "1"
    assert found["config"].state["rate"] == 0.1
    [key] = [key for key, item in found.items() if item == 2]
    assert key.state == {"name": "x"}


@pytest.mark.parametrize("protocol", range(1, 6))
def test_what_lies_outside(protocol):
    file = io.BytesIO()
    Pickler(file, protocol).dump([Path("a"), Path("b")])
    outside: list[Outside] = []
    found = read(file.getvalue(), outside=outside)
    assert [item.key for item in found] == [("outside", "a"), ("outside", "b")]
    assert found == outside


def test_one_pickle_after_another():
    file = io.BytesIO(pickle.dumps(1) + pickle.dumps("two", 0) + b"rest")
    assert [read_pickle(file), read_pickle(file), file.read()] == [1, "two", b"rest"]


class Evil:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return Path.touch, (self.witness,)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nothing_is_run(tmp_path, protocol):
    raw = pickle.dumps(Evil(tmp_path / "witness"), protocol)
    assert isinstance(read(raw), Made)
    assert not (tmp_path / "witness").exists()
    pickle.loads(raw)
    assert (tmp_path / "witness").exists()


# Steps by hand: each is one that pickle runs and that pickle.dumps of such values does not write.
@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b"I01\n.", True),
        (b"I7\n.", 7),
        (b"L7L\n.", 7),
        (b"(I1\nI2\nl.", [1, 2]),
        (b"(S'a'\nI1\nd.", {"a": 1}),
        (b"(I1\nI2\n1I3\n.", 3),
        (b"I1\n2\x86.", (1, 1)),
        (b"I1\n(I2\n00.", 1),
        (b"U\x03abc.", "abc"),
        (b"T\x03\x00\x00\x00abc.", "abc"),
        (b"cos\nsystem\n.", Named("os", "system")),
    ],
)
def test_steps_of_old_pickles(raw, value):
    assert read(raw) == value


@pytest.mark.parametrize(
    ("raw", "arguments"),
    [
        (b"(S'ls'\nios\nsystem\n.", ("ls",)),
        (b"(cos\nsystem\nS'ls'\no.", ("ls",)),
        (b"cos\nsystem\n(S'ls'\ntR.", ("ls",)),
        (b"\x80\x02cos\nsystem\n(U\x02lst\x81.", ("ls",)),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02ls\x85}\x92.", ("ls",)),
    ],
)
def test_every_step_that_calls(raw, arguments):
    found = read(raw)
    assert (str(found), found.arguments) == ("os.system object", arguments)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"n",
        b".",
        b"t.",
        b"0.",
        b"h\x07.",  # a number that nothing has
        b"N\x86.",
        b"Ns.",
        b"NNNs.",
        b"(Nd.",
        b"(K\x01K\x02K\x03d.",
        b"K\x01K\x02\x93.",
        b"\x80\x05\x97.",  # a buffer that is handed over beside the pickle
        b"I" + b"9" * 5000 + b"\n.",
        b"\x8e" + b"\xff" * 8 + b".",
        b"\x96" + b"\xff" * 7 + b"\x7f.",
    ],
)
def test_damaged_pickles(raw):
    with pytest.raises(PickleError) as caught:
        read(raw)
    assert str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.data())
def test_altered_pickles_are_read_or_refused(data):
    raw = bytearray(
        pickle.dumps(
            {"a": [1, 2.5, ("x", None)], "b": OrderedDict(c=Config(0.1, Path("y")))}, data.draw(st.integers(0, 5))
        )
    )
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        read(bytes(raw[: data.draw(st.integers(0, len(raw)))]))
    except PickleError as error:
        assert "\n" not in str(error)


def test_a_small_pickle_stays_small():
    # Python's own reader makes room for two billion numbered values here.
    assert read(b"Nr\xff\xff\xff\x7f.") is None
    # A tuple of tuples, 60 deep, whose hash would take 2^60 steps.
    nested = b"}N" + b"2\x86" * 60 + b"Ns."
    assert [str(key) for key in read(nested)] == ["builtins.tuple object"]
    with pytest.raises(PickleError, match="its pickle takes more than 1,000 steps"):
        read(b"N0" * 1000 + b"N.", most_steps=1000)
