"""What all tests share: every installed backend, and strict settings for their libraries."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

from phicore.backend import DEFAULTS, Backend, BackendOptions
from phicore.errors import BackendError
from phicore.plugins import Plugins

# JAX reads these when it is imported. An implicit cast or an implicit new axis is then an error.
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")


def pytest_configure(config: pytest.Config) -> None:
    """Compiled programs go to pytest's own cache, not to the user's.

    MLX keeps those of a CPU in the folder for temporary files, where two processes would write the
    same one at a time: each has its own.
    """
    if config.pluginmanager.hasplugin("cacheprovider"):
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
        if worker := os.environ.get("PYTEST_XDIST_WORKER"):
            os.environ["TMPDIR"] = str(config.cache.mkdir(f"tmp-{worker}"))


# The same examples in every run, and no time limit: a first example may have to be compiled.
settings.register_profile("phicore", deadline=None, derandomize=True, database=None)
settings.load_profile("phicore")

ALL_BACKENDS = tuple(Plugins().backends())
"""The names that `--backend` takes here, from the registry that the command line uses."""
BACKENDS = tuple(name for name in ALL_BACKENDS if name != "array-api-strict")
"""Those without the slow one, which is for the tests of the protocol alone."""


def make_backend(name: str, options: BackendOptions = DEFAULTS) -> Backend:
    """A backend on its best device. Where its library does not work the test is skipped, in CI not.

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
    """Each installed backend in turn."""
    return request.param


@pytest.fixture(scope="session")
def ops(backend_name: str) -> Backend:
    """Each installed backend in turn, made."""
    return make_backend(backend_name)
