"""What a draft model has read of sequences: data on the host."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import ReferenceType

from phicore.engine.cache import Cache
from phicore.engine.sequence import Sequence


@dataclass(eq=False)
class Text:
    """What the small model has read of a sequence.

    Attributes:
        sequence: The sequence.
        chance: How likely a guess is right.
        tokens: The tokens whose keys and values are in the cache.
        sure: The number of first tokens that are known to be those of the sequence.
        is_long: Whether the keys are rotated by LongRoPE's long factors.
        cache: The cache, while it is not a row of the batch; None if there is none.
    """

    sequence: ReferenceType[Sequence]
    chance: float
    tokens: list[int]
    sure: int = 0
    is_long: bool = False
    cache: Cache | None = None

    @property
    def is_live(self) -> bool:
        """Return whether the sequence goes on."""
        sequence = self.sequence()
        return sequence is not None and sequence.finish_reason is None

    def follow(self, sequence: Sequence) -> None:
        """Forget the tokens that are not those of the sequence, and its last, which must be run."""
        length = length_of(sequence)
        most = min(len(self.tokens), length - 1)
        while self.sure < most and self.tokens[self.sure] == token_at(sequence, self.sure):
            self.sure += 1
        self.sure = min(self.sure, most)
        del self.tokens[self.sure :]


def length_of(sequence: Sequence) -> int:
    """Return the number of tokens of a sequence that the host has read."""
    return len(sequence.request.prompt_ids) + len(sequence.answer)


def token_at(sequence: Sequence, index: int) -> int:
    """Return a token of a sequence."""
    prompt = sequence.request.prompt_ids
    return prompt[index] if index < len(prompt) else sequence.answer[index - len(prompt)]


def tokens_from(sequence: Sequence, start: int) -> list[int]:
    """Return the tokens of a sequence from an index on."""
    return [token_at(sequence, index) for index in range(start, length_of(sequence))]


def lacks(text: Text, sequence: Sequence) -> int:
    """Return how many tokens of a sequence the small model has yet to read."""
    return length_of(sequence) - len(text.tokens)
