"""Removes from texts what tells who somebody is: folders, the user's name, the machine's name."""

from __future__ import annotations

import getpass
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any


def remover() -> Callable[[Any], Any]:
    """Return a function that cleans the texts in data of JSON.

    The home folder becomes `~`, the user's name `USER` and the host's name `HOST`, as whole words.
    """
    rules: list[tuple[re.Pattern[str], str]] = []
    homes = {str(Path.home()), os.path.realpath(Path.home())} - {os.path.sep}
    for home in sorted(homes, key=len, reverse=True):
        rules.append((re.compile(rf"{re.escape(home)}(?![\w.-])"), "~"))
    host = socket.gethostname()
    for name in dict.fromkeys((host, host.partition(".")[0])):
        if name and name != "localhost":
            rules.append((_word(name), "HOST"))
    user = _user()
    if user:
        rules.append((_word(user), "USER"))

    def cleaned(value: Any) -> Any:
        if isinstance(value, str):
            for pattern, other in rules:
                value = pattern.sub(other, value)
            return value
        if isinstance(value, dict):
            return {key: cleaned(each) for key, each in value.items()}
        if isinstance(value, list):
            return [cleaned(each) for each in value]
        return value

    return cleaned


def _word(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])", re.IGNORECASE)


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's user may have no name
        return None
