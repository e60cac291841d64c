"""The watch on plugins that keep the thread that computes waiting."""

from __future__ import annotations

import pytest

from phicore.plugins import blaming
from phicore.server.faults import Watch


class Name(str):
    """A plugin's name. When the watch writes it down, the step ends."""

    watch: Watch

    def __format__(self, spec: str) -> str:
        self.watch.end()
        return str(self)


def test_step_that_ends_while_its_plugin_is_named_blocks_nothing(monkeypatch: pytest.MonkeyPatch):
    """The server refused all requests for ever: no other step came, which would have ended it."""
    told: list[str] = []
    watch = Watch(0.04, lambda: told.append("blocked"))
    Name.watch = watch
    names: list[Name] = []

    def running(frame: object, but: object) -> tuple[Name, str]:
        names.append(Name("bad"))
        return names[-1], "file.py, line 1"

    monkeypatch.setattr(blaming, "running", running)
    watch.start()
    watch.begin()
    while watch._began_s is not None:
        pass
    watch.stop()
    assert watch.blocker is None
    assert told == []
