"""Checks of the arguments of `phicore.load` and `Model`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from phicore.backend import Backend
from phicore.backend.host import free_memory_bytes, memory_bytes
from phicore.engine.drafts import Drafter, NGrams
from phicore.engine.forced import Forced
from phicore.engine.request import is_integer
from phicore.errors import ArgumentError
from phicore.network.config import Phi3Config
from phicore.text.tokenizer import Tokenizer

PREFIX_CACHE_BYTES = 2 * 10**9
"""The largest size of the prefix cache by default."""


def checked_context(context: int | None, config: Phi3Config) -> int:
    most = config.max_position_embeddings
    if context is None:
        return most
    if not is_integer(context) or not 1 <= context <= most:
        raise ArgumentError(
            parameter="ctx", expected=f"1 to {most}, the model's context", got=context
        )
    return int(context)


def checked_kv_memory(count: int | None, ops: Backend) -> int | None:
    if count is None:
        free = free_memory_bytes() if ops.capabilities.device == "cpu" else None
        return None if free is None else free // 2
    if not is_integer(count) or count < 1:
        raise ArgumentError(parameter="kv_memory", expected="1 or more bytes", got=count)
    return int(count)


def checked_drafter(speculation: bool | Drafter) -> Drafter | None:
    if isinstance(speculation, Drafter):
        return speculation
    if not isinstance(speculation, bool):
        expected = "True, False or a Drafter"
        raise ArgumentError(parameter="speculation", expected=expected, got=speculation)
    return Forced(NGrams()) if speculation else None


def checked_prefix_bytes(count: int | None) -> int:
    if count is None:
        memory = memory_bytes()
        return PREFIX_CACHE_BYTES if memory is None else min(PREFIX_CACHE_BYTES, memory // 8)
    if not is_integer(count) or count < 0:
        raise ArgumentError(parameter="prefix_cache_bytes", expected="0 or more", got=count)
    return int(count)


def checked_ids(
    ids: Any,
    vocab_size: int,
    parameter: str = "prompt",
    expected: str = "a string, messages or token ids",
) -> list[int]:
    if isinstance(ids, (str, bytes)) or not isinstance(ids, (Sequence, np.ndarray)):
        raise ArgumentError(parameter=parameter, expected=expected, got=ids)
    checked = []
    for i in ids:
        if not is_integer(i):
            raise ArgumentError(
                f"expected {expected}; found {i!r} in the list", parameter=parameter, got=i
            )
        if not 0 <= i < vocab_size:
            raise ArgumentError(f"token id {i}: expected 0 to {vocab_size - 1}")
        checked.append(int(i))
    return checked


def check_template_kwargs(variables: Mapping[str, Any] | None) -> None:
    parameter = "chat_template_kwargs"
    if variables is None:
        return
    if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
        raise ArgumentError(parameter=parameter, expected="variables by name", got=variables)
    if "messages" in variables:
        raise ArgumentError("messages are the prompt", parameter=parameter)
    if "self" in variables:
        raise ArgumentError("'self' is a name of Jinja's own", parameter=parameter)


def refuse_without_template(for_template: Mapping[str, Any]) -> None:
    given = [name for name, value in for_template.items() if value is not None]
    if given:
        raise ArgumentError("only for a prompt of messages", parameter=given[0])


def check_same_vocabulary(tokenizer: Tokenizer, other: Tokenizer, name: str) -> None:
    """Check that a draft model has the tokens of the model.

    Args:
        name: The name of the draft model's file.
    Raises:
        ArgumentError: If it has others.
    """
    if (difference := tokenizer.difference(other)) is not None:
        raise ArgumentError(
            f"{name} has another vocabulary than the model: {difference}; take a smaller model of "
            "the same family",
            parameter="draft_model",
        )
