"""Small vocabularies as metadata of GGUF files, for tests of what files leave out or get wrong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from phicore.text.tokenizer import Tokenizer

_FOLDER = os.environ.get("PHICORE_TEST_DATA")
PHI3_FILE = (
    Path(_FOLDER) if _FOLDER else Path(__file__).parents[3] / "shared" / "data"
) / "ggml-vocab-phi-3.gguf"
"""llama.cpp's test file of Phi-3's real vocabulary."""
needs_phi3_file = pytest.mark.skipif(
    not PHI3_FILE.exists(),
    reason="needs llama.cpp's vocabulary test files: set PHICORE_TEST_DATA to a folder with "
    "ggml-vocab-phi-3.gguf, .inp and .out",
)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def llama(**changes: Any) -> dict[str, Any]:
    """Return the metadata of a SentencePiece vocabulary; a change to None removes a key."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]
    text = ["▁a", "ab", "▁ab", "▁", "a", "b", "c", "é", "s", ">", "<", "s>"]  # best first
    scores = [0.0] * len(pieces) + [-float(rank) for rank in range(len(text))]
    values = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces + text,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array(types + [NORMAL] * len(text), np.int32),
        "tokenizer.ggml.eos_token_id": 2,
    }
    return changed(values, changes)


def gpt2(pre: str | None = "gpt-2", **changes: Any) -> dict[str, Any]:
    """Return the metadata of a byte-level vocabulary; a change to None removes a key.

    The vocabulary has a token for each byte, two merged tokens, a control token and a user-defined
    token.
    """
    pieces = [
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        "ab",
        "abc",
        "<|end|>",
        "<user defined>",
    ]
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [NORMAL] * 258 + [CONTROL, USER_DEFINED],
        "tokenizer.ggml.merges": ["a b", "ab c"],
        "tokenizer.ggml.bos_token_id": 258,
    }
    return changed(values, changes)


def byte_level(pieces: list[str], pre: str) -> dict[str, Any]:
    """Return the metadata of a byte-level vocabulary whose pieces are in the order of merging."""
    made = set(pre_tokenizers.ByteLevel.alphabet())
    merges = []
    for piece in pieces:
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        merges += [f"{a} {b}" for a, b in cuts if a in made and b in made]
        made.add(piece)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [NORMAL] * len(pieces),
        "tokenizer.ggml.merges": merges,
    }


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    names = {"architecture": "general.architecture", "chat_template": "tokenizer.chat_template"}
    values |= {names.get(key, f"tokenizer.ggml.{key}"): value for key, value in changes.items()}
    return {key: value for key, value in values.items() if value is not None}


def longer(values: dict[str, Any], pieces: list[str], types: list[int]) -> dict[str, Any]:
    """Return metadata with more tokens, of the given types, at the end."""
    more: dict[str, list[Any]] = {
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [-1000.0] * len(pieces),
    }
    return values | {key: [*values[key], *more[key]] for key in more.keys() & values.keys()}


def pieces_of(tokenizer: Tokenizer, text: str, **options: bool) -> list[str]:
    return [tokenizer.piece(id) for id in tokenizer.encode(text, **options)]


LLAMA_TOKENS = llama()["tokenizer.ggml.tokens"]
GPT2_TOKENS = gpt2()["tokenizer.ggml.tokens"]
