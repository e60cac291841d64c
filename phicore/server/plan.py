"""What is served, and how: plain data that another process can carry out."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from phicore.extras import check
from phicore.server.settings import Settings

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from phicore.model import Model


@dataclass(frozen=True)
class Plan:
    """A model to serve, and how. It can be pickled.

    Attributes:
        reference: The reference of the model.
        loading: Further arguments of `phicore.load`.
        names: The names by which clients may call the model. The first is its id.
        settings: Limits and behaviour.
        api_keys: If there are any, clients must send one of these keys.
        allowed_hosts: Names of the server beside localhost and addresses; "*" allows all.
        cors_origins: Origins whose pages may use the server.
        log_format: How logs are written: "text" or "json".
        log_level: The name of the least level that is logged, such as "info".
    """

    reference: str
    loading: Mapping[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    settings: Settings = field(default_factory=Settings)
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    log_format: str = "text"
    log_level: str = "info"

    def load(self) -> Model:
        """Load the model.

        Raises:
            PhicoreError: If it cannot be loaded.
        """
        from phicore.loading import load

        return load(self.reference, **self.loading)

    def application(
        self, failed: Callable[[BaseException], None] = lambda error: None
    ) -> Starlette:
        """Return the application, which loads the model when it starts.

        Args:
            failed: Called in the thread that computes if the model cannot be loaded, or can no
                longer compute.
        Raises:
            PhicoreError: If a package that the server needs is not installed.
        """
        check_packages()
        from phicore.server.application import app

        return app(
            self.load,
            names=self.names or (self.reference,),
            settings=self.settings,
            api_keys=self.api_keys,
            allowed_hosts=self.allowed_hosts,
            cors_origins=self.cors_origins,
            failed=failed,
        )

    def prepare_process(self) -> None:
        """Let this process write its logs to standard error, and keep little memory.

        Raises:
            PhicoreError: If a package that the server needs is not installed.
        """
        check_packages()
        from phicore.server.faults import tell_of_threads
        from phicore.server.logs import Lines
        from phicore.server.memory import use_few_arenas

        use_few_arenas()
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(Lines(as_json=self.log_format == "json"))
        logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
        logging.getLogger("phicore").setLevel(self.log_level.upper())
        tell_of_threads()


def check_packages() -> None:
    """Check that the packages of a server are installed.

    Raises:
        PhicoreError: If one is not.
    """
    check("serve", "the server")
