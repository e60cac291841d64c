"""Every error that phicore raises on purpose: one line that says what is wrong and what to do.

A message reads "where: expected, found; what to do". The command line prints it and exits with
`exit_code`; anything else that escapes is a bug in phicore.
"""


class PhicoreError(Exception):
    """Base class of the errors that a user can cause and mend."""

    exit_code = 1


class GGUFError(PhicoreError):
    """A GGUF file that is damaged, hostile, or asks for something phicore does not have."""


class TokenizerError(PhicoreError):
    """A tokenizer, or a chat template, that cannot be built or used."""


class SourceError(PhicoreError):
    """A model reference that is malformed, does not exist or cannot be fetched."""


class BackendError(PhicoreError):
    """A backend or device that is not installed, does not work here or was asked too much."""


class ArgumentError(PhicoreError, ValueError):
    """An argument outside of its range; the message gives the range and the value."""


class ContextError(PhicoreError):
    """A prompt that is longer than the context."""
