"""Tests of `swallowed_interrupts`, which notices each Ctrl-C, even if a library catches it."""

import signal
import threading
from collections.abc import Iterator

import pytest

from phicore.lab.interrupts import swallowed_interrupts


@pytest.fixture(autouse=True)
def python_s_own_handler() -> Iterator[None]:
    """Set Python's own handler, since a background job may have been started ignoring Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupt_that_a_library_catches_is_found() -> None:
    with swallowed_interrupts() as swallowed:
        assert not swallowed
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            pass
        else:
            raise AssertionError("no exception")
        assert swallowed
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupt_that_python_can_only_report_is_found() -> None:
    class Dying:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    with swallowed_interrupts() as swallowed:
        Dying()
        assert swallowed


def test_handler_of_the_application_stays() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
    with swallowed_interrupts() as swallowed:
        signal.raise_signal(signal.SIGINT)
    assert seen == [signal.SIGINT]
    assert not swallowed


def test_other_threads_can_generate() -> None:
    entered: list[bool] = []

    def work() -> None:
        with swallowed_interrupts():
            entered.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [True]
