"""What is installed, told by a process of its own, since a plugin may end the process.

`phicore doctor` runs this module as a program: `python -m phicore.lab.survey RESULT.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from phicore.plugins import Plugins


def survey() -> dict[str, Any]:
    """Load the installed plugins, without their tensor libraries.

    Returns:
        `plugins`, rows with `name`, `distribution`, `version`, `status` and `is_broken`; and
        `backends`, rows with `name`, `distribution` and `version`.
    """
    found = Plugins()
    backends = [
        {"name": info.name, "distribution": info.distribution, "version": info.version}
        for info in found.backends().values()
    ]
    rows: list[tuple[str, str, str | None, str, bool]] = [
        (p.name, p.distribution, p.version, "; ".join(p.provides) or "provides nothing", False)
        for p in found.installed()
    ]
    rows += [(p.name, p.distribution, None, f"not usable: {p.reason}", True) for p in found.broken]
    rows += [(name, owner, None, "switched off", False) for name, owner in found.disabled]
    columns = ("name", "distribution", "version", "status", "is_broken")
    return {
        "plugins": [dict(zip(columns, row, strict=True)) for row in rows],
        "backends": backends,
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(survey()), encoding="utf-8")
