"""The backends that the conformance kit is run on."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import ALL_BACKENDS, make_backend

from phicore.backend import DEFAULTS, Backend, BackendOptions
from phicore.testing.conformance.base import Make

XLA = ("jax-xla",) if "jax" in ALL_BACKENDS else ()
"""JAX without its kernels, as where they cannot be used."""
OTHER_KERNELS = ("jax-avx2", "jax-generic") if "jax" in ALL_BACKENDS else ()
"""JAX with the kernels of other processors. tests/kernels/test_targets.py compares them, too."""


def make_any(name: str, options: BackendOptions = DEFAULTS) -> Backend:
    if name not in (*XLA, *OTHER_KERNELS):
        return make_backend(name, options)
    from phicore_jax.backend import JaxBackend

    kernels = None
    if name != "jax-xla":
        pytest.importorskip("llvmlite", reason="install llvmlite, for the kernels of JAX")
        from kernels.made import kernels_of
        from phicore_jax.kernels.build import supported_targets

        target = name.removeprefix("jax-")
        if target not in supported_targets():
            pytest.skip(f"this processor cannot run {target} code")
        kernels = kernels_of(target)
    return JaxBackend(replace(options, device="cpu"), kernels=kernels)


class EveryLibrary:
    """Mixin that runs tests on each installed backend and on JAX without kernels.

    This is enough for operations that no kernel computes.
    """

    @pytest.fixture(scope="class", params=[*ALL_BACKENDS, *XLA])
    @classmethod
    def make(cls, request: pytest.FixtureRequest) -> Make:
        return lambda options: make_any(request.param, options)


class EveryBackend:
    """Mixin that runs tests on each installed backend and on more variants of JAX.

    The variants are JAX without kernels and JAX with the kernels of other processors.
    """

    @pytest.fixture(
        scope="class",
        params=[
            *ALL_BACKENDS,
            *XLA,
            *(pytest.param(name, marks=pytest.mark.complete) for name in OTHER_KERNELS),
        ],
    )
    @classmethod
    def make(cls, request: pytest.FixtureRequest) -> Make:
        return lambda options: make_any(request.param, options)
