"""Drafts: guesses of the next tokens, which a step checks all at once.

A draft changes how fast a text comes and never which text comes. The sampled token is a function of
the tokens before it, of the seed and of its index in the answer. A step that runs the last token
and a draft of k tokens samples k + 1 tokens, each as if the draft before it were the text. Up to
the first token that differs from the draft it is the text, this token included.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from phicore.engine.sequence import Sequence
from phicore.network.sampling import Sampling

PADDING = -1
"""Comes after a draft that is shorter than its step. No sampled token is equal to it."""
LENGTHS = (3, 2)
"""The lengths of the n-grams that are looked up, the best first."""
KINDS = (4, 8, 16)
"""Matches of fewer tokens than each of these, or of at least the last, have their own hit rate."""
FIRST_CHANCES = (0.3, 0.6, 0.8, 0.9)
"""The hit rates of these kinds before anything is known of a text."""
PREDICTED = 8
"""The beginning of a prediction counts as a match of this many tokens."""
NEWEST = 0.1
"""The weight of the newest token in a hit rate."""


@dataclass(frozen=True)
class Draft:
    """A guess of the next tokens of a sequence.

    Attributes:
        tokens: The tokens; none if there is no guess.
        chance: About how likely each token is right if those before it are, 0 to 1.
    """

    tokens: tuple[int, ...] = ()
    chance: float = 0.0

    @property
    def length(self) -> int:
        """Return the number of tokens."""
        return len(self.tokens)


NO_DRAFT = Draft()


class Outlook(NamedTuple):
    """What is known of a draft before it is made.

    Attributes:
        length: The number of tokens that it can have.
        chance: About how likely each token is right if those before it are, 0 to 1.
    """

    length: int
    chance: float


@dataclass(frozen=True)
class Plan:
    """A way to draft, which the engine takes if it is expected to pay.

    Attributes:
        outlooks: What the draft of each sequence is like. A sequence without a draft may be
            missing.
        make: Makes the drafts, of up to the given number of tokens. Sequences may be missing.
        token_s: The time in seconds that each token of the drafts takes, for all sequences
            together.
    """

    outlooks: Mapping[Sequence, Draft | Outlook]
    make: Callable[[int], Mapping[Sequence, Draft]]
    token_s: float = 0.0


NO_PLAN = Plan({}, lambda _: {})


class Drafter(ABC):
    """Guesses the next tokens of sequences.

    One object serves all sequences of an engine, so that a drafter with a network of its own can
    compute many at a time. It may keep what it likes for a sequence, by weak reference. It must
    depend on nothing but what it is told, and may be wrong as often as it likes.

    Attributes:
        slot_bytes: The number of bytes that the drafter keeps for each token that the engine's
            caches have room for.
    """

    slot_bytes = 0

    @property
    def compiled_bytes(self) -> int:
        """Return about how much memory compiled functions take."""
        return 0

    @abstractmethod
    def draft(self, sequences: Tokens[Sequence], most: int) -> list[Draft]:
        """Guess what comes after the tokens of sequences that the host has read.

        It is called before each step in which a draft could be checked, so it must be quick when
        nothing is to be guessed.

        Args:
            sequences: The sequences.
            most: The largest number of tokens of a draft.
        Returns:
            The draft of each sequence.
        """

    def plans(self, sequences: Tokens[Sequence], most: int) -> list[Plan]:
        """Return ways to draft, of which the engine takes the one that gains most, if any does.

        A drafter whose drafts take time overrides this, and makes them only when they are wanted.
        The arguments are those of `draft`.
        """
        drafts = dict(zip(sequences, self.draft(sequences, most), strict=True))
        return [Plan(drafts, lambda _: drafts)]

    def warm_up(self, sizes: Tokens[int], samplings: Tokens[Sampling]) -> None:  # noqa: B027
        """Compile what drafts for batches of these sizes and for these parameters need."""

    def checked(self, sequence: Sequence, drafted: int, accepted: int) -> None:  # noqa: B027
        """Take note of how many tokens of a draft of a sequence were checked, and were right."""


class NGrams(Drafter):
    """Guesses that a text goes on as it did after the same two or three tokens before.

    What a request predicts is guessed from the beginning of the answer on, and counts as a part of
    the text.

    Source: Saxena, "Prompt Lookup Decoding" (2023), github.com/apoorvumang/prompt-lookup-decoding.
    """

    def __init__(self) -> None:
        self._matches: WeakKeyDictionary[Sequence, Match] = WeakKeyDictionary()

    def draft(self, sequences: Tokens[Sequence], most: int) -> list[Draft]:
        return [self._match(sequence).draft(most) for sequence in sequences]

    def _match(self, sequence: Sequence) -> Match:
        """Return the match of a sequence, up to date."""
        match = self._matches.get(sequence)
        if match is None:
            request = sequence.request
            match = self._matches[sequence] = Match(request.prompt_ids, request.prediction)
        match.extend(sequence.answer[len(match.tokens) - match.given :])
        return match


class Match:
    """Where the end of a text was before, and how often the text then went on the same way.

    A token costs the same however long the text is: the place after each n-gram is in a table. An
    old match is followed as long as the text goes on as it did there, since a long match is better
    than a recent one. Each token tells whether the match was right, whether or not a draft was made
    of it. So hit rates are known without a draft that fails.

    Attributes:
        tokens: The tokens of the text. What is predicted comes after the prompt.
        given: The number of tokens of the prompt and the prediction.
    """

    def __init__(self, prompt: Iterable[int] = (), prediction: Iterable[int] = ()) -> None:
        """Begin a text.

        Args:
            prompt: Its first tokens.
            prediction: Tokens that those after the prompt are thought to resemble.
        """
        self.tokens: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}  # the index after the last of each n-gram
        self._next: int | None = None  # the index of the token that is guessed
        self._length = 0  # about how many tokens before it are the same
        self._chances = list(FIRST_CHANCES)
        self.extend(prompt)
        start = len(self.tokens)
        self.extend(prediction)
        self.given = len(self.tokens)
        if self.given > start:
            self._next, self._length = start, PREDICTED
        self._chances = list(FIRST_CHANCES)  # an answer is another kind of text than its prompt

    def extend(self, tokens: Iterable[int]) -> None:
        """Add tokens at the end of the text."""
        for token in tokens:
            self._add(token)

    def _add(self, token: int) -> None:
        is_right = self._next is not None and self.tokens[self._next] == token
        if self._next is not None:
            kind = self._kind
            self._chances[kind] += NEWEST * (is_right - self._chances[kind])
        self.tokens.append(token)
        end = len(self.tokens)
        if self._next is not None and is_right:
            self._next, self._length = self._next + 1, self._length + 1
        else:
            self._next, self._length = None, 0
        for length in LENGTHS:
            if end >= length:
                key = tuple(self.tokens[end - length :])
                place = self._places.get(key)
                if self._next is None and place is not None:
                    self._next, self._length = place, length
                self._places[key] = end

    @property
    def _kind(self) -> int:
        return sum(self._length >= least for least in KINDS)

    def draft(self, most: int) -> Draft:
        """Guess up to `most` tokens. Where a match runs into the end, it is repeated."""
        if self._next is None:
            return NO_DRAFT
        tokens = self.tokens[self._next : self._next + most]
        period = len(self.tokens) - self._next
        while len(tokens) < most:
            tokens.append(tokens[len(tokens) - period])
        return Draft(tuple(tokens), self._chances[self._kind])


class Either(Drafter):
    """Takes the drafts of one drafter where they are as likely right as those of another.

    The other's drafts may take time. The plan without any of them is offered, too.
    """

    def __init__(self, quick: Drafter, other: Drafter) -> None:
        self._quick = quick
        self._other = other
        self._made: WeakKeyDictionary[Sequence, Drafter] = WeakKeyDictionary()
        self.slot_bytes = quick.slot_bytes + other.slot_bytes

    @property
    def compiled_bytes(self) -> int:
        return self._quick.compiled_bytes + self._other.compiled_bytes

    def draft(self, sequences: Tokens[Sequence], most: int) -> list[Draft]:
        made = self.plans(sequences, most)[-1].make(most)
        return [made.get(sequence, NO_DRAFT) for sequence in sequences]

    def plans(self, sequences: Tokens[Sequence], most: int) -> list[Plan]:
        quick = self._quick.plans(sequences, most) or [NO_PLAN]
        others = [NO_PLAN, *self._other.plans(sequences, most)]
        return [self._joined(one, other) for other in others for one in quick]

    def warm_up(self, sizes: Tokens[int], samplings: Tokens[Sampling]) -> None:
        self._quick.warm_up(sizes, samplings)
        self._other.warm_up(sizes, samplings)

    def _joined(self, quick: Plan, other: Plan) -> Plan:
        """Return a plan that takes the other's draft where it is the more likely one."""
        chosen = {
            sequence: outlook
            for sequence, outlook in other.outlooks.items()
            if _chance(outlook) > _chance(quick.outlooks.get(sequence, NO_DRAFT))
        }

        def make(most: int) -> Mapping[Sequence, Draft]:
            drafts = {s: draft for s, draft in quick.make(most).items() if s not in chosen}
            self._made.update(dict.fromkeys(drafts, self._quick))
            made = other.make(most) if chosen else {}
            slow = {s: draft for s, draft in made.items() if s in chosen}
            self._made.update(dict.fromkeys(slow, self._other))
            return {**drafts, **slow}

        return Plan({**quick.outlooks, **chosen}, make, other.token_s if chosen else 0.0)

    def checked(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        if sequence in self._made:
            self._made[sequence].checked(sequence, drafted, accepted)


def _chance(outlook: Draft | Outlook) -> float:
    return outlook.chance if outlook.length else 0.0


def accepted(tokens: Tokens[int], inputs: Tokens[int]) -> int:
    """Return how many of the tokens that a step has sampled are the text: 1 to T.

    Args:
        tokens: The T sampled tokens.
        inputs: The T tokens that were run: the last token of the text, then the draft.
    """
    for count, (token, drafted) in enumerate(zip(tokens, inputs[1:], strict=False), 1):
        if token != drafted:
            return count
    return len(tokens)


def inputs_of(
    sequences: Tokens[Sequence | None], drafts: Mapping[Sequence, Draft], size: int
) -> np.ndarray:
    """Return the tokens of a step that checks drafts, (B, size) int32.

    Each row has the last token of its sequence, its draft, and `PADDING`.
    """
    inputs = np.full((len(sequences), size), PADDING, np.int32)
    for row, sequence in zip(inputs, sequences, strict=True):
        row[0] = 0
        if sequence is not None:
            row[0] = (sequence.answer or sequence.request.prompt_ids)[-1]
            tokens = drafts.get(sequence, NO_DRAFT).tokens[: size - 1]
            row[1 : 1 + len(tokens)] = tokens
    return inputs
