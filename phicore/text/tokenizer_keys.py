"""Checked values of a GGUF file's tokenizer keys. The file may come from anyone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from phicore.errors import TokenizerError
from phicore.values import as_kind

_NO_ID = (-1, 2**32 - 1)  # what programs write for "none", as a signed or an unsigned number


def special_token_id(metadata: Mapping[str, Any], name: str, vocab_size: int) -> int | None:
    """Return `tokenizer.ggml.<name>_token_id`, checked, or None if the file has none.

    If the value is a list, the first id counts; `special_token_ids` returns all of them.
    """
    ids = _ids(metadata, f"tokenizer.ggml.{name}_token_id", vocab_size)
    return ids[0] if ids else None


def special_token_ids(metadata: Mapping[str, Any], name: str, vocab_size: int) -> list[int]:
    """Return all ids of `tokenizer.ggml.<name>_token_id`, and of `..._ids`, as ollama writes it."""
    keys = (f"tokenizer.ggml.{name}_token_id", f"tokenizer.ggml.{name}_token_ids")
    return [id for key in keys for id in _ids(metadata, key, vocab_size)]


def _ids(metadata: Mapping[str, Any], key: str, vocab_size: int) -> list[int]:
    value = metadata.get(key)
    if value is None:
        return []
    values = value if isinstance(value, (list, np.ndarray)) else [value]
    ids = [metadata_value({key: id}, key, int) for id in values]
    return [_checked_id(key, id, vocab_size) for id in ids if id not in _NO_ID]


def _checked_id(key: str, id: int, vocab_size: int) -> int:
    if not 0 <= id < vocab_size:
        raise TokenizerError(f"{key}: expected 0 to {vocab_size - 1}, found {id}")
    return id


def metadata_value(metadata: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """Read a value of the metadata and check its type.

    Raises:
        TokenizerError: If the value has another type, or is missing without a default.
    """
    value = as_kind(metadata.get(key, default), kind)
    if value is None:
        raise TokenizerError(f"{key}: missing from the file; {tokenizer_advice(metadata)}")
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        name = "array" if kind is Collection else kind.__name__
        found = " ".join(repr(value).split())  # numpy writes an array in several lines
        raise TokenizerError(f"{key}: expected {name}, found {found:.80}")
    return value


def strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    """Read an array of strings, which must all be valid Unicode."""
    strings: list[str] = metadata_value(metadata, key, list)
    with suppress(TypeError, UnicodeEncodeError):
        "".join(strings).encode()  # at once: a vocabulary has 100,000 strings
        return strings
    for value in strings:
        if not isinstance(value, str):
            raise TokenizerError(f"{key}: expected strings, found {value!r:.80}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(f"{key}: expected UTF-8, found {value!r:.80}") from error
    return strings


def numbers(metadata: Mapping[str, Any], key: str, size: int) -> list[float]:
    """Read an array with one finite number for each of `size` tokens."""
    values = metadata_value(metadata, key, Collection)
    with suppress(TypeError, ValueError):
        array = np.asarray(values, dtype=np.float64)
        if array.shape == (size,) and np.isfinite(array).all():
            return array.tolist()
    raise TokenizerError(
        f"{key}: expected {size} finite numbers, one a token; found {len(values)} values"
    )


def tokenizer_advice(metadata: Mapping[str, Any]) -> str:
    """Say what to do when a file's vocabulary cannot be used, for the end of a message."""
    url = origin(metadata)
    found = "" if url is None else f" (the file names {url:.100})"
    return f"give the model's tokenizer.json{found}"


def origin(metadata: Mapping[str, Any]) -> str | None:
    """Return the address of the repository that a file was made from, if it names one.

    An address on the Hugging Face Hub comes before others, since its files can be fetched.
    """
    keys = ("general.source.repo_url", "general.base_model.0.repo_url", "general.repo_url")
    found = [url for key in keys if isinstance(url := metadata.get(key), str)]
    return min(found, key=lambda url: not url.startswith("https://huggingface.co/"), default=None)
