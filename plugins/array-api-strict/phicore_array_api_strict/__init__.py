"""phicore on array-api-strict, for tests."""

from phicore import BackendError, hookimpl


@hookimpl
def phicore_register_backends(register):  # type: ignore[no-untyped-def]
    def create(device: str | None = None):  # type: ignore[no-untyped-def]
        if device not in (None, "cpu"):
            raise BackendError(f"backend array-api-strict: no device {device!r} (available: cpu)")
        from phicore_array_api_strict.backend import StrictBackend

        return StrictBackend()

    register(
        "array-api-strict",
        create=create,
        devices=lambda: ["cpu"],
        protocol=1,
        notes=lambda: "slow, for tests",
    )
