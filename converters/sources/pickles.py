"""Pickles as data: a machine for their opcodes that imports nothing, and calls nothing but a table of its own.

A pickle is a program. Its names ("module.name") stay names here, and a call of one that is not in the table makes a stand-in that
keeps the arguments: whatever a hostile file names, nothing of it is loaded or run.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

#: returns the value of a call, given its arguments; raises any exception if they are impossible
Handler = Callable[..., object]

# A few bytes may describe tuples in tuples whose hash takes for ever
_MOST_IN_KEY = 1000
_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}


@dataclass(frozen=True)
class Name:
    """The name of a class or function, with its module; it is not imported."""

    name: str


@dataclass(eq=False)
class StandIn:
    """An object of a class that is not known, as the pickle describes it.

    Attributes
    ----------
    name
        The name of its class, or of the function that would make it.
    args
        The arguments of the call.
    state
        The state that it would be given.
    members
        The elements that would be added, or keys and values in turn.
    """

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    members: list[Any] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The name to show: of the class, if a function of Python's would make the object."""
        helped = self.name.startswith(("copyreg.", "builtins.")) and self.args
        return self.args[0].name if helped and isinstance(self.args[0], Name) else self.name

    def parts(self) -> Iterable[Any]:
        """Return everything that it is made of."""
        return (*self.args, self.state, *self.members)


class PickleMachine:
    """Returns the value of a pickle.

    Parameters
    ----------
    handlers
        The values of calls, by the name of the function or class.
    build
        Gives a state to a value that is not a stand-in.
    find
        Returns the object of a persistent id.
    """

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        build: Callable[[object, object], None],
        find: Callable[[Any], object],
    ) -> None:
        self._handlers = handlers
        self._build = build
        self._find = find
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def load(self, file: BinaryIO) -> object:
        """Return the value of the pickle at the position of a file, and leave the file behind its end.

        Raises any exception if it is damaged.
        """
        self._stack, self._marks, self._memo = [], [], {}
        for opcode, argument, _ in pickletools.genops(file):
            step = _STEPS.get(opcode.name)
            if step is None:
                raise ValueError(f"the opcode {opcode.name} has no meaning in a file")
            step(self, argument)
        (value,) = self._stack
        return value

    def push(self, value: object) -> None:
        """Put a value on the stack."""
        self._stack.append(value)

    def pop(self) -> Any:
        """Take the last value from the stack."""
        return self._stack.pop()

    def top(self) -> Any:
        """Return the last value of the stack."""
        return self._stack[-1]

    def take(self, count: int) -> list[Any]:
        """Take the last values from the stack."""
        start = len(self._stack) - count
        if start < 0:
            raise ValueError("nothing is on the stack")
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def drop(self, items: Sequence[Any]) -> None:
        """Do nothing with values."""

    def mark(self) -> None:
        """Remember the height of the stack."""
        self._marks.append(len(self._stack))

    def marked(self) -> list[Any]:
        """Take everything above the last mark."""
        return self.take(len(self._stack) - self._marks.pop())

    def memoize(self, key: int | None) -> None:
        """Remember the last value."""
        self._memo[len(self._memo) if key is None else key] = self.top()

    def recall(self, key: int) -> None:
        """Put a remembered value on the stack."""
        self.push(self._memo[key])

    def call(self, function: object, args: object, keywords: object = None) -> None:
        """Put the value of a call on the stack."""
        if not isinstance(args, tuple):
            raise TypeError("arguments that are no tuple")
        if keywords:
            args = (*args, keywords)
        if not isinstance(function, Name):  # it is itself the result of a call, or a plain value
            title = function.title if isinstance(function, StandIn) else type(function).__name__
            self.push(StandIn(title, args))
            return
        handler = self._handlers.get(function.name)
        self.push(StandIn(function.name, args) if handler is None else handler(*args))

    def extend(self, items: Sequence[Any]) -> None:
        """Add elements to the last value."""
        target = self.top()
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, set):
            target.update(map(_hashable, items))
        elif isinstance(target, StandIn):
            target.members.extend(items)
        else:
            raise TypeError("elements for something else than a list")

    def set_items(self, items: Sequence[Any]) -> None:
        """Add keys and values, in turn, to the last value."""
        target = self.top()
        if isinstance(target, dict):
            target.update(pairs(items))
        elif isinstance(target, StandIn):
            target.members.extend(items)
        else:
            raise TypeError("entries for something else than a dict")

    def persistent(self, key: object) -> None:
        """Put the object of a persistent id on the stack."""
        self.push(self._find(key))

    def set_state(self) -> None:
        """Give the last value to the one below it as its state."""
        state, target = self.pop(), self.top()
        if isinstance(target, StandIn):
            target.state = state
        elif not isinstance(target, Name):
            self._build(target, state)


def _name(module: object, name: object) -> Name:
    if not isinstance(module, str) or not isinstance(name, str):
        raise TypeError("a name that is no text")
    return Name(f"{_OLD_MODULES.get(module, module)}.{name}")


def _named(argument: str) -> Name:
    """Return a name from the text of pickletools, in which a space is between module and name."""
    return _name(*argument.split(" ", 1))


def _hashable(key: Any) -> Any:
    """Return a key; raise an exception if it cannot be hashed, or not soon."""
    waiting, count = [key], 0
    while waiting:
        item = waiting.pop()
        if isinstance(item, tuple):
            waiting.extend(item)
            count += len(item)
        if count > _MOST_IN_KEY:
            raise ValueError("a key of very many parts")
    hash(key)
    return key


def pairs(items: Sequence[Any]) -> dict[Any, Any]:
    """Return a dict of keys and values that stand in turn."""
    return dict(zip(map(_hashable, items[::2]), items[1::2], strict=True))


def members(items: Iterable[Any]) -> frozenset[Any]:
    """Return a set of elements."""
    return frozenset(map(_hashable, items))


Step = Callable[[PickleMachine, Any], None]
_VALUES = (
    "INT LONG FLOAT STRING UNICODE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINSTRING SHORT_BINSTRING BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8"
)
#: what each opcode does, by its name in pickletools; the others refer to things outside the file
_STEPS: dict[str, Step] = {
    **dict.fromkeys(_VALUES.split(), PickleMachine.push),
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda _machine, _: None),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), PickleMachine.memoize),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), PickleMachine.recall),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_SET": lambda machine, _: machine.push(set()),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.take(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.take(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.take(3))),
    "MARK": lambda machine, _: machine.mark(),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.marked())),
    "LIST": lambda machine, _: machine.push(machine.marked()),
    "DICT": lambda machine, _: machine.push(pairs(machine.marked())),
    "FROZENSET": lambda machine, _: machine.push(members(machine.marked())),
    "POP": lambda machine, _: machine.drop(machine.take(1)),
    "POP_MARK": lambda machine, _: machine.drop(machine.marked()),
    "DUP": lambda machine, _: machine.push(machine.top()),
    "APPEND": lambda machine, _: machine.extend(machine.take(1)),
    "APPENDS": lambda machine, _: machine.extend(machine.marked()),
    "ADDITEMS": lambda machine, _: machine.extend(machine.marked()),
    "SETITEM": lambda machine, _: machine.set_items(machine.take(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.marked()),
    "GLOBAL": lambda machine, argument: machine.push(_named(argument)),
    "STACK_GLOBAL": lambda machine, _: machine.push(_name(*machine.take(2))),
    "REDUCE": lambda machine, _: machine.call(*machine.take(2)),
    "NEWOBJ": lambda machine, _: machine.call(*machine.take(2)),
    "NEWOBJ_EX": lambda machine, _: machine.call(*machine.take(3)),
    "INST": lambda machine, argument: machine.call(_named(argument), tuple(machine.marked())),
    "OBJ": lambda machine, _: _object(machine, machine.marked()),
    "PERSID": PickleMachine.persistent,
    "BINPERSID": lambda machine, _: machine.persistent(machine.pop()),
    "BUILD": lambda machine, _: machine.set_state(),
}


def _object(machine: PickleMachine, items: Sequence[Any]) -> None:
    machine.call(items[0], tuple(items[1:]))
