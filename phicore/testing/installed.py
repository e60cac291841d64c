"""The tests of the kit for the backend of `runner.run`, which runs pytest on this module."""

from __future__ import annotations

from collections.abc import Callable

from phicore.backend import Backend, BackendOptions
from phicore.testing.conformance import BackendConformance

factory: Callable[[BackendOptions], Backend] | None = None


class TestBackend(BackendConformance):
    @classmethod
    def make_backend(cls, options: BackendOptions) -> Backend:
        assert factory is not None, "set by runner.run"
        return factory(options)
