"""Fixtures: a Hub on loopback, and phicore in a separate process that can reach only this Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sources.hub_server import Hub, serve

# Run in a fresh interpreter, because huggingface_hub reads its settings when it is imported.
PROGRAM = """
import json, sys
from phicore.errors import SourceError
from phicore.sources import known_models, resolve

for reference in sys.argv[1:]:
    try:
        if reference == "known":
            models = [(m.reference, m.path, m.size_bytes) for m in known_models()]
            print(json.dumps(models, default=str))
        else:
            files = resolve(reference)
            print(json.dumps([files.path, files.tokenizer], default=str))
    except SourceError as error:
        print(json.dumps(str(error)))
"""


HANG_S = 120
"""Whatever takes this long, in seconds, hangs; a slow machine is faster."""


@dataclass(frozen=True)
class Client:
    """A way to run phicore in a process with an empty home folder and the loopback Hub."""

    hub: Hub
    home: Path

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-W", "error", "-c", PROGRAM]

    def environment(self, **variables: str) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT") if name in os.environ}
        home = {"HOME": str(self.home), "HF_HOME": str(self.home / "hf")}
        hub = {"HF_ENDPOINT": self.hub.url, "NO_PROXY": "127.0.0.1"}
        patience = {f"HF_HUB_{what}_TIMEOUT": str(HANG_S) for what in ("ETAG", "DOWNLOAD")}
        return kept | home | hub | patience | variables

    def answers(self, *references: str, **variables: str) -> list[Any]:
        """Resolve references: to [path, tokenizer], or to the message of a SourceError.

        The reference `known` gives the known models.
        """
        done = subprocess.run(
            [*self.command, *references],
            env=self.environment(**variables),
            capture_output=True,
            text=True,
            timeout=HANG_S,
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    def files(self, reference: str, **variables: str) -> tuple[Path, Path | None]:
        (answer,) = self.answers(reference, **variables)
        assert isinstance(answer, list), answer
        return Path(answer[0]), answer[1] and Path(answer[1])

    def error(self, reference: str, **variables: str) -> str:
        (answer,) = self.answers(reference, **variables)
        assert isinstance(answer, str), answer
        assert "\n" not in answer
        return answer


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve(Hub()) as served:
        yield served


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Client:
    return Client(hub, tmp_path)
