"""The conformance tests run on every installed backend, and on one that has only the list."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from backend.strict import StrictBackend
from conftest import BACKENDS, make_backend

from phicore.protocol import Backend

VARIANTS = ("jax-xla", "jax-avx2", "jax-generic") if "jax" in BACKENDS else ()
"""JAX as it is on other processors, and where its kernels cannot be used."""


def make_variant(name: str) -> Backend:
    from phicore_jax.backend import JaxBackend

    kernels = None
    if name != "jax-xla":
        pytest.importorskip("llvmlite", reason="the kernels of the JAX backend need llvmlite")
        from phicore_jax.kernels.build import supported_targets
        from phicore_jax.kernels.runtime import Kernels

        target = name.removeprefix("jax-")
        if target not in supported_targets():
            pytest.skip(f"this processor cannot run {target} code")
        kernels = Kernels(target)
    return JaxBackend("cpu", kernels=kernels)


@pytest.fixture(scope="session", params=[*BACKENDS, *VARIANTS, "strict"])
def ops(request: pytest.FixtureRequest) -> Backend:
    """Each installed backend in turn, variants, and array-api-strict behind the protocol's list.

    The cache is exact; other types of cache have tests of their own.
    """
    if request.param == "strict":
        return StrictBackend()
    make = make_variant if request.param in VARIANTS else make_backend
    made = make(request.param)
    made.configure(cache_type="f32")
    return made


@pytest.fixture(autouse=True)
def _no_fused_kernels():
    """MLX has a C++ compiler make these on a CPU, a second each; other tests use them."""
    mlx = sys.modules.get("mlx.core")
    if mlx is None:
        yield
        return
    mlx.disable_compile()
    yield
    mlx.enable_compile()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
