"""phicore's own sources, architectures and logits processors, registered as a plugin's are."""

from __future__ import annotations

from phicore.hookspecs import (
    RegisterArchitecture,
    RegisterLogitsProcessor,
    RegisterSource,
    hookimpl,
)


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


@hookimpl
def phicore_register_logits_processors(register: RegisterLogitsProcessor) -> None:
    from phicore.logits import BUILT_IN

    for name, create in BUILT_IN.items():
        register(name, create=create)
