"""Array-api-strict backend of phicore, for tests."""

from phicore import BackendError, hookimpl


@hookimpl
def phicore_register_backends(register):  # type: ignore[no-untyped-def]
    def create(options):  # type: ignore[no-untyped-def]
        if options.device not in (None, "cpu"):
            raise BackendError(
                f"backend array-api-strict: no device {options.device!r} (available: cpu)"
            )
        from phicore_array_api_strict.backend import StrictBackend

        return StrictBackend(options)

    register(
        "array-api-strict",
        create=create,
        devices=lambda: ["cpu"],
        protocol=2,
        notes=lambda: "slow, for tests",
    )
