"""A chat with a model: what is asked, what the answers need, and what is kept of them."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phicore.chat.answering import Answering
from phicore.chat.context import WAYS, checked_room, tokens_of
from phicore.chat.conversation import Conversation, Turn
from phicore.chat.settings import PARAMETERS
from phicore.chat.store import Store
from phicore.errors import (
    ArgumentError,
    ConversationError,
    PhicoreError,
    TokenizerError,
)
from phicore.sources import ALIASES

if TYPE_CHECKING:
    from phicore.engine import Request
    from phicore.engine.timings import Timings
    from phicore.generation import Generation
    from phicore.model import Model

SMALL = 5
"""A context is told to be small when less than this part of it is left: a fifth."""


class Chat:
    """A conversation with a model. It is changed by `ask`, `retry`, `edit` and the commands.

    Attributes:
        model: The model.
        conversation: The conversation.
        store: The folder of conversations; None keeps nothing.
        next_seed: The seed of the next answer, which grows by one with each; None takes random
            seeds.
        timings: The times of the last answer; None before the first one.
    """

    def __init__(
        self,
        model: Model,
        conversation: Conversation | None = None,
        store: Store | None = None,
        *,
        seed: int | None = None,
        tell: Callable[[str], None],
    ) -> None:
        """Begin or resume a chat.

        Args:
            seed: The value of `next_seed`.
            tell: Tells the user something in a line.
        Raises:
            ArgumentError: If a setting of the conversation is not allowed.
            TokenizerError: If the model has no chat template, or one that refuses the system
                message.
        """
        self.model = model
        self.conversation = conversation or Conversation()
        self.store = store
        self.next_seed = seed
        self.timings: Timings | None = None
        self._tell = tell
        self._generation: Generation | None = None
        # The number of a turn, and of dropped turns; and the number of tokens up to its end.
        self._used: tuple[tuple[int, int], int] = ((0, 0), 0)
        self._is_told_small = False
        self._is_saving_broken = False
        self._prefix_bytes = model.engine.prefixes.most_bytes
        self.check()
        self._load_rows()

    # ---- parameters ----------------------------------------------------------------------------

    def defaults(self) -> dict[str, Any]:
        """Return the value of each parameter that the user has not set."""
        own = {name: each.default for name, each in PARAMETERS.items()}
        return {**own, **asdict(self.model.sampling)}

    def options(self) -> dict[str, Any]:
        """Return the value of each parameter."""
        return {**self.defaults(), **self.conversation.settings}

    def set(self, name: str, value: Any) -> None:
        """Set a parameter for the next answers; None takes the default again.

        Raises:
            ArgumentError: If the value is not allowed. It stays as it was.
        """
        settings = {**self.conversation.settings, name: value}
        if value is None:
            del settings[name]
        self.model.request([0], seed=self.next_seed, **{**self.defaults(), **settings})
        self.conversation.settings = settings

    def set_system(self, text: str | None) -> None:
        """Set the system message for the next answers; None is none.

        Raises:
            TokenizerError: If the model's chat template refuses it. It stays as it was.
        """
        before = self.conversation.system
        self.conversation.system = None if text is None else checked_text(text)
        try:
            self.check()
        except PhicoreError:
            self.conversation.system = before
            raise

    def check(self) -> None:
        """Check that the model can be asked something with this system message and settings.

        Raises:
            ArgumentError: If a setting is not allowed.
            TokenizerError: If the chat template refuses the messages.
        """
        system = self.conversation.system
        if system is not None:
            checked_text(system)
        messages = Conversation().messages("?", None, system=system, dropped=0)
        try:
            self.model.request(messages, seed=self.next_seed, **self.options())
        except TokenizerError as error:  # a chat has no --raw
            problem = error.problem.replace("use --raw to send", "phicore generate --raw sends")
            raise TokenizerError(problem) from error

    # ---- answers -------------------------------------------------------------------------------

    def ask(self, text: str) -> Answering:
        """Begin the answer to the next message.

        Raises:
            ContextError: If the message does not fit. The message says what can be done.
            PhicoreError: If there is no answer for another reason.
        """
        return self._begin(text, self.conversation.current)

    def retry(self) -> Answering:
        """Begin another answer to the last message."""
        last = self._last("retry")
        return self._begin(last.user, last.parent)

    def edit(self, text: str) -> Answering:
        """Begin the answer to another message in place of the last one."""
        return self._begin(text, self._last("edit").parent)

    def _last(self, command: str) -> Turn:
        if self.conversation.last is None:
            raise ArgumentError(f"there is no message to {command}")
        return self.conversation.last

    def _begin(self, user: str, parent: int | None) -> Answering:
        if not checked_text(user).strip():
            raise ArgumentError("the message is empty")
        talk, options = self.conversation, self.options()
        seed = secrets.randbits(32) if self.next_seed is None else self.next_seed
        turn = Turn(
            number=talk.next_number,
            parent=parent,
            user=user,
            seed=seed,
            system=talk.system,
            dropped=min(talk.dropped, len(talk.path(parent))),
            options=options,
            model=_absolute(self.model.reference),
            backend=self.model.backend,
        )
        messages = talk.messages_of(turn)
        request = self.model.request(messages, seed=seed, **options)
        warning = checked_room(self.model, talk, turn, len(request.prompt_ids))
        if warning is not None:
            self._tell(warning)
        self._let_prefix_fit(request)
        generation = self.model.generate(request)
        if self.next_seed is not None:
            self.next_seed = (self.next_seed + 1) % 2**64
        talk.add(turn)
        self.save()  # so that the message is not lost, whatever happens
        return Answering(turn, generation, ended=self._end, discarded=self._discard)

    def _let_prefix_fit(self, request: Request) -> None:
        """Let the prefix cache hold this conversation, however large it becomes.

        A cache has up to twice the slots that its tokens need.
        """
        engine = self.model.engine
        answer = self.model.context if request.max_tokens == -1 else request.max_tokens
        tokens = min(len(request.prompt_ids) + answer, self.model.context)
        needed = engine.runner.slot_bytes * engine.runner.capacity_for(tokens)
        engine.prefixes.most_bytes = max(self._prefix_bytes, needed)

    def _end(self, turn: Turn, generation: Generation) -> None:
        """Store the answer of a turn that has ended."""
        self._generation = generation
        self.timings = generation.timings
        self._used = ((turn.number, turn.dropped), len(generation.token_ids))
        self.conversation.add(turn)
        self.save()
        left = self.model.context - self._used[1]
        if turn.finish_reason == "context":
            self._tell(f"stopped: the context of {self.model.context} tokens is full; {WAYS}")
        elif left < self.model.context // SMALL and not self._is_told_small:
            self._tell(
                f"{left} of {self.model.context} tokens of the context are left; {WAYS} when "
                "that is too little"
            )
        self._is_told_small = left < self.model.context // SMALL

    def _discard(self, turn: Turn, generation: Generation) -> None:
        """Forget a turn whose answer has not begun."""
        self._generation = generation
        self.conversation.discard(turn.number)
        self.save()

    # ---- the context ---------------------------------------------------------------------------

    def used(self) -> int:
        """Return how many tokens of the context the turns that the model sees have so far."""
        talk, last = self.conversation, self.conversation.last
        if last is None or talk.dropped == len(talk.path(last.number)):
            return 0
        place = (last.number, talk.dropped)
        if self._used[0] != place:
            tokens = tokens_of(self.model, talk, replace(last, dropped=talk.dropped))
            self._used = (place, tokens + last.generated_tokens)
        return self._used[1]

    # ---- what is kept --------------------------------------------------------------------------

    def save(self) -> None:
        """Write the conversation's file; a chat goes on without it if that fails."""
        if self.store is None:
            return
        if not self.conversation.turns:
            self.store.remove(self.conversation)
            return
        try:
            if self.store.save(self.conversation):
                self._tell(
                    "another program has changed the conversation's file; this one is now "
                    f"{self.conversation.name!r}"
                )
            self._is_saving_broken = False
        except ConversationError as error:
            if not self._is_saving_broken:  # once, not after each turn
                self._tell(f"the conversation is not saved: {error}")
            self._is_saving_broken = True

    def leave(self) -> None:
        """Save the rows of the conversation, so that it need not be read again later."""
        store, generation, name = self.store, self._generation, self.conversation.name
        if store is None or generation is None or not name or not self.conversation.turns:
            return
        self._generation = None
        tokens = generation.token_ids
        needed = self.model.engine.runner.slot_bytes * len(tokens)
        if needed > store.most_bytes:
            if store.most_bytes:
                self._tell(
                    f"what the model has read is not saved: it has {needed / 1e9:.1f} GB, and "
                    f"--saved-size allows {store.most_bytes / 1e9:.1f} GB"
                )
            return
        try:
            store.save_rows(name, lambda path: self.model.save_session(path, tokens))
        except (PhicoreError, OSError) as error:
            self._tell(f"what the model has read is not saved: {error}")

    def change_to(self, conversation: Conversation) -> None:
        """Leave the conversation for another one.

        Raises:
            PhicoreError: If the other one has settings or messages that the model refuses. The chat
                stays in its conversation.
        """
        before, self.conversation = self.conversation, conversation
        try:
            self.check()
        except PhicoreError:
            self.conversation = before
            raise
        self.conversation = before
        self.leave()
        self.conversation = conversation
        self._used = ((0, 0), 0)
        self._is_told_small = False
        self._load_rows()

    def _load_rows(self) -> None:
        """Load what was saved beside the conversation."""
        name = self.conversation.name
        if self.store is None or not name or not self.store.rows_path(name).exists():
            return
        path = self.store.rows_path(name)
        try:
            # What is loaded is needed now, so it may be as large as the file.
            prefixes = self.model.engine.prefixes
            prefixes.most_bytes = max(prefixes.most_bytes, 3 * path.stat().st_size)
            self.model.load_session(path)
            self.store.touch_rows(name)
        except (PhicoreError, OSError) as error:
            self._tell(f"the conversation is read again: {error}")


def checked_text(text: str) -> str:
    """Return a text.

    Raises:
        ArgumentError: If it has bytes in it that are no UTF-8, which Python keeps as surrogates.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ArgumentError("the text is not valid UTF-8") from None
    return text


def _absolute(reference: str) -> str:
    """Return a reference that means the same in another folder."""
    path = Path(reference)
    return str(path.resolve()) if reference not in ALIASES and path.is_file() else reference
