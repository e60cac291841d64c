"""How many replicas there are, and what each of them gets. The command line has these options."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from phicore.backend.host import cpu_count
from phicore.errors import ArgumentError
from phicore.settings import check_settings, setting

MOST_REPLICAS = 10_000


@dataclass(frozen=True)
class Scaling:
    """How many replicas there are, and what each of them gets."""

    replicas: str = setting(
        "1",
        "The number of replicas, such as 2; or the least and the largest number, such as 2..8, "
        "between which it follows the number of answers under way.",
        metavar="N|N..M",
    )
    num_gpus: float = setting(
        0.0,
        "The number of GPUs that each replica gets.",
        expected="0 or more",
        check=lambda n: n >= 0,
        metavar="N",
    )
    num_cpus: float | None = setting(
        None,
        "The number of CPUs that each replica gets, and computes with.",
        expected="more than 0",
        check=lambda n: n > 0,
        metavar="N",
        shown_default="an equal share of this machine's",
    )
    target: float | None = setting(
        None,
        "The number of answers under way for each replica that N..M aims at.",
        expected="more than 0",
        check=lambda n: n > 0,
        metavar="N",
        shown_default="--parallel",
    )
    up_after: float = setting(
        10.0,
        "Start a replica after so many seconds with too few.",
        expected="0 or more",
        check=lambda s: s >= 0,
        metavar="SECONDS",
    )
    down_after: float = setting(
        300.0,
        "End a replica after so many seconds with too many.",
        expected="0 or more",
        check=lambda s: s >= 0,
        metavar="SECONDS",
    )
    sticky: bool = setting(
        True,
        "Send the requests of a conversation to the replica that has read its beginning. [yes]",
    )

    def __post_init__(self) -> None:
        check_settings(self)
        self.bounds  # noqa: B018 - checks the text

    @property
    def bounds(self) -> tuple[int, int]:
        """Return the least and the largest number of replicas.

        Raises:
            ArgumentError: If `replicas` does not say them.
        """
        found = re.fullmatch(r"(\d{1,5})(?:\.\.(\d{1,5}))?", self.replicas.strip())
        if found is not None:
            least = int(found[1])
            most = int(found[2] or least)
            if 1 <= least <= most <= MOST_REPLICAS:
                return least, most
        expected = f"a number from 1 to {MOST_REPLICAS}, or two such as 2..8"
        raise ArgumentError(parameter="replicas", expected=expected, got=self.replicas)

    @property
    def cpus(self) -> float:
        """Return the number of CPUs for each replica."""
        if self.num_cpus is not None:
            return self.num_cpus
        share = cpu_count() / self.bounds[1]
        return float(math.floor(share)) if share >= 1 else math.floor(100 * share) / 100 or 0.01

    @property
    def threads(self) -> int:
        """Return the number of threads that each replica computes with on a CPU."""
        return max(1, math.floor(self.cpus))
