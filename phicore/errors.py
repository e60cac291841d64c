"""Every error that phicore raises on purpose: one line that says what is wrong and what to do.

A message reads "where: expected, found; what to do". Whoever shows an error words its parameter:
`temperature` in Python, `--temperature` on the command line. The command line prints the line and
exits with `exit_code`; anything else that escapes is a bug in phicore.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_NOTHING: Any = object()


class PhicoreError(Exception):
    """Base class of the errors that a user can cause and mend.

    Args:
        problem: What is wrong, and what to do. It may be left out where `expected` and `got` say
            it.
        parameter: The name of the parameter that is wrong, as Python spells it.
        expected: What the parameter may be.
        got: What it was.
    """

    exit_code = 1

    def __init__(
        self,
        problem: str | None = None,
        *,
        parameter: str | None = None,
        expected: str | None = None,
        got: Any = _NOTHING,
    ) -> None:
        if problem is None:
            problem = f"expected {expected}"
            if got is not _NOTHING:
                problem += f", got {got!r:.60}"
        self.problem = problem
        self.parameter = parameter
        self.expected = expected
        self.got = None if got is _NOTHING else got
        super().__init__(self.worded())

    def worded(self, spell: Callable[[str], str] = str) -> str:
        """The message, with the name of the parameter as `spell` writes it."""
        return (
            self.problem if self.parameter is None else f"{spell(self.parameter)}: {self.problem}"
        )


class GGUFError(PhicoreError):
    """A GGUF file is damaged, hostile, or asks for something that phicore does not have."""


class TokenizerError(PhicoreError):
    """A tokenizer or a chat template cannot be built or used."""


class SourceError(PhicoreError):
    """A model reference is malformed, does not exist or cannot be fetched."""


class BackendError(PhicoreError):
    """A backend or device is not installed, does not work here or was asked too much."""


class ArgumentError(PhicoreError, ValueError):
    """An argument is outside of its range; the message gives the range and the value."""


class ContextError(PhicoreError):
    """A prompt is longer than the context."""
