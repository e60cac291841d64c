"""Tests of XLA's memory: expanded weights must not pile up, and running out gives a clear error."""

import gc

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from phicore.errors import BackendError
from phicore.testing import oracle

jax = pytest.importorskip("jax", reason="install phicore-jax")

LAYERS, SIZE = 8, 512


@pytest.mark.parametrize("rows", [1, 16])
def test_products_keep_at_most_two_expanded_matrices_at_a_time(rows: int):
    """Regression: XLA:CPU expanded all matrices of a model before it began the first product."""
    from phicore_jax.backend import CPU_OPTIONS, JaxBackend

    from phicore.backend import BackendOptions

    ops = JaxBackend(BackendOptions(device="cpu"), kernels=None)
    rng = np.random.default_rng(0)
    weights = [
        ops.load_weight(oracle.matrix([Type.Q4_K], [SIZE], SIZE, rng)) for _ in range(LAYERS)
    ]

    def chain(x, weights):
        for weight in weights:
            x = ops.linear(x, weight)
        return x

    x = ops.asarray(np.zeros((rows, SIZE), np.float32))
    compiled = jax.jit(chain, compiler_options=CPU_OPTIONS).lower(x, weights).compile()

    assert compiled.memory_analysis().temp_size_in_bytes < 2.5 * SIZE * SIZE * 4


def test_few_of_the_functions_that_copy_caches_are_held(monkeypatch: pytest.MonkeyPatch):
    """Regression: a server of many capacities held one for each pair of them, for ever."""
    from phicore_jax import backend

    def held() -> int:
        found = jax.devices("cpu")[0].client.live_executables()
        return sum(each.hlo_modules()[0].name == "jit_traced" for each in found)

    monkeypatch.setattr(backend, "FORMS", 2)
    ops = backend.JaxBackend()
    cache, only = ops.new_cache(1, 2, 8, 32), ops.asarray(np.zeros(1, np.int32))
    gc.collect()
    before = held()
    gc.disable()  # what is dropped must not wait for a search for cycles
    try:
        for capacity in range(8, 14):
            copy = ops.copy_rows(cache, only, only, capacity)
            assert copy["k"].shape[2] == capacity
        assert held() - before <= 2
    finally:
        gc.enable()


def test_report_that_memory_is_out_becomes_a_line_and_other_errors_pass():
    from phicore_jax.backend import memory_errors

    message = r"not enough memory .*Out of memory allocating 6 bytes"
    with pytest.raises(BackendError, match=message), memory_errors():
        raise ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 6 bytes.\nmore lines")
    with pytest.raises(ValueError, match="another"), memory_errors():
        raise ValueError("another")
