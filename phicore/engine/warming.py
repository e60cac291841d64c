"""Runs steps without an answer, so that they are compiled before anybody waits for them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from phicore.engine.drafts import inputs_of
from phicore.engine.memory import Memory
from phicore.engine.request import Request
from phicore.engine.rows import first_states
from phicore.engine.scheduler import SIZES, Scheduler
from phicore.engine.sequence import Sequence
from phicore.engine.speculation import Speculation


def decode_each_size(
    requests: Iterable[Request], memory: Memory, scheduler: Scheduler, speculation: Speculation
) -> None:
    """Run a decode step, and steps that check drafts, with each number of rows of each request."""
    runner, requests = memory.runner, list(requests)
    sizes = [size for size in SIZES if size <= scheduler.max_sequences]
    one = runner.new_cache(1)
    for size in sizes:
        cache = runner.copy(one, [0] * size, np.ones(size))
        for other in sizes:
            runner.copy(cache, [0] * other, np.ones(other))
        cache.layers = runner.steps.insert(cache.layers, one.layers, 0, 1)
        for request in requests:
            sequence = Sequence(request, 2, "length", False)
            states = first_states(runner.ops, sequence, runner.config.vocab_size)
            if states:
                alone, take = states, runner.steps.take_states
                states = take(states, np.zeros(size, np.int32))
                states = runner.steps.put_states(states, alone, 0)
                for other in sizes:
                    take(states, np.zeros(other, np.int32))
            kinds, sequences = sequence.kinds, [sequence] * size
            runner.decode(memory.rows(cache, sequences, kinds, states), 1)
            for count in speculation.step_sizes(size, [sequence], scheduler):
                rows = memory.rows(cache, sequences, kinds, states)
                inputs = inputs_of(rows.sequences, {}, count)
                runner.verify(rows, inputs, rows.ahead({}, count))
    if speculation.drafter is not None and runner.ops.capabilities.steps == 1:
        checked = [size for size in sizes if scheduler.step_sizes(size)]
        samplings = list(dict.fromkeys(request.sampling for request in requests))
        speculation.drafter.warm_up(checked, samplings)
