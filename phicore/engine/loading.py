"""The weights of a model, which a thread may load while steps are compiled for them."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait

from phicore.backend import Params
from phicore.progress import Progress

TELL_EVERY_S = 0.1
"""Who waits for weights is told of progress this often."""

Load = Callable[[Progress], Params]
"""A function that loads weights, and calls its argument after each of them."""


class Weights:
    """The weights of a model: loaded, or on their way to the device.

    Attributes:
        forms: What a step is compiled for: the weights or, as long as they are loaded, their forms.
    """

    def __init__(self, forms: Params, load: Load | None = None) -> None:
        """Take weights, or begin to load them.

        Args:
            forms: The weights, if `load` is None. Otherwise their forms, nested as they are.
            load: Loads them in a thread, which ends early if nobody needs the weights any more: if
                this object is freed, or the main thread has ended.
        """
        self.forms = forms
        self._loading = None if load is None else _Loading(load)
        if self._loading is not None:
            weakref.finalize(self, self._loading.stop)
        self._made_s = time.perf_counter()

    @property
    def are_loaded(self) -> bool:
        """Return whether nobody has to wait for the weights."""
        return self._loading is None or self._loading.result.done()

    @property
    def ready_s(self) -> float:
        """Return when the weights were loaded, by `time.perf_counter`; now, if they are not yet."""
        if self._loading is None:
            return self._made_s
        return self._loading.ended_s or time.perf_counter()

    def get(self, progress: Progress) -> Params:
        """Return the weights, and wait for them before.

        Args:
            progress: Called in this thread while it waits.
        Raises:
            Exception: The error with which loading them has ended.
        """
        loading = self._loading
        if loading is not None:
            while not loading.result.done():
                progress("loading", loading.done, loading.total)
                wait([loading.result], TELL_EVERY_S)
                if loading.result.done():
                    progress("loading", loading.total, loading.total)
            self.forms, self._made_s = loading.result.result(), self.ready_s
            self._loading = None
        return self.forms


class _Loading:
    """A thread that loads weights. It does not refer to `Weights`, so that these can be freed."""

    def __init__(self, load: Load) -> None:
        self.result: Future[Params] = Future()
        self.done, self.total = 0, 1
        self.ended_s: float | None = None
        self._load: Load | None = load
        self._is_wanted = True
        # Not a daemon: Python must not end while the thread is in a library.
        threading.Thread(target=self._run, name="phicore-weights").start()

    def stop(self) -> None:
        self._is_wanted = False

    def _run(self) -> None:
        assert self._load is not None
        try:
            params = self._load(self._report)
        except BaseException as error:  # noqa: BLE001 - who waits raises it
            self.result.set_exception(error)
        else:
            self.ended_s = time.perf_counter()
            self.result.set_result(params)
        finally:
            self._load = None  # and with it the file

    def _report(self, what: str, done: int, total: int) -> None:
        if not self._is_wanted or not threading.main_thread().is_alive():
            raise _UnwantedError
        self.done, self.total = done, total


class _UnwantedError(Exception):
    """Nobody needs the weights any more."""
