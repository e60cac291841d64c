"""The loop of `phicore chat`: reads a message or a command, and shows what comes of it."""

from __future__ import annotations

import json
import signal
import sys
from typing import TYPE_CHECKING, Any

from phicore.chat import commands
from phicore.chat.answering import Answering
from phicore.chat.blocks import content
from phicore.chat.chat import Chat
from phicore.chat.conversation import Conversation, Turn
from phicore.chat.file_commands import resumed_lines
from phicore.chat.replies import Reply
from phicore.chat.store import Store, data_path
from phicore.cli.chat_input import LineReader, Reader, TerminalReader, is_terminal, silent_keys
from phicore.cli.chat_output import Output, PlainOutput, Silence
from phicore.cli.chat_signals import Stop
from phicore.cli.clipboard import copy
from phicore.cli.terminal import Console, ProgressLine, printable
from phicore.errors import PhicoreError
from phicore.model import Model
from phicore.progress import AGAIN

if TYPE_CHECKING:
    from phicore.cli.markdown import MarkdownStream


class Loop:
    """Runs a chat between a person, or a pipe, and a model.

    Attributes:
        failures: The number of messages and commands that failed, where nobody sits at a terminal.
    """

    def __init__(
        self,
        console: Console,
        line: ProgressLine,
        swallowed: list[object],
        *,
        markdown: bool,
        as_json: bool,
    ) -> None:
        """Prepare a loop.

        Args:
            console: Shows lines to the user.
            line: Shows progress.
            swallowed: Gets an item with each Ctrl-C that a library has swallowed.
            markdown: Whether Markdown is rendered on a terminal.
            as_json: Whether each answer is printed as a line of JSON.
        """
        self.failures = 0
        self._console = console
        self._line = line
        self._swallowed = swallowed
        self._as_json = as_json
        self._is_terminal = is_terminal()
        self._has_person = sys.stdin.isatty()
        self._markdown = markdown and self._is_terminal and not as_json
        self._stop = Stop()
        self._is_loaded = False
        self._markdown_stream: MarkdownStream | None = None

    def progress(self, what: str, done: int, total: int) -> None:
        """Show progress. If an answer is to stop, raise KeyboardInterrupt between two chunks."""
        if what == "prompt" and done < total and self._stop.number is not None:
            raise KeyboardInterrupt
        if not self._is_loaded or self._is_terminal:
            self._line(what, done, total)
            if what == AGAIN and self._markdown_stream is not None:
                self._markdown_stream.restart()  # the line was written after the text

    def run(
        self,
        model: Model,
        conversation: Conversation,
        store: Store | None,
        *,
        seed: int | None,
        first: str | None,
    ) -> None:
        """Run the chat until it ends.

        Args:
            seed: The seed of the first answer; None takes random seeds.
            first: The first message, if it is known already.
        Raises:
            PhicoreError: If there is no chat with this model.
        """
        chat = Chat(model, conversation, store, seed=seed, tell=self._console.say)
        self._is_loaded = True
        reader = self._reader(chat)
        if conversation.turns:
            self._show(chat, Reply(resumed_lines(chat), turn=conversation.last))
        elif self._has_person:
            self._console.say(f"{model.path.name} on {model.backend}; /help lists the commands")
        try:
            if first is not None:
                if self._is_terminal:
                    print(f">>> {printable(first)}")
                self._say(chat, first)
            draft, edits = "", False
            while True:
                try:
                    text = reader.read(draft)
                except KeyboardInterrupt:
                    if not self._has_person:
                        raise
                    self._say_interrupted(edits)
                    draft, edits = "", False
                    continue
                except EOFError:
                    break
                was_edit, draft, edits = edits, "", False
                reply = self._turn(chat, text, is_edit=was_edit)
                if reply.ends:
                    break
                draft, edits = reply.draft or "", reply.edits
                if draft and not isinstance(reader, TerminalReader):
                    if edits:
                        self._console.say("expected /edit TEXT, since this is no terminal")
                    draft, edits = "", False
        finally:
            self._leave(chat)

    def _leave(self, chat: Chat) -> None:
        """Save what can be large, and show meanwhile that the program has not hung."""
        self._console.text_ends()
        if self._is_terminal:
            self._line("saving what was read", 0, 1)
        try:
            chat.leave()
        finally:
            self._line.stop()

    def _reader(self, chat: Chat) -> Reader:
        if not self._is_terminal:
            return LineReader(asks=self._has_person)
        history = None if chat.store is None else data_path() / "history"
        return TerminalReader(chat, history, lambda: _status(chat))

    def _say_interrupted(self, edits: bool) -> None:
        if edits:
            self._console.say("the message stays as it was")
        elif not self._is_terminal:
            self._console.say("")  # the terminal has shown ^C

    # ---- a message or a command ----------------------------------------------------------------

    def _turn(self, chat: Chat, text: str, *, is_edit: bool) -> Reply:
        """Do what a line says, and return what is left to do."""
        command = None if is_edit else commands.split(text)
        if self._has_person and not is_edit and text.strip() in ("exit", "quit"):
            command = ("bye", "")  # as in other programs
        if command is None:
            text = content(commands.message_of(text))
            if text.strip() and not self._say(chat, text, is_edit=is_edit):
                return Reply(draft=text, edits=is_edit)
            return Reply()
        try:
            reply = commands.run(chat, *command)
        except PhicoreError as error:
            self._fail(error)
            return Reply()
        self._show(chat, reply)
        return reply

    def _say(self, chat: Chat, text: str, *, is_edit: bool = False) -> bool:
        """Send a message; return False if the user has stopped it before the answer began."""
        try:
            answering = chat.edit(text) if is_edit else chat.ask(text)
        except PhicoreError as error:
            self._fail(error)
            return True
        self._answer(answering)
        return not answering.is_discarded

    def _fail(self, error: PhicoreError) -> None:
        self.failures += not self._has_person
        self._console.say(error.worded())

    def _show(self, chat: Chat, reply: Reply) -> None:
        """Show what a command replies."""
        if reply.rows:
            self._console.table(reply.rows)
        for line in reply.lines:
            self._console.say(line)
        if reply.turn is not None and self._is_terminal:
            self._show_turn(reply.turn)
        if reply.copied is not None:
            try:
                way = copy(reply.copied, self._write if self._is_terminal else None)
            except PhicoreError as error:
                self._fail(error)
            else:
                self._console.say(f"copied {len(reply.copied)} characters {way}")
        if reply.answering is not None:
            self._answer(reply.answering)

    def _show_turn(self, turn: Turn) -> None:
        """Show a turn again."""
        print(f">>> {printable(turn.user)}")
        output = self._output()
        output.push(turn.answer)
        output.close()
        print()

    def _output(self) -> Output:
        if self._as_json:
            return Silence()
        if not self._markdown:
            return PlainOutput()
        from phicore.cli.markdown import MarkdownStream, new_console

        self._markdown_stream = MarkdownStream(new_console(), self._write)
        return self._markdown_stream

    @staticmethod
    def _write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    # ---- answers -------------------------------------------------------------------------------

    def _answer(self, answering: Answering) -> None:
        """Run an answer and show it, until it ends or the user stops it."""
        output = self._output()
        self._swallowed.clear()
        self._console.text_ends()
        with self._stop.watching(), silent_keys():  # a signal leaves no terminal silent
            try:
                with answering:
                    self._run(answering, output)
            except KeyboardInterrupt:
                self._line.stop()
            except PhicoreError as error:
                self._line.stop()
                self._fail(error)
        if answering.is_discarded:
            if self._stop.number is not None and self._has_person:
                self._console.say("stopped before the answer began")
        elif self._as_json:
            print(json.dumps(_result(answering), ensure_ascii=False), flush=True)
        self._after(answering)

    def _run(self, answering: Answering, output: Output) -> None:
        try:
            for piece in answering:
                if piece.text:
                    self._console.text_begins()
                output.push(piece.text)
                if self._stop.number is not None or self._swallowed:
                    break
        finally:
            # Whoever ends the program, unlike Ctrl-C, does not want to change the message.
            answering.keeps_message = self._stop.number not in (None, signal.SIGINT)
            output.close()

    def _after(self, answering: Answering) -> None:
        """Say why an answer has ended, if it is not complete, and obey signals."""
        reason, number = answering.turn.finish_reason, self._stop.number
        if self._has_person and not answering.is_discarded:
            if reason == "interrupted":
                self._console.say("stopped; what is there is kept, /undo removes it")
            elif reason == "length":
                most = answering.turn.options["max_tokens"]
                self._console.say(f"stopped after {most} tokens; /set max_tokens changes that")
        if self._is_terminal:
            print(flush=True)
        if number is None:
            return
        if not self._has_person and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number != signal.SIGINT:
            raise SystemExit(128 + number)


def _result(answering: Answering) -> dict[str, Any]:
    turn = answering.turn
    return {
        "text": turn.answer,
        "finish_reason": turn.finish_reason,
        "seed": turn.seed,
        "prompt_tokens": turn.prompt_tokens,
        "cached_tokens": turn.cached_tokens,
        "generated_tokens": turn.generated_tokens,
    }


def _status(chat: Chat) -> str:
    """Return the line below the input: the model, the use of the context, the speed."""
    t = chat.timings
    parts = [chat.model.path.stem[:40], f"{chat.used()} of {chat.model.context} tokens"]
    if t is not None and t.decode_tokens_per_s > 0:
        parts.append(f"{t.decode_tokens_per_s:.0f} tokens/s")
    if (last := chat.conversation.last) is not None:
        parts.append(f"seed {last.seed}")
    return " · ".join(parts)
