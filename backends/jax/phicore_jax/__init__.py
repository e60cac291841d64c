"""JAX backend of phicore: CPU and CUDA through XLA. JAX is imported when the backend is used."""

from phicore import hookimpl

LEAST_ADDRESSES_MB = 1900
"""JAX and LLVM map so much. With less, they end the process without a word that helps."""


def _check_addresses() -> None:
    """Check that `ulimit -v` lets JAX be imported.

    Raises:
        BackendError: If it does not.
    """
    try:
        import resource
    except ImportError:  # Windows
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < LEAST_ADDRESSES_MB << 20:
        from phicore.errors import BackendError

        raise BackendError(
            f"backend jax: this process may have {limit >> 20} MB of addresses (ulimit -v), and "
            f"JAX needs {LEAST_ADDRESSES_MB}; raise the limit, or take --backend numpy"
        )


@hookimpl
def phicore_register_backends(register):  # type: ignore[no-untyped-def]
    def create(options):  # type: ignore[no-untyped-def]
        _check_addresses()
        from phicore_jax.backend import JaxBackend

        return JaxBackend(options)

    def devices() -> list[str]:
        _check_addresses()
        from phicore_jax.backend import device_names

        return device_names()

    def notes() -> str:
        from phicore_jax import cuda, kernels
        from phicore_jax.backend import device_names, find_device

        found, about = kernels.find_kernels()
        said = f"CPU kernels: {about}" if found else f"no CPU kernels, XLA alone ({about})"
        if found is not None:
            from phicore_jax.kernels import build

            others = build.passed_over(found.target)
            said += f" ({others})" if others else ""
        if len(device_names()) > 1:
            on_gpu, about = cuda.working_kernels(find_device(None))
            said += f"; CUDA kernels: {about}" if on_gpu else f"; no CUDA kernels ({about})"
        return said

    def join(group):  # type: ignore[no-untyped-def]
        from phicore_jax import processes

        return processes.join(group)

    register("jax", create=create, devices=devices, notes=notes, join=join, protocol=2)
