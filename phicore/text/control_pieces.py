"""Spellings of control tokens in a text, and how a text is kept free of control tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import tokenizers
from tokenizers import AddedToken, normalizers

# A noncharacter, which Unicode sets aside for use inside of a program.
_MARK = "\ufdd0"
_BREAK = f"{_MARK}."  # comes after the first character of a spelling, and breaks it


class ControlPieces:
    """The spellings of a vocabulary's control tokens.

    Attributes:
        ids: The ids of the control tokens, by spelling.
    """

    def __init__(self, ids: Mapping[str, int]) -> None:
        self.ids = {piece: id for piece, id in ids.items() if piece}
        longest_first = sorted(self.ids, key=len, reverse=True)
        spelling = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._spelling = re.compile(spelling)
        # A spelling of one character cannot be broken, so another name stands for it.
        single = [_MARK, *(piece for piece in longest_first if len(piece) == 1)]
        self._names = {character: f"{_MARK}{n}." for n, character in enumerate(single)}
        characters = "".join(map(re.escape, single))
        self._to_escape = re.compile(f"[{characters}]|(?={spelling}).", re.DOTALL)

    def found_in(self, text: str) -> list[str]:
        """Return the spellings that are in a text, in the text's order."""
        return self._spelling.findall(text)

    def escape(self, text: str) -> str:
        """Return the text with a mark in each spelling. A tokenizer of `unescaping` removes it."""
        return self._to_escape.sub(
            lambda found: self._names.get(found[0], found[0] + _BREAK),
            text,
        )

    def escape_parts(self, texts: Sequence[str]) -> list[str]:
        """Escape texts that may be joined, so that no spelling lies across their borders."""
        escaped = []
        for number, text in enumerate(texts):
            before, after = "".join(texts[: number + 1]), "".join(texts[number + 1 :])
            is_across = any(
                before.endswith(piece[:cut]) and after.startswith(piece[cut:])
                for piece in self.ids
                for cut in range(1, len(piece))
            )
            escaped.append(self.escape(text) + (_BREAK if is_across else ""))
        return escaped

    def escape_marks(self, text: str) -> str:
        """Return the text so that `unescaping` gives it back, its control tokens included."""
        return text.replace(_MARK, self._names[_MARK])

    def unescaping(self, backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
        """Return a tokenizer that takes marks away after it has looked for control tokens.

        It shares its model with `backend`. Added tokens get the same ids, since they are added in
        the same order.
        """
        copy = tokenizers.Tokenizer(backend.model)
        # The first name stands for the mark itself, so it is replaced last.
        names = [*self._names.items()][::-1]
        steps = [normalizers.Replace(_BREAK, "")]
        steps += [normalizers.Replace(name, character) for character, name in names]
        copy.normalizer = normalizers.Sequence(
            steps if backend.normalizer is None else [*steps, backend.normalizer]
        )
        copy.pre_tokenizer = backend.pre_tokenizer
        added = sorted(backend.get_added_tokens_decoder().items())
        copy.add_tokens([self._before_normalizing(token) for _, token in added])
        return copy

    def _before_normalizing(self, token: AddedToken) -> AddedToken:
        return AddedToken(
            token.content,
            single_word=token.single_word,
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            normalized=token.normalized and token.content not in self.ids,
            special=token.special,
        )
