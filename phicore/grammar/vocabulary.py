"""The tokens of a model, as llguidance needs them, and the check of constraints against them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from phicore.errors import ArgumentError
from phicore.extras import library
from phicore.grammar.constraints import Constraint, in_a_line
from phicore.text.tokenizer import Tokenizer

SEPARATOR = "\x02"
LIMITS = {"initial_lexer_fuel": 500_000, "step_lexer_fuel": 100_000, "max_lexer_states": 50_000}
"""What llguidance may do for a constraint: half of its own limits, a fifth of the states."""
STACK_BYTES = 512 * 2**20
"""The stack of the thread that builds grammars. llguidance follows references and rules by calling
itself, and a stack that overflows ends the process; this one holds more levels than the longest
text that `MOST_TEXT` of constraints.py allows. Only what is used of it takes memory."""
MOST_KEPT = 4
"""The number of constraints that are kept."""


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
        self._limits = llguidance.LLParserLimits(**LIMITS)
        self._kept: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, constraint: Constraint) -> None:
        """Check that a constraint can be honoured.

        Raises:
            ArgumentError: If it cannot, with the library's reason. A part of a schema that the
                library would leave out counts, too.
        """
        matcher = self.matcher(constraint)
        reasons = [matcher.get_error()] if matcher.is_error() else matcher.get_grammar_warnings()
        if not reasons:
            matcher.compute_bitmask()  # some are found to be too complex only here
            reasons = [matcher.get_error()] if matcher.is_error() else []
        if reasons:
            raise ArgumentError(in_a_line(reasons[0]), parameter=constraint.name)

    def matcher(self, constraint: Constraint) -> Any:
        """Return a new `llguidance.LLMatcher`, which follows one answer."""
        with self._lock:
            found = self._kept.get(constraint.grammar)
        if found is None:
            found = with_large_stack(lambda: self._made(constraint.grammar))
        with self._lock:
            self._kept[constraint.grammar] = found
            self._kept.move_to_end(constraint.grammar)
            if len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
            return found.deep_copy()  # which takes a few microseconds

    def _made(self, grammar: str) -> Any:
        return self._matcher(self._tokens, grammar, log_level=0, limits=self._limits)


_STARTING = threading.Lock()


def with_large_stack(function: Callable[[], Any]) -> Any:
    """Call a function in a thread whose stack has `STACK_BYTES`; return its result.

    Raises:
        BaseException: What the function raises.
    """
    results: list[Any] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as error:  # noqa: BLE001 - it is raised again
            errors.append(error)

    with _STARTING:  # the size is that of all threads that start meanwhile, which does no harm
        before = threading.stack_size(STACK_BYTES)
        try:
            thread = threading.Thread(target=call, name="phicore-grammar")
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


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
