"""How `phicore chat` reads messages: with prompt_toolkit on a terminal, else line by line."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from phicore.chat.blocks import is_open
from phicore.chat.chat import Chat
from phicore.chat.commands import BY_NAME, COMMANDS
from phicore.cli.chat_signals import ENDING, handled
from phicore.errors import ArgumentError

if TYPE_CHECKING:
    from prompt_toolkit.completion import CompleteEvent, Completer
    from prompt_toolkit.document import Document
    from prompt_toolkit.formatted_text import AnyFormattedText

PROMPT, CONTINUED = ">>> ", "... "


class Reader(Protocol):
    """Reads what the user writes."""

    def read(self, draft: str = "") -> str:
        """Return the next message or command, which may have several lines.

        Args:
            draft: A text that the user can change, if the reader can show it.
        Raises:
            EOFError: If there is none.
            KeyboardInterrupt: If the user has pressed Ctrl-C.
        """
        ...


class LineReader:
    """Reads lines from standard input; a block between triple quotes is one message.

    Args:
        asks: Whether prompts are shown, on standard error.
    """

    def __init__(self, asks: bool) -> None:
        self._asks = asks
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="strict")  # in the C locale, it would take invalid bytes

    def read(self, draft: str = "") -> str:
        text = self._line(PROMPT)
        while is_open(text):
            try:
                text += "\n" + self._line(CONTINUED)
            except EOFError:
                break  # the end of the input ends a block
        return text

    def _line(self, prompt: str) -> str:
        if self._asks:
            sys.stderr.write(prompt)
            sys.stderr.flush()
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise ArgumentError(f"standard input is not {error.encoding} text: {error}") from None
        if not line:
            raise EOFError
        return line.removesuffix("\n").removesuffix("\r")


class TerminalReader:
    """Reads from a terminal, with editing, history, several lines and completion.

    Args:
        chat: The chat, for completion.
        history: The file of what was entered before; None keeps nothing.
        status: Returns a text for the line below.
    """

    def __init__(self, chat: Chat, history: Path | None, status: Callable[[], str]) -> None:
        import prompt_toolkit
        from prompt_toolkit.filters import Condition
        from prompt_toolkit.history import FileHistory, History, InMemoryHistory
        from prompt_toolkit.styles import Style

        past: History = InMemoryHistory()
        if history is not None:
            with suppress(OSError):
                history.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                history.touch(mode=0o600)
                past = FileHistory(str(history))

        is_command = Condition(
            lambda: self._session.default_buffer.document.text_before_cursor.startswith("/")
        )
        self._session: prompt_toolkit.PromptSession[str] = prompt_toolkit.PromptSession(
            [("class:prompt", PROMPT)],
            history=past,
            multiline=True,
            prompt_continuation=_continuation,
            completer=_completer(chat),
            complete_while_typing=is_command,
            reserve_space_for_menu=6,
            key_bindings=_keys(),
            bottom_toolbar=lambda: [("class:status", status())],
            enable_open_in_editor=True,
            style=Style.from_dict(
                {
                    "prompt": "bold ansicyan",
                    "continuation": "ansicyan",
                    "bottom-toolbar": "noreverse",
                    "status": "noreverse dim",
                }
            ),
        )

    def read(self, draft: str = "") -> str:
        """Return the next message; a signal that ends the chat raises SystemExit in its place.

        An exception that a handler raises amid the event loop can be lost there, so the handler
        only notes the signal, and the loop leaves the prompt. The second signal does raise.
        """
        app, ended = self._session.app, 0

        def end(number: int, _: object) -> None:
            nonlocal ended
            if ended:
                raise SystemExit(128 + number)
            ended = number
            if app.loop is not None:
                app.loop.call_soon_threadsafe(leave)

        def leave() -> None:
            if ended and app.future is not None and not app.future.done():
                app.exit(exception=SystemExit(128 + ended))

        with handled(ENDING, end):
            text = self._session.prompt(default=draft, pre_run=leave)
        if ended:
            raise SystemExit(128 + ended)
        return text


def _continuation(width: int, number: int, is_wrapped: int) -> AnyFormattedText:
    """Return what stands before a further line; one that the terminal has wrapped has no dots."""
    return [("class:continuation", " " * len(CONTINUED) if is_wrapped else CONTINUED)]


def _keys() -> Any:
    """Return the keys that differ from prompt_toolkit's: Enter sends, Alt-Enter is a new line."""
    from prompt_toolkit.filters import has_focus, is_searching
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()
    is_here = has_focus("DEFAULT_BUFFER") & ~is_searching

    @keys.add("enter", filter=is_here)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=is_here)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _completer(chat: Chat) -> Completer:
    from prompt_toolkit.completion import Completer, Completion

    class Commands(Completer):
        """Completes commands, and their arguments."""

        def get_completions(
            self, document: Document, complete_event: CompleteEvent
        ) -> Iterator[Completion]:
            for start, word, help in completions(chat, document.text_before_cursor):
                yield Completion(word, start_position=-start, display_meta=help)

    return Commands()


def completions(chat: Chat, text: str) -> Iterable[tuple[int, str, str]]:
    """Return what may come at the end of a text.

    Returns:
        For each: how many characters of the text it replaces, the word, and a help text.
    """
    if not text.startswith("/"):
        return []
    name, space, argument = text[1:].partition(" ")
    if not space:
        return [(len(text), f"/{c.name}", c.help) for c in COMMANDS if c.name.startswith(name)]
    command = BY_NAME.get(name)
    if command is None:
        return []
    words = dict.fromkeys(command.words(chat))
    return [(len(argument), word, "") for word in words if word.startswith(argument)]


def is_terminal() -> bool:
    """Return whether a person sits at a terminal that can move its cursor."""
    is_dumb = os.environ.get("TERM") in ("dumb", "unknown", "")
    return sys.stdin.isatty() and sys.stdout.isatty() and not is_dumb


@contextmanager
def silent_keys() -> Iterator[None]:
    """Do not show what is typed, which would stand amid an answer; it is read later."""
    try:
        import termios

        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
    except Exception:  # noqa: BLE001 - no terminal of POSIX
        yield
        return
    after = [*before]
    after[3] = before[3] & ~termios.ECHO  # the local flags
    termios.tcsetattr(descriptor, termios.TCSADRAIN, after)
    try:
        yield
    finally:
        with suppress(termios.error):  # the terminal may be gone
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
