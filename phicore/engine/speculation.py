"""When guesses of the next tokens are checked, and which."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, replace

import numpy as np

from phicore.engine.drafts import NO_DRAFT, Draft, Drafter, inputs_of
from phicore.engine.rows import Ahead, Rows
from phicore.engine.runner import Runner
from phicore.engine.scheduler import STEP_SIZES, Scheduler
from phicore.engine.sequence import Sequence, SequenceError
from phicore.engine.steps import States


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

    def checks(self, rows: Rows, scheduler: Scheduler) -> Checks | None:
        """Return what a step that checks drafts runs; None if it does not pay.

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
        drafts = dict(zip(asked, self.drafter.draft(asked, STEP_SIZES[-1] - 1), strict=True))
        told = {}
        for sequence, draft in drafts.items():
            if draft.tokens and sequence.needs_tokens:
                told[sequence] = _ahead_of(rows, sequence, draft)
                drafts[sequence] = replace(draft, tokens=draft.tokens[: len(told[sequence])])
        all_drafts = [drafts.get(sequence, NO_DRAFT) for sequence in live]
        size = scheduler.step_wanted(
            len(rows.sequences), most, all_drafts, is_drawn=rows.draw is not None
        )
        if size == 1:
            return None
        return Checks(inputs_of(rows.sequences, drafts, size), rows.ahead(told, size))


def _ahead_of(rows: Rows, sequence: Sequence, draft: Draft) -> list[States]:
    try:
        return rows.ahead_of(sequence, draft.tokens)
    except Exception as error:  # a processor may raise anything
        raise SequenceError(sequence, error) from error
