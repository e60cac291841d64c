"""Every backend that the conformance kit is run on."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import ALL_BACKENDS, make_backend

from phicore.backend import DEFAULTS, Backend, BackendOptions
from phicore.testing.conformance.base import Make

VARIANTS = ("jax-xla", "jax-steps", "jax-avx2", "jax-generic") if "jax" in ALL_BACKENDS else ()
"""JAX as it is on other processors and on cards, and where its kernels cannot be used."""


def make_any(name: str, options: BackendOptions = DEFAULTS) -> Backend:
    if name not in VARIANTS:
        return make_backend(name, options)
    from phicore_jax.backend import JaxBackend

    kernels = None
    if name == "jax-steps":
        return JaxBackend(replace(options, device="cpu"), kernels=None, steps=5)
    if name != "jax-xla":
        pytest.importorskip("llvmlite", reason="the kernels of the JAX backend need llvmlite")
        from kernels.made import kernels_of
        from phicore_jax.kernels.build import supported_targets

        target = name.removeprefix("jax-")
        if target not in supported_targets():
            pytest.skip(f"this processor cannot run {target} code")
        kernels = kernels_of(target)
    return JaxBackend(replace(options, device="cpu"), kernels=kernels)


class EveryBackend:
    """Each installed backend, and variants of JAX."""

    @pytest.fixture(scope="class", params=[*ALL_BACKENDS, *VARIANTS])
    @classmethod
    def make(cls, request: pytest.FixtureRequest) -> Make:
        return lambda options: make_any(request.param, options)
