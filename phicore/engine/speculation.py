"""When guesses of the next tokens are checked, and which."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from phicore.engine.drafts import Drafter, Outlook, Plan, inputs_of
from phicore.engine.rows import Ahead, Rows
from phicore.engine.runner import Runner
from phicore.engine.scheduler import STEP_SIZES, Scheduler
from phicore.engine.sequence import Sequence, SequenceError
from phicore.engine.steps import States
from phicore.errors import FAULTS, as_error


class Wanted(NamedTuple):
    """A step that is expected to pay.

    Attributes:
        size: The number of tokens of each row.
        plan: How they are drafted.
    """

    size: int
    plan: Plan


@dataclass(frozen=True)
class Checks:
    """A step that checks drafts.

    Attributes:
        inputs: The tokens that it runs, (B, T) int32.
        ahead: What logits processors tell of the states after each token.
    """

    inputs: np.ndarray
    ahead: Ahead


class Speculation:
    """Asks a drafter for guesses, and the scheduler whether to check them.

    Attributes:
        drafter: Guesses the next tokens; None guesses none.
    """

    def __init__(self, runner: Runner, drafter: Drafter | None) -> None:
        self._runner = runner
        self.drafter = drafter
        # What processors have told ahead of a draft, with the answer's length and the draft.
        self._told: WeakKeyDictionary[
            Sequence, tuple[tuple[int, tuple[int, ...]], list[States]]
        ] = WeakKeyDictionary()

    def step_sizes(
        self, rows: int, live: Tokens[Sequence], scheduler: Scheduler
    ) -> tuple[int, ...]:
        """Return the numbers of tokens that a step which checks drafts may have.

        None are checked where a call runs several steps, as on GPUs, or where a processor needs
        each token and cannot look ahead.
        """
        has_drafts = any(sequence.request.speculation for sequence in live)
        can_be_checked = all(sequence.can_be_checked for sequence in live)
        is_possible = self.drafter is not None and self._runner.ops.capabilities.steps == 1
        return scheduler.step_sizes(rows) if is_possible and has_drafts and can_be_checked else ()

    def wanted(self, rows: Rows, scheduler: Scheduler) -> Wanted | None:
        """Return the size and the drafts of a step that checks some; None if none pays.

        While a call is under way, the result only says whether it pays to wait for that.

        Raises:
            SequenceError: If a logits processor of a sequence has raised an error.
        """
        live = rows.live
        sizes = self.step_sizes(len(rows.sequences), live, scheduler)
        if self.drafter is None or not sizes:
            return None
        most = min(sequence.left for sequence in live)
        for sequence in live:
            factors = self._runner.tables.left(sequence.computed, sequence.is_long)
            most = most if factors is None else min(most, factors)
        if most < sizes[0]:
            return None
        asked = [sequence for sequence in live if sequence.request.speculation]
        plans = [
            replace(plan, outlooks={s: self._cut(rows, s, o) for s, o in plan.outlooks.items()})
            for plan in self.drafter.plans(asked, STEP_SIZES[-1] - 1)
        ]
        is_drawn = rows.draw is not None
        size, plan = scheduler.plan_wanted(
            len(rows.sequences), most, live, plans, is_drawn=is_drawn
        )
        return None if plan is None else Wanted(size, plan)

    def checks(self, rows: Rows, wanted: Wanted) -> Checks | None:
        """Make the drafts of a step; None if nothing is left of them.

        Raises:
            SequenceError: If a logits processor of a sequence has raised an error.
        """
        made = wanted.plan.make(wanted.size - 1)
        drafts = {sequence: self._cut(rows, sequence, draft) for sequence, draft in made.items()}
        if not any(draft.length for draft in drafts.values()):
            return None
        told = {
            sequence: self._ahead_of(rows, sequence, draft.tokens)
            for sequence, draft in drafts.items()
            if draft.length and sequence.needs_tokens
        }
        return Checks(inputs_of(rows.sequences, drafts, wanted.size), rows.ahead(told, wanted.size))

    def _cut(self, rows: Rows, sequence: Sequence, draft: Any) -> Any:
        """Cut a draft before the first token that the sequence's processors forbid."""
        if isinstance(draft, Outlook) or not draft.length or not sequence.needs_tokens:
            return draft
        told = self._ahead_of(rows, sequence, draft.tokens)
        return replace(draft, tokens=draft.tokens[: len(told)])

    def _ahead_of(self, rows: Rows, sequence: Sequence, tokens: tuple[int, ...]) -> list[States]:
        """Return `Rows.ahead_of`, which is computed once for the same draft."""
        key = len(sequence.answer), tokens
        known, told = self._told.get(sequence, ((-1, ()), []))
        if known[0] == key[0] and known[1][: len(tokens)] == tokens:
            return told[: len(tokens)]
        try:
            told = rows.ahead_of(sequence, tokens)
        except FAULTS as error:  # a processor may raise anything
            raise SequenceError(sequence, as_error(error)) from error
        self._told[sequence] = key, told
        return told
