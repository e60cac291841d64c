"""Tests of the backend: every operation, every quantization and whole models."""

from dataclasses import replace

from phicore_torch.backend import TorchBackend

from phicore.backend import BackendOptions
from phicore.testing import BackendConformance


class TestTorch(BackendConformance):
    @classmethod
    def make_backend(cls, options: BackendOptions) -> TorchBackend:
        return TorchBackend(replace(options, device="cpu"))
