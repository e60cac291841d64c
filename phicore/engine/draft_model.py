"""Drafts of a second, smaller model, which guesses the tokens that it would choose itself.

It draws with the random numbers with which the tokens of the text are drawn, those of the seed and
of the token's index. So where both models find the same tokens likely they mostly choose the same
one, at any temperature.

The small model has caches of its own. What it has read of a sequence is compared with the text at
each draft: rejected tokens are forgotten, and their slots are overwritten. So it needs to be told
nothing, and a sequence that it has not seen for a while is read on from where it was.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from collections.abc import Sequence as Tokens
from itertools import product
from weakref import WeakKeyDictionary, ref

import numpy as np

from phicore.backend import Array
from phicore.engine.cache import Cache
from phicore.engine.draft_texts import Text, lacks, length_of, tokens_from
from phicore.engine.drafts import NO_DRAFT, Draft, Drafter, Outlook, Plan
from phicore.engine.noise import noise_of
from phicore.engine.request import Request
from phicore.engine.runner import Runner
from phicore.engine.scheduler import SIZES
from phicore.engine.sequence import Sequence
from phicore.engine.timings import Timings
from phicore.network.sampling import Sampling

log = logging.getLogger(__name__)

FIRST_CHANCE = 0.7
"""How likely a guess is right as long as nothing is known."""
NEWEST = 0.1
"""The weight of the newest token in the chance that a guess is right."""
FORGET = 1 / 1024
"""The part of the difference from `FIRST_CHANCE` that is forgotten at each chance to draft, so that
a model whose guesses were wrong is tried again when the text may be of another kind."""
CATCH_UP = (1, 2, 8)
"""The first step of a draft runs one of these numbers of tokens of each row. A row that lacks more
is read in chunks before."""
SHORTEST = 16
"""What was read of another sequence is used if at least this many first tokens are the same."""
ANSWER = 512
"""A new cache has slots for the text and this many tokens. It can grow."""
NEWEST_TIME = 0.3
"""The weight of the newest measurement in the time of a draft."""
LONGEST = 3
"""A draft counts as if it had taken at most so many times as long as was thought."""


class ModelDrafter(Drafter):
    """Guesses the tokens that another model would choose, for all sequences in each step.

    Args:
        runner: Runs the other model, which must have the same vocabulary. Its backend may be
            another one.
        context: The largest number of tokens of a text that the other model can read.
    """

    def __init__(self, runner: Runner, context: int) -> None:
        self._runner = runner
        self._context = context
        self.slot_bytes = runner.slot_bytes
        self._guess = runner.steps.guess()
        self._texts: WeakKeyDictionary[Sequence, Text] = WeakKeyDictionary()
        self._batch: Cache | None = None
        self._rows: list[Text | None] = []  # of the batch; texts of ended sequences stay for others
        self._chance = FIRST_CHANCE
        self._times: dict[int, float] = {}  # of a token, by the number of rows
        self._is_off = False

    @property
    def compiled_bytes(self) -> int:
        return self._runner.steps.held_bytes

    # ---- decisions -------------------------------------------------------------------------

    def draft(self, sequences: Tokens[Sequence], most: int) -> list[Draft]:
        made = self._make(sequences, most)
        return [made.get(sequence, NO_DRAFT) for sequence in sequences]

    def plans(self, sequences: Tokens[Sequence], most: int) -> list[Plan]:
        if self._is_off or not sequences:
            return []
        self._chance += FORGET * (FIRST_CHANCE - self._chance)
        outlooks = {}
        for sequence in sequences:
            text = self._text(sequence)
            text.chance += FORGET * (FIRST_CHANCE - text.chance)
            room = self._context - length_of(sequence)
            outlooks[sequence] = Outlook(max(0, min(most, room)), text.chance)
        rows = next(size for size in SIZES if size >= len(sequences))
        token_s = self._times.get(rows, 0.0)
        if token_s:  # so that one bad measurement does not count for ever
            self._times[rows] = token_s - FORGET * (token_s - min(self._times.values()))
        return [Plan(outlooks, lambda count: self._make(sequences, count), token_s)]

    def warm_up(self, sizes: Tokens[int], samplings: Tokens[Sampling]) -> None:
        chunks = self._runner.ops.capabilities.prompt_chunks[1:]
        all_lengths = [[chunk + 1] for chunk in chunks] + [[2] * size for size in sizes]
        for lengths, sampling in product(all_lengths, samplings):
            requests = [Request([0] * length, sampling) for length in lengths]
            texts = [Sequence(request, 99, "length", False) for request in requests]
            for count in (*[1] * len(texts), *CATCH_UP, 0):  # a draft reads a part of one text
                drafts = self._make(texts, 2)
                for text in texts:
                    guess = drafts.get(text, NO_DRAFT).tokens[:1]
                    text.answer += [int(guess == (0,))] * count  # never what was guessed
            self._batch, self._rows = None, []
        self._times.clear()

    def checked(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        text = self._text(sequence)
        for is_right in [True] * accepted + [False] * (accepted < drafted):
            text.chance += NEWEST * (is_right - text.chance)
            self._chance += NEWEST * (is_right - self._chance)

    def _text(self, sequence: Sequence) -> Text:
        text = self._texts.get(sequence)
        if text is None:
            text = self._texts[sequence] = Text(ref(sequence), self._chance, [])
        return text

    def _took(self, rows: int, token_s: float) -> None:
        """Take note of the time of each token of a draft."""
        known = self._times.get(rows)
        if known is not None:
            newest_s = min(token_s, LONGEST * known)
            token_s = (1 - NEWEST_TIME) * known + NEWEST_TIME * newest_s
        self._times[rows] = token_s

    # ---- drafts ----------------------------------------------------------------------------

    def _make(self, sequences: Tokens[Sequence], count: int) -> Mapping[Sequence, Draft]:
        """Return drafts of the sequences that are read; of the others, read a part of one.

        An error turns the drafter off, since the texts need no drafts.
        """
        if self._is_off:
            return {}
        try:
            return self._drafts(sequences, count)
        except BaseException as error:  # a cache that was handed to a failed step is lost
            self._batch, self._rows = None, []
            self._texts.clear()
            if not isinstance(error, Exception):
                raise
            log.warning("the draft model is not used any more: %s", error)
            self._is_off = True
            return {}

    def _drafts(self, sequences: Tokens[Sequence], count: int) -> Mapping[Sequence, Draft]:
        self._shrink()
        texts, behind = {}, []
        for sequence in sequences:
            if length_of(sequence) + count > self._context:
                continue
            text = texts[sequence] = self._text(sequence)
            self._check_factors(text, sequence)
            text.follow(sequence)
            if text not in self._rows or lacks(text, sequence) > CATCH_UP[-1]:
                behind.append(sequence)
        if behind:
            first = min(behind, key=lambda sequence: lacks(texts[sequence], sequence))
            self._read(texts[first], first)
        ready = {
            text: sequence
            for sequence, text in texts.items()
            if text in self._rows and lacks(text, sequence) <= CATCH_UP[-1]
        }
        return self._run(ready, count) if ready else {}

    def _check_factors(self, text: Text, sequence: Sequence) -> None:
        """Forget a text if LongRoPE's other factors are needed for it."""
        tables = self._runner.tables
        is_long = tables.has_two_parts and tables.is_long(length_of(sequence))
        if is_long != text.is_long:
            self._leave(text)
            text.cache, text.tokens, text.is_long = None, [], is_long

    def _run(self, ready: Mapping[Text, Sequence], count: int) -> Mapping[Sequence, Draft]:
        """Guess `count` tokens of each of these rows of the batch."""
        batch, runner = self._batch, self._runner
        assert batch is not None
        started, timings = time.perf_counter(), [s.timings for s in ready.values()]
        compile_s = timings[0].compile_s
        most = max(lacks(text, sequence) for text, sequence in ready.items())
        size = next(size for size in CATCH_UP if size >= most)
        last_place = batch.first + batch.capacity - (size + count - 1)
        tokens, ends = np.zeros((len(self._rows), size), np.int32), self._ends()
        lasts = np.zeros(len(self._rows), np.int32)
        for row, text in enumerate(self._rows):
            if text is not None and text in ready:
                new = tokens_from(ready[text], len(text.tokens))
                tokens[row, : len(new)], lasts[row] = new, len(new) - 1
                text.tokens += new
                text.sure = len(text.tokens)
            else:  # its last slots are overwritten if no others are free
                ends[row] = min(ends[row], last_place[row])
                if text is not None:
                    del text.tokens[ends[row] :]
        runner.make_room(batch, ends, size + count - 1)
        positions = ends[:, None] + np.arange(size, dtype=np.int32)
        sequences = [None if text is None else ready.get(text) for text in self._rows]
        noise = noise_of(runner.ops, sequences, runner.config.vocab_size)
        guessed = [self._call(batch, tokens, positions, lasts, noise(0), timings)]
        only = np.zeros_like(lasts)
        for number in range(1, count):
            places = (ends + lasts + number)[:, None]
            guessed.append(self._call(batch, guessed[-1], places, only, noise(number), timings))
        found = np.concatenate([runner.ops.to_numpy(each) for each in guessed], axis=1)
        if timings[0].compile_s == compile_s:
            self._took(len(self._rows), (time.perf_counter() - started) / count)
        drafts = {}
        for row, text in enumerate(self._rows):
            if text is not None and text in ready:
                draft = found[row].tolist()
                text.tokens += draft[:-1]
                drafts[ready[text]] = Draft(tuple(draft), text.chance)
        return drafts

    def _call(
        self,
        cache: Cache,
        tokens: np.ndarray | Array,
        positions: np.ndarray,
        last: np.ndarray,
        draw: dict[str, Array] | None,
        timings: list[Timings],
    ) -> Array:
        """Run tokens (B, T), and return the guess after the last of each row, (B, 1) int32."""
        asarray, tables = self._runner.ops.asarray, self._runner.tables
        is_long = tables.has_two_parts & (cache.rope_start > 0)
        reached = max(zip(is_long.tolist(), positions.max(axis=1).tolist(), strict=True))
        given = asarray(tokens) if isinstance(tokens, np.ndarray) else tokens
        cache.layers, guess = self._runner.steps.run(
            self._guess,
            cache,
            tables.until(reached[1] + 1, reached[0]),
            (given, asarray(positions), asarray(last), draw),
            timings,
        )
        return guess

    # ---- texts -----------------------------------------------------------------------------

    def _read(self, text: Text, sequence: Sequence) -> None:
        """Read a chunk of a text that lacks more than a step runs; put it into the batch."""
        runner = self._runner
        if text in self._rows:
            self._leave(text)
        elif text.cache is None and (other := self._similar(text, sequence)) is not None:
            text.tokens, text.sure = other.tokens, 0
            self._rows[self._rows.index(other)] = text
            text.follow(sequence)
            self._leave(text)
        if text.cache is None:
            text.cache = runner.new_cache(length_of(sequence) + ANSWER, text.is_long)
        if lacks(text, sequence) > CATCH_UP[-1]:
            given = sequence.tokens[:-1]
            chunk = runner.chunk_at(given, len(text.tokens))
            runner.make_room(text.cache, np.array([chunk.start], np.int32), chunk.size)
            inputs = chunk.tokens, chunk.positions, chunk.last
            self._call(text.cache, *inputs, None, [sequence.timings])
            text.tokens += given[chunk.start : chunk.end]
            text.sure = len(text.tokens)
        if lacks(text, sequence) <= CATCH_UP[-1]:
            self._enter(text, text.cache)

    def _similar(self, text: Text, sequence: Sequence) -> Text | None:
        """Return the text of an ended sequence that has most of a sequence's first tokens."""
        window, best, most = self._runner.config.sliding_window, None, SHORTEST - 1
        for row, other in enumerate(self._rows):
            if other is None or other.is_live or other.is_long != text.is_long:
                continue
            both = zip(other.tokens, sequence.tokens[:-1], strict=False)
            count = next(
                (i for i, (one, two) in enumerate(both) if one != two),
                min(len(other.tokens), length_of(sequence) - 1),
            )
            assert self._batch is not None
            first = int(self._batch.first[row])
            is_seen = first == 0 or (window is not None and count - (window - 1) >= first)
            if is_seen and count > most:
                best, most = other, count
        return best

    def _ends(self) -> np.ndarray:
        """Return the position after the last token of each row of the batch, (B,) int32."""
        assert self._batch is not None
        ends = self._batch.first.copy()
        for row, text in enumerate(self._rows):
            if text is not None:
                ends[row] = len(text.tokens)
        return ends

    def _leave(self, text: Text) -> None:
        """Give a text a cache of its own, if it is a row of the batch."""
        if text not in self._rows:
            return
        assert self._batch is not None
        row = self._rows.index(text)
        if len(self._rows) == 1:
            text.cache, self._batch, self._rows = self._batch, None, []
            return
        text.cache = self._runner.copy(self._batch, [row], self._ends()[[row]])
        self._rows[row] = None

    def _enter(self, text: Text, cache: Cache) -> None:
        """Make a text with a cache of its own a row of the batch."""
        text.cache = None
        batch, runner = self._batch, self._runner
        if batch is None or not any(other is not None and other.is_live for other in self._rows):
            self._batch, self._rows = cache, [text]
            return
        if all(other is not None and other.is_live for other in self._rows):
            size = next(size for size in SIZES if size > len(self._rows))
            batch = self._arrange(list(range(len(self._rows))), size)
        if cache.capacity > batch.capacity:
            rows = range(len(self._rows))
            batch = self._batch = runner.copy(batch, rows, self._ends(), cache.capacity)
        lengths = {
            row: 0 if other is None else len(other.tokens)
            for row, other in enumerate(self._rows)
            if other is None or not other.is_live
        }
        row = min(lengths, key=lambda row: lengths[row])
        slots = len(text.tokens) - int(cache.first[0])
        layers = runner.steps.insert(batch.layers, cache.layers, row, slots)
        self._batch = batch.with_row(layers, row, cache)
        self._rows[row] = text

    def _shrink(self) -> None:
        """Drop rows of ended sequences if half of the rows are enough."""
        rows = [i for i, text in enumerate(self._rows) if text is not None and text.is_live]
        size = next(size for size in SIZES if size >= max(1, len(rows)))
        if self._batch is not None and 2 * size <= len(self._rows):
            self._arrange(rows or [0], size)

    def _arrange(self, rows: list[int], size: int) -> Cache:
        """Give the batch these rows, in this order, and unused ones, `size` together."""
        assert self._batch is not None
        unused = size - len(rows)
        indices = [*rows, *[rows[0]] * unused]
        self._batch = self._runner.copy(self._batch, indices, self._ends()[indices])
        self._rows = [*(self._rows[row] for row in rows), *[None] * unused]
        return self._batch
