"""Which compiled functions are held, and which are dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from phicore.backend import KeptProgram
from phicore.engine import compiled as module
from phicore.engine.compiled import Compiled


class Program(KeptProgram):
    """A function that takes as much memory as its argument says."""

    def __call__(self, *args: Any) -> Any:
        self.memory_bytes = args[0]

    def prepare(self, *args: Any) -> None:
        self.memory_bytes = args[0]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Compiled:
    """Return compiled functions of nothing; three are held, of a hundred bytes."""
    monkeypatch.setattr(module, "MOST_HELD", 3)
    monkeypatch.setattr(module, "MOST_HELD_BYTES", 100)
    nothing = cast("Any", None)
    return Compiled(nothing, nothing, nothing, lambda *args: None, programs=cast("Any", object()))


@pytest.mark.parametrize(
    ("called", "held"),
    [
        ([(1, 10), (2, 10), (3, 10), (4, 10)], [2, 3, 4]),
        ([(1, 10), (2, 10), (3, 10), (1, 10), (4, 10)], [3, 1, 4]),
        ([(1, 60), (2, 20), (3, 30)], [2, 3]),
        ([(1, 60), (2, 20), (1, 60), (3, 30)], [1, 3]),
        ([(1, 10), (2, 10), (3, 200)], [3]),
        ([(1, 200), (2, 200)], [2]),
    ],
)
def test_functions_that_were_called_last_are_held(
    compiled: Compiled, called: list[tuple[int, int]], held: list[int]
):
    for key, size in called:
        compiled._call(key, cast("Callable[[], Any]", Program), (size,))
    assert list(compiled._called) == held
    assert compiled.held_bytes == sum(dict(called)[key] for key in held)


def test_functions_that_were_foreseen_in_vain_are_dropped(compiled: Compiled):
    for key in range(10):
        compiled._prepare(key, cast("Callable[[], Any]", Program), (10,))
    assert list(compiled._prepared) == [7, 8, 9]
    foreseen = compiled._prepared[8]
    compiled._call(8, cast("Callable[[], Any]", Program), (10,))
    assert compiled._called[8] is foreseen
    assert list(compiled._prepared) == [7, 9]
