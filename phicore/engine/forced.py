"""Drafts of the tokens that a constraint forces, such as the names of a schema's properties."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from weakref import WeakKeyDictionary

from phicore.engine.drafts import NEWEST, Draft, Drafter
from phicore.engine.sequence import Sequence, SequenceError
from phicore.errors import FAULTS, as_error


class Forced(Drafter):
    """Guesses the tokens that logits processors force; where they force none, asks another drafter.

    A constraint forces bytes, and the model decides which tokens spell them. The tokenizer's own
    tokens are the guess, which is right for nearly all of them: so its chance is 1, until an answer
    shows that it is spelled in another way.
    """

    def __init__(self, otherwise: Drafter) -> None:
        """Take the drafter that guesses where nothing is forced."""
        self.otherwise = otherwise
        self._chances: WeakKeyDictionary[Sequence, float] = WeakKeyDictionary()
        self._is_forced: WeakKeyDictionary[Sequence, bool] = WeakKeyDictionary()

    def draft(self, sequences: Tokens[Sequence], most: int) -> list[Draft]:
        found = {s: Draft(_forced(s)[:most], self._chances.get(s, 1.0)) for s in sequences}
        self._is_forced.update({s: bool(draft.tokens) for s, draft in found.items()})
        others = [sequence for sequence in sequences if not found[sequence].tokens]
        if others:
            found.update(zip(others, self.otherwise.draft(others, most), strict=True))
        return [found[sequence] for sequence in sequences]

    def checked(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        if not self._is_forced.get(sequence, False):
            self.otherwise.checked(sequence, drafted, accepted)
            return
        chance = self._chances.get(sequence, 1.0)
        for is_right in [True] * accepted + [False] * (drafted > accepted):
            chance += NEWEST * (is_right - chance)
        self._chances[sequence] = chance


def _forced(sequence: Sequence) -> tuple[int, ...]:
    """Return the tokens that the first logits processor forces that forces some."""
    try:
        found = (processor.forced() for processor in sequence.processors)
        return next((tuple(tokens) for tokens in found if len(tokens)), ())
    except FAULTS as error:  # a processor may raise anything
        raise SequenceError(sequence, as_error(error)) from error
