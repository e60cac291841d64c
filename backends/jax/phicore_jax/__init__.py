"""JAX backend of phicore: CPU and CUDA through XLA. JAX is imported when the backend is used."""

from phicore import hookimpl


@hookimpl
def phicore_register_backends(register):  # type: ignore[no-untyped-def]
    def create(device: str | None = None):  # type: ignore[no-untyped-def]
        from phicore_jax.backend import JaxBackend

        return JaxBackend(device)

    def devices() -> list[str]:
        from phicore_jax.backend import device_names

        return device_names()

    def notes() -> str:
        from phicore_jax.backend import device_names
        from phicore_jax.cuda import find_products
        from phicore_jax.kernels import find_kernels

        kernels, about = find_kernels()
        said = f"CPU kernels: {about}" if kernels else f"no CPU kernels, XLA alone ({about})"
        if len(device_names()) > 1:
            products, about = find_products()
            said += f"; CUDA kernels: {about}" if products else f"; no CUDA kernels ({about})"
        return said

    register("jax", create=create, devices=devices, notes=notes, protocol=1)
