"""The options of a team of processes."""

from __future__ import annotations

from dataclasses import dataclass

from phicore.errors import ArgumentError
from phicore.settings import check_settings, setting

MOST = 1024


@dataclass(frozen=True)
class TeamOptions:
    """Which processes compute a model."""

    processes: int = setting(
        1,
        "Number of processes, on one host or several, that compute the model; --devices counts the "
        "devices of all. This one leads, and waits for the others, which `phicore join` starts "
        "(JAX).",
        expected=f"1 to {MOST}",
        check=lambda n: 1 <= n <= MOST,
        metavar="N",
    )
    coordinator: str | None = setting(
        None,
        "The address at which this process waits for the others, if there are several. The next "
        "port is used, too.",
        metavar="HOST:PORT",
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.processes > 1 and self.coordinator is None:
            raise ArgumentError(
                "several processes need an address to meet at, such as 10.0.0.1:7000",
                parameter="coordinator",
            )
        if self.processes == 1 and self.coordinator is not None:
            raise ArgumentError("only with --processes", parameter="coordinator")
        if self.coordinator is not None:
            from phicore.team.protocol import checked_address

            checked_address(self.coordinator)
