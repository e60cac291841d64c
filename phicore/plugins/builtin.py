"""The built-in plugin: it registers phicore's own sources, architectures and logits processors."""

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
    """Adapt a function that makes a processor from an argument and does not need the model."""

    def create(argument: str, model: LoadedModel) -> LogitsProcessor:
        return parse(argument)

    return create
