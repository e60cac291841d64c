"""Tests of the trials that GPU kernels must pass before they are used."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("jax", reason="install phicore-jax")
pytest.importorskip("llvmlite", reason="install llvmlite, for the kernels of JAX")

import jax
from cuda import host
from gguf import GGMLQuantizationType as Type
from phicore_jax import cuda
from phicore_jax.cuda import check, runtime

from phicore.errors import BackendError

ALWAYS_TRIED = (
    *("quantize_normed", "quantize_gated", "uniforms", "store", "attention", "combine"),
)
OF_A_TYPE = ("product", "expand", "expert_product", "expert_expand")


@pytest.fixture(autouse=True)
def _tried_anew() -> Iterator[None]:
    yield
    check.fault.cache_clear()
    cuda.working_kernels.cache_clear()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(runtime, "launch", host.launch)
    monkeypatch.setattr(runtime, "launch_in_place", host.launch_in_place)
    return jax.local_devices(backend="cpu")[0]


@pytest.mark.complete
def test_kernels_that_are_right_are_used(device: Any):
    kernels, about = cuda.working_kernels(device)
    assert isinstance(kernels, runtime.CudaKernels)
    assert about == "sm_75"
    assert kernels.has_type(Type.Q4_K)
    assert kernels.has_experts(Type.Q4_K)
    assert not kernels.has_type(Type.F16)


def let_it_be_wrong(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    def wrong(run: Any) -> Any:
        def launch(emit: Any, constants: Any, operands: Any, results: Any, warps: int) -> Any:
            found = run(emit, constants, operands, results, warps)
            if emit.__name__ != f"emit_{kernel}":
                return found
            first, *others = found
            return ((first.astype("float32") * 1.01).astype(first.dtype), *others)

        return launch

    for name in ("launch", "launch_in_place"):
        monkeypatch.setattr(runtime, name, wrong(getattr(host, name)))


@pytest.mark.complete
@pytest.mark.parametrize("kernel", ALWAYS_TRIED)
def test_kernel_that_is_wrong_is_found(
    device: Any, monkeypatch: pytest.MonkeyPatch, kernel: str, caplog: pytest.LogCaptureFixture
):
    let_it_be_wrong(monkeypatch, kernel)
    with caplog.at_level(logging.WARNING):
        kernels, about = cuda.working_kernels(device)
    assert kernels is None
    assert about.startswith("they do not work with this GPU: wrong results, by ")
    assert caplog.messages == [f"CUDA kernels: {about}; XLA computes instead"]


@pytest.mark.complete
@pytest.mark.parametrize("kernel", OF_A_TYPE)
def test_type_whose_products_are_wrong_is_left_to_xla(
    device: Any, monkeypatch: pytest.MonkeyPatch, kernel: str, caplog: pytest.LogCaptureFixture
):
    kernels, _ = cuda.working_kernels(device)
    assert kernels is not None
    let_it_be_wrong(monkeypatch, kernel)
    with caplog.at_level(logging.WARNING):
        assert kernels.has_type(Type.Q2_K) == kernel.startswith("expert")
        assert not kernels.has_experts(Type.Q2_K)
    (message,) = caplog.messages
    assert message.startswith("CUDA kernels for Q2_K: they do not work with this GPU: wrong")


def test_card_that_stopped_is_told(monkeypatch: pytest.MonkeyPatch, device: Any):
    """A process cannot use a stopped GPU any more, so an error is raised and XLA is not tried."""

    def stopped(*_: Any) -> Any:
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")

    monkeypatch.setattr(runtime, "launch", stopped)
    monkeypatch.setattr(check.jax, "device_put", stopped)
    with pytest.raises(
        BackendError, match=r"the GPU stopped .*; start again with PHICORE_KERNELS=0"
    ):
        cuda.working_kernels(device)


def test_kernels_that_cannot_run_are_told(monkeypatch: pytest.MonkeyPatch, device: Any):
    def launch(*_: Any) -> Any:
        raise RuntimeError("PTX is too new for the driver\nand more")

    monkeypatch.setattr(runtime, "launch", launch)
    kernels, about = cuda.working_kernels(device)
    assert kernels is None
    assert about.endswith("this GPU: RuntimeError: PTX is too new for the driver")
