"""Bounds of what a chat template may do: it is a program, and it may come from anybody.

A template runs in the process that renders it, so Jinja's sandbox keeps it from that process' data,
and a `Budget` bounds its time and its memory. Nothing of this looks at a clock, so a template that
renders here renders everywhere.

What is counted, as work: each operation, call, filter, test and pass of a loop or a macro, by the
size of its body; each 4096 bytes of a text that an operation makes, which is a copy; and each 256
bytes of what it reads or makes else, where values that contain the same value twice count it
twice, since comparing or printing them takes so long. What is counted, as memory: each text and
container that an operation makes, whether or not it is dropped later. Operations whose result can
be much larger than what they read (`*`, `**`, `%`, `replace`, `join`, `center`, `indent`, ...) are
refused before they begin.

What is not bounded: the time of one operation on a value that the budget allows, which is about a
second at most (a comparison of two texts of 100 MB, say), and the text of messages, tools and
variables, which whoever calls `render` has in memory already.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from phicore.errors import TokenizerError

MOST_SOURCE = 2**17
"""The largest number of characters of a template. The longest ones of known models have 20,000."""
MOST_WORK = 3_000_000
"""The most operations of a rendering."""
MOST_BYTES = 2**29
"""The most bytes of the texts and containers that the operations of one attempt make."""
MOST_BITS = 2**13
"""The largest size of an integer."""
MOST_DEPTH = 400
"""The deepest nesting of a value that is read, compared or printed."""
NODE = 32  # bytes that each item of a container counts as, beside its text
UNIT = 8  # two to this power is the number of bytes that count as an operation
COPY = 12  # likewise, for the copy of a text, which templates make longer a turn at a time
LONG = 16  # likewise, for operations whose time is the product of two lengths
CALL = 4  # operations that a call, a filter or a test is as slow as
PER_COST = 64  # bytes that the outputs of a body may need for each operation


class ExceededError(Exception):
    """A template does too much."""


class Budget:
    """What is left of the work and the memory of a rendering.

    Args:
        work: The number of operations; None is `MOST_WORK`.
    """

    def __init__(self, work: int | None = None) -> None:
        self.work = MOST_WORK if work is None else work
        self.bytes = MOST_BYTES
        self._known: dict[int, tuple[Any, int, int]] = {}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Charge what this thread renders meanwhile. The memory is that of a new attempt."""
        self.bytes, self._known = MOST_BYTES, {}
        token = CURRENT.set(self)
        try:
            yield
        finally:
            CURRENT.reset(token)
            self._known = {}

    def spend(self, work: int) -> None:
        """Charge operations.

        Raises:
            ExceededError: If there were too many.
        """
        self.work -= work
        if self.work < 0:
            raise ExceededError("it does too much work; no prompt needs so many operations")

    def room(self, size: int) -> None:
        """Check that a value of a size in bytes may be made.

        Raises:
            ExceededError: If it may not.
        """
        if size > self.bytes:
            raise ExceededError(f"it makes texts or lists of more than {MOST_BYTES >> 20} MiB")

    def make(self, size: int) -> None:
        """Charge a new value of a size in bytes."""
        self.room(size)
        self.bytes -= size
        self.spend(size >> UNIT)

    def made(self, value: Any) -> Any:
        """Charge a value that an operation has made; count what an iterator will give."""
        if isinstance(value, str):
            size = sys.getsizeof(value)
            self.room(size)
            self.bytes -= size
            self.spend(1 + (size >> COPY))
        elif isinstance(value, (list, tuple, dict, bytes, set)):
            self.spend(1)
            self.make(sys.getsizeof(value))
        elif isinstance(value, int):
            if value.bit_length() > MOST_BITS:
                raise ExceededError("it computes with too large numbers")
        elif isinstance(value, Iterator):
            return self._counted(value)
        return value

    def _counted(self, values: Iterator[Any], cost: int = 1) -> Iterator[Any]:
        for value in values:
            self.spend(cost)
            yield value

    def looped(self, values: Any, cost: int) -> Any:
        """Charge a loop for the condition that it asks of each item."""
        if isinstance(values, Iterator):
            return self._counted(values, cost)
        self.spend(cost * length(values))
        return values

    def walk(self, *values: Any) -> int:
        """Charge an operation that reads whole values; return their size in bytes."""
        size = sum(self.weight(value)[0] for value in values)
        self.spend(len(values) + (size >> UNIT))
        return size

    def read(self, value: Any) -> Any:
        """Charge an operation that reads a whole value; return the value."""
        if isinstance(value, str):
            self.spend(1 + (len(value) >> UNIT))
        elif type(value) in _SMALL:
            self.spend(1)
        else:
            self.walk(value)
        return value

    def written(self, value: Any) -> Any:
        """Charge an operation that writes a value as text; return the value."""
        if isinstance(value, str):
            self.make(len(value))
        else:
            self.make(self.walk(value))
        return value

    def depth(self, value: Any) -> int:
        """Return how deeply a value is nested."""
        return self.weight(value)[1]

    def weight(self, value: Any) -> tuple[int, int]:
        """Return the size of a value as text, in bytes, and how deeply it is nested.

        What a value contains twice counts twice, but it is looked at once: templates cannot change
        containers.
        """
        if isinstance(value, (str, bytes)):
            return NODE + len(value), 0
        if isinstance(value, int):
            return NODE + (value.bit_length() >> 1), 0
        if isinstance(value, range):
            return NODE * (1 + len(value)), 1
        inner: Any
        if isinstance(value, Mapping):
            inner = [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set, *_VIEWS)):
            inner = value
        else:
            return NODE, 0
        if (known := self._known.get(id(value))) is not None:
            return known[1], known[2]
        size, depth = NODE, 0
        for item in inner:
            found = self.weight(item)
            size, depth = size + found[0], max(depth, found[1])
        self.spend(1 + (length(value) >> 1))
        if depth >= MOST_DEPTH:
            raise ExceededError("its values are nested too deeply")
        self._known[id(value)] = value, size, depth + 1  # with the value, which keeps its id
        return size, depth + 1


_SMALL = (bool, type(None), float)
_EMPTY: dict[Any, Any] = {}
_VIEWS: tuple[Any, ...] = tuple(map(type, (_EMPTY.keys(), _EMPTY.values(), _EMPTY.items())))
CURRENT: ContextVar[Budget] = ContextVar("budget")


def length(value: Any) -> int:
    try:
        return len(value) if isinstance(value, Sized) else 1
    except OverflowError:
        return sys.maxsize


def refusal(error: Exception) -> TokenizerError:
    """Return the error about a template that has failed in any way."""
    problem = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, RecursionError):
        problem = "too deep a recursion of its calls or values"
    elif isinstance(error, MemoryError):
        problem = "there is not enough memory"
    return TokenizerError(f"chat template: {problem:.300}")
