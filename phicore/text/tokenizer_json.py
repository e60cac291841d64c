"""Reads Hugging Face's tokenizer.json files, and checks that they belong to the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import tokenizers

from phicore.errors import TokenizerError

_MAX_TOKENS = 2**20  # if the GGUF file has no vocabulary to compare with; real ones have 2**18


def read_json(path: Path) -> tokenizers.Tokenizer:
    """Read a tokenizer.json, without its settings for truncation and padding.

    Raises:
        TokenizerError: If the file cannot be read.
    """
    try:
        backend = tokenizers.Tokenizer.from_buffer(path.read_bytes())
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def check_pieces(
    path: Path,
    vocabulary: Mapping[str, int],
    added: Mapping[int, tokenizers.AddedToken],
    required: Sequence[tuple[str, bool] | None],
) -> None:
    """Check that a tokenizer.json has only tokens of the model, and all of its special tokens.

    Args:
        vocabulary: The ids of the file's tokens, by spelling.
        added: The file's tokens that are found in a text before it is split, by id.
        required: The result of `required_pieces`. If it is empty, only the number of tokens is
            checked.
    Raises:
        TokenizerError: If a token differs or a special token is missing.
    """
    size = max(vocabulary.values(), default=-1) + 1
    most = len(required) or _MAX_TOKENS
    if size > most:
        raise TokenizerError(f"{path}: expected at most {most} tokens, found {size}")
    problems = [
        (id, f"expected {wanted[0]!r}, found {piece!r}")
        for piece, id in vocabulary.items()
        if required and (wanted := required[id]) and piece != wanted[0]
    ] + [
        (id, f"expected the special token {wanted[0]!r}, found none")
        for id, wanted in enumerate(required)
        if wanted and wanted[1] and id not in added
    ]
    if problems:
        id, problem = min(problems)
        raise TokenizerError(f"{path}: not of this model: token {id}: {problem}")


@contextmanager
def library_errors(where: str) -> Iterator[None]:
    """Turn every error of the library `tokenizers` into a TokenizerError of one line.

    The library has no type of its own for errors. Its panics derive from BaseException, not from
    Exception.
    """
    try:
        yield
    except (TokenizerError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise TokenizerError(f"{where}: {' '.join(str(error).split())}") from error
