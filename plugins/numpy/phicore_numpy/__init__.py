"""The reference backend: the tensor protocol on NumPy, as a third party would write it."""

from phicore import BackendError, hookimpl


@hookimpl
def phicore_register_backends(register):  # type: ignore[no-untyped-def]
    def create(device: str | None = None):  # type: ignore[no-untyped-def]
        if device not in (None, "cpu"):
            raise BackendError(f"backend numpy: no device {device!r} (available: cpu)")
        from phicore_numpy.backend import NumpyBackend

        return NumpyBackend()

    register("numpy", create=create, devices=lambda: ["cpu"], protocol=1)
