"""Fixtures for all tests: every installed backend, and strict settings for tensor libraries."""

from __future__ import annotations

import os
import signal
import sys
from collections import defaultdict
from collections.abc import Generator, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

# NumPy reads this when it is imported. One thread, since each test process has its own processor.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

from phicore.backend import DEFAULTS, Backend, BackendOptions
from phicore.errors import BackendError
from phicore.plugins import Plugins

# JAX reads these when it is imported. An implicit cast or an implicit new axis is then an error.
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
# Tests do not fill the user's cache with weights; the tests of it have a folder of their own.
os.environ["PHICORE_PACKED_CACHE"] = "0"
# Small programs are kept on disk, too: many tests compile the same ones.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def pytest_configure(config: pytest.Config) -> None:
    """Keep compiled programs in pytest's own cache, not in the user's.

    All test processes of all runs share them. MLX keeps CPU programs in the folder for temporary
    files; it compiles each under a name of its own and renames it, so processes can share these.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell that starts pytest in the background ignores the interrupt key for it. Programs
        # that tests start and interrupt would inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and `nohup` ignores this
    if config.pluginmanager.hasplugin("cacheprovider"):
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
        os.environ["TMPDIR"] = str(config.cache.mkdir("tmp"))
    # The same examples in every run, and no time limit: a first example may have to be compiled.
    settings.register_profile(
        "phicore",
        max_examples=25 if config.option.markexpr == "not complete" else 100,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile("phicore")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests as `complete` that `each_value` leaves out of the default run.

    `@pytest.mark.each_value("data_type", "backend")` stands for the product of these parameters.
    The default run takes each value of the parameter with the most values, together with one value
    of every other parameter, in turn. So it tests every value of every parameter. The complete run
    tests the rest of the product. `@pytest.mark.complete_where(backend_name="jax")` leaves tests
    with this value of a parameter to the complete run: those that compile for long.

    Hypothesis tries fewer examples in the default run, so the complete run has its tests, too.
    """
    products: dict[Any, list[tuple[pytest.Item, dict[str, int]]]] = defaultdict(list)
    places: dict[Any, dict[int, int]] = defaultdict(dict)  # indices of a parameter's values
    for item in items:
        callspec = getattr(item, "callspec", None)
        values = {} if callspec is None else callspec.params
        test = getattr(item, "obj", None)
        is_law = getattr(test, "is_hypothesis_test", False)
        chooses_number = is_law and test.__module__.startswith("phicore.")  # the conformance kit
        if is_law and not chooses_number and config.option.markexpr == "complete":
            item.add_marker(pytest.mark.complete)
        for marker in item.iter_markers("complete_where"):
            if all(values.get(name) == value for name, value in marker.kwargs.items()):
                item.add_marker(pytest.mark.complete)
        for marker in item.iter_markers("each_value"):
            if callspec is None or not set(marker.args) <= callspec.params.keys():
                continue
            product = (item.path, item.nodeid.partition("[")[0], marker.args)
            indices = {}
            for name in marker.args:
                seen = places[product, name]
                indices[name] = seen.setdefault(id(callspec.params[name]), len(seen))
            products[product].append((item, indices))
    for product, found in products.items():
        counts = {name: len(places[product, name]) for name in found[0][1]}
        longest = max(counts, key=lambda name: counts[name])
        for item, indices in found:
            turn = indices[longest]
            if any(index != turn % counts[name] for name, index in indices.items()):
                item.add_marker(pytest.mark.complete)


ABOUT_LOGIC = ("api", "chat", "cli", "engine", "grammar", "server", "testing", "unit")
"""Folders with tests of phicore's own logic, whatever a tensor library computes."""


@pytest.fixture(scope="module", autouse=True)
def _compile_quickly(request: pytest.FixtureRequest) -> Iterator[None]:
    """Spare compilers most of their work in tests of logic, which run each program a few times.

    There XLA does not optimize, which takes a quarter of the time, and MLX does not have operations
    fused by a C++ compiler. The numbers that users get are tested in the other folders, and in
    modules with the mark `as_for_users`, such as those of sums that must be equal to the last bit;
    `as_for_users("jax")` spares MLX alone.
    """
    folder = request.path.relative_to(Path(__file__).parent).parts[0]
    marker = request.node.get_closest_marker("as_for_users")
    whole = () if marker is None else marker.args or ("jax", "mlx")
    quick = {"jax", "mlx"}.difference(whole) if folder in ABOUT_LOGIC else set()
    with pytest.MonkeyPatch.context() as patch, ExitStack() as at_end:
        if "jax" in quick:
            with suppress(ImportError):
                from phicore_jax.backend import CPU_OPTIONS

                patch.setitem(CPU_OPTIONS, "xla_backend_optimization_level", 0)
                patch.setitem(CPU_OPTIONS, "xla_cpu_use_fusion_emitters", False)
        if "mlx" in quick:
            with suppress(ImportError):
                import mlx.core as mx

                mx.disable_compile()
                at_end.callback(mx.enable_compile)
        yield


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs() -> Iterator[None]:
    """Clear JAX's compiled programs after each module; otherwise a worker grows to gigabytes."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


ALL_BACKENDS = tuple(Plugins().backends())
"""The names of the installed backends, from the registry that the command line uses."""
BACKENDS = tuple(name for name in ALL_BACKENDS if name != "array-api-strict")
"""The backends without the slow `array-api-strict`, which only tests of the protocol use."""


def make_backend(name: str, options: BackendOptions = DEFAULTS) -> Backend:
    """Make a backend on its best device. If its library does not work, skip the test; in CI, fail.

    A backend whose package is not installed is not in `BACKENDS` at all.
    """
    try:
        return Plugins().backends()[name].create(options)
    except BackendError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{error}; install what it needs")


@pytest.fixture(scope="session", params=BACKENDS)
def backend_name(request: pytest.FixtureRequest) -> str:
    """Return the name of each backend in `BACKENDS` in turn."""
    return request.param


@pytest.fixture(scope="session")
def ops(backend_name: str) -> Backend:
    """Return each backend in `BACKENDS` in turn."""
    return make_backend(backend_name)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Write half characters in what was logged as escapes; xdist cannot send them as they are."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections
    ]
    return report
