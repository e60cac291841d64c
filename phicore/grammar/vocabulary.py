"""The tokens of a model, as llguidance needs them, and the check of constraints against them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from phicore.errors import ArgumentError
from phicore.extras import library
from phicore.grammar.constraints import Constraint, in_a_line
from phicore.text.tokenizer import Tokenizer

SEPARATOR = "\x02"


class Vocabulary:
    """The tokens of a model. It is made once, which takes about 0.2 s for 50,000 tokens.

    Attributes:
        size: The number of tokens that the tokenizer has.
        ends: The tokens that may end an answer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Take a tokenizer's tokens.

        Raises:
            ArgumentError: If the tokenizer has no token that ends an answer.
        """
        llguidance = library("llguidance", "json_schema, regex and grammar")
        self.ends = tokenizer.end_token_ids
        if not self.ends:
            raise ArgumentError("the model has no end token, so no grammar could end an answer")
        ids = range(tokenizer.vocab_size)
        wrapper = llguidance.TokenizerWrapper(_Tokens(tokenizer, ids))
        self.size = tokenizer.vocab_size
        self._tokens = llguidance.LLTokenizer(wrapper, eos_token=sorted(self.ends))
        self._matcher = llguidance.LLMatcher

    def check(self, constraint: Constraint) -> None:
        """Check that a constraint can be honoured.

        Raises:
            ArgumentError: If it cannot, with the library's reason. A part of a schema that the
                library would leave out counts, too.
        """
        check = self._matcher.validate_grammar_with_warnings
        _, reasons = check(constraint.grammar, self._tokens)
        if reasons:
            raise ArgumentError(in_a_line(reasons[0]), parameter=constraint.name)

    def matcher(self, constraint: Constraint) -> Any:
        """Return a new `llguidance.LLMatcher`, which follows one answer."""
        return self._matcher(self._tokens, constraint.grammar, log_level=0)


class _Tokens:
    """A tokenizer with the names that llguidance expects."""

    def __init__(self, tokenizer: Tokenizer, ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = min(tokenizer.end_token_ids)
        self.bos_token_id = tokenizer.bos_token_id
        self.tokens = [tokenizer.spelled(id) for id in ids]
        self.special_token_ids = [id for id in ids if tokenizer.is_control(id)]

    def __call__(self, text: bytes) -> list[int]:
        """Return the tokens of a text that continues another one.

        Some tokenizers put a space in front of a text, so a character comes first that is no part
        of longer tokens, and its tokens are taken off again.
        """
        before = self._encode(SEPARATOR)
        tokens = self._encode(SEPARATOR + text.decode("utf-8", "replace"))
        return tokens[len(before) :] if tokens[: len(before)] == before else []

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_bos=False, parse_special=False)
