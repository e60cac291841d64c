"""The logits processor that forbids every token that a constraint does not allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from phicore.backend import Array, Backend
from phicore.errors import PhicoreError
from phicore.grammar.constraints import Constraint, in_a_line
from phicore.grammar.vocabulary import Vocabulary
from phicore.network.processors import LogitsProcessor

BITS = 8


class AllowedTokens(LogitsProcessor):
    """Forbids the tokens that a constraint does not allow.

    The state is one bit for each token, `mask` (V / 8,) uint8, the first token in the lowest bit.
    """

    def __init__(self, vocabulary: Vocabulary, constraint: Constraint) -> None:
        """Prepare to constrain an answer.

        Raises:
            ArgumentError: If the constraint cannot be honoured.
        """
        vocabulary.check(constraint)
        self._vocabulary = vocabulary
        self._constraint = constraint

    def start(self, prompt: Sequence[int], vocab_size: int) -> Mapping[str, np.ndarray]:
        self._matcher = self._vocabulary.matcher(self._constraint)
        # The library writes whole words, and knows no tokens beyond the tokenizer's.
        self._words = np.zeros(-(-self._vocabulary.size // 32), np.int32)
        self._bytes = -(-vocab_size // BITS)
        self._known: list[tuple[int, Mapping[str, np.ndarray]]] = []
        return self._allowed(self._matcher)

    def update(self, token: int) -> Mapping[str, np.ndarray]:
        if token in self._vocabulary.ends:
            return {}  # no token comes after it
        self._matcher.consume_token(token)
        if self._known and self._known[0][0] == token:
            return self._known.pop(0)[1]
        self._known = []
        return self._allowed(self._matcher)

    def ahead(self, tokens: Sequence[int]) -> Sequence[Mapping[str, np.ndarray]]:
        matcher, self._known = self._matcher.deep_copy(), []  # which takes a few microseconds
        for token in tokens:
            if token in self._vocabulary.ends:
                self._known += [(token, {})] if matcher.is_accepting() else []
                break
            if not 0 <= token < self._vocabulary.size or not matcher.consume_token(token):
                break
            state = self._allowed(matcher)
            if matcher.is_error():  # too complex; the answer may never come here
                break
            self._known.append((token, state))
        return [state for _, state in self._known]

    def forced(self) -> Sequence[int]:
        found: list[int] = self._matcher.compute_ff_tokens()
        return found

    @classmethod
    def neutral(cls, vocab_size: int) -> Mapping[str, np.ndarray]:
        return {"mask": np.full(-(-vocab_size // BITS), 2**BITS - 1, np.uint8)}

    def _allowed(self, matcher: Any) -> Mapping[str, np.ndarray]:
        if matcher.is_error():
            reason = in_a_line(matcher.get_error())
            raise PhicoreError(f"{self._constraint.name}: {reason}")
        matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        mask = np.zeros(self._bytes, np.uint8)
        known = self._words.view(np.uint8)[: self._bytes]
        mask[: len(known)] = known
        return {"mask": mask}

    @classmethod
    def apply(cls, ops: Backend, logits: Array, state: Mapping[str, Array]) -> Array:
        xp = ops.xp
        left, bits = xp.astype(state["mask"], xp.int32), []
        for power in reversed(range(BITS)):  # without shifts, which the protocol does not have
            is_set = xp.astype(left >= 2**power, xp.int32)
            left = left - is_set * 2**power
            bits.append(is_set[:, :, None])
        allowed = xp.concat(bits[::-1], axis=2)  # (B, V / 8, 8)
        allowed = xp.reshape(allowed, (allowed.shape[0], -1))[:, : logits.shape[1]]
        return xp.where(allowed > 0, logits, -float("inf"))
