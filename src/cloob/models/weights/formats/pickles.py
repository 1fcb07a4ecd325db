"""A pickle read as data: an interpreter of its own for the few opcodes that files of weights hold.

Python's own unpickler calls what a file names. Here a name is looked up among exact (module, name) pairs, and what
stands for it is a function of ours that makes an inert value. Anything else ends the reading: other names, other
opcodes, an argument that is longer than what is left of the file. The bytes of arrays are not read: their place in the
file is kept.

A pickle has no checksum. What Python's pickler always writes is asked for instead, so that a byte that is lost or
doubled inside an array does not shift its numbers unseen: frames that end where they say and hold all but large bytes,
and, where arrays lie in it, values that are kept under consecutive numbers.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from cloob.errors import InputError

_MAX_OPS = 4_000_000
_MAX_HANDED = 4_000_000
_MAX_TEXT = 1 << 16
_MAX_LONG = 16
_FRAME = b"\x95"
_LARGE = frozenset({b"B", b"X", b"\x8e", b"\x96"})  # opcodes of what may stand outside of frames
_UNFRAMED = 3  # other opcodes that may, behind a full frame or large bytes: a frame would be longer than its content
_FULL_FRAME = 1 << 16
MAX_SPELLED = 1 << 24
"""Characters of the names of all arrays of a file: one long prefix, which a file holds once, may be that of many."""


@dataclass(frozen=True)
class Span:
    """Bytes that a pickle holds, left where they are.

    Attributes:
        start: First byte in the file.
        size: Number of bytes.
    """

    start: int
    size: int


@dataclass(frozen=True)
class Name:
    """What stands for a name that a pickle may hold.

    Attributes:
        module: As in the file.
        name: As in the file.
        call: Makes the value of a call (REDUCE, NEWOBJ) of its arguments; None where it must not be called. It raises
            TypeError or ValueError for arguments that it does not know.
    """

    module: str
    name: str
    call: Callable[..., Any] | None = None


@dataclass
class Holder:
    """A value with a state that comes after it (BUILD).

    Attributes:
        kind: What made it.
        state: What the file said of it; None before.
    """

    kind: str
    state: Any = None
    arguments: tuple[Any, ...] = ()


class OrderedPairs(dict[Any, Any]):
    """What stands for ``collections.OrderedDict``; the state that torch adds to one (its metadata) is left out."""

    def __init__(self, pairs: Any = ()) -> None:
        """Takes a list of pairs, as Python 2 wrote; later ones fill the dict by its items.

        Raises:
            TypeError, ValueError: It is none, or a key is neither a string nor a whole number.
        """
        if pairs != () and not (isinstance(pairs, list) and all(isinstance(pair, list | tuple) for pair in pairs)):
            raise TypeError
        if not all(isinstance(key, str | int) for key, _ in pairs):
            raise TypeError
        super().__init__(pairs)


@dataclass
class PickleRules:
    """What a kind of file may hold.

    Attributes:
        names: The exact pairs.
        other: Asked for a pair that ``names`` lacks; None refuses it.
        persistent: Makes a value of a persistent id; None refuses all.
        numbered: Whether values have to be kept under consecutive numbers, as Python's pickler does.
    """

    names: Mapping[tuple[str, str], Name]
    other: Callable[[str, str], Name | None] | None = None
    persistent: Callable[[Any], Any] | None = None
    numbered: bool = False


@dataclass
class _Machine:
    path: Path
    file: BinaryIO
    end: int
    rules: PickleRules
    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    place: int = 0
    frame_end: int | None = None
    framed: bool = False
    loose: int = 0
    kept_at: int = -2
    handed: int = 0

    def refuse(self, why: str) -> InputError:
        return InputError(f"{self.path}: not a file of weights that can be trusted: {why} (byte {self.place})")

    def take(self, count: int) -> bytes:
        if count > self.end - self.file.tell():
            raise self.refuse(f"{count} bytes claimed, beyond its end")
        return self.file.read(count)

    def number(self, layout: str) -> int:
        value: int = struct.unpack(layout, self.take(struct.calcsize(layout)))[0]
        return value

    def text(self, count: int) -> str:
        if count > _MAX_TEXT:
            raise self.refuse(f"a string of {count} bytes")
        return self.take(count).decode("utf-8", "surrogatepass")

    def span(self, count: int) -> Span:
        start = self.file.tell()
        if count > self.end - start:
            raise self.refuse(f"{count} bytes claimed, beyond its end")
        self.file.seek(start + count)
        return Span(start, count)

    def pop(self) -> Any:
        if not self.stack or (self.marks and self.marks[-1] >= len(self.stack)):
            raise self.refuse("an empty stack")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise self.refuse("a mark that is missing")
        at = self.marks.pop()
        items = self.stack[at:]
        del self.stack[at:]
        return items

    def name(self, module: Any, name: Any) -> Name:
        if not isinstance(module, str) or not isinstance(name, str):
            raise self.refuse("a name that is no string")
        known = self.rules.names.get((module, name))
        if known is None and self.rules.other is not None and "." not in name:
            known = self.rules.other(module, name)
        if known is None:
            raise self.refuse(f"it asks for {printable(module)}.{printable(name)}")
        return known

    def call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Name) or function.call is None or not isinstance(arguments, tuple):
            raise self.refuse("it calls what is not to be called")
        # A value that is kept may be handed on any number of times, and what is called walks through it or copies it.
        parts = (arguments, *arguments)
        self.handed += sum(len(part) for part in parts if isinstance(part, dict | list | tuple))
        if self.handed > _MAX_HANDED:
            raise self.refuse(f"more than {_MAX_HANDED} values handed to calls")
        try:
            return function.call(*arguments)
        except (TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise self.refuse(f"{function.module}.{function.name} with arguments of another kind") from None

    def build(self, state: Any) -> None:
        target = self.stack[-1] if self.stack else None
        if isinstance(target, OrderedPairs):
            return
        if not isinstance(target, Holder) or target.state is not None:
            raise self.refuse("a state for what has none")
        target.state = state

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1] if self.stack else None
        if not isinstance(target, dict) or len(items) % 2:
            raise self.refuse("pairs for what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int):
                raise self.refuse(f"a key of kind {type(key).__name__}")
            if key in target:
                raise self.refuse(f"the key {printable(str(key))} twice")
            target[key] = value

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1] if self.stack else None
        if not isinstance(target, list):
            raise self.refuse("items for what is no list")
        target.extend(items)

    def get(self, place: int) -> None:
        if place not in self.memo:
            raise self.refuse("a value that it does not hold")
        self.stack.append(self.memo[place])

    def put(self, place: int) -> None:
        if not self.stack:
            raise self.refuse("an empty stack")
        if self.rules.numbered and (place != len(self.memo) or self.kept_at == self.place - 1):
            raise self.refuse(f"a value kept as {place}, which is not its turn")
        self.kept_at = self.place
        self.memo[place] = self.stack[-1]

    def begin_frame(self) -> None:
        size = self.number("<Q")
        if self.frame_end is not None or size > self.end - self.file.tell():
            raise self.refuse("a frame that does not fit")
        self.framed, self.frame_end = True, self.file.tell() + size
        self.loose = _UNFRAMED if size >= _FULL_FRAME else 0

    def check_frame(self, code: bytes) -> None:
        """Looks at where an opcode stands, the file's position being behind it."""
        if self.frame_end is not None and self.place >= self.frame_end:
            if self.place > self.frame_end:
                raise self.refuse("a frame that ends elsewhere than it says")
            self.frame_end = None
        if not self.framed or self.frame_end is not None:
            return
        if code in _LARGE:
            self.loose = _UNFRAMED
        elif code != _FRAME:
            self.loose -= 1
            if self.loose < 0:
                raise self.refuse("what belongs into a frame stands outside")

    def run(self) -> Any:
        for _ in range(_MAX_OPS):
            self.place = self.file.tell()
            code = self.take(1)
            self.check_frame(code)
            if code == b".":
                result = self.pop()
                if self.stack or self.marks or self.frame_end not in (None, self.file.tell()):
                    raise self.refuse("values that nobody takes")
                return result
            step = _STEPS.get(code)
            if step is None:
                raise self.refuse(f"opcode {code!r}, which no file of weights needs")
            step(self)
        raise self.refuse(f"more than {_MAX_OPS} steps")


def read_pickle(path: Path, file: BinaryIO, end: int, rules: PickleRules) -> Any:
    """The value of the pickle at the file's position; afterwards the position is behind it.

    Args:
        path: For errors.
        file: Open for reading.
        end: Where the pickle ends at the latest.
        rules: What it may hold.

    Returns:
        Plain values, ``Span`` for bytes, and what the rules make.

    Raises:
        InputError: It holds anything else.
    """
    machine = _Machine(path, file, end, rules)
    try:
        return machine.run()
    except (UnicodeDecodeError, RecursionError, struct.error) as error:
        raise machine.refuse(f"damaged ({type(error).__name__})") from None


def printable(text: str) -> str:
    """A name from a file as it can stand in an error's line."""
    short = text if len(text) <= 100 else f"{text[:99]}…"
    return "".join(letter if letter.isprintable() else "?" for letter in short)


def _push(value: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(value(machine))


def _reduce(machine: _Machine) -> None:
    arguments = machine.pop()
    machine.stack.append(machine.call(machine.pop(), arguments))


def _global(machine: _Machine) -> None:
    lines = []
    for _ in range(2):
        line = bytearray()
        while (letter := machine.take(1)) != b"\n":
            line += letter
            if len(line) > 1024:
                raise machine.refuse("a name without an end")
        lines.append(line.decode("utf-8"))
    machine.stack.append(machine.name(*lines))


def _stack_global(machine: _Machine) -> None:
    name = machine.pop()
    machine.stack.append(machine.name(machine.pop(), name))


def _protocol(machine: _Machine) -> None:
    if machine.take(1)[0] not in (2, 3, 4, 5):
        raise machine.refuse("a protocol that files of weights are not in")


def _long(machine: _Machine) -> int:
    count = machine.take(1)[0]
    if count > _MAX_LONG:
        raise machine.refuse(f"a number of {count} bytes")
    return int.from_bytes(machine.take(count), "little", signed=True)


def _few(count: int) -> Callable[[_Machine], None]:
    def make(machine: _Machine) -> None:
        items = [machine.pop() for _ in range(count)]
        machine.stack.append(tuple(reversed(items)))

    return make


def _pair(machine: _Machine) -> None:
    value = machine.pop()
    machine.set_items([machine.pop(), value])


def _persistent(machine: _Machine) -> None:
    made = machine.rules.persistent
    if made is None:
        raise machine.refuse("a persistent id")
    machine.stack.append(machine.call(Name("torch", "storage", made), (machine.pop(),)))


def _build(machine: _Machine) -> None:
    machine.build(machine.pop())


def _one_item(machine: _Machine) -> None:
    machine.append([machine.pop()])


_STEPS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _protocol,
    _FRAME: lambda m: m.begin_frame(),
    b"(": lambda m: m.marks.append(len(m.stack)),
    b"N": _push(lambda m: None),
    b"\x88": _push(lambda m: True),
    b"\x89": _push(lambda m: False),
    b"K": _push(lambda m: m.number("<B")),
    b"M": _push(lambda m: m.number("<H")),
    b"J": _push(lambda m: m.number("<i")),
    b"\x8a": _push(_long),
    b"G": _push(lambda m: m.number(">d")),
    b"\x8c": _push(lambda m: m.text(m.number("<B"))),
    b"X": _push(lambda m: m.text(m.number("<I"))),
    b"C": _push(lambda m: m.span(m.number("<B"))),
    b"B": _push(lambda m: m.span(m.number("<I"))),
    b"\x8e": _push(lambda m: m.span(m.number("<Q"))),
    b"\x96": _push(lambda m: m.span(m.number("<Q"))),
    b"}": _push(lambda m: {}),
    b"]": _push(lambda m: []),
    b")": _push(lambda m: ()),
    b"t": _push(lambda m: tuple(m.pop_mark())),
    b"\x85": _few(1),
    b"\x86": _few(2),
    b"\x87": _few(3),
    b"s": _pair,
    b"u": lambda m: m.set_items(m.pop_mark()),
    b"a": _one_item,
    b"e": lambda m: m.append(m.pop_mark()),
    b"c": _global,
    b"\x93": _stack_global,
    b"R": _reduce,
    b"\x81": _reduce,  # NEWOBJ: the same for functions of ours
    b"b": _build,
    b"Q": _persistent,
    b"q": lambda m: m.put(m.number("<B")),
    b"r": lambda m: m.put(m.number("<I")),
    b"h": lambda m: m.get(m.number("<B")),
    b"j": lambda m: m.get(m.number("<I")),
    b"\x94": lambda m: m.put(len(m.memo)),
}
