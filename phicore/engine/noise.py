"""The random numbers with which the next tokens of sequences are drawn."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Tokens

import numpy as np

from phicore.backend import Array, Backend, philox
from phicore.engine.rows import NOBODY
from phicore.engine.sequence import Sequence
from phicore.network import sampler


def noise_of(
    ops: Backend, sequences: Tokens[Sequence | None], vocab_size: int
) -> Callable[[int], dict[str, Array] | None]:
    """Return a function that makes the argument `draw` of `sampler.sample` for B rows.

    Its argument is the number of the token after those that the host has read, from 0 on. The
    numbers are those with which the engine draws this token of the text.

    Args:
        sequences: The sequence of each row; a row without one is greedy.
        vocab_size: V, the number of tokens that the model knows.
    """
    requests = [None if sequence is None else sequence.request for sequence in sequences]
    inputs = sampler.inputs([NOBODY if r is None else r.sampling for r in requests])
    if inputs is None:
        return lambda number: None
    draw = {name: ops.asarray(array) for name, array in inputs.items()}
    seeds = [0 if request is None else request.seed or 0 for request in requests]
    firsts = np.array([0 if s is None else len(s.answer) for s in sequences], np.uint32)
    if ops.capabilities.random_on_device:
        draw["key"] = ops.asarray(philox.keys(seeds))
        return lambda number: {**draw, "step": ops.asarray(firsts + np.uint32(number))}

    def uniforms(number: int) -> dict[str, Array]:
        numbers = np.zeros((len(seeds), vocab_size), np.float32)
        for row, request in enumerate(requests):
            if request is not None and not request.sampling.is_greedy:
                numbers[row] = sampler.uniforms(seeds[row], int(firsts[row]) + number, vocab_size)
        return {**draw, "uniforms": ops.asarray(numbers)}

    return uniforms
