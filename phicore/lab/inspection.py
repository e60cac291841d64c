"""The data for `phicore inspect` and `phicore tokenize`, read without loading weights."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from phicore.errors import PhicoreError, about
from phicore.gguf.reader import GGUFFile, open_gguf
from phicore.network.architectures import architecture_of
from phicore.plugins import Plugins
from phicore.prompting.tokenizers import tokenizer_of
from phicore.sources import ModelFiles, resolve
from phicore.text.chat_template import ChatTemplate
from phicore.text.tokenizer import Tokenizer


def find(reference: str, tokenizer: str | None = None) -> ModelFiles:
    """Find the files of a reference, with the given tokenizer.json in place of the model's."""
    return resolve(reference, tokenizer=tokenizer, schemes=Plugins().sources())


def open_tokenizer(reference: str, tokenizer: str | None) -> tuple[Tokenizer, ChatTemplate]:
    """Open the tokenizer and the chat template of a model."""
    files = find(reference, tokenizer)
    with open_gguf(files.path) as file, about(file.path.name, str(files.tokenizer)):
        read = tokenizer_of(files, file.metadata)
        return read, ChatTemplate.from_gguf(file.metadata, read)


def inspect_model(reference: str) -> dict[str, Any]:
    """Describe the contents of a model file as plain data.

    A part that cannot be read is replaced by the error.
    """
    files = find(reference)
    with open_gguf(files.path) as file:
        weights = sum(t.n_elements for t in file.tensors.values())
        tensor_bytes = sum(t.size_bytes for t in file.tensors.values())
        return {
            "file": str(file.path),
            "size_bytes": file.size_bytes,
            "name": _plain(file.metadata.get("general.name")),
            "architecture": _plain(file.metadata.get("general.architecture")),
            "weights": weights,
            "bits_per_weight": 8 * tensor_bytes / weights if weights else None,
            "hyperparameters": _or_error(lambda: _hyperparameters(file)),
            "tokenizer": _or_error(lambda: _tokenizer_summary(files, file)),
            "metadata": {key: _plain(value) for key, value in file.metadata.items()},
            "tensors": [
                {
                    "name": t.name,
                    "type": t.type.name,
                    "shape": list(t.shape),
                    "size_bytes": t.size_bytes,
                }
                for t in file.tensors.values()
            ],
        }


def _hyperparameters(file: GGUFFile) -> dict[str, Any]:
    architecture = architecture_of(file.metadata, Plugins().architectures(), tensors=file.tensors)
    config = asdict(architecture.config(file.metadata))
    del config["vocab_size"]  # the tokenizer has it
    return config


def _or_error(read: Any) -> dict[str, Any]:
    """Return the result of `read`, or its error, so that one bad part does not hide the others."""
    try:
        return read()
    except PhicoreError as error:
        return {"error": str(error)}


def _tokenizer_summary(files: ModelFiles, file: GGUFFile) -> dict[str, Any]:
    tokenizer = tokenizer_of(files, file.metadata)
    return {
        "source": tokenizer.source,
        "vocab_size": tokenizer.vocab_size,
        "add_bos": tokenizer.add_bos,
        "bos": None if tokenizer.bos_token_id is None else tokenizer.piece(tokenizer.bos_token_id),
        "end": [tokenizer.piece(i) for i in sorted(tokenizer.end_token_ids)],
        "chat_template": "tokenizer.chat_template" in file.metadata,
    }


def _plain(value: Any) -> Any:
    """Convert a metadata value for JSON: long arrays to their length, NaN and infinity to None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list):
        return f"array of {len(value)}" if len(value) > 16 else [_plain(item) for item in value]
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
