"""The errors that phicore raises on purpose.

A message is one line and reads "where: expected, found; what to do". The code that shows an error
chooses the spelling of its parameter: `temperature` in Python, `--temperature` on the command line.
The command line prints the line and exits with `exit_code`. Other exceptions are bugs in phicore.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_NOTHING: Any = object()


class PhicoreError(Exception):
    """Base class of the errors that a user can cause and fix.

    Args:
        problem: What is wrong, and what to do. None makes it from `expected` and `got`.
        parameter: The Python name of the wrong parameter.
        expected: The values that the parameter may have.
        got: The value that the parameter had.
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
        """Return the message, with the parameter's name converted by `spell`."""
        return (
            self.problem if self.parameter is None else f"{spell(self.parameter)}: {self.problem}"
        )


class GGUFError(PhicoreError):
    """A GGUF file is damaged, hostile, or asks for something that phicore does not have."""


class TokenizerError(PhicoreError):
    """A tokenizer or a chat template cannot be built or used."""


class SourceError(PhicoreError):
    """A model reference is malformed, does not exist or cannot be fetched."""


class SessionError(PhicoreError):
    """A session file is damaged, or was saved for another model, cache type or backend."""


class ConversationError(PhicoreError):
    """The file of a conversation is damaged, missing, or cannot be read or written."""


class BackendError(PhicoreError):
    """A backend or device is not installed, does not work here or cannot do what was requested."""


@contextmanager
def about(file: str, *others: str) -> Iterator[None]:
    """Let errors about a file's content begin with its name.

    Args:
        file: The name of the file.
        others: Names of other files, with which an error may begin instead.
    """
    try:
        yield
    except (GGUFError, TokenizerError) as error:
        if error.problem.startswith((file, *others)):
            raise
        raise type(error)(f"{file}: {error.problem}") from error


class ArgumentError(PhicoreError, ValueError):
    """An argument is outside of its range; the message gives the range and the value."""


class ContextError(PhicoreError):
    """A prompt is longer than the context."""


class BusyError(PhicoreError):
    """Too many requests wait already."""


FAULTS = (Exception, SystemExit)
"""What the code of others may raise. A plugin that calls `sys.exit` must not end the server."""


def as_error(fault: BaseException) -> Exception:
    """Return an error for what the code of others has raised: itself, or what says the same."""
    if isinstance(fault, Exception):
        return fault
    found = PhicoreError(f"a plugin or a library wanted to end the program ({fault!r:.60})")
    return found.with_traceback(fault.__traceback__)
