"""Kinds of tokens, which their spellings tell: ends, bytes, padding, special tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from gguf.constants import TokenType

from phicore.text.tokenizer_keys import special_token_id

# Spellings of tokens that end a generation in every vocabulary (llama.cpp, `special_eog_ids`). They
# count as control tokens, whatever type the file gives them. `</s>` is not one of them: in Phi-3 it
# is an ordinary token, for example of HTML. If `</s>` ends a generation, the metadata says so.
END_PIECES = {
    *("<|end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>"),
    *("<end_of_turn>", "<end_of_utterance>", "<EOT>", "_<EOT>", "[EOT]"),
    *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>"),
    *("<reponame>", "<|file_sep|>", "<｜end▁of▁sentence｜>"),
}

BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # one byte of a character that has no piece
# Names for ids without a meaning, which fill a vocabulary up to the rows of the embedding.
PADDING = re.compile(r"|[\[<]\|?(pad|placeholder|dummy|unused|reserved|empty)\w*\|?[\]>]", re.I)
# Types whose tokens are found in a text, and printed, exactly as the vocabulary spells them.
VERBATIM = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED)
# Spellings that no text has by chance: "<|im_start|>", and DeepSeek's "<｜User｜>".
_SPECIAL = re.compile(r"<\|[^\s|<>]+\|>|<｜[^\s｜<>]+｜>")
_FIRST = ("<", "[", "_")  # what END_PIECES and all patterns but that of padding begin with
# Spellings of special tokens, used only for the tokens that the file names as begin or end of text.
_BRACKETED = re.compile(r"<[^\s<>]+>|\[[^\s\[\]]+\]")


def corrected_types(
    metadata: Mapping[str, Any], pieces: Sequence[str], types: Sequence[int]
) -> list[int]:
    """Return the types of tokens, and replace types that a token's spelling contradicts."""
    has_bytes = metadata.get("tokenizer.ggml.model") == "llama"
    names = ("bos", "eos", "eot", "eom")
    named = [special_token_id(metadata, name, len(pieces)) for name in names]

    def corrected(id: int, piece: str, token_type: int) -> int:
        if piece in END_PIECES:
            return TokenType.CONTROL
        if token_type != TokenType.NORMAL:
            return token_type
        if _SPECIAL.fullmatch(piece) or (id in named and _BRACKETED.fullmatch(piece)):
            return TokenType.CONTROL
        return TokenType.BYTE if has_bytes and BYTE_PIECE.fullmatch(piece) else token_type

    found = [int(token_type) for token_type in types]
    for id, piece in enumerate(pieces):
        if piece.startswith(_FIRST):  # no other piece can be special
            found[id] = int(corrected(id, piece, types[id]))
    return found
