"""The parameters that `/set` changes: the sampler's, and those of a request that fit a chat."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from phicore.engine.request import ROPE_FACTORS
from phicore.errors import ArgumentError
from phicore.network.sampling import Sampling

MAX_TOKENS = 2048
"""The largest number of tokens of an answer by default."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of an answer.

    Attributes:
        name: The name, as in Python.
        help: The help text, in complete sentences.
        default: The value if neither the user nor the model's file gives one.
        parse: Makes the value from a text. It raises ValueError.
        expected: A description of the allowed values.
    """

    name: str
    help: str
    default: Any
    parse: Callable[[str], Any]
    expected: str


def _words(text: str) -> list[str]:
    return shlex.split(text)


_PARSE: Mapping[str, Callable[[str], Any]] = {"int": int, "float": float}

PARAMETERS: Mapping[str, Parameter] = {
    parameter.name: parameter
    for parameter in (
        *(
            Parameter(
                field.name,
                field.metadata["help"],
                field.default,
                _PARSE[str(field.type)],
                field.metadata["expected"],
            )
            for field in fields(Sampling)
        ),
        Parameter(
            "max_tokens",
            "Write at most this many tokens. -1 writes until the context is full.",
            MAX_TOKENS,
            int,
            "1 or more, or -1 (until the context is full)",
        ),
        Parameter(
            "stop",
            "Stop at these strings, which are not part of the answer. Quote a string with spaces.",
            [],
            _words,
            "strings",
        ),
        Parameter(
            "processors",
            "Change the logits before a token is chosen, such as frequency-penalty=0.5.",
            [],
            _words,
            "NAME=ARG",
        ),
        Parameter(
            "rope_factors",
            "The rotary factors of models with LongRoPE: auto changes from the short to the long "
            "ones when the text needs it, and reads it again then; long begins with these.",
            ROPE_FACTORS[0],
            str,
            " or ".join(ROPE_FACTORS),
        ),
    )
}


def parameter(name: str) -> Parameter:
    """Return a parameter by its name, in which "-" may stand for "_".

    Raises:
        ArgumentError: If there is none of this name.
    """
    spelled = name.replace("-", "_").lower()
    if spelled not in PARAMETERS:
        near = difflib.get_close_matches(spelled, PARAMETERS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ArgumentError(f"no parameter {name!r:.40}: expected {', '.join(PARAMETERS)}{hint}")
    return PARAMETERS[spelled]


def parsed(name: str, text: str) -> Any:
    """Return the value of a parameter that a text says.

    Raises:
        ArgumentError: If the text says none. The bounds are checked elsewhere, with the others.
    """
    found = parameter(name)
    try:
        return found.parse(text)
    except ValueError:
        raise ArgumentError(parameter=found.name, expected=found.expected, got=text) from None


def shown(value: Any) -> str:
    """Return a value as `/set` takes it."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(shlex.quote, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
