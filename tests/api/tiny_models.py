"""Tiny models for tests of the program: quick on any backend, with editable metadata."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
from gguf import GGMLQuantizationType as Type

from phicore.testing.tiny_models import Tiny, write_model

TINY = Tiny(
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=320,
)

Edit = Callable[[gguf.GGUFWriter], None]


def write_tiny(path: Path, edit: Edit | None = None, **changes: Any) -> Path:
    """Write a tiny model of float32 weights with a vocabulary and a chat template.

    Args:
        edit: Called with the writer before anything is written.
        changes: Hyperparameters that differ from `TINY`.
    """

    class Writer(gguf.GGUFWriter):
        def write_header_to_file(self, path: Path | None = None) -> None:
            if edit is not None:
                edit(self)
            super().write_header_to_file(path)

    with mock.patch.object(gguf, "GGUFWriter", Writer):
        return write_model(path, replace(TINY, **changes), Type.F32)


def write_endless(path: Path, context: int = 20000) -> Path:
    """Write a model that, greedily and without a penalty, generates until its context is full."""
    end = 0

    def never_end(writer: gguf.GGUFWriter) -> None:
        nonlocal end
        tokens = writer.kv_data[0]["tokenizer.ggml.tokens"].value
        for other in ("<|end|>", "<|endoftext|>"):
            tokens[tokens.index(other)] = f"not-{other}"
        end = writer.kv_data[0]["tokenizer.ggml.eos_token_id"].value = tokens.index("</s>")

    write_tiny(path, never_end, max_position_embeddings=context)
    tensors = {t.name: t.data for t in gguf.GGUFReader(path, "r+").tensors}
    # Its score is always 0, which is never the highest. A random row may be, after many tokens.
    tensors.get("output.weight", tensors["token_embd.weight"])[end] = 0
    return path


def spoilt(path: Path, tensor: str, value: float) -> Path:
    """Overwrite the fourth number of a float32 tensor in a file; return the file's path."""
    reader = gguf.GGUFReader(path, "r+")
    (data,) = (t.data for t in reader.tensors if t.name == tensor)
    data.reshape(-1)[3] = value
    return path


def without(key: str) -> Edit:
    """Return an edit that removes a key."""
    return lambda writer: writer.kv_data[0].pop(key)


def with_value(key: str, value: Any) -> Edit:
    """Return an edit that changes the value of an existing key."""

    def edit(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0][key].value = value

    return edit


def with_number(key: str, value: float) -> Edit:
    """Return an edit that adds a key: int32 for an integer, float32 for a float."""

    def edit(writer: gguf.GGUFWriter) -> None:
        add = writer.add_int32 if isinstance(value, int) else writer.add_float32
        add(key, value)

    return edit
