"""The merges of a vocabulary: the pairs of tokens that make a token, in the order of joining."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from gguf.constants import TokenType

from phicore.errors import TokenizerError
from phicore.text.token_kinds import PADDING, VERBATIM
from phicore.text.tokenizer_keys import strings, tokenizer_advice

_KEY = "tokenizer.ggml.merges"
_MAX_PIECE_LENGTH = 256  # characters; splitting a piece takes time quadratic in its length


def merges_by_score(
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

    If the scores are a placeholder, the same number for most pieces, the file's merges are taken.

    Raises:
        TokenizerError: If a piece is too long, or the file does not say how text is split.
    """
    not_text = (*VERBATIM, TokenType.BYTE)
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
        if metadata.get(_KEY):
            listed = merges_of_file(metadata)
            check_merges(metadata, pieces, types, listed)
            return listed
        raise TokenizerError(
            f"tokenizer.ggml.scores: {count} of {len(merged)} tokens have the same score "
            f"{-alike:g}, a placeholder, so the file does not say how text is split; "
            f"{tokenizer_advice(metadata)}"
        )
    merges.sort(key=operator.itemgetter(0, 1))
    return [(piece[:-split], piece[-split:]) for _, split, piece in merges]


def check_merges(
    metadata: Mapping[str, Any],
    pieces: Sequence[str],
    types: Sequence[int],
    merges: Sequence[tuple[str, str]],
) -> None:
    """Check that merges produce at least half of the text tokens.

    Raises:
        TokenizerError: If they do not, which means that merges are missing from the file.
    """
    made, normal = {left + right for left, right in merges}, int(TokenType.NORMAL)
    words = [
        piece
        for piece, token_type in zip(pieces, types, strict=True)
        if token_type == normal
        and len(piece) > 1
        and not (piece[0] in "[<" and PADDING.fullmatch(piece))
    ]
    lost = sum(word not in made for word in words)
    if lost > max(1, len(words) // 2):
        raise TokenizerError(
            f"{_KEY}: {len(merges)} merges make none of {lost} of {len(words)} "
            f"tokens, so the file does not say how text is split; {tokenizer_advice(metadata)}"
        )


def merges_of_file(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Read `tokenizer.ggml.merges`, texts "left right", as pairs."""
    merges = []
    for merge in strings(metadata, _KEY):
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            raise TokenizerError(
                f"{_KEY}: expected two tokens and a space between, found {merge!r}"
            )
        merges.append((left, right))
    return merges
