"""What a bug report needs: versions, devices, settings, and a self-test of each backend.

Everything that loads a plugin or a tensor library runs in a process of its own, so that a backend
that crashes or hangs becomes a line of the report.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import numpy as np

from phicore.lab import children, facts
from phicore.lab.privacy import remover
from phicore.lab.synthetic import write_model
from phicore.plugins.manager import DISABLE, GROUP
from phicore.progress import Progress, silent
from phicore.testing.compare import relative_error
from phicore.testing.tolerances import FLOAT32_LOGITS

TIMEOUT_S = 180.0
REFERENCE = "reference"
"""The name of the protocol's default operations on NumPy in the report."""


def examine(
    backends: Sequence[str] | None = None,
    *,
    folders: Mapping[str, Path] | None = None,
    timeout_s: float = TIMEOUT_S,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Collect the facts about this installation, and test its backends.

    Nothing in the result tells who the user is: see `phicore.lab.privacy`.

    Args:
        backends: The names of the backends to test. None tests all.
        folders: Folders that phicore writes to, beside those of its cache, by kind.
        timeout_s: How long each test may take.
        progress: Called before each test.
    Returns:
        `phicore`, the version; `system`, `libraries`, `extras`, `folders` and `variables` of
        `phicore.lab.facts`; `plugins` as `phicore.lab.survey` gives them; `backends`, with the
        libraries, devices and notes of each; `tests`, with `backend`, `device`, `outcome`,
        `reason`, `relative_error` and times; and `is_well`, whether all that was tested works.
    """
    found, off = _survey(timeout_s)
    names = [row["name"] for row in found["backends"]]
    wanted = names if backends is None else list(backends)
    infos = {row["name"]: row for row in found["backends"]}
    with tempfile.TemporaryDirectory(prefix="phicore-") as folder:
        model = Path(folder) / "tiny.gguf"
        write_model(model, "tiny")
        tests = _tests(wanted, infos, model, timeout_s, {DISABLE: off}, progress)
    for row in infos.values():
        row["libraries"] = facts.libraries_of(row["distribution"])
    is_broken = any(row["is_broken"] for row in found["plugins"])
    is_well = all(test["outcome"] == "passed" for test in tests) and bool(wanted)
    cleaned: dict[str, Any] = remover()(
        {
            "phicore": version("phicore"),
            "system": facts.system(),
            "libraries": facts.libraries(),
            "extras": facts.extras(),
            "plugins": found["plugins"],
            "backends": list(infos.values()),
            "tests": tests,
            "folders": facts.folders(folders or {}),
            "variables": facts.variables(),
            "is_well": is_well and not is_broken,
        }
    )
    return cleaned


def _survey(timeout_s: float) -> tuple[dict[str, Any], str]:
    """Return what `phicore.lab.survey` tells, and the value of the variable that it was told with.

    A plugin that ends the process is found by loading each alone, and left out.
    """
    off = os.environ.get(DISABLE, "")
    ended = children.run("phicore.lab.survey", (), timeout_s=timeout_s)
    if ended.result is not None:
        return ended.result, off
    points = {point.name: point for point in entry_points(group=GROUP)}
    culprits: list[dict[str, Any]] = []
    for name, point in points.items():
        others = ",".join([off, *(other for other in points if other != name)])
        alone = children.run("phicore.lab.survey", (), timeout_s=timeout_s, env={DISABLE: others})
        if alone.result is None:
            owner = point.dist.name if point.dist else "?"
            culprits.append(
                {
                    "name": name,
                    "distribution": owner,
                    "version": point.dist.version if point.dist else None,
                    "status": f"not usable: {alone.reason}",
                    "is_broken": True,
                }
            )
            off = f"{off},{name}"
    again = children.run("phicore.lab.survey", (), timeout_s=timeout_s, env={DISABLE: off})
    found = again.result or {"plugins": [], "backends": []}
    names = {row["name"] for row in culprits}
    rest = [row for row in found["plugins"] if row["name"] not in names]
    if again.result is None:
        status = f"not usable: {again.reason}"
        unknown = {"name": "?", "distribution": "?", "version": None}
        rest.append({**unknown, "status": status, "is_broken": True})
    return {"plugins": [*rest, *culprits], "backends": found["backends"]}, off


def _tests(
    wanted: Sequence[str],
    infos: dict[str, dict[str, Any]],
    model: Path,
    timeout_s: float,
    env: Mapping[str, str],
    progress: Progress,
) -> list[dict[str, Any]]:
    """Test each backend on its first device, then on its first device of every other kind.

    The infos of backends get `devices` and `notes`.
    """
    progress(f"testing {REFERENCE}", 0, len(wanted) + 1)
    expected = _run(model, [], timeout_s, env)
    rows = []
    if expected.result is None:
        # Without it nothing can be compared. The other tests say whether backends run at all.
        rows.append(_row(REFERENCE, None, expected, None))
    for number, name in enumerate(wanted, 1):
        progress(f"testing {name}", number, len(wanted) + 1)
        first = _run(model, [name], timeout_s, env)
        rows.append(_row(name, None, first, expected.result))
        told = first.result or {}
        devices = told.get("devices", [])
        if name in infos:
            infos[name] |= {"devices": devices, "notes": told.get("notes", "")}
        kinds = [str(told.get("device")).partition(":")[0]]
        for device in devices:
            kind = device.partition(":")[0]
            if kind not in kinds:
                kinds.append(kind)
                other = _run(model, [name, device], timeout_s, env)
                rows.append(_row(name, device, other, expected.result))
    progress("testing", len(wanted) + 1, len(wanted) + 1)
    return rows


def _run(
    model: Path, names: Sequence[str], timeout_s: float, env: Mapping[str, str]
) -> children.Ended:
    """Run a self-test. A reason that it tells itself is moved to the reason of the process."""
    ended = children.run("phicore.lab.selftest", [str(model), *names], timeout_s=timeout_s, env=env)
    if ended.result is not None and "reason" in ended.result:
        return children.Ended(ended.seconds, reason=ended.result["reason"])
    return ended


def _row(
    backend: str,
    device: str | None,
    ended: children.Ended,
    expected: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return a row of the report's tests."""
    row: dict[str, Any] = {
        "backend": backend,
        "device": device,
        "outcome": "failed",
        "reason": ended.reason,
        "relative_error": None,
        "seconds": round(ended.seconds, 2),
        "load_s": None,
        "text_s": None,
    }
    found = ended.result
    if found is None:
        return row
    row |= {name: round(found[name], 3) for name in ("load_s", "text_s")}
    row["device"] = found["device"]
    if expected is None:
        return {**row, "reason": "it runs, but there is nothing to compare it with"}
    error = relative_error(np.array(found["logits"]), np.array(expected["logits"]))
    row["relative_error"] = error if np.isfinite(error) else None
    row["reason"] = _difference(found["tokens"], expected["tokens"], error)
    if row["reason"] is None:
        row["outcome"] = "passed"
    return row


def _difference(tokens: Sequence[int], expected: Sequence[int], error: float) -> str | None:
    """Say in one line how a backend's results differ from what they should be, if they do."""
    said = []
    if tokens != expected:
        pairs = zip(tokens, expected, strict=False)
        same = next(
            (i for i, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(expected))
        )
        said.append(f"another greedy text from token {same + 1} on")
    if not error <= FLOAT32_LOGITS:  # true for NaN, too
        said.append(f"relative error of the logits {error:.1e}, more than {FLOAT32_LOGITS:g}")
    return "; ".join(said) or None
