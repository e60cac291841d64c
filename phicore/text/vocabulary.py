"""Translates the vocabulary of a GGUF file for the `tokenizers` library.

A file names one of two models. "llama" is SentencePiece: pieces of text with "▁" for a space, a
score for each piece, and a token for each byte, for characters that no piece has. "gpt2" is
byte-level BPE: pieces spelled in a printable alphabet of the 256 bytes, a list of merges, and the
name of the regular expressions that first split text into words. Both become a
`tokenizers.Tokenizer` with BPE and a decoder, which can be saved as a tokenizer.json.

Files are not trusted. Contents that are wrong cause a `TokenizerError` that names the key.

Source: llama.cpp (llama-vocab.cpp) for the rules that a file leaves open; constants from `gguf`.
"""

import operator
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import tokenizers
from gguf.constants import TokenType
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from phicore.errors import TokenizerError
from phicore.text.pre_tokenizers import PRE_TOKENIZERS

# Spellings of tokens that end a generation in every vocabulary (llama.cpp, `special_eog_ids`). They
# count as control tokens, whatever type the file gives them. `</s>` is not one of them: in Phi-3 it
# is an ordinary token, for example of HTML. If `</s>` ends a generation, the metadata says so.
END_PIECES = {
    *("<|end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>"),
    *("<end_of_turn>", "<end_of_utterance>", "<EOT>", "_<EOT>", "[EOT]"),
    *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>"),
    *("<reponame>", "<|file_sep|>", "<｜end▁of▁sentence｜>"),
}

# The ids of special tokens in a SentencePiece vocabulary if the file does not say (llama.cpp).
SENTENCEPIECE_IDS = {
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}

BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # one byte of a character that has no piece
# Names for ids without a meaning, which fill a vocabulary up to the rows of the embedding.
_PADDING = re.compile(r"|[\[<]\|?(pad|placeholder|dummy|unused|reserved|empty)\w*\|?[\]>]", re.I)
_SPACE = "▁"  # how SentencePiece spells a space
_MAX_PIECE_LENGTH = 256  # characters; splitting a piece takes time quadratic in its length
# Types whose tokens are found in a text, and printed, exactly as the vocabulary spells them.
_VERBATIM = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED)
_KEEP_SPACE = {"<unk>", "<s>", "<|endoftext|>"}  # Phi-3's tokens that leave a space after them
_PHI3_PIECES = {"<|user|>", "<|assistant|>", "<|end|>"}
# Spellings that no text has by chance: "<|im_start|>", and DeepSeek's "<｜User｜>".
_SPECIAL = re.compile(r"<\|[^\s|<>]+\|>|<｜[^\s｜<>]+｜>")
# Spellings of special tokens, used only for the tokens that the file names as begin or end of text.
_BRACKETED = re.compile(r"<[^\s<>]+>|\[[^\s\[\]]+\]")


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
            type says so, or a token has no type.
    """
    key = "tokenizer.ggml.tokens"
    # llama.cpp's name for a token without a spelling
    pieces = [piece or f"[EMPTY_{id}]" for id, piece in enumerate(_strings(metadata, key))]
    ids: dict[str, int] = {}
    for id, piece in enumerate(pieces):
        if ids.setdefault(piece, id) != id:
            raise TokenizerError(f"{key}: {piece!r} has two ids, {ids[piece]} and {id}")
    numbers = _numbers(metadata, "tokenizer.ggml.token_type", len(pieces))
    types = _corrected(metadata, pieces, [int(number) for number in numbers])
    for piece, token_type in zip(pieces, types, strict=True):
        if token_type == TokenType.BYTE and not BYTE_PIECE.fullmatch(piece):
            raise TokenizerError(f"{key}: expected a byte such as '<0x0A>', found {piece!r}")
    return pieces, types


def _corrected(
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

    return [int(corrected(id, *token)) for id, token in enumerate(zip(pieces, types, strict=True))]


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
    pieces = _strings(metadata, "tokenizer.ggml.tokens")
    types = [float(TokenType.NORMAL)] * len(pieces)
    if "tokenizer.ggml.token_type" in metadata:
        types = _numbers(metadata, "tokenizer.ggml.token_type", len(pieces))
    special = (TokenType.CONTROL, TokenType.USER_DEFINED)
    return [
        None
        if token_type == TokenType.UNUSED or _PADDING.fullmatch(piece)
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
    scores = _numbers(metadata, "tokenizer.ggml.scores", len(pieces))
    merges = _merges_by_score(metadata, pieces, types, scores)
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
    merges = _merges_of_file(metadata)
    backend = _bpe(pieces, merges, ignore_merges=rule.ignores_merges)
    _check_merges(metadata, pieces, types, merges)
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
    if token_type in _VERBATIM:
        return piece.encode()
    if not byte_level:
        return piece.replace(_SPACE, " ").encode()
    try:
        return bytes(_BYTE_CHARACTERS[character] for character in piece)
    except KeyError:  # a character is not in the byte alphabet, so the piece is plain text
        return piece.encode()


def special_token_id(metadata: Mapping[str, Any], name: str, vocab_size: int) -> int | None:
    """Read and check `tokenizer.ggml.<name>_token_id`; return None if the file has no such key."""
    key = f"tokenizer.ggml.{name}_token_id"
    if metadata.get(key) is None:
        return None
    return _checked_id(key, metadata_value(metadata, key, int), vocab_size)


def special_token_ids(metadata: Mapping[str, Any], name: str, vocab_size: int) -> list[int]:
    """Return the list `tokenizer.ggml.<name>_token_ids`, as ollama writes it; it may be empty."""
    key = f"tokenizer.ggml.{name}_token_ids"
    if metadata.get(key) is None:
        return []
    return [
        _checked_id(key, metadata_value({key: id}, key, int), vocab_size)
        for id in metadata_value(metadata, key, Collection)
    ]


def _checked_id(key: str, id: int, vocab_size: int) -> int:
    if not 0 <= id < vocab_size:
        raise TokenizerError(f"{key}: expected 0 to {vocab_size - 1}, found {id}")
    return id


def metadata_value(metadata: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """Read a value of the metadata and check its type.

    Raises:
        TokenizerError: If the value has another type, or is missing without a default.
    """
    value = metadata.get(key, default)
    if value is None:
        raise TokenizerError(f"{key}: missing from the file; {tokenizer_advice(metadata)}")
    if kind is int and isinstance(value, np.integer):
        value = int(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        name = "array" if kind is Collection else kind.__name__
        found = " ".join(repr(value).split())  # numpy writes an array in several lines
        raise TokenizerError(f"{key}: expected {name}, found {found:.80}")
    return value


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
            if token_type in _VERBATIM
        ]
    )


def _merges_by_score(
    metadata: Mapping[str, Any],
    pieces: Sequence[str],
    types: Sequence[int],
    scores: Sequence[float],
) -> list[tuple[str, str]]:
    """Return the merges that make each piece of text from two others, the best score first.

    A SentencePiece vocabulary has scores and no merges: SentencePiece always joins the two
    neighbours whose union has the best score. For equal scores, the longer left part comes first.
    In runs of one character this has the effect of joining the leftmost neighbours first. Only text
    is merged, so that no text can become a control token.
    """
    not_text = (*_VERBATIM, TokenType.BYTE)
    ranked = {p: s for p, t, s in zip(pieces, types, scores, strict=True) if t not in not_text}
    longest = max(map(len, ranked), default=0)
    if longest > _MAX_PIECE_LENGTH:
        raise TokenizerError(
            f"tokenizer.ggml.tokens: expected at most {_MAX_PIECE_LENGTH} characters in a token, "
            f"found {longest}"
        )
    merges = [
        (-score, -split, piece)
        for piece, score in ranked.items()
        for split in range(1, len(piece))
        if piece[:split] in ranked and piece[split:] in ranked
    ]
    merged = {piece: score for score, _, piece in merges}
    alike, count = Counter(merged.values()).most_common(1)[0] if merged else (0.0, 0)
    if count > max(1, len(merged) // 2):
        raise TokenizerError(
            f"tokenizer.ggml.scores: {count} of {len(merged)} tokens have the same score "
            f"{-alike:g}, a placeholder, so the file does not say how text is split; "
            f"{tokenizer_advice(metadata)}"
        )
    merges.sort(key=operator.itemgetter(0, 1))
    return [(piece[:-split], piece[-split:]) for _, split, piece in merges]


def _check_merges(
    metadata: Mapping[str, Any],
    pieces: Sequence[str],
    types: Sequence[int],
    merges: Sequence[tuple[str, str]],
) -> None:
    """Check that merges produce at least half of the text tokens.

    Raises:
        TokenizerError: If they do not, which means that merges are missing from the file.
    """
    made = {left + right for left, right in merges}
    words = [
        piece
        for piece, token_type in zip(pieces, types, strict=True)
        if token_type == TokenType.NORMAL and len(piece) > 1 and not _PADDING.fullmatch(piece)
    ]
    lost = sum(word not in made for word in words)
    if lost > max(1, len(words) // 2):
        raise TokenizerError(
            f"tokenizer.ggml.merges: {len(merges)} merges make none of {lost} of {len(words)} "
            f"tokens, so the file does not say how text is split; {tokenizer_advice(metadata)}"
        )


def tokenizer_advice(metadata: Mapping[str, Any]) -> str:
    """Say what to do when a file's vocabulary cannot be used, for the end of a message."""
    url = origin(metadata)
    found = "" if url is None else f" (the file names {url:.100})"
    return f"give the model's tokenizer.json{found}"


def origin(metadata: Mapping[str, Any]) -> str | None:
    """Return the address of the repository that a file was made from, if it names one."""
    keys = ("general.source.repo_url", "general.base_model.0.repo_url", "general.repo_url")
    found = (metadata.get(key) for key in keys)
    return next((url for url in found if isinstance(url, str)), None)


def _merges_of_file(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Read `tokenizer.ggml.merges`, texts "left right", as pairs."""
    merges = []
    for merge in _strings(metadata, "tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            raise TokenizerError(
                f"tokenizer.ggml.merges: expected two tokens and a space between, found {merge!r}"
            )
        merges.append((left, right))
    return merges


def _bpe(
    pieces: Sequence[str], merges: list[tuple[str, str]], **options: Any
) -> tokenizers.Tokenizer:
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    try:
        return tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **options))
    except Exception as error:  # the library raises no narrower type
        raise TokenizerError(f"tokenizer.ggml.tokens and merges do not fit: {error}") from error


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    """Read an array of strings, which must all be valid Unicode."""
    strings: list[str] = metadata_value(metadata, key, list)
    for value in strings:
        if not isinstance(value, str):
            raise TokenizerError(f"{key}: expected strings, found {value!r:.80}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(f"{key}: expected UTF-8, found {value!r:.80}") from error
    return strings


def _numbers(metadata: Mapping[str, Any], key: str, size: int) -> list[float]:
    """Read an array with one finite number for each of `size` tokens."""
    values = metadata_value(metadata, key, Collection)
    with suppress(TypeError, ValueError):
        array = np.asarray(values, dtype=np.float64)
        if array.shape == (size,) and np.isfinite(array).all():
            return array.tolist()
    raise TokenizerError(
        f"{key}: expected {size} finite numbers, one a token; found {len(values)} values"
    )
