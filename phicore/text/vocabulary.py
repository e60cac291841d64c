"""Translates the vocabulary of a GGUF file for the `tokenizers` library.

A file names one of two models. "llama" is SentencePiece: pieces of text with "▁" for a space, a
score for each piece, and a token for each byte, for characters that no piece has. "gpt2" is
byte-level BPE: pieces spelled in a printable alphabet of the 256 bytes, a list of merges, and the
name of the regular expressions that first split text into words. Both become a
`tokenizers.Tokenizer` with BPE and a decoder, which can be saved as a tokenizer.json.

Files are not trusted. Contents that are wrong cause a `TokenizerError` that names the key.

Source: llama.cpp (llama-vocab.cpp) for the rules that a file leaves open; constants from `gguf`.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import tokenizers
from gguf.constants import TokenType
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from phicore.errors import TokenizerError
from phicore.text.merges import check_merges, merges_by_score, merges_of_file
from phicore.text.pre_tokenizers import PRE_TOKENIZERS
from phicore.text.token_kinds import BYTE_PIECE, END_PIECES, PADDING, VERBATIM, corrected_types
from phicore.text.tokenizer_keys import numbers, special_token_id, strings, tokenizer_advice

# The ids of special tokens in a SentencePiece vocabulary if the file does not say (llama.cpp).
SENTENCEPIECE_IDS = {
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}

_SPACE = "▁"  # how SentencePiece spells a space
_KEEP_SPACE = {"<unk>", "<s>", "<|endoftext|>"}  # Phi-3's tokens that leave a space after them
_PHI3_PIECES = {"<|user|>", "<|assistant|>", "<|end|>"}
_TYPES = {0, *map(int, TokenType)}  # 0: llama.cpp's "undefined"
_TEXT_TYPES = {TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.BYTE}


def _byte_characters() -> dict[str, int]:
    """Map GPT-2's spelling to bytes: printable bytes are themselves, others U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(0x100)) - set(printable))
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_CHARACTERS = _byte_characters()


def is_phi3_vocabulary(metadata: Mapping[str, Any], pieces: Collection[str]) -> bool:
    """Return whether a vocabulary is Phi-3's, by its model and its special tokens.

    The architecture does not tell: Phi-4 is `phi3` too and has another vocabulary, and fine-tunes
    of Phi-3 are also published as `llama`.
    """
    return metadata.get("tokenizer.ggml.model") == "llama" and _PHI3_PIECES.issubset(pieces)


def read_pieces(metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Read the spelling and the type of every token, by id; no two have the same spelling.

    Types are corrected where the spelling shows that the file's type is wrong: a token that ends a
    generation, or looks like "<|im_start|>", is a control token, and in a SentencePiece vocabulary
    "<0x0A>" is a byte.

    Raises:
        TokenizerError: If a spelling occurs twice, is not UTF-8 or is not that of a byte where the
            type says so, a token has no type or one that does not exist, or no token is text.
    """
    key = "tokenizer.ggml.tokens"
    # llama.cpp's name for a token without a spelling
    pieces = [piece or f"[EMPTY_{id}]" for id, piece in enumerate(strings(metadata, key))]
    if not pieces:
        raise TokenizerError(f"{key}: no token in it; {tokenizer_advice(metadata)}")
    if len(set(pieces)) < len(pieces):
        ids: dict[str, int] = {}
        for id, piece in enumerate(pieces):
            if ids.setdefault(piece, id) != id:
                raise TokenizerError(f"{key}: {piece!r} has two ids, {ids[piece]} and {id}")
    types_key = "tokenizer.ggml.token_type"
    found = [float(TokenType.NORMAL)] * len(pieces)  # as in llama.cpp, if the file does not say
    if types_key in metadata:
        found = numbers(metadata, types_key, len(pieces))
    for number in set(found):
        if number not in _TYPES:
            raise TokenizerError(
                f"{types_key}: expected 0 to {max(_TYPES)}, found {number:g}; "
                f"{tokenizer_advice(metadata)}"
            )
    types = corrected_types(metadata, pieces, [int(number) for number in found])
    if not _TEXT_TYPES.intersection(types):
        raise TokenizerError(
            f"{types_key}: every token is special, so none is text; {tokenizer_advice(metadata)}"
        )
    byte = int(TokenType.BYTE)
    for piece, token_type in zip(pieces, types, strict=True):
        if token_type == byte and not BYTE_PIECE.fullmatch(piece):
            raise TokenizerError(f"{key}: expected a byte such as '<0x0A>', found {piece!r}")
    return pieces, types


def required_pieces(metadata: Mapping[str, Any]) -> list[tuple[str, bool] | None]:
    """Return the tokens that a tokenizer.json must have to belong to the model, by id.

    Returns:
        The spelling of each token, and whether the token is found in a text before the text is
        split; None for padding. The list is empty if the metadata has no vocabulary.
    Raises:
        TokenizerError: If the spellings are not text, or if a token has no type.
    """
    if "tokenizer.ggml.tokens" not in metadata:
        return []
    pieces = strings(metadata, "tokenizer.ggml.tokens")
    types = [float(TokenType.NORMAL)] * len(pieces)
    if "tokenizer.ggml.token_type" in metadata:
        types = numbers(metadata, "tokenizer.ggml.token_type", len(pieces))
    special = (TokenType.CONTROL, TokenType.USER_DEFINED)
    return [
        None
        if token_type == TokenType.UNUSED or PADDING.fullmatch(piece)
        else (piece, token_type in special or piece in END_PIECES)
        for piece, token_type in zip(pieces, types, strict=True)
    ]


def sentencepiece_backend(
    metadata: Mapping[str, Any], pieces: Sequence[str], types: Sequence[int], space_prefix: bool
) -> tokenizers.Tokenizer:
    """Make an encoder that spells spaces as "▁" and characters without a piece as bytes.

    Args:
        metadata: The file's; it has the score of each piece.
        pieces, types: As from `read_pieces`.
        space_prefix: Whether a space is put in front of a text.
    Raises:
        TokenizerError: If the scores do not fit, or a piece is too long.
    """
    unknown = special_token_id(metadata, "unknown", len(pieces))
    scores = numbers(metadata, "tokenizer.ggml.scores", len(pieces))
    merges = merges_by_score(metadata, pieces, types, scores)
    unk_token = None if unknown is None else pieces[unknown]
    backend = _bpe(pieces, merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True)
    # The normalizer runs separately on each part of the text between special tokens, so each part
    # gets its own space in front, as in llama.cpp.
    prefix = [normalizers.Prepend(_SPACE)] if space_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    unescape = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(" ", 1, 0)] if space_prefix else []
    backend.decoder = decoders.Sequence([*unescape, *strip])
    rstrip = is_phi3_vocabulary(metadata, pieces)
    _add_special_tokens(backend, pieces, types, rstrip=rstrip)
    return backend


def byte_level_backend(
    metadata: Mapping[str, Any], pieces: Sequence[str], types: Sequence[int], pre: str
) -> tokenizers.Tokenizer:
    """Make an encoder that splits text into words by the rule `pre`, and merges each word's bytes.

    Args:
        metadata: The file's metadata, which has the merges.
        pieces, types: The results of `read_pieces`.
        pre: The value of `tokenizer.ggml.pre`.
    Raises:
        TokenizerError: If `pre` is not supported, or the merges do not fit the pieces.
    """
    if pre not in PRE_TOKENIZERS:
        raise TokenizerError(
            f"tokenizer.ggml.pre: {pre!r} is not supported; {tokenizer_advice(metadata)}"
        )
    rule = PRE_TOKENIZERS[pre]
    merges = merges_of_file(metadata)
    backend = _bpe(pieces, merges, ignore_merges=rule.ignores_merges)
    check_merges(metadata, pieces, types, merges)
    if rule.composes:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(r), "isolated") for r in rule.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    backend.decoder = decoders.ByteLevel()
    _add_special_tokens(backend, pieces, types, rstrip=False)
    return backend


def piece_bytes(piece: str, token_type: int, *, byte_level: bool) -> bytes:
    """Return the bytes that a token stands for, which may be part of a character.

    Args:
        piece: The token's spelling in the vocabulary.
        token_type: A value of `gguf.TokenType`.
        byte_level: Whether pieces spell bytes as GPT-2 does. False means that they spell spaces as
            SentencePiece does.
    """
    if token_type == TokenType.BYTE:
        return bytes([int(piece[3:5], 16)])
    if token_type in VERBATIM:
        return piece.encode()
    if not byte_level:
        return piece.replace(_SPACE, " ").encode()
    try:
        return bytes(_BYTE_CHARACTERS[character] for character in piece)
    except KeyError:  # a character is not in the byte alphabet, so the piece is plain text
        return piece.encode()


def _add_special_tokens(
    backend: tokenizers.Tokenizer, pieces: Sequence[str], types: Sequence[int], *, rstrip: bool
) -> None:
    """Add control, unknown and user-defined tokens, which are found before the text is split.

    Args:
        rstrip: Whether these tokens remove the whitespace after them, except `_KEEP_SPACE`. They do
            in Phi-3's vocabulary, in llama.cpp as well as in the tokenizer.json.
    """
    backend.add_tokens(
        [
            AddedToken(
                piece,
                rstrip=rstrip and piece not in _KEEP_SPACE,
                normalized=False,
                special=token_type != TokenType.USER_DEFINED,
            )
            for piece, token_type in zip(pieces, types, strict=True)
            if token_type in VERBATIM
        ]
    )


def _bpe(
    pieces: Sequence[str], merges: list[tuple[str, str]], **options: Any
) -> tokenizers.Tokenizer:
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    try:
        return tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **options))
    except Exception as error:  # the library raises no narrower type
        raise TokenizerError(f"tokenizer.ggml.tokens and merges do not fit: {error}") from error
