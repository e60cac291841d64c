"""NumPy backend of phicore, the reference; it is written as a third party would write one."""

from phicore import BackendError, hookimpl


@hookimpl
def phicore_register_backends(register):  # type: ignore[no-untyped-def]
    def create(options):  # type: ignore[no-untyped-def]
        if options.device not in (None, "cpu"):
            raise BackendError(f"backend numpy: no device {options.device!r} (available: cpu)")
        from phicore_numpy.backend import NumpyBackend

        return NumpyBackend(options)

    register("numpy", create=create, devices=lambda: ["cpu"], protocol=2)
