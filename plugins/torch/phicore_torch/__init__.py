"""PyTorch backend of phicore, written as a third party would write one.

torch is imported when the backend is used.
"""

from phicore import hookimpl


@hookimpl
def phicore_register_backends(register):  # type: ignore[no-untyped-def]
    def create(options):  # type: ignore[no-untyped-def]
        from phicore_torch.backend import TorchBackend

        return TorchBackend(options)

    def devices() -> list[str]:
        from phicore_torch.backend import device_names

        return device_names()

    register("torch", create=create, devices=devices, protocol=2)
