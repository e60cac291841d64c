"""phicore's own model sources and architectures, registered as a plugin registers its own."""

from __future__ import annotations

from phicore.hookspecs import RegisterArchitecture, RegisterSource, hookimpl


@hookimpl
def phicore_register_sources(register: RegisterSource) -> None:
    from phicore.sources import SCHEMES

    for scheme, resolve in SCHEMES.items():
        register(scheme, resolve=resolve)


@hookimpl
def phicore_register_architectures(register: RegisterArchitecture) -> None:
    from phicore.architectures import BUILT_IN

    for architecture in BUILT_IN.values():
        register(architecture)
