"""Hugging Face's tokenizer.json: reading it, and checking that it belongs to the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import tokenizers

from phicore.errors import TokenizerError

_MAX_TOKENS = 2**20  # of a tokenizer.json without a model; the largest in use have 2**18


def read_json(path: Path) -> tokenizers.Tokenizer:
    """What a tokenizer.json says, but for the lengths that it cuts or fills texts to."""
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
    """Raise unless a tokenizer.json has no other tokens than the model, and all special ones.

    Args:
        vocabulary, added: The file's tokens by spelling, and those found before a text is split.
        required: From `required_pieces`; if empty, only the number of tokens is checked.
    """
    advice = "give the model's own, or none to use the GGUF file's tokenizer"
    size = max(vocabulary.values(), default=-1) + 1
    most = len(required) or _MAX_TOKENS
    if size > most:
        raise TokenizerError(f"{path}: expected at most {most} tokens, found {size}; {advice}")
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
        raise TokenizerError(f"{path}: not of this model: token {id}: {problem}; {advice}")


@contextmanager
def library_errors(where: str) -> Iterator[None]:
    """Turn whatever `tokenizers` raises into a TokenizerError of one line.

    It has no narrower type than Exception, and its panics derive from BaseException alone.
    """
    try:
        yield
    except (TokenizerError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise TokenizerError(f"{where}: {' '.join(str(error).split())}") from error
