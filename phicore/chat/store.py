"""The folder in which conversations are kept, and the saved rows beside them."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from phicore.chat.conversation import Conversation
from phicore.chat.files import from_json, to_json
from phicore.disk.replacing import remove_left, replacing
from phicore.errors import ArgumentError, ConversationError

DATA = "PHICORE_DATA"
"""The environment variable that names another folder for data."""

_ENDING, _ROWS = ".json", ".rows"
_NAME = re.compile(r"[^\W_][\w .-]{0,99}")


def data_path() -> Path:
    """Return the folder of the user's data, which need not exist.

    It is the environment variable PHICORE_DATA, or else phicore's folder among the platform's
    application data.
    """
    if path := os.environ.get(DATA):
        return Path(path).expanduser()
    import platformdirs

    return platformdirs.user_data_path("phicore", appauthor=False)


class Store:
    """The conversations in a folder: for each a JSON file and, perhaps, a file of saved rows.

    Rows are what the engine has computed for a conversation (`Model.save_session`). They can be
    made again, so the oldest ones are removed when all have more than a number of bytes.

    Args:
        folder: The folder. It is made when something is written, for the user alone.
        most_bytes: The largest number of bytes of all rows.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder = folder
        self.most_bytes = most_bytes
        self._seen: dict[str, tuple[int, int, int]] = {}

    def path(self, name: str) -> Path:
        """Return the file of a conversation."""
        return self.folder / f"{name}{_ENDING}"

    def rows_path(self, name: str) -> Path:
        """Return the file of a conversation's rows."""
        return self.folder / f"{name}{_ROWS}"

    def names(self) -> list[str]:
        """Return the names of all conversations, the one that was changed last first."""
        found = []
        with suppress(OSError):
            for path in self.folder.glob(f"*{_ENDING}"):
                with suppress(OSError):  # it may have been removed meanwhile
                    found.append((path.stat().st_mtime_ns, path.name.removesuffix(_ENDING)))
        return [name for _, name in sorted(found, reverse=True)]

    def load(self, name: str) -> Conversation:
        """Read a conversation.

        Raises:
            ArgumentError: If the name cannot be one.
            ConversationError: If there is none of this name, or its file is damaged.
        """
        path = self.path(checked_name(name))
        try:
            conversation = from_json(path.read_text(encoding="utf-8"), name)
        except FileNotFoundError:
            raise ConversationError(
                f"there is no conversation {name!r}; /sessions lists them"
            ) from None
        except OSError as error:
            raise ConversationError(f"{path}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConversationError(f"{path}: damaged: not UTF-8 text") from None
        except ConversationError as error:
            raise ConversationError(f"{path}: {error.problem}") from None
        self._seen[name] = _state(path)
        return conversation

    def save(self, conversation: Conversation) -> bool:
        """Write a conversation. An older file is replaced only when the new one is complete.

        A conversation without a name gets one. If another program has changed the file, the
        conversation gets a new name, so that nothing is lost.

        Returns:
            Whether it got a new name because of another program.
        Raises:
            ConversationError: If the file cannot be written.
        """
        name, is_new_name = conversation.name, False
        if name and name in self._seen and _state(self.path(name)) not in (self._seen[name], _GONE):
            name, is_new_name = self._free(name), True
        elif not name:
            name = self._free(_name_for(conversation))
        with _replacing(self.path(name)) as new:
            new.write_text(to_json(conversation), encoding="utf-8")
        conversation.name = name
        self._seen[name] = _state(self.path(name))
        return is_new_name

    def rename(self, conversation: Conversation, name: str) -> None:
        """Give a conversation another name.

        Raises:
            ArgumentError: If the name cannot be one, or another conversation has it.
            ConversationError: If the file cannot be written.
        """
        old = conversation.name
        if checked_name(name) == old:
            return
        if self.path(name).exists():
            raise ArgumentError(f"there is a conversation {name!r} already; take another name")
        conversation.name = name
        try:
            self.save(conversation)
        except ConversationError:
            conversation.name = old
            raise
        if old:
            with suppress(OSError):
                self.path(old).unlink(missing_ok=True)
                self.rows_path(old).replace(self.rows_path(name))

    def remove(self, conversation: Conversation) -> None:
        """Remove the file of a conversation that has become empty."""
        if conversation.name:
            for path in (self.path(conversation.name), self.rows_path(conversation.name)):
                with suppress(OSError):
                    path.unlink(missing_ok=True)
            conversation.name = ""

    # ---- rows ----------------------------------------------------------------------------------

    def save_rows(self, name: str, write: Callable[[Path], int]) -> int:
        """Save the rows of a conversation, and remove the oldest rows that are too many.

        Args:
            write: Writes a file, and returns the number of tokens in it.
        Returns:
            The number of tokens.
        Raises:
            PhicoreError: If `write` raises it.
        """
        path = self.rows_path(name)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        count = write(path)
        if count:
            with suppress(OSError):
                path.chmod(0o600)
        self.remove_old_rows()
        return count

    def touch_rows(self, name: str) -> None:
        """Note that the rows of a conversation were used now."""
        with suppress(OSError):
            os.utime(self.rows_path(name))

    def remove_old_rows(self) -> None:
        """Remove the rows that were not used for longest, until the rest is small enough."""
        found = []
        for path in self.folder.glob(f"*{_ROWS}"):
            with suppress(OSError):
                state = path.stat()
                found.append((state.st_mtime_ns, state.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.most_bytes:
                return
            with suppress(OSError):
                path.unlink(missing_ok=True)
            total -= size

    def _free(self, name: str) -> str:
        """Return the name, or the name with a number, which no conversation has."""
        number, free = 1, name
        while self.path(free).exists():
            number += 1
            free = f"{name}-{number}"
        return free


def checked_name(name: str) -> str:
    """Return a name that can be a conversation's.

    Raises:
        ArgumentError: If it cannot be the name of a file in the folder.
    """
    if not _NAME.fullmatch(name):
        expected = "letters, digits, spaces, '.', '-' and '_', 100 at most, a letter or digit first"
        raise ArgumentError(f"the name of a conversation has {expected}; got {name!r:.60}")
    return name


def _name_for(conversation: Conversation) -> str:
    """Make a name from the time and the first words."""
    words = re.findall(r"[^\W_]+", conversation.title.lower())
    start = ""
    for word in words:
        if len(start) + len(word) > 30:
            break
        start += f"-{word}"
    return time.strftime("%Y-%m-%d-%H%M") + start


_GONE = (0, 0, 0)


def _state(path: Path) -> tuple[int, int, int]:
    """Return what tells whether a file was changed, also if the clock was set back meanwhile."""
    try:
        state = path.stat()
    except OSError:
        return _GONE
    return state.st_ino, state.st_mtime_ns, state.st_size


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Replace a file by a new one, which nobody but the user can read, when that is complete.

    Raises:
        ConversationError: If it cannot be written.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        remove_left(path.parent)
        with replacing(path, mode=0o600) as new:
            yield new
    except OSError as error:
        raise ConversationError(f"{path}: cannot be written: {error.strerror}") from error
