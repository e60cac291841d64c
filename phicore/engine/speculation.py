"""When guesses of the next tokens are checked, and which."""

from __future__ import annotations

from collections.abc import Sequence as Tokens

import numpy as np

from phicore.engine.drafts import NO_DRAFT, Drafter, inputs_of
from phicore.engine.rows import Rows
from phicore.engine.runner import Runner
from phicore.engine.scheduler import STEP_SIZES, Scheduler
from phicore.engine.sequence import Sequence


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

        Calls of several steps, as on GPUs, and processors that need each token check none.
        """
        has_drafts = any(sequence.request.speculation for sequence in live)
        needs_tokens = any(sequence.needs_tokens for sequence in live)
        is_possible = self.drafter is not None and self._runner.ops.capabilities.steps == 1
        return scheduler.step_sizes(rows) if is_possible and has_drafts and not needs_tokens else ()

    def inputs(self, rows: Rows, scheduler: Scheduler) -> np.ndarray | None:
        """Return the tokens of a step that checks drafts, (B, T) int32; None if it does not pay.

        While a call is under way, the result only says whether it pays to wait for that.
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
        all_drafts = [drafts.get(sequence, NO_DRAFT) for sequence in live]
        size = scheduler.step_wanted(len(rows.sequences), most, all_drafts)
        return None if size == 1 else inputs_of(rows.sequences, drafts, size)
