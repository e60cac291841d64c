"""Every backend that the conformance kit is run on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from backend.strict import StrictBackend
from conftest import BACKENDS, make_backend

from phicore.protocol import Backend

VARIANTS = ("jax-xla", "jax-avx2", "jax-generic") if "jax" in BACKENDS else ()
"""JAX as it is on other processors, and where its kernels cannot be used."""


def make_any(name: str) -> Backend:
    if name == "strict":
        return StrictBackend()
    if name not in VARIANTS:
        return make_backend(name)
    from phicore_jax.backend import JaxBackend

    kernels = None
    if name != "jax-xla":
        pytest.importorskip("llvmlite", reason="the kernels of the JAX backend need llvmlite")
        from kernels.made import kernels_of
        from phicore_jax.kernels.build import supported_targets

        target = name.removeprefix("jax-")
        if target not in supported_targets():
            pytest.skip(f"this processor cannot run {target} code")
        kernels = kernels_of(target)
    return JaxBackend("cpu", kernels=kernels)


class EveryBackend:
    """Each installed backend, variants of JAX, and array-api-strict behind the protocol's list."""

    @pytest.fixture(scope="class", params=[*BACKENDS, *VARIANTS, "strict"])
    @classmethod
    def make(cls, request: pytest.FixtureRequest) -> Callable[[], Backend]:
        return lambda: make_any(request.param)
