"""Pickles as plain data: nothing that stands in a file is imported or called.

A pickle is a program for a stack machine, and what makes it dangerous is two things: it may name any object of any
module, and call it. This machine admits the instructions that build numbers, strings and containers. A name is only
looked up in the Vocabulary that the caller gives, which maps it to a function of ours or makes the object a Record;
any other name is refused. Work is bounded: by the file's size, a number of instructions and a depth.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable
from typing import Any

from stylepipe.interop.plain_data import (
    MAX_NAME,
    Budget,
    Global,
    Record,
    RefusedError,
    Vocabulary,
    check_nesting,
    checked_keys,
    shown,
)

_MAX_MARKS = 1000
_MAX_INTEGER_BYTES = 64
_MAX_PROTOCOL = 5


def read_pickle(data: memoryview, start: int, vocabulary: Vocabulary, budget: Budget) -> tuple[Any, int]:
    """Read the pickle that begins at `start`; return what it holds, and where it ends.

    Byte strings come as views of `data`. What is returned has passed `check_nesting`.

    Args:
        data: [n] bytes, read-only.
        start: position in `data`.
        vocabulary: what names mean.
        budget: shared by all pickles of a file.

    Raises:
        RefusedError: the pickle is damaged, uses an instruction or a name that is not admitted, or exceeds a limit.
    """
    machine = _Machine(data, start, vocabulary, budget)
    value = machine.run()
    check_nesting(value)
    return value, machine.position


class _Machine:
    def __init__(self, data: memoryview, start: int, vocabulary: Vocabulary, budget: Budget) -> None:
        self.data = data
        self.position = start
        self.vocabulary = vocabulary
        self.budget = budget
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        while True:
            self.budget.spend()
            at = self.position
            code = self.take(1)[0]
            if code == _STOP:
                value = self.pop()
                if self.stack or self.outer:
                    raise RefusedError(f"damaged: the pickle ends at byte {at:,} with values left over")
                return value
            action = _ACTIONS.get(code)
            if action is None:
                name = _NAMES.get(code, f"{code:#04x}")
                raise RefusedError(f"instruction {name} at byte {at:,} of the pickle, which no network file has")
            action(self)

    def take(self, count: int) -> memoryview:
        left = len(self.data) - self.position
        if count > left:
            raise RefusedError(
                f"cut short or damaged: {count:,} bytes announced at byte {self.position:,}, {left:,} there"
            )
        self.position += count
        return self.data[self.position - count : self.position]

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def text(self, count: int) -> str:
        at = self.position
        try:
            return str(self.take(count), "utf-8")
        except UnicodeDecodeError:
            raise RefusedError(f"damaged: the string at byte {at:,} is not UTF-8") from None

    def line(self) -> str:
        """Take a line, such as GLOBAL has two of."""
        window = bytes(self.data[self.position : self.position + MAX_NAME])
        end = window.find(b"\n")
        if end < 0:
            raise RefusedError(f"damaged: the name at byte {self.position:,} does not end")
        text = self.text(end)
        self.position += 1
        return text

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            raise RefusedError(f"damaged: a value is missing before byte {self.position:,} of the pickle")
        return self.stack.pop()

    def top(self) -> Any:
        self.push(value := self.pop())
        return value

    def mark(self) -> None:
        if len(self.outer) >= _MAX_MARKS:
            raise RefusedError(f"more than {_MAX_MARKS} containers within one another")
        self.outer.append(self.stack)
        self.stack = []

    def pop_to_mark(self) -> list[Any]:
        if not self.outer:
            raise RefusedError(f"damaged: no mark before byte {self.position:,} of the pickle")
        items, self.stack = self.stack, self.outer.pop()
        return items

    def pop_any(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_to_mark()

    def put(self, index: int) -> None:
        self.memo[index] = self.top()

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise RefusedError(
                f"damaged: value {index} is used before it is there, at byte {self.position:,} of the pickle"
            )
        self.push(self.memo[index])

    def integer(self) -> None:
        count = self.number("B")
        if count > _MAX_INTEGER_BYTES:
            raise RefusedError(f"an integer of {count:,} bytes; expected at most {_MAX_INTEGER_BYTES}")
        self.push(int.from_bytes(self.take(count), "little", signed=True))

    def last_as_tuple(self, count: int) -> None:
        self.push(tuple([self.pop() for _ in range(count)][::-1]))

    def extend(self, items: list[Any]) -> None:
        self.target(list).extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.target(dict)
        if len(items) % 2:
            raise RefusedError(f"damaged: a key without a value before byte {self.position:,} of the pickle")
        for key, value in zip(checked_keys(items[::2]), items[1::2], strict=True):
            if key in target:
                raise RefusedError(f"key {shown(str(key))} twice in one dictionary")
            target[key] = value

    def add_items(self, items: list[Any]) -> None:
        self.target(set).update(checked_keys(items))

    def target(self, kind: type) -> Any:
        value = self.top()
        if type(value) is not kind:
            found = type(value).__name__
            raise RefusedError(f"damaged: a {found} where a {kind.__name__} is filled, at byte {self.position:,}")
        return value

    def name(self, module: Any, attribute: Any) -> None:
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise RefusedError(f"damaged: a name that is no string before byte {self.position:,} of the pickle")
        name = f"{module}.{attribute}"
        words = self.vocabulary
        if not (name in words.calls or name in words.inert or words.has_record(name)):
            raise RefusedError(f"refers to {shown(name)}, which no network file needs; nothing was imported or run")
        self.push(Global(name))

    def name_from_stack(self) -> None:
        attribute = self.pop()
        self.name(self.pop(), attribute)

    def call(self) -> None:
        """Carry out REDUCE and NEWOBJ, which differ only for classes that Python would make without a call."""
        args, callee = self.pop(), self.pop()
        if not isinstance(callee, Global) or not isinstance(args, tuple):
            raise RefusedError(f"calls something that is not a name, before byte {self.position:,} of the pickle")
        self.budget.spend(sum(len(arg) for arg in args if isinstance(arg, list)))  # it may come from the memo, often
        ours = self.vocabulary.calls.get(callee.name)
        if ours is not None:
            self.push(ours(args))
        elif self.vocabulary.has_record(callee.name):
            self.push(Record(callee.name, args))
        else:
            raise RefusedError(f"calls {shown(callee.name)}, which only stands for itself; nothing was run")

    def build(self) -> None:
        state = self.pop()
        target = self.top()
        if isinstance(target, Record) and target.state is None and isinstance(state, (dict, tuple)):
            target.state = state
        elif not isinstance(target, dict) or not isinstance(state, (dict, type(None))):
            raise RefusedError(
                f"damaged: sets the state of a {type(target).__name__}, before byte {self.position:,} of the pickle"
            )
        # What else a dictionary's subclass holds, such as a state dict's versions, is of no use here.

    def persistent(self) -> None:
        if self.vocabulary.persistent is None:
            raise RefusedError("refers to something outside of the file by a persistent id")
        self.push(self.vocabulary.persistent(self.pop()))

    def protocol(self) -> None:
        found = self.number("B")
        if not 2 <= found <= _MAX_PROTOCOL:
            raise RefusedError(f"pickle protocol {found}; expected 2 to {_MAX_PROTOCOL}")

    def frame(self) -> None:
        """Pass over the length of a frame: it only tells how much to read ahead."""
        self.number("Q")


_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
_STOP = ord(".")


def _bytes_of(form: str) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(machine.take(machine.number(form)))


def _text_of(form: str) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(machine.text(machine.number(form)))


def _number(form: str) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(machine.number(form))


_ACTIONS: dict[int, Callable[[_Machine], None]] = {
    ord(code): action
    for code, action in {
        "\x80": _Machine.protocol,
        "\x95": _Machine.frame,
        # numbers, strings, bytes
        "N": lambda m: m.push(None),
        "\x88": lambda m: m.push(True),
        "\x89": lambda m: m.push(False),
        "J": _number("i"),
        "K": _number("B"),
        "M": _number("H"),
        "\x8a": _Machine.integer,
        "G": lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
        "X": _text_of("I"),
        "\x8c": _text_of("B"),
        "\x8d": _text_of("Q"),
        "B": _bytes_of("I"),
        "C": _bytes_of("B"),
        "\x8e": _bytes_of("Q"),
        # containers
        "(": _Machine.mark,
        "0": _Machine.pop_any,
        "]": lambda m: m.push([]),
        "}": lambda m: m.push({}),
        "\x8f": lambda m: m.push(set()),
        ")": lambda m: m.push(()),
        "t": lambda m: m.push(tuple(m.pop_to_mark())),
        "\x85": lambda m: m.last_as_tuple(1),
        "\x86": lambda m: m.last_as_tuple(2),
        "\x87": lambda m: m.last_as_tuple(3),
        "a": lambda m: m.extend([m.pop()]),
        "e": lambda m: m.extend(m.pop_to_mark()),
        "s": lambda m: m.set_items([m.pop(), m.pop()][::-1]),
        "u": lambda m: m.set_items(m.pop_to_mark()),
        "\x90": lambda m: m.add_items(m.pop_to_mark()),
        # the memo
        "q": lambda m: m.put(m.number("B")),
        "r": lambda m: m.put(m.number("I")),
        "\x94": lambda m: m.put(len(m.memo)),
        "h": lambda m: m.get(m.number("B")),
        "j": lambda m: m.get(m.number("I")),
        # names, and what is made of them
        "c": lambda m: m.name(m.line(), m.line()),
        "\x93": _Machine.name_from_stack,
        "R": _Machine.call,
        "\x81": _Machine.call,
        "b": _Machine.build,
        "Q": _Machine.persistent,
    }.items()
}
