"""Tokenizers, which turn text into token ids and back.

A tokenizer is built from the metadata of a GGUF file or from a tokenizer.json. The `tokenizers`
library splits and merges text; `vocabulary.py` translates a GGUF file for it. This module adds the
tokens that begin and end a text, and turns ids back into text as they are generated.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from gguf.constants import TokenType

from phicore.errors import TokenizerError
from phicore.text.control_pieces import ControlPieces
from phicore.text.pre_tokenizers import PRE_TOKENIZERS, recognized
from phicore.text.token_kinds import BYTE_PIECE, END_PIECES
from phicore.text.tokenizer_json import check_pieces, library_errors, read_json
from phicore.text.tokenizer_keys import (
    metadata_value,
    special_token_id,
    special_token_ids,
    tokenizer_advice,
)
from phicore.text.vocabulary import (
    SENTENCEPIECE_IDS,
    byte_level_backend,
    is_phi3_vocabulary,
    piece_bytes,
    read_pieces,
    required_pieces,
    sentencepiece_backend,
)

LONG = 10_000
"""A text of this many characters is long: to split it takes some 30 ms."""
_END_NAMES = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")


class Tokenizer:
    """A vocabulary, and the rules that split text into its tokens.

    Make a tokenizer with `of`, `from_gguf` or `from_file`. Its methods do not change it, so threads
    can share it.

    Attributes:
        vocab_size: The number of ids, V; every id is in [0, V).
        add_bos: Whether `encode` puts the BOS token in front by default.
        bos_token_id: The token that begins a text, or None.
        eos_token_id: The token that ends a text, or None.
        end_token_ids: Every token that ends a generation.
        is_phi3: Whether this is Phi-3's vocabulary.
        source: The source of the rules: "GGUF (llama)", "GGUF (gpt2, smollm)" or a path. If a
            tokenizer.json was found but could not be used, this gives the reason, too.
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
        """Make a tokenizer from its parts.

        Args:
            backend: The encoder, whose special tokens are the control tokens.
            pieces: The V spellings, by id.
            types: The V values of `gguf.TokenType`, by id.
            metadata: The GGUF metadata, for the ids of special tokens.
            byte_level: Whether pieces spell bytes as GPT-2 does. False means that they spell spaces
                as SentencePiece does.
            strip_space: Whether `encode` puts a space in front, so that `decode` removes one.
            add_bos: The value of `add_bos` if the metadata has none.
            bos_token_id: The BOS token if the metadata names none.
            source: The source of the rules, for the attribute.
        Raises:
            TokenizerError: If a special id is not an id, or BOS is wanted and there is none.
        """
        self._backend = backend
        self._pieces = pieces
        self._types = types
        self._byte_level = byte_level
        self._strip_space = strip_space
        self.vocab_size = len(pieces)
        self.is_phi3 = is_phi3_vocabulary(metadata, pieces)
        self.source = source
        names = ("bos", *_END_NAMES)
        ids = {name: special_token_id(metadata, name, self.vocab_size) for name in names}
        self.bos_token_id = bos_token_id if ids["bos"] is None else ids["bos"]
        self.eos_token_id = ids["eos"]
        ends = [ids[name] for name in _END_NAMES] + [self.token_id(piece) for piece in END_PIECES]
        ends += special_token_ids(metadata, "eos", self.vocab_size)
        self.end_token_ids = frozenset(id for id in ends if id is not None)
        self.add_bos = metadata_value(metadata, "tokenizer.ggml.add_bos_token", bool, add_bos)
        if self.add_bos and self.bos_token_id is None:
            raise TokenizerError(
                "tokenizer.ggml.bos_token_id: expected an id, since the model wants a BOS token "
                "in front of a text; found none"
            )

    @classmethod
    def of(
        cls, path: Path | None, metadata: Mapping[str, Any], *, explicit: bool = False
    ) -> Tokenizer:
        """Make a model's tokenizer from its tokenizer.json or, if it has none, from the GGUF file.

        Args:
            path: The tokenizer.json, or None.
            metadata: The GGUF metadata.
            explicit: Whether the user named the tokenizer.json. If it was only found and cannot be
                used, the GGUF file's own tokenizer is taken, and `source` gives the reason.
        Raises:
            TokenizerError: If `from_file` or `from_gguf` raises it.
        """
        if path is None:
            return cls.from_gguf(metadata)
        try:
            return cls.from_file(path, metadata)
        except TokenizerError as error:
            if explicit:
                advice = "give the model's own, or none to use the GGUF file's tokenizer"
                raise TokenizerError(f"{error}; {advice}") from error
            try:
                tokenizer = cls.from_gguf(metadata)
            except TokenizerError as own:
                raise TokenizerError(
                    f"{own}; the one that was found is of no use: {error}"
                ) from own
            tokenizer.source += f" instead of {error}"
            return tokenizer

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Make the tokenizer that a GGUF file describes.

        Args:
            metadata: The values by GGUF key. Arrays of numbers may be lists or NumPy arrays.
        Raises:
            TokenizerError: If a key is missing, contradicts other keys, or names a kind of
                tokenizer that phicore does not have.
        """
        model = metadata_value(metadata, "tokenizer.ggml.model", str)
        if model not in ("llama", "gpt2"):
            raise TokenizerError(
                f"tokenizer.ggml.model: {model!r} is not supported (supported: gpt2, llama); "
                f"{tokenizer_advice(metadata)}"
            )
        pieces, types = read_pieces(metadata)
        is_llama = model == "llama"
        pre = metadata_value(metadata, "tokenizer.ggml.pre", str, recognized(pieces) or "")
        if not pre and not is_llama:
            raise TokenizerError(
                "tokenizer.ggml.pre: missing, so the file does not say where text is cut; "
                f"{tokenizer_advice(metadata)}"
            )
        if is_llama:
            metadata = SENTENCEPIECE_IDS | dict(metadata)
            space_prefix = metadata_value(metadata, "tokenizer.ggml.add_space_prefix", bool, True)
            backend = sentencepiece_backend(metadata, pieces, types, space_prefix)
        else:
            space_prefix = False
            backend = byte_level_backend(metadata, pieces, types, pre)
        return cls(
            backend,
            pieces,
            types,
            metadata=metadata,
            byte_level=not is_llama,
            strip_space=space_prefix,
            add_bos=is_llama or PRE_TOKENIZERS[pre].adds_bos,
            source="GGUF (llama)" if is_llama else f"GGUF (gpt2, {pre})",
        )

    @classmethod
    def from_file(cls, path: Path, metadata: Mapping[str, Any]) -> Tokenizer:
        """Make a tokenizer from a Hugging Face tokenizer.json for the model of `metadata`.

        The file says how text is split. The metadata says which tokens begin and end a text.

        Raises:
            TokenizerError: If the file cannot be read, has other tokens than the model, or has
                tokens that cannot be printed one by one.
        """
        with library_errors(f"{path}: not a tokenizer.json"):
            return cls._from_file(path, metadata)

    @classmethod
    def _from_file(cls, path: Path, metadata: Mapping[str, Any]) -> Tokenizer:
        backend = read_json(path)
        decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {"type": None}
        steps = {step["type"]: step for step in decoder.get("decoders", [decoder])}
        if not steps.keys() & {"ByteLevel", "ByteFallback", "Metaspace"}:
            raise TokenizerError(
                f"{path}: decoder: expected ByteLevel, ByteFallback or Metaspace, found "
                f"{decoder['type']}"
            )
        byte_level = "ByteLevel" in steps
        metaspace = steps.get("Metaspace", {"prepend_scheme": "never"})

        vocabulary = backend.get_vocab(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        required = required_pieces(metadata)
        check_pieces(path, vocabulary, added, required)
        # Ids that the file lacks print nothing.
        pieces = [""] * max(len(required), *(id + 1 for id in vocabulary.values()), 0)
        types = [int(TokenType.NORMAL)] * len(pieces)
        for piece, id in vocabulary.items():
            pieces[id] = piece
            if not byte_level and BYTE_PIECE.fullmatch(piece):
                types[id] = int(TokenType.BYTE)
        for id, token in added.items():
            control = token.special or token.content in END_PIECES
            types[id] = int(TokenType.CONTROL if control else TokenType.USER_DEFINED)

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
        self,
        text: str,
        *,
        add_bos: bool | None = None,
        parse_special: bool = True,
        escaped: bool = False,
    ) -> list[int]:
        """Turn text into token ids.

        If a byte-level vocabulary has no token for a byte, the byte is dropped, as in `tokenizers`
        and llama.cpp. This concerns control characters that the training text did not have.

        Args:
            text: Any valid Unicode text.
            add_bos: Whether the ids begin with BOS, which is never doubled. None takes
                `self.add_bos`.
            parse_special: Whether spellings such as "<|end|>" become control tokens. If False, they
                are ordinary text. User-defined tokens (type 4) are matched in both cases.
            escaped: Whether `text` has parts that `escape` returned. These become ordinary text.
        Raises:
            TokenizerError: If the text has lone surrogates, if BOS is requested and there is none,
                or if the rules of the tokenizer.json fail on the text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"text: expected valid Unicode, found {text[error.start]!r} at {error.start}"
            ) from error
        if not parse_special:
            text = self.escape(text)
        backend = self._backend if parse_special and not escaped else self._unescaping
        with library_errors(f"text: {self.source} cannot split it"):
            ids = _encoded(backend, text)
        if self.add_bos if add_bos is None else add_bos:
            if self.bos_token_id is None:
                raise TokenizerError("add_bos: this vocabulary has no BOS token; leave it out")
            if ids[:1] != [self.bos_token_id]:
                ids.insert(0, self.bos_token_id)
        return ids

    def escape(self, text: str) -> str:
        """Return the text with a mark in each spelling of a control token.

        `encode(..., escaped=True)` removes the marks, and so reads the spellings as ordinary text.
        A prompt can thus have control tokens around a text of unknown origin, but none in it.
        """
        return self._control.escape(text)

    def escape_parts(self, texts: Sequence[str]) -> list[str]:
        """Escape texts that may be joined, so that no control token lies across their borders."""
        return self._control.escape_parts(texts)

    def escape_marks(self, text: str) -> str:
        """Return a text for `encode(..., escaped=True)` whose control tokens stay such."""
        return self._control.escape_marks(text)

    def control_tokens_in(self, text: str) -> list[int]:
        """Return the control tokens whose spellings are in the text, in the text's order."""
        return [self._control.ids[piece] for piece in self._control.found_in(text)]

    @cached_property
    def _control(self) -> ControlPieces:
        ids = range(self.vocab_size)
        return ControlPieces({self._pieces[id]: id for id in ids if self.is_control(id)})

    @cached_property
    def _unescaping(self) -> tokenizers.Tokenizer:
        return self._control.unescaping(self._backend)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Turn token ids into text. Bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: Tokens of this vocabulary.
            skip_special: Whether control tokens print nothing. If False, they print their spelling.
        Raises:
            TokenizerError: If an id is out of range.
        """
        stream = TextStream(self.token_bytes if skip_special else self.spelled, self._strip_space)
        return "".join(map(stream.push, ids)) + stream.flush()

    def stream(self, *, strip_space: bool | None = None, shown: Collection[str] = ()) -> TextStream:
        """Return a stream that turns ids into text one by one.

        By default, its parts join to the text that `decode` returns.

        Args:
            strip_space: Whether to drop the space that `encode` puts in front of a text. None drops
                it if `encode` adds one, as `decode` does. Use False for ids that continue a text.
            shown: Spellings of control tokens that are printed as they are spelled.
        """
        strip = self._strip_space if strip_space is None else strip_space
        ids = {self._control.ids[piece] for piece in shown if piece in self._control.ids}

        def spelled(id: int) -> bytes:
            return self.spelled(id) if id in ids else self.token_bytes(id)

        return TextStream(spelled if ids else self.token_bytes, strip)

    def control_id(self, piece: str) -> int | None:
        """Return the control token with exactly this spelling, or None."""
        return self._control.ids.get(piece)

    def piece(self, id: int) -> str:
        """Return the vocabulary's spelling of a token, such as "▁Hello", "<0x0A>" or "Ġthe"."""
        return self._pieces[self._check(id)]

    def difference(self, other: Tokenizer) -> str | None:
        """Return in words how the tokens of another vocabulary differ; None if they are the same.

        Compared are the spellings and their ids, as the files have them.
        """
        for id, (piece, found) in enumerate(zip(self._pieces, other._pieces, strict=False)):
            if piece != found:
                return f"token {id} is {found!r:.40} instead of {piece!r:.40}"
        if self.vocab_size != other.vocab_size:
            return f"it has {other.vocab_size} tokens instead of {self.vocab_size}"
        return None

    def token_id(self, piece: str) -> int | None:
        """Return the token with exactly this spelling, or None."""
        return self._backend.token_to_id(piece)

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes that a token prints.

        They may be part of a character. A control token prints nothing.
        """
        return b"" if self.is_control(id) else self.spelled(id)

    def is_control(self, id: int) -> bool:
        """Return whether a token is a control token, such as "<|end|>" or "<unk>", and not text."""
        return self._types[self._check(id)] in (TokenType.CONTROL, TokenType.UNKNOWN)

    def spelled(self, id: int) -> bytes:
        """Return the bytes of a token's spelling. That of a control token is never printed."""
        piece = self._pieces[self._check(id)]
        return piece_bytes(piece, self._types[id], byte_level=self._byte_level)

    def _check(self, id: int) -> int:
        if not 0 <= id < self.vocab_size:
            raise TokenizerError(f"token id: expected 0 to {self.vocab_size - 1}, found {id}")
        return id


def _encoded(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    """Return the ids of a text. While a long one is split, other threads go on."""
    if len(text) < LONG:
        return backend.encode(text, add_special_tokens=False).ids
    # Unlike `encode`, this releases Python's lock, and it computes no offsets.
    return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids


class TextStream:
    """Turns token ids into text one by one. It returns only complete characters, each once."""

    def __init__(self, token_bytes: Callable[[int], bytes], strip_space: bool) -> None:
        """Make a stream.

        Args:
            token_bytes: Returns the bytes of a token.
            strip_space: Whether to drop a space at the start of the text.
        """
        self._token_bytes = token_bytes
        self._strip_space = strip_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """Return the text that this token completes, which may be "".

        The bytes of an incomplete last character are held back.

        Raises:
            TokenizerError: If the id is out of range.
        """
        data = self._token_bytes(id)
        if data and self._strip_space:
            data = data.removeprefix(b" ")
            self._strip_space = False
        return self._decoder.decode(data)

    def flush(self) -> str:
        """Return the rest of the text: U+FFFD for an incomplete character, or ""."""
        return self._decoder.decode(b"", final=True)
