"""Tests of the MLX backend's own features: memory, tracing, work for NumPy, errors."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from api.tiny_models import write_tiny
from gguf import GGMLQuantizationType as Type
from mlx_backend.test_affine import edges, random_tensor, values
from phicore_mlx import devices, host
from phicore_mlx.affine import LAYOUTS
from phicore_mlx.backend import MlxBackend

import phicore
from phicore.backend import BackendOptions
from phicore.errors import BackendError
from phicore.gguf.matrix import Matrix
from phicore.testing import tiny_models
from phicore.testing.compare import assert_close
from phicore.testing.conformance.models import Reference
from phicore.testing.tolerances import FLOAT32_LOGITS, PRODUCT

MEBI = 1 << 20
CACHE = (1, 8, 2048, 64)  # 4 MiB of keys, and of values


@pytest.fixture
def ops() -> MlxBackend:
    return MlxBackend(BackendOptions(device="cpu"))


# ---- products ------------------------------------------------------------------------------


@pytest.mark.parametrize("ggml_type", LAYOUTS, ids=lambda t: t.name)
def test_product_shared_among_streams_equals_one(
    ggml_type: Type, ops: MlxBackend, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(host, "SHARED_WEIGHTS", 1)
    tensor, x = random_tensor(ggml_type, 67, 512, rng), rng.standard_normal((3, 512), np.float32)
    weight = ops.load_weight(Matrix("w", (tensor,)))
    y = ops.to_numpy(ops.linear(ops.asarray(x), weight))
    monkeypatch.setattr(host, "SHARED_WEIGHTS", 1 << 40)
    assert np.array_equal(ops.to_numpy(ops.linear(ops.asarray(x), weight)), y)
    assert_close(y, x.astype(np.float64) @ values(tensor).T, PRODUCT)


@pytest.mark.parametrize("ggml_type", [*LAYOUTS, Type.F16], ids=lambda t: t.name)
def test_product_of_the_host_equals_that_of_mlx(
    ggml_type: Type, ops: MlxBackend, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
):
    tensor, x = random_tensor(ggml_type, 67, 512, rng), rng.standard_normal((20, 512), np.float32)
    weight = ops.load_weight(Matrix("w", (tensor,)))
    by_numpy = ops.to_numpy(ops.linear(ops.asarray(x), weight))
    monkeypatch.setattr(host, "ROWS", 1000)
    assert_close(ops.to_numpy(ops.linear(ops.asarray(x), weight)), by_numpy, PRODUCT)


def test_prompts_run_untraced_on_the_host_and_single_tokens_are_traced_once(ops: MlxBackend):
    runs = []

    def double(x: mx.array) -> mx.array:
        runs.append(x.shape[0])
        ops._is_for_host(x.shape[0])
        return x * 2

    compiled = ops.compile(double)
    for rows in (1, 1, 20, 20, 1, 20):
        assert (
            ops.to_numpy(compiled(ops.asarray(np.ones((rows, 2), np.float32)))).tolist()
            == [[2, 2]] * rows
        )
    # One trace for one row. For 20 rows one trace, which is given up, and then each call untraced.
    assert runs == [1, 20, 20, 20, 20]


# ---- decoding ------------------------------------------------------------------------------


@pytest.mark.complete
def test_step_is_traced_once_while_the_cache_fills(tmp_path: Path, monkeypatch):
    traces = []
    embedding = MlxBackend.embedding

    def counted(self: MlxBackend, ids: mx.array, weight: object) -> mx.array:
        traces.append(ids.shape)
        return embedding(self, ids, weight)

    monkeypatch.setattr(MlxBackend, "embedding", counted)
    with phicore.load(write_tiny(tmp_path / "tiny.gguf"), "mlx") as model:
        list(model.generate([1, 2, 3], max_tokens=100, ignore_eos=True))
        assert traces.count((1, 1)) == 1
        list(model.generate([3, 2, 1, 0], max_tokens=50, ignore_eos=True, temperature=0.3))
        assert traces.count((1, 1)) <= 2  # greedy and sampled decoding are two compiled steps


def test_cache_is_overwritten_in_place(ops: MlxBackend):
    def step(cache: list, k: mx.array, positions: mx.array) -> list:
        return [ops.update_cache(layer, k, k + 1, positions) for layer in cache]

    compiled = ops.compile(step, donate=(0,))
    cache = [ops.new_cache(*CACHE) for _ in range(4)]  # 32 MiB
    k = ops.asarray(np.ones((1, 8, 1, 64), np.float32))
    mx.eval(cache)
    for n in range(5):
        if n == 2:  # the first calls compile
            mx.reset_peak_memory()
            before = mx.get_active_memory()
        cache = compiled(cache, k, ops.asarray(np.array([[n]], np.int32)))
        mx.eval(cache)
    assert mx.get_peak_memory() - before < MEBI  # a copied layer would be 8 MiB
    assert ops.to_numpy(cache[3]["v"])[0, 0, :6, 0].tolist() == [2, 2, 2, 2, 2, 0]


def test_weights_are_loaded_one_at_a_time(tmp_path: Path):
    path = tiny_models.write_model(
        tmp_path / "model.gguf",
        tiny_models.Tiny(num_hidden_layers=8, hidden_size=512, intermediate_size=1024),
        Type.Q4_K,
    )
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    with phicore.load(path, "mlx"):
        held = mx.get_active_memory() - before
        assert mx.get_peak_memory() - before <= 1.3 * held


THREADS = """
    import sys, threading
    import phicore

    def run(job):
        thread = threading.Thread(target=job)
        thread.start()
        return thread

    model = phicore.load(sys.argv[1], "mlx")
    options = {"max_tokens": 20, "temperature": 0, "ignore_eos": True}
    prompts = [[1], list(range(40))]  # one is traced, the other is not
    expected = [[p.token_id for p in model.generate(ids, **options)] for ids in prompts]

    begun = model.generate(prompts[1], **options)
    found = [next(begun).token_id]
    run(lambda: found.extend(next(begun).token_id for _ in range(5))).join()
    assert found + [p.token_id for p in begun] == expected[1]

    results = {}
    def generate(n):
        results[n] = [p.token_id for p in model.generate(prompts[n % 2], **options)]
    for thread in [run(lambda n=n: generate(n)) for n in range(6)]:
        thread.join()
    assert [results[n] for n in range(6)] == expected * 3
"""


@pytest.mark.complete
def test_threads_may_share_a_model_and_a_generation_and_the_process_ends_well(tmp_path: Path):
    path = write_tiny(tmp_path / "tiny.gguf")
    command = [sys.executable, "-c", textwrap.dedent(THREADS), str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")


# ---- choices -------------------------------------------------------------------------------


def test_compact_weights_take_less_memory_and_answer_nearly_alike(tmp_path: Path):
    path = tiny_models.write_model(
        tmp_path / "model.gguf", tiny_models.Tiny(num_hidden_layers=4), Type.Q4_K
    )
    ids = list(range(40))
    with phicore.load(path, "mlx") as exact, phicore.load(path, "mlx", compact=True) as compact:
        found, expected = compact.logits(ids), exact.logits(ids)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert FLOAT32_LOGITS < error < 5e-3


def test_compact_keeps_scales_that_float16_cannot_hold(rng: np.random.Generator):
    ops = MlxBackend(BackendOptions(device="cpu", compact=True))
    tensor = edges(Type.Q4_K, rng)  # scales up to 63 * 65504
    (part,) = ops.load_weight(Matrix("w", (tensor,)))
    assert part["scales"].dtype == mx.float32
    y = ops.to_numpy(ops.embedding(mx.arange(len(tensor.data))[None], (part,)))[0]
    np.testing.assert_array_equal(y, values(tensor))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"dtype": "float16"}, "dtype: expected float32 with this backend on cpu, got 'float16'"),
        (
            {"cache_type": "bf16"},
            "cache_type: expected f32, f16, i16, q8_0 with this backend on cpu, got 'bf16'",
        ),
        ({"fast_prefill": True}, "fast_prefill: this backend has only exact products on cpu"),
        ({"threads": 2}, "threads: the library chooses the number"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_cpu_cannot_do_is_an_error(choice: dict, message: str):
    with pytest.raises(BackendError, match=f"^{message}"):
        MlxBackend(BackendOptions(device="cpu", **choice))


def test_compact_is_an_error_for_other_backends():
    with pytest.raises(BackendError, match=r"^compact: this backend has only exact weights"):
        Reference(BackendOptions(compact=True))


# ---- errors --------------------------------------------------------------------------------


def test_unknown_device_lists_those_there_are():
    names = ", ".join(devices.device_names())
    with pytest.raises(BackendError, match=rf"^backend mlx: no device 'tpu' \(available: {names}"):
        MlxBackend(BackendOptions(device="tpu"))


@pytest.mark.parametrize(
    ("name", "hint"), [("cuda:7", r"phicore-mlx\[cuda\]"), ("metal:7", "Macs")]
)
def test_missing_gpu_is_an_error_with_a_hint(name: str, hint: str):
    with pytest.raises(BackendError, match=hint):
        MlxBackend(BackendOptions(device=name))


def test_memory_that_is_not_there_is_an_error_of_one_line(ops: MlxBackend):
    with pytest.raises(BackendError, match=r"^backend mlx: not enough memory") as caught:
        ops.new_cache(1, 1 << 20, 1 << 20, 64)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("library", "message"),
    [
        ("raise ImportError('no libmlx')", "MLX cannot be imported (no libmlx); install phicore-"),
        ("__version__ = '0.30.6'", "MLX 0.30.6 is too old; install 0.31.2 or later"),
    ],
    ids=["missing", "old"],
)
def test_library_that_cannot_be_used_is_an_error_of_one_line(
    library: str, message: str, tmp_path: Path
):
    folder = tmp_path / "mlx"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "core.py").write_text(library)
    run = subprocess.run(
        [sys.executable, "-m", "phicore", "generate", "--backend", "mlx", "Hello"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert f"backend mlx: {message}" in run.stderr
    assert "Traceback" not in run.stderr
    assert run.stdout == ""


def test_plugin_is_listed_without_importing_mlx():
    script = """
        import sys
        from phicore.plugins import Plugins

        assert "mlx" in Plugins().backends()
        assert "mlx.core" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
