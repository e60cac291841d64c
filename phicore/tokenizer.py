"""Text to token ids and back, from the metadata of a GGUF file or from a tokenizer.json.

The `tokenizers` library splits and merges; this module translates a GGUF vocabulary into it, with
llama.cpp's rules (llama-vocab.cpp) for what the file leaves open, and turns ids back into text.
"""

from __future__ import annotations

import codecs
import json
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from gguf.constants import TokenType
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from phicore.errors import TokenizerError

# Spellings that end a generation in every vocabulary that has them (llama.cpp, `special_eog_ids`);
# they count as control tokens, whatever type the file gives them. `</s>` is not among them: Phi-3
# has it as an ordinary token, for example in HTML, and where it is the end, the metadata says so.
_END_PIECES = {
    *("<|end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>"),
    *("<end_of_turn>", "<end_of_utterance>", "<EOT>", "_<EOT>", "[EOT]"),
    *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>"),
    *("<reponame>", "<|file_sep|>"),
}
_END_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")

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
_SENTENCEPIECE_IDS = {
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}
_SPACE = "▁"  # how SentencePiece spells a space
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # one byte of a character that has no piece
_MAX_PIECE_LENGTH = 256  # characters; splitting a piece takes time quadratic in its length


def _byte_characters() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones as themselves, the others as U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(0x100)) - set(printable))
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_CHARACTERS = _byte_characters()


class Tokenizer:
    """A vocabulary, and the rules that split text into its tokens.

    Make one with `from_gguf` or `from_file`. Calls do not change it, so threads can share it.

    Attributes:
        vocab_size: Number of ids, V; every id is in [0, V).
        add_bos: Whether `encode` puts the BOS token in front when it is not told.
        bos_token_id: The token that begins a text, or None.
        eos_token_id: The token that ends a text, or None.
        end_token_ids: Every token that ends a generation.
        source: Where the rules came from: "GGUF (llama)", "GGUF (gpt2, smollm)" or a path.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        pieces: Sequence[str],
        types: Sequence[int],
        *,
        metadata: Mapping[str, Any],
        byte_level: bool,
        strip_space: bool,
        add_bos: bool,
        bos_token_id: int | None = None,
        source: str,
    ) -> None:
        """Put the parts together; `add_bos` and `bos_token_id` hold where the metadata is silent.

        Args:
            backend: Encodes; its special tokens are the control tokens.
            pieces: The V spellings, by id.
            types: The V values of `gguf.TokenType`.
            metadata: The GGUF metadata, for special ids.
            byte_level: Whether pieces spell bytes as GPT-2 does, or spaces as SentencePiece does.
            strip_space: Whether `encode` puts a space in front, so that `decode` takes one away.
        """
        self._backend = backend
        self._plain = _without_special(backend)
        self._pieces = pieces
        self._types = types
        self._byte_level = byte_level
        self._strip_space = strip_space
        self.vocab_size = len(pieces)
        self.source = source
        ids = {key: _token_id(metadata, key, self.vocab_size) for key in ("bos", *_END_KEYS)}
        self.bos_token_id = bos_token_id if ids["bos"] is None else ids["bos"]
        self.eos_token_id = ids["eos"]
        ends = [ids[key] for key in _END_KEYS] + [self.token_id(piece) for piece in _END_PIECES]
        self.end_token_ids = frozenset(id for id in ends if id is not None)
        self.add_bos = _value(metadata, "tokenizer.ggml.add_bos_token", bool, add_bos)
        if self.add_bos and self.bos_token_id is None:
            raise TokenizerError(
                "tokenizer.ggml.bos_token_id: expected an id, since the model wants a BOS token "
                "in front of a text; found none"
            )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build the tokenizer that a GGUF file describes.

        Args:
            metadata: GGUF key to value; arrays of numbers may be lists or numpy arrays.
        Raises:
            TokenizerError: If a key is missing, does not fit the others, or names a kind of
                tokenizer that phicore does not have.
        """
        model = _value(metadata, "tokenizer.ggml.model", str)
        if model not in ("llama", "gpt2"):
            raise TokenizerError(
                f"tokenizer.ggml.model: {model!r} is not supported (supported: gpt2, llama); "
                "give the model's tokenizer.json"
            )
        pieces, types = _vocabulary(metadata)
        pre = _value(metadata, "tokenizer.ggml.pre", str, "default")
        is_llama = model == "llama"
        if is_llama:
            metadata = _SENTENCEPIECE_IDS | dict(metadata)
            space_prefix = _value(metadata, "tokenizer.ggml.add_space_prefix", bool, True)
            backend = _sentencepiece(metadata, pieces, types, space_prefix)
        else:
            space_prefix = False
            backend = _byte_level(metadata, pieces, pre)
        phi3 = is_llama and metadata.get("general.architecture") == "phi3"
        _add_special_tokens(backend, pieces, types, rstrip=phi3)
        return cls(
            backend,
            pieces,
            types,
            metadata=metadata,
            byte_level=not is_llama,
            strip_space=space_prefix,
            add_bos=is_llama or pre == "llama-bpe",
            source="GGUF (llama)" if is_llama else f"GGUF (gpt2, {pre})",
        )

    @classmethod
    def from_file(cls, path: Path, metadata: Mapping[str, Any]) -> Tokenizer:
        """Read a tokenizer.json of Hugging Face for the model that `metadata` describes.

        The file says how text is split; the metadata says which tokens begin and end it.

        Raises:
            TokenizerError: If the file cannot be read, has other tokens than the model, or is
                of a kind whose tokens cannot be printed one by one.
        """
        try:
            backend = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        except OSError as error:
            raise TokenizerError(f"{path}: cannot be read: {error.strerror}") from error
        except Exception as error:  # the library raises no narrower type
            raise TokenizerError(f"{path}: not a tokenizer.json: {error}") from error
        backend.no_truncation()
        backend.no_padding()

        decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {"type": None}
        steps = {step["type"]: step for step in decoder.get("decoders", [decoder])}
        if not steps.keys() & {"ByteLevel", "ByteFallback", "Metaspace"}:
            raise TokenizerError(
                f"{path}: decoder: expected ByteLevel, ByteFallback or Metaspace, found "
                f"{decoder['type']}; leave the file out to use the GGUF file's own tokenizer"
            )
        byte_level = "ByteLevel" in steps
        metaspace = steps.get("Metaspace", {"prepend_scheme": "never"})

        vocabulary = backend.get_vocab(with_added_tokens=True)
        size = max(vocabulary.values(), default=-1) + 1
        model_pieces = metadata.get("tokenizer.ggml.tokens", ())
        pieces = [""] * max(size, len(model_pieces))  # ids that the file lacks print nothing
        types = [int(TokenType.NORMAL)] * len(pieces)
        for piece, id in vocabulary.items():
            pieces[id] = piece
            if not byte_level and _BYTE_PIECE.fullmatch(piece):
                types[id] = int(TokenType.BYTE)
        for id, token in backend.get_added_tokens_decoder().items():
            control = token.special or token.content in _END_PIECES
            types[id] = int(TokenType.CONTROL if control else TokenType.USER_DEFINED)
        same = sum(map(operator.eq, pieces, model_pieces))
        if model_pieces and (size > len(model_pieces) or same < len(model_pieces) / 2):
            raise TokenizerError(
                f"{path}: expected the model's {len(model_pieces)} tokens, found {size}, "
                f"{same} of them the same; give the tokenizer.json of this model"
            )

        plain = backend.encode("a", add_special_tokens=False).ids
        first = backend.encode("a", add_special_tokens=True).ids[:1]
        adds_bos = first != plain[:1]
        return cls(
            backend,
            pieces,
            types,
            metadata=metadata,
            byte_level=byte_level,
            strip_space="Strip" in steps or metaspace["prepend_scheme"] != "never",
            add_bos=adds_bos,
            bos_token_id=first[0] if adds_bos else None,
            source=str(path),
        )

    def encode(
        self, text: str, *, add_bos: bool | None = None, parse_special: bool = True
    ) -> list[int]:
        """Turn text into token ids.

        A byte that a byte-level vocabulary has no token for is left out, as in `tokenizers` and
        llama.cpp; such are control characters that its training text did not have.

        Args:
            text: Any valid Unicode text.
            add_bos: Whether the ids begin with BOS; it is never doubled. None: `self.add_bos`.
            parse_special: Whether spellings such as "<|end|>" become their control tokens; when
                not, they are ordinary text. Tokens that the vocabulary's maker defined as text
                (type 4) are matched either way.
        Raises:
            TokenizerError: If the text has lone surrogates, or BOS is asked for and there is none.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"text: expected valid Unicode, found {text[error.start]!r} at {error.start}"
            ) from error
        backend = self._backend if parse_special else self._plain
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        if self.add_bos if add_bos is None else add_bos:
            if self.bos_token_id is None:
                raise TokenizerError("add_bos: this vocabulary has no BOS token; leave it out")
            if ids[:1] != [self.bos_token_id]:
                ids.insert(0, self.bos_token_id)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Turn token ids into text; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: Tokens of this vocabulary.
            skip_special: Whether control tokens print nothing, or their spelling.
        Raises:
            TokenizerError: If an id is out of range.
        """
        stream = TextStream(self.token_bytes if skip_special else self._spelling, self._strip_space)
        return "".join(map(stream.push, ids)) + stream.flush()

    def stream(self, *, strip_space: bool | None = None) -> TextStream:
        """Begin to turn ids into text one by one; the parts add up to what `decode` returns.

        Args:
            strip_space: Whether to drop the space that `encode` puts in front of a text. None:
                as `decode` does. False is for ids that continue a text.
        """
        strip = self._strip_space if strip_space is None else strip_space
        return TextStream(self.token_bytes, strip)

    def piece(self, id: int) -> str:
        """The vocabulary's spelling of a token, such as "▁Hello", "<0x0A>" or "Ġthe"."""
        return self._pieces[self._check(id)]

    def token_id(self, piece: str) -> int | None:
        """The token with exactly this spelling, or None."""
        id: int | None = self._backend.token_to_id(piece)
        return id

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token prints, perhaps a part of a character; none if it is control."""
        return b"" if self.is_control(id) else self._spelling(id)

    def is_control(self, id: int) -> bool:
        """Whether a token is a sign to the model, such as "<|end|>" or "<unk>", and not text."""
        return self._types[self._check(id)] in (TokenType.CONTROL, TokenType.UNKNOWN)

    def _spelling(self, id: int) -> bytes:
        piece, kind = self._pieces[self._check(id)], self._types[id]
        if kind == TokenType.BYTE:
            return bytes([int(piece[3:5], 16)])
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED):
            return piece.encode()
        if not self._byte_level:
            return piece.replace(_SPACE, " ").encode()
        try:
            return bytes(_BYTE_CHARACTERS[character] for character in piece)
        except KeyError:  # text that the byte alphabet cannot have made stands for itself
            return piece.encode()

    def _check(self, id: int) -> int:
        if not 0 <= id < self.vocab_size:
            raise TokenizerError(f"token id: expected 0 to {self.vocab_size - 1}, found {id}")
        return id


class TextStream:
    """Turns token ids into text as they come: whole characters only, each of them once."""

    def __init__(self, token_bytes: Callable[[int], bytes], strip_space: bool) -> None:
        """Read bytes with `token_bytes`; drop a space in front of them if `strip_space`."""
        self._token_bytes = token_bytes
        self._strip_space = strip_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that this token completes; "" while its last character is incomplete.

        Raises:
            TokenizerError: If the id is out of range.
        """
        data = self._token_bytes(id)
        if data and self._strip_space:
            data = data.removeprefix(b" ")
            self._strip_space = False
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an incomplete character, or ""."""
        return self._decoder.decode(b"", final=True)


def _sentencepiece(
    metadata: Mapping[str, Any], pieces: Sequence[str], types: Sequence[int], space_prefix: bool
) -> tokenizers.Tokenizer:
    """An encoder that spells spaces as "▁" and characters without a piece as bytes."""
    for piece, kind in zip(pieces, types, strict=True):
        if kind == TokenType.BYTE and not _BYTE_PIECE.fullmatch(piece):
            raise TokenizerError(
                f"tokenizer.ggml.tokens: expected a byte such as '<0x0A>', found {piece!r}"
            )
    unknown = _token_id(metadata, "unknown", len(pieces))
    scores = _array(metadata, "tokenizer.ggml.scores", len(pieces))
    merges = _sentencepiece_merges(pieces, types, scores)
    unk_token = None if unknown is None else pieces[unknown]
    backend = _bpe(pieces, merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True)
    # The normalizer sees each stretch of text between special tokens by itself, so every one of
    # them gets its own space in front, as in llama.cpp.
    prefix = [normalizers.Prepend(_SPACE)] if space_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    unescape = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(" ", 1, 0)] if space_prefix else []
    backend.decoder = decoders.Sequence([*unescape, *strip])
    return backend


def _byte_level(
    metadata: Mapping[str, Any], pieces: Sequence[str], pre: str
) -> tokenizers.Tokenizer:
    """An encoder that cuts text into words, as `pre` says, and merges the bytes of each."""
    if pre not in _PRE_TOKENIZERS:
        raise TokenizerError(
            f"tokenizer.ggml.pre: {pre!r} is not supported (supported: "
            f"{', '.join(sorted(_PRE_TOKENIZERS))}); give the model's tokenizer.json"
        )
    # Llama 3 looks a whole word up before it merges.
    backend = _bpe(pieces, _split_merges(metadata), ignore_merges=pre == "llama-bpe")
    splits = [pre_tokenizers.Split(Regex(r), "isolated") for r in _PRE_TOKENIZERS[pre]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend


def _without_special(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer, for text in which control tokens are not looked for.

    A second object, since the library keeps the choice in the object and threads may share it.
    The model behind both is one; added tokens get the same ids when added in the same order.
    """
    plain = tokenizers.Tokenizer(backend.model)
    plain.normalizer = backend.normalizer
    plain.pre_tokenizer = backend.pre_tokenizer
    added = sorted(backend.get_added_tokens_decoder().items())
    plain.add_tokens([token for _, token in added])
    plain.encode_special_tokens = True
    return plain


def _add_special_tokens(
    backend: tokenizers.Tokenizer, pieces: Sequence[str], types: Sequence[int], rstrip: bool = False
) -> None:
    """Let control, unknown and user-defined tokens be found in the text before it is split.

    Args:
        rstrip: Whether such a token swallows the whitespace after it, as in Phi-3's vocabulary,
            where only the tokens below do not. llama.cpp and tokenizer.json agree.
    """
    keep_space = {"<unk>", "<s>", "<|endoftext|>"} if rstrip else set(pieces)
    backend.add_tokens(
        [
            AddedToken(
                piece,
                rstrip=piece not in keep_space,
                normalized=False,
                special=kind != TokenType.USER_DEFINED,
            )
            for piece, kind in zip(pieces, types, strict=True)
            if kind in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
        ]
    )


def _sentencepiece_merges(
    pieces: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """The merges that make each piece of text from two others, the best score first.

    A vocabulary of SentencePiece has scores and no merges: it always joins the two neighbours
    whose union scores best. Of equal scores the longer left part goes first, which is what
    joining the leftmost neighbours first comes to in runs of one character. Only text can be
    merged, so that no text can spell a control token.
    """
    other = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.BYTE)
    ranked = {p: s for p, t, s in zip(pieces, types, scores, strict=True) if t not in other}
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


def _split_merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
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


def _vocabulary(metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Spellings, which differ, and types, by id."""
    key = "tokenizer.ggml.tokens"
    # llama.cpp's name for a token without a spelling
    pieces = [piece or f"[EMPTY_{id}]" for id, piece in enumerate(_strings(metadata, key))]
    ids: dict[str, int] = {}
    for id, piece in enumerate(pieces):
        if ids.setdefault(piece, id) != id:
            raise TokenizerError(f"{key}: {piece!r} has two ids, {ids[piece]} and {id}")
    types = [int(kind) for kind in _array(metadata, "tokenizer.ggml.token_type", len(pieces))]
    for piece in _END_PIECES & ids.keys():
        types[ids[piece]] = TokenType.CONTROL
    return pieces, types


def _token_id(metadata: Mapping[str, Any], name: str, vocab_size: int) -> int | None:
    """`tokenizer.ggml.<name>_token_id`, checked, or None."""
    key = f"tokenizer.ggml.{name}_token_id"
    if metadata.get(key) is None:
        return None
    id = _value(metadata, key, int)
    if not 0 <= id < vocab_size:
        raise TokenizerError(f"{key}: expected 0 to {vocab_size - 1}, found {id}")
    return id


def _value(metadata: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """One value of the metadata, of this type; an error if it is missing without a default."""
    value = metadata.get(key, default)
    if value is None:
        raise TokenizerError(f"{key}: missing from the file; give the model's tokenizer.json")
    if kind is int and isinstance(value, np.integer):
        value = int(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        name = "array" if kind is Collection else kind.__name__
        raise TokenizerError(f"{key}: expected {name}, found {value!r:.80}")
    return value


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    """An array of strings, every one valid Unicode."""
    strings: list[str] = _value(metadata, key, list)
    for value in strings:
        if not isinstance(value, str):
            raise TokenizerError(f"{key}: expected strings, found {value!r:.80}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(f"{key}: expected UTF-8, found {value!r:.80}") from error
    return strings


def _array(metadata: Mapping[str, Any], key: str, size: int) -> list[float]:
    """An array of one number a token."""
    values = _value(metadata, key, Collection)
    with suppress(TypeError, ValueError):
        array = np.asarray(values, dtype=np.float64)
        if array.shape == (size,) and np.isfinite(array).all():
            numbers: list[float] = array.tolist()
            return numbers
    raise TokenizerError(
        f"{key}: expected {size} finite numbers, one a token; found {len(values)} values"
    )
