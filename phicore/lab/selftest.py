"""The self-test of a backend: a tiny model's logits and its greedy text.

`phicore doctor` runs this module as a program, one process for each backend and device, because a
broken library may end the process:

    python -m phicore.lab.selftest RESULT.json MODEL.gguf [BACKEND [DEVICE]]

Without a backend, it computes what the others are compared with, which is the protocol's default
operations on NumPy.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from phicore.backend import Backend, BackendOptions
from phicore.engine import Engine, Request
from phicore.errors import PhicoreError
from phicore.gguf.reader import open_gguf
from phicore.network.sampling import Sampling
from phicore.plugins import Plugins, choose_backend
from phicore.testing.reference import Reference

PROMPT = (3, 314, 159, 265, 358, 97, 93, 238, 462, 643, 383, 279, 502, 884, 197, 169, 399, 375, 105)
MAX_TOKENS = 16


def compute(ops: Backend, path: Path) -> dict[str, Any]:
    """Run the model on a backend.

    Returns:
        `tokens`, the greedy text; `logits`, those of the prompt's tokens as lists of numbers;
        `load_s` and `text_s`, the times of loading and of writing the text, with compilation.
    """
    started_s = time.perf_counter()
    with open_gguf(path) as file, np.errstate(all="ignore"):
        engine = Engine.load(ops, file)
        loaded_s = time.perf_counter()
        request = Request(PROMPT, Sampling(temperature=0.0), max_tokens=MAX_TOKENS)
        tokens = [int(token) for token in engine.generate(request)]
        written_s = time.perf_counter()
        logits = np.asarray(engine.logits(list(PROMPT)), np.float32)
    return {
        "tokens": tokens,
        "logits": logits.tolist(),
        "load_s": loaded_s - started_s,
        "text_s": written_s - loaded_s,
    }


def test(path: Path, backend: str, device: str | None) -> dict[str, Any]:
    """Run the model on an installed backend.

    Returns:
        The result of `compute`, and `device`, `devices` and `notes`.
    Raises:
        BackendError: If the backend or the device cannot be used.
    """
    info = choose_backend(backend, Plugins())
    told = {"devices": info.devices(), "notes": info.notes()}
    ops = info.create(BackendOptions(device=device, packed_cache=False))
    return {**told, "device": ops.capabilities.device, **compute(ops, path)}


def main() -> None:
    """Run the test that the arguments name, and write its result, or the reason why there is none.

    A `PhicoreError` and any other error become `reason`, one line.
    """
    result, model, *names = sys.argv[1:]
    try:
        if names:
            found = test(Path(model), names[0], names[1] if len(names) > 1 else None)
        else:
            found = compute(Reference(), Path(model))
    except PhicoreError as error:
        found = {"reason": str(error)}
    except Exception as error:  # noqa: BLE001 - the page tells it in a line
        lines = str(error).strip().splitlines()
        found = {"reason": ": ".join([type(error).__name__, *lines[:1]])}
    Path(result).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
