"""What a pickle says, read without running it: nothing is imported, and nothing is called.

Plain values come as they are; what only running the pickle would make comes as a description of it. Other readers of
untrusted pickles let a few functions be called. This one needs none: it reads every protocol, and files that hold
objects of any class beside their tensors.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any, Protocol, cast

# A step takes up to some 100 bytes of memory, many times what it takes in the file.
MOST_STEPS = 1 << 22


class PickleError(Exception):
    """The bytes are no pickle, or a damaged one, or one that is too long."""


@dataclass(frozen=True)
class Named:
    """A class or function that the pickle names."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


# Most objects have none, and there may be millions of them.
_NO_ITEMS: dict[Any, Any] = {}


@dataclass(eq=False, slots=True)
class Made:
    """An object that running the pickle would make.

    Attributes:
        maker: what would be called, in general a Named.
        arguments: what it would be called with, in general a tuple.
        items: what would be set in the object by key.
        state: what the object would be given at last, in general a dict of its attributes.
    """

    maker: object
    arguments: object = ()
    items: dict[Any, Any] = field(default_factory=lambda: _NO_ITEMS)
    state: object = None

    def __str__(self) -> str:
        return f"{self.maker} object" if isinstance(self.maker, Named) else "object"


@dataclass(eq=False)
class Outside:
    """What the pickle refers to by a persistent id, and which lies outside of it."""

    key: object


class Readable(Protocol):
    """What a pickle is read from."""

    def tell(self) -> int:
        """Return the position."""

    def read(self, size: int, /) -> bytes:
        """Return up to size bytes."""

    def readline(self) -> bytes:
        """Return bytes to the end of a line."""


def read_pickle(file: Readable, outside: list[Outside] | None = None, most_steps: int = MOST_STEPS) -> Any:
    """Read one pickle of any protocol, and leave the file after it.

    Args:
        file: a single string may take all of it, so it is to refuse, with ValueError, what memory is not to hold.
        outside: gets all that the pickle refers to by a persistent id.
        most_steps: that it may take.

    Raises:
        PickleError: it is not one, is damaged, or takes more steps.
    """
    machine = _Machine([] if outside is None else outside)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(cast(IO[bytes], file))):
            if count == most_steps:
                raise PickleError(f"its pickle takes more than {most_steps:,} steps")
            _STEPS[opcode.name](machine, argument)
        return machine.stack.pop()
    except (ValueError, OverflowError) as error:
        raise PickleError(" ".join(str(error).split())[:200]) from error
    # The stack is too short, nothing has such a number, or an operand is of another type than the step needs.
    except (LookupError, TypeError, AttributeError) as error:
        raise PickleError("the steps of its pickle do not fit together") from error


class _Machine:
    """What a pickle is a program for: a stack with marks in it, and a memo of numbered values."""

    def __init__(self, outside: list[Outside]) -> None:
        self.outside = outside
        self.stack: list[Any] = []
        self.below_marks: list[list[Any]] = []
        # Picklers number values from 0 on, and there are many of them; a number that is out of turn may be any.
        self.memo: list[Any] = []
        self.out_of_turn: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self) -> None:
        self.below_marks.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        above, self.stack = self.stack, self.below_marks.pop()
        return above

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def pop_many(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError
        popped = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return popped

    def memoize(self) -> None:
        self.put(len(self.memo) + len(self.out_of_turn))

    def put(self, number: int) -> None:
        if number == len(self.memo):
            self.memo.append(self.stack[-1])
        elif 0 <= number < len(self.memo):
            self.memo[number] = self.stack[-1]
        else:
            self.out_of_turn[number] = self.stack[-1]

    def get(self, number: int) -> None:
        self.stack.append(self.memo[number] if 0 <= number < len(self.memo) else self.out_of_turn[number])

    def make(self, maker: Any, arguments: Any) -> None:
        self.stack.append(Made(maker, arguments))

    def refer(self, key: object) -> None:
        self.outside.append(Outside(key))
        self.stack.append(self.outside[-1])

    def name(self, module: str, name: str) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError
        self.stack.append(Named(module, name))

    def build(self, state: Any) -> None:
        owner = self.stack[-1]
        if isinstance(owner, Made):
            owner.state = state

    def extend(self, values: list[Any]) -> None:
        if isinstance(self.stack[-1], list):  # else a set or the like, of which only the class is told
            self.stack[-1].extend(values)

    def set_items(self, flat: list[Any]) -> None:
        owner = self.stack[-1]
        if isinstance(owner, Made) and owner.items is _NO_ITEMS:
            owner.items = {}
        items = owner.items if isinstance(owner, Made) else owner
        items.update(zip(map(_as_key, flat[::2]), flat[1::2], strict=True))


def _as_key(key: Any) -> Any:
    # Others are never looked up, and the hash of a tuple of tuples may take for ever.
    return key if isinstance(key, str | int | float | Made) else Made(Named("builtins", type(key).__name__))


def _make_dict(machine: _Machine) -> None:
    flat = machine.pop_mark()
    machine.push({})
    machine.set_items(flat)


def _make_of_mark(machine: _Machine) -> None:
    maker, *arguments = machine.pop_mark()
    machine.make(maker, tuple(arguments))


def _make_instance(machine: _Machine, words: str) -> None:
    arguments = tuple(machine.pop_mark())
    machine.name(*words.split(" ", 1))
    machine.make(machine.stack.pop(), arguments)


_SET, _FROZENSET = Named("builtins", "set"), Named("builtins", "frozenset")

# Steps by their names in pickletools, which also says what each of them does.
_STEPS: dict[str, Callable[[_Machine, Any], object]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP", "READONLY_BUFFER"), lambda m, a: None),
    # Plain values.
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"), _Machine.push),
    **dict.fromkeys(("FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE"), _Machine.push),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BYTEARRAY8"), _Machine.push),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"), _Machine.push),
    "NONE": lambda m, a: m.push(None),
    "NEWTRUE": lambda m, a: m.push(True),
    "NEWFALSE": lambda m, a: m.push(False),
    # Containers.
    "EMPTY_TUPLE": lambda m, a: m.push(()),
    "TUPLE": lambda m, a: m.push(tuple(m.pop_mark())),
    "TUPLE1": lambda m, a: m.push(tuple(m.pop_many(1))),
    "TUPLE2": lambda m, a: m.push(tuple(m.pop_many(2))),
    "TUPLE3": lambda m, a: m.push(tuple(m.pop_many(3))),
    "EMPTY_LIST": lambda m, a: m.push([]),
    "LIST": lambda m, a: m.push(m.pop_mark()),
    "APPEND": lambda m, a: m.extend(m.pop_many(1)),
    "APPENDS": lambda m, a: m.extend(m.pop_mark()),
    "EMPTY_DICT": lambda m, a: m.push({}),
    "DICT": lambda m, a: _make_dict(m),
    "SETITEM": lambda m, a: m.set_items(m.pop_many(2)),
    "SETITEMS": lambda m, a: m.set_items(m.pop_mark()),
    "EMPTY_SET": lambda m, a: m.make(_SET, ()),
    "ADDITEMS": lambda m, a: m.pop_mark(),
    "FROZENSET": lambda m, a: m.make(_FROZENSET, (m.pop_mark(),)),
    # The stack and the memo.
    "MARK": lambda m, a: m.mark(),
    "POP": lambda m, a: m.pop(),
    "POP_MARK": lambda m, a: m.pop_mark(),
    "DUP": lambda m, a: m.push(m.stack[-1]),
    "MEMOIZE": lambda m, a: m.memoize(),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    # Names, and objects made by them.
    "GLOBAL": lambda m, a: m.name(*a.split(" ", 1)),
    "STACK_GLOBAL": lambda m, a: m.name(*m.pop_many(2)),
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), lambda m, a: m.name("copyreg", f"extension {a}")),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda m, a: m.make(*m.pop_many(2))),
    "NEWOBJ_EX": lambda m, a: m.make(*m.pop_many(3)[:2]),
    "OBJ": lambda m, a: _make_of_mark(m),
    "INST": _make_instance,
    "BUILD": lambda m, a: m.build(*m.pop_many(1)),
    "PERSID": _Machine.refer,
    "BINPERSID": lambda m, a: m.refer(*m.pop_many(1)),
}
