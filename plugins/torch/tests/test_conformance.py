"""Whether the backend is right: every operation, every quantization, whole models."""

from phicore_torch.backend import TorchBackend

from phicore.testing import BackendConformance


class TestTorch(BackendConformance):
    @classmethod
    def make_backend(cls) -> TorchBackend:
        return TorchBackend("cpu")
