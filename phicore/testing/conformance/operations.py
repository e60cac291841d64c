"""Tests of the small operations, compared with float64, and of copies, `compile` and loops."""

from typing import Any

import numpy as np
import pytest

from phicore.backend import Array, Backend
from phicore.testing import oracle, tolerances
from phicore.testing.compare import assert_close
from phicore.testing.conformance.base import Conformance

# All sizes are different, so that swapped axes cannot pass.
B, T, HEADS, D = 2, 3, 5, 8


def angles(rng: np.random.Generator, r: int) -> tuple[np.ndarray, np.ndarray]:
    angle = rng.uniform(-3, 3, (B, T, r))
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


class OperationsConformance(Conformance):
    def test_rms_norm_equals_float64(self, ops: Backend, rng: np.random.Generator) -> None:
        x = 3 * rng.standard_normal((B, T, 7), np.float32)
        x[0, 0] = 0  # eps alone is under the root
        x[1, 0] *= 1e-4  # where eps counts
        weight = rng.standard_normal(7, np.float32)
        run = ops.compile(lambda x, weight: ops.rms_norm(x, weight, 1e-5))
        result = ops.to_numpy(run(ops.asarray(x), ops.asarray(weight)))
        assert result.dtype == np.float32
        assert_close(result, oracle.rms_norm(x, weight, 1e-5), tolerances.ELEMENTWISE)
        assert_close(result[1, 0], oracle.rms_norm(x, weight, 1e-5)[1, 0], tolerances.ELEMENTWISE)

    def test_layer_norm_equals_float64(self, ops: Backend, rng: np.random.Generator) -> None:
        x = 3 * rng.standard_normal((B, T, 7), np.float32) + 2
        x[0, 0] = 5  # eps alone is under the root
        x[1, 0] *= 1e-4  # where eps counts
        weight, bias = rng.standard_normal((2, 7), np.float32)
        run = ops.compile(lambda x, w, b: ops.layer_norm(x, w, b, 1e-5))
        result = ops.to_numpy(run(*map(ops.asarray, (x, weight, bias))))
        assert result.dtype == np.float32
        expected = oracle.layer_norm(x, weight, bias, 1e-5)
        assert_close(result, expected, tolerances.ELEMENTWISE)
        assert_close(result[:, 0] - bias, expected[:, 0] - bias, tolerances.ELEMENTWISE)

    @pytest.mark.parametrize("r", [D // 2, 3, 1], ids=["full", "partial", "one-pair"])
    def test_rope_equals_complex_rotation(
        self, ops: Backend, rng: np.random.Generator, r: int
    ) -> None:
        x = rng.standard_normal((B, T, HEADS, D), np.float32)
        cos, sin = angles(rng, r)
        result = ops.to_numpy(ops.compile(ops.rope)(*map(ops.asarray, (x, cos, sin))))
        assert_close(result, oracle.rope(x, cos, sin), tolerances.ELEMENTWISE)
        assert np.array_equal(result[..., 2 * r :], x[..., 2 * r :])

    def test_swiglu_equals_float64(self, ops: Backend, rng: np.random.Generator) -> None:
        gate_up = 3 * rng.standard_normal((B, T, 14), np.float32)
        result = ops.to_numpy(ops.compile(ops.swiglu)(ops.asarray(gate_up)))
        assert_close(result, oracle.swiglu(gate_up), tolerances.ELEMENTWISE)

    def test_swiglu_extreme_gates_saturate_without_warning(self, ops: Backend) -> None:
        gate = np.array([-3e38, -1e4, -89, -88, 0, 88, 89, 1e4, 3e38], np.float32)
        gate_up = np.concatenate([gate, np.ones_like(gate)])[None]
        result = ops.to_numpy(ops.compile(ops.swiglu)(ops.asarray(gate_up)))[0]
        assert np.isfinite(result).all()
        assert np.array_equal(result[4:], gate[4:])
        assert (np.abs(result[:4]) < 1e-35).all()

    @pytest.mark.parametrize("size", [1, 6])
    def test_contains_ignores_what_is_outside(self, ops: Backend, size: int) -> None:
        ids = np.array(
            [[0, 2, 2, -1], [-1, -1, -1, -1], [size, size + 1, 5, -6], [2**31 - 1, -(2**31), 0, 1]],
            np.int32,
        )
        run = ops.compile(lambda ids: ops.contains(ids, size))
        result = ops.to_numpy(run(ops.asarray(ids)))
        expected = [[i in row for i in range(size)] for row in ids.tolist()]
        assert result.dtype == np.bool_
        assert np.array_equal(result, expected)

    def test_contains_one_number_a_row_finds_it(self, ops: Backend) -> None:
        run = ops.compile(lambda ids: ops.contains(ids, 3))
        result = ops.to_numpy(run(ops.asarray(np.array([[1], [-2]], np.int32))))
        assert np.array_equal(result, [[False, True, False], [False, False, False]])

    @pytest.mark.parametrize("dtype", [np.float32, np.int32, np.bool_])
    def test_asarray_there_and_back_keeps_dtype_shape_and_values(
        self, ops: Backend, dtype: type
    ) -> None:
        for x in (np.arange(6).reshape(1, 2, 3) % 2, np.zeros((2, 0)), np.array(1)):
            x = x.astype(dtype)
            result = ops.to_numpy(ops.asarray(x))
            assert isinstance(result, np.ndarray)
            assert (result.dtype, result.shape) == (x.dtype, x.shape)
            assert np.array_equal(result, x)

    def test_asarray_special_floats_survive(self, ops: Backend) -> None:
        x = np.array([np.nan, np.inf, -np.inf, -0.0, 3.4e38, 1.2e-38], np.float32)
        result = ops.to_numpy(ops.asarray(x))
        assert np.array_equal(result.view(np.uint32)[1:], x.view(np.uint32)[1:])
        assert np.isnan(result[0])

    def test_asarray_host_array_changes_later_copy_does_not(self, ops: Backend) -> None:
        for offset in range(16):  # a library may use memory without a copy if aligned to 64 bytes
            host = np.ones(4096, np.float32)[offset:]
            device = ops.asarray(host)
            host[:] = 2
            assert (ops.to_numpy(device) == 1).all()

    def test_asarray_views_take_their_values(self, ops: Backend) -> None:
        x = np.arange(24, dtype=np.float32).reshape(4, 6)
        read_only = np.broadcast_to(x[0], (3, 6))
        for view in (x.T, x[::2, ::-1], read_only):
            assert np.array_equal(ops.to_numpy(ops.asarray(view)), view)

    def test_compile_nested_containers_and_none_pass_through(self, ops: Backend) -> None:
        def fn(params: Any, pair: Any, nothing: Any) -> Any:
            a, (b, missing) = params["a"], params["list"]
            assert missing is None
            assert nothing is None
            return {"sum": a + b, "none": None, "list": [pair[0], (pair[1], None)]}

        one, two = (ops.asarray(np.full((2, 3), n, np.float32)) for n in (1, 2))
        run = ops.compile(fn)
        for _ in range(2):  # the second call uses what the first call compiled
            result = run({"a": one, "list": [two, None]}, (two, one), None)
            assert np.array_equal(ops.to_numpy(result["sum"]), np.full((2, 3), 3))
            assert result["none"] is None
            first, (second, none) = result["list"]
            assert np.array_equal(ops.to_numpy(first), np.full((2, 3), 2))
            assert np.array_equal(ops.to_numpy(second), np.full((2, 3), 1))
            assert none is None

    def test_compile_other_shapes_and_structure_work_again(self, ops: Backend) -> None:
        run = ops.compile(lambda x, extra: x + x if extra is None else x + extra["y"])
        ones = [ops.asarray(np.ones(n, np.float32)) for n in (2, 3)]
        assert ops.to_numpy(run(ones[0], None)).tolist() == [2, 2]
        assert ops.to_numpy(run(ones[1], None)).tolist() == [2, 2, 2]
        assert ops.to_numpy(run(ones[1], {"y": ones[1]})).tolist() == [2, 2, 2]

    def test_compile_donated_argument_result_is_right_each_time(self, ops: Backend) -> None:
        run = ops.compile(lambda keep, state: {"n": [s + keep for s in state["n"]]}, donate=(1,))
        one = ops.asarray(np.ones(3, np.float32))
        state = {"n": [ops.asarray(np.zeros(3, np.float32)), ops.asarray(np.ones(3, np.float32))]}
        for _ in range(5):
            state = run(one, state)
        assert ops.to_numpy(state["n"][0]).tolist() == [5, 5, 5]
        assert ops.to_numpy(state["n"][1]).tolist() == [6, 6, 6]
        assert ops.to_numpy(one).tolist() == [1, 1, 1]

    def test_while_loop_ends_when_the_condition_is_false(self, ops: Backend) -> None:
        def sum_below(n: Array) -> Array:
            state = {"i": n * 0, "sums": [n * 0]}
            return ops.while_loop(
                lambda s: s["i"] < n,
                lambda s: {"i": s["i"] + 1, "sums": [s["sums"][0] + s["i"]]},
                state,
            )["sums"][0]

        run = ops.compile(sum_below) if ops.capabilities.steps > 1 else sum_below
        for n, expected in ((5, 10), (1, 0), (0, 0)):
            found = ops.to_numpy(run(ops.asarray(np.array([n], np.int32))))
            assert found.tolist() == [expected]

    def test_peak_memory_is_none_or_positive(self, ops: Backend) -> None:
        peak = ops.peak_memory_bytes()
        assert peak is None or peak > 2**20
