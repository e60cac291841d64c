"""Texts from which follows what a compiled step computes."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from phicore.backend.sources import sources_digest
from phicore.engine.steps import Steps
from phicore.network.config import Phi3Config
from phicore.network.processors import Kinds

ROOMS = ("backend", "engine", "gguf", "grammar", "network")
"""The rooms whose sources a step is made of."""


def identity_of(steps: Steps, name: str, kinds: Kinds, has_logprobs: bool) -> str | None:
    """Return a text from which follows what a function of `Steps` computes.

    Args:
        name: The name of the function.
        kinds: The classes of the logits processors.
        has_logprobs: Whether it computes log probabilities.
    Returns:
        The text; None if sources are involved that are not phicore's own.
    """
    if type(steps) is not Steps or type(steps.config) is not Phi3Config:
        return None
    if any(
        kind.__module__.split(".")[:2] not in [["phicore", room] for room in ROOMS]
        for kind in kinds
    ):
        return None
    sources = _sources()
    if sources is None:
        return None
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in kinds]
    return f"{sources} {name} {names} {has_logprobs} {steps.config!r}"


@cache
def _sources() -> str | None:
    home = Path(__file__).parent.parent
    return sources_digest(home / room for room in ROOMS)
