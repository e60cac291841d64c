"""MLX backend of phicore: Apple Metal, CUDA and CPU. MLX is imported when the backend is used."""

from phicore import hookimpl


@hookimpl
def phicore_register_backends(register):  # type: ignore[no-untyped-def]
    def create(options):  # type: ignore[no-untyped-def]
        from phicore_mlx import devices  # noqa: F401 - first, as it raises if MLX is unusable
        from phicore_mlx.backend import MlxBackend

        return MlxBackend(options)

    def devices() -> list[str]:
        from phicore_mlx.devices import device_names

        return device_names()

    def notes() -> str:
        from phicore_mlx.devices import about

        return about()

    register("mlx", create=create, devices=devices, notes=notes, protocol=2)
