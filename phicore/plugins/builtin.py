"""phicore's own sources, architectures and logits processors, registered as a plugin's are."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from phicore.plugins.hookspecs import (
    CreateProcessor,
    LoadedModel,
    RegisterArchitecture,
    RegisterLogitsProcessor,
    RegisterSource,
    hookimpl,
)

if TYPE_CHECKING:
    from phicore.network.processors import LogitsProcessor


@hookimpl
def phicore_register_sources(register: RegisterSource) -> None:
    from phicore.sources import SCHEMES

    for scheme, resolve in SCHEMES.items():
        register(scheme, resolve=resolve)


@hookimpl
def phicore_register_architectures(register: RegisterArchitecture) -> None:
    from phicore.network.architectures import BUILT_IN

    for architecture in BUILT_IN.values():
        register(architecture)


@hookimpl
def phicore_register_logits_processors(register: RegisterLogitsProcessor) -> None:
    from phicore.network.processors import BUILT_IN

    for name, parse in BUILT_IN.items():
        register(name, create=_without_model(parse))


def _without_model(parse: Callable[[str], LogitsProcessor]) -> CreateProcessor:
    """A processor that needs to know nothing of the model."""

    def create(argument: str, model: LoadedModel) -> LogitsProcessor:
        return parse(argument)

    return create
