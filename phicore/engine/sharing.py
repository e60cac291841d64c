"""Which sequences can share a batch, though they have other logits processors."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from phicore.network.processors import Kinds, LogitsProcessor


def hosts(present: Iterable[Kinds], may_be_added: Callable[[type[LogitsProcessor]], bool]) -> Hosts:
    """Say with which classes of logits processors each sequence runs.

    A sequence can join others that have all of its processors and more, in the same order, if the
    others have neutral states. It joins those that have the most.

    Args:
        present: The classes of the sequences that run.
        may_be_added: Returns whether a sequence without a processor of a class can have its neutral
            state.
    Returns:
        For each of the classes that are present, those of the batch.
    """
    every = list(dict.fromkeys(present))

    def can_join(kinds: Kinds, host: Kinds) -> bool:
        more = [kind for kind in host if kind not in kinds]
        is_part = kinds == tuple(kind for kind in host if kind in kinds)
        # A class that occurs twice has two states, and it would not be clear which is whose.
        return is_part and len({*host}) == len(host) and all(map(may_be_added, more))

    def rank(host: Kinds) -> tuple[int, list[str]]:
        # By name, so that sequences that come later change nothing for those that run.
        return len(host), [kind.__qualname__ for kind in host]

    return {
        kinds: max((host for host in every if host == kinds or can_join(kinds, host)), key=rank)
        for kinds in every
    }


Hosts = dict[Kinds, Kinds]
"""The result of `hosts`."""
