"""The vocabulary of a GGUF file, translated for the `tokenizers` library.

A file names one of two models. "llama" is SentencePiece: pieces of text with "▁" for a space, a
score for each, and one token a byte for characters that no piece has. "gpt2" is byte-level BPE:
pieces spelled in a printable alphabet of the 256 bytes, a list of merges, and the name of the
regular expressions that cut text into words first. Both become a `tokenizers.Tokenizer` with BPE,
complete with its decoder, so that it can be saved as a tokenizer.json.

The file may come from anyone: what does not fit ends in a `TokenizerError` that names the key.

Source: llama.cpp (llama-vocab.cpp) for the rules that a file leaves open; constants from `gguf`.
"""

import operator
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import tokenizers
from gguf.constants import TokenType
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from phicore.errors import TokenizerError

# Spellings that end a generation in every vocabulary that has them (llama.cpp, `special_eog_ids`);
# they count as control tokens, whatever type the file gives them. `</s>` is not among them: Phi-3
# has it as an ordinary token, for example in HTML, and where it is the end, the metadata says so.
END_PIECES = {
    *("<|end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>"),
    *("<end_of_turn>", "<end_of_utterance>", "<EOT>", "_<EOT>", "[EOT]"),
    *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>"),
    *("<reponame>", "<|file_sep|>"),
}

PHI = ("phi3", "phimoe")  # the architectures with Phi-3's vocabulary

# Regular expressions of the tokenizer.json files that the names stand for, each applied to what
# the one before it left whole. llama.cpp spells them differently where its engine needs it.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "dbrx": (_LLAMA3,),
    "gpt-4o": (_GPT4O,),
    "qwen2": (_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),),
}

# Where a SentencePiece vocabulary has them when the file does not say (llama.cpp).
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


def _byte_characters() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones as themselves, the others as U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(0x100)) - set(printable))
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_CHARACTERS = _byte_characters()


def read_pieces(metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """The spelling and the type of every token, by id; no two have the same spelling.

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
    types = [int(number) for number in numbers]
    for piece in END_PIECES & ids.keys():
        types[ids[piece]] = TokenType.CONTROL
    for piece, token_type in zip(pieces, types, strict=True):
        if token_type == TokenType.BYTE and not BYTE_PIECE.fullmatch(piece):
            raise TokenizerError(f"{key}: expected a byte such as '<0x0A>', found {piece!r}")
    return pieces, types


def required_pieces(metadata: Mapping[str, Any]) -> list[tuple[str, bool] | None]:
    """What another tokenizer of the same model must agree on, by id.

    Returns:
        The spelling of each token, and whether it is found in a text before that is split; None
        for padding. Empty if the metadata has no vocabulary.
    Raises:
        TokenizerError: If the spellings are not text, or not every one has a type.
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
    """An encoder that spells spaces as "▁" and characters without a piece as bytes.

    Args:
        metadata: Has the score of each piece; Phi-3's special tokens swallow the space after them.
        pieces, types: As from `read_pieces`.
        space_prefix: Whether a space is put in front of a text.
    Raises:
        TokenizerError: If the scores do not fit, or a piece is too long.
    """
    unknown = special_token_id(metadata, "unknown", len(pieces))
    scores = _numbers(metadata, "tokenizer.ggml.scores", len(pieces))
    merges = _merges_by_score(pieces, types, scores)
    unk_token = None if unknown is None else pieces[unknown]
    backend = _bpe(pieces, merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True)
    # The normalizer sees each stretch of text between special tokens by itself, so every one of
    # them gets its own space in front, as in llama.cpp.
    prefix = [normalizers.Prepend(_SPACE)] if space_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    unescape = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(" ", 1, 0)] if space_prefix else []
    backend.decoder = decoders.Sequence([*unescape, *strip])
    is_phi3 = str(metadata.get("general.architecture")) in PHI
    _add_special_tokens(backend, pieces, types, rstrip=is_phi3)
    return backend


def byte_level_backend(
    metadata: Mapping[str, Any], pieces: Sequence[str], types: Sequence[int], pre: str
) -> tokenizers.Tokenizer:
    """An encoder that cuts text into words, as `pre` says, and merges the bytes of each.

    Args:
        metadata: Has the merges.
        pieces, types: As from `read_pieces`.
        pre: The value of `tokenizer.ggml.pre`.
    Raises:
        TokenizerError: If phicore does not have `pre`, or the merges do not fit the pieces.
    """
    if pre not in _PRE_TOKENIZERS:
        raise TokenizerError(
            f"tokenizer.ggml.pre: {pre!r} is not supported (supported: "
            f"{', '.join(sorted(_PRE_TOKENIZERS))}); give the model's tokenizer.json"
        )
    # Llama 3 looks a whole word up before it merges.
    backend = _bpe(pieces, _merges_of_file(metadata), ignore_merges=pre == "llama-bpe")
    splits = [pre_tokenizers.Split(Regex(r), "isolated") for r in _PRE_TOKENIZERS[pre]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    backend.decoder = decoders.ByteLevel()
    _add_special_tokens(backend, pieces, types, rstrip=False)
    return backend


def piece_bytes(piece: str, token_type: int, *, byte_level: bool) -> bytes:
    """The bytes that a token stands for, perhaps a part of a character.

    Args:
        piece: Its spelling in the vocabulary.
        token_type: A value of `gguf.TokenType`.
        byte_level: Whether pieces spell bytes as GPT-2 does, or spaces as SentencePiece does.
    """
    if token_type == TokenType.BYTE:
        return bytes([int(piece[3:5], 16)])
    if token_type in _VERBATIM:
        return piece.encode()
    if not byte_level:
        return piece.replace(_SPACE, " ").encode()
    try:
        return bytes(_BYTE_CHARACTERS[character] for character in piece)
    except KeyError:  # text that the byte alphabet cannot have made stands for itself
        return piece.encode()


def special_token_id(metadata: Mapping[str, Any], name: str, vocab_size: int) -> int | None:
    """`tokenizer.ggml.<name>_token_id`, checked, or None."""
    key = f"tokenizer.ggml.{name}_token_id"
    if metadata.get(key) is None:
        return None
    id = metadata_value(metadata, key, int)
    if not 0 <= id < vocab_size:
        raise TokenizerError(f"{key}: expected 0 to {vocab_size - 1}, found {id}")
    return id


def metadata_value(metadata: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """One value of the metadata, of this type; an error if it is missing without a default."""
    value = metadata.get(key, default)
    if value is None:
        raise TokenizerError(f"{key}: missing from the file; give the model's tokenizer.json")
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
    """Let control, unknown and user-defined tokens be found in the text before it is split.

    Args:
        rstrip: Whether such a token swallows the whitespace after it, as in Phi-3's vocabulary,
            where only `_KEEP_SPACE` do not. llama.cpp and tokenizer.json agree.
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
    pieces: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """The merges that make each piece of text from two others, the best score first.

    A vocabulary of SentencePiece has scores and no merges: it always joins the two neighbours
    whose union scores best. Of equal scores the longer left part goes first, which is what
    joining the leftmost neighbours first comes to in runs of one character. Only text can be
    merged, so that no text can spell a control token.
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
    merges.sort(key=operator.itemgetter(0, 1))
    return [(piece[:-split], piece[-split:]) for _, split, piece in merges]


def _merges_of_file(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """`tokenizer.ggml.merges`, "left right" each, as pairs."""
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
    """An array of strings, every one valid Unicode."""
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
    """An array of one number a token."""
    values = metadata_value(metadata, key, Collection)
    with suppress(TypeError, ValueError):
        array = np.asarray(values, dtype=np.float64)
        if array.shape == (size,) and np.isfinite(array).all():
            return array.tolist()
    raise TokenizerError(
        f"{key}: expected {size} finite numbers, one a token; found {len(values)} values"
    )
