"""Tests that NVIDIA's assembler accepts every kernel's PTX and spills no registers."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jax", reason="install phicore-jax")
pytest.importorskip("llvmlite", reason="install llvmlite, for the kernels of JAX")

from phicore_jax.cuda.attention import (
    CACHE_TYPES,
    Shape,
    emit_attention,
    emit_combine,
    emit_store,
)
from phicore_jax.cuda.formats import FORMATS
from phicore_jax.cuda.linear import (
    emit_expand,
    emit_expert_expand,
    emit_expert_product,
    emit_product,
    emit_quantize,
    emit_quantize_gated,
    emit_quantize_normed,
)
from phicore_jax.cuda.ptx import ptx
from phicore_jax.cuda.uniforms import emit_uniforms

Kernel = tuple[str, Any, tuple[Any, ...], int]


def kernels() -> Iterator[Kernel]:
    """Yield each kernel's name and the arguments of `ptx` for it."""
    yield "quantize", emit_quantize, (96,), 4
    for rows in (1, 8):
        yield f"uniforms-{rows}", emit_uniforms, (rows, 200_064), 3
    for columns in (3072, 5120, 96):
        yield f"normed-{columns}", emit_quantize_normed, (columns // 32, columns, 1e-5), 5
        yield f"gated-{columns}", emit_quantize_gated, (columns // 32, columns), 4
    for fmt in FORMATS.values():
        name, planes = fmt.type.name, fmt.plane_count
        for m in (1, 4, 8):
            for shape in ((9216, 3072), (3072, 8192), (35, 1280)):
                constants = (fmt, shape, m)
                yield f"product-{name}-{shape[1]}-{m}", emit_product, constants, 3 + planes + 1
        expert = (fmt, (6400, 4096), 2)
        yield f"expert-product-{name}", emit_expert_product, expert, 4 + planes + 1
        for is_fast in (False, True):
            constants = (fmt, 3072, (256, 1024), is_fast)
            yield f"expand-{name}-{is_fast}", emit_expand, constants, planes + 1
            constants = (fmt, (6400, 4096), (256, 1024), is_fast)
            yield f"expert-expand-{name}-{is_fast}", emit_expert_expand, constants, planes + 2
    for cache_type in CACHE_TYPES:
        planes = 4 if cache_type == "i16" else 2
        for dim in (64, 96, 128, 192, 256):
            name, shape = f"{cache_type}-{dim}", Shape(1, 32, 8, 4096, dim, cache_type)
            yield f"store-{name}", emit_store, (shape,), 3 + planes
            yield f"attention-{name}", emit_attention, (shape, 2047), 2 + planes + 2
            yield f"combine-{name}", emit_combine, (shape,), 3


@pytest.fixture(scope="module")
def ptxas() -> Path:
    try:
        found = [f for f in files("nvidia-cuda-nvcc") or () if f.name == "ptxas"]
    except PackageNotFoundError:
        found = []
    if not found:
        pytest.skip(
            "needs NVIDIA's assembler: uv run --group ahead-of-time pytest tests/cuda/test_ptx.py"
        )
    return Path(str(found[0].locate()))


@pytest.mark.parametrize("kernel", [*kernels()], ids=lambda k: k[0])
def test_assembler_takes_it_and_spills_nothing(ptxas: Path, tmp_path: Path, kernel: Kernel):
    source = tmp_path / "kernel.ptx"
    source.write_text(ptx(*kernel[1:]))
    for gpu in ("sm_75", "sm_90", "sm_120"):
        command = [str(ptxas), f"-arch={gpu}", "-v", "-o", str(tmp_path / "out"), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "0 bytes spill stores, 0 bytes spill loads" in done.stderr
        registers = re.search(r"Used (\d+) registers", done.stderr)
        assert registers is not None
        assert int(registers[1]) <= 255
