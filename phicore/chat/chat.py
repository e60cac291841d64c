"""A chat with a model: what is asked, what the answers need, and what is kept of them."""

from __future__ import annotations

import secrets
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from phicore.chat.conversation import Conversation, Turn
from phicore.chat.settings import PARAMETERS
from phicore.chat.store import Store
from phicore.errors import (
    ArgumentError,
    ContextError,
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
    from phicore.text.pieces import Piece

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
        self._check_room(turn, len(request.prompt_ids))
        self._let_prefix_fit(request)
        generation = self.model.generate(request)
        if self.next_seed is not None:
            self.next_seed = (self.next_seed + 1) % 2**64
        talk.add(turn)
        self.save()  # so that the message is not lost, whatever happens
        return Answering(self, turn, generation)

    def _let_prefix_fit(self, request: Request) -> None:
        """Let the prefix cache hold this conversation, however large it becomes.

        A cache has up to twice the slots that its tokens need.
        """
        engine = self.model.engine
        answer = self.model.context if request.max_tokens == -1 else request.max_tokens
        tokens = min(len(request.prompt_ids) + answer, self.model.context)
        needed = engine.runner.slot_bytes * engine.runner.capacity_for(tokens)
        engine.prefixes.most_bytes = max(self._prefix_bytes, needed)

    def ended(self, turn: Turn, generation: Generation) -> None:
        """Store the answer of a turn that has ended."""
        self._generation = generation
        self.timings = generation.timings
        self._used = ((turn.number, turn.dropped), len(generation.token_ids))
        self.conversation.add(turn)
        self.save()
        left = self.model.context - self._used[1]
        if turn.finish_reason == "context":
            self._tell(f"stopped: the context of {self.model.context} tokens is full; {_WAYS}")
        elif left < self.model.context // SMALL and not self._is_told_small:
            self._tell(
                f"{left} of {self.model.context} tokens of the context are left; {_WAYS} when "
                "that is too little"
            )
        self._is_told_small = left < self.model.context // SMALL

    def discard(self, turn: Turn, generation: Generation) -> None:
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
            tokens = self._tokens_of(replace(last, dropped=talk.dropped))
            self._used = (place, tokens + last.generated_tokens)
        return self._used[1]

    def _tokens_of(self, turn: Turn) -> int:
        return len(self.model.encode(self.conversation.messages_of(turn)))

    def _check_room(self, turn: Turn, tokens: int) -> None:
        """Tell the user when a prompt leaves little room for an answer.

        Raises:
            ContextError: If it leaves none.
        """
        context = self.model.context
        most = turn.options["max_tokens"]
        wanted = min(context // 16, 256, context if most == -1 else most)
        if tokens + wanted <= context:
            return
        hint = self._hint(turn, context - wanted)
        if tokens >= context:
            raise ContextError(
                f"the message is not sent: with it, the conversation has {tokens} tokens, and the "
                f"context holds {context}, the answer included; {hint}"
            )
        self._tell(f"{context - tokens} tokens of the context are left for the answer; {hint}")

    def _hint(self, turn: Turn, most: int) -> str:
        """Return what makes a prompt have at most a number of tokens."""
        path = self.conversation.path(turn.parent)
        counts = range(1, len(path) - turn.dropped + 1)

        def fits(count: int) -> bool:
            return self._tokens_of(replace(turn, dropped=turn.dropped + count)) <= most

        if (found := bisect_left(counts, True, key=fits)) < len(counts):
            count = counts[found]
            turns = "turn" if count == 1 else f"{count} turns"
            return f"/drop {count} makes room (the model forgets the oldest {turns}); {_OTHERS}"
        if not path:
            return "shorten the message, or begin with a larger --ctx"
        return "no turns make enough room: shorten the message, or /clear begins anew"

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


class Answering:
    """An answer under way: an iterator of pieces, and a context manager that stores it at the end.

    Attributes:
        turn: The turn, without its answer until the context ends.
        generation: The generation.
        is_discarded: Whether nothing was there to keep when the context ended.
    """

    def __init__(self, chat: Chat, turn: Turn, generation: Generation) -> None:
        self.turn = turn
        self.generation = generation
        self.is_discarded = False
        self._chat = chat
        self._pieces: list[Piece] = []

    @property
    def text(self) -> str:
        """Return the text so far."""
        return "".join(piece.text for piece in self._pieces)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        piece = next(self.generation)
        self._pieces.append(piece)
        return piece

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.generation.close()
        reason = self._pieces[-1].finish_reason if self._pieces else None
        if not self.text and reason is None:
            self.is_discarded = True
            self._chat.discard(self.turn, self.generation)
            return
        timings = self.generation.timings
        self.turn = replace(
            self.turn,
            answer=self.text,
            finish_reason=reason or "interrupted",
            prompt_tokens=timings.prompt_tokens,
            cached_tokens=timings.cached_tokens,
            generated_tokens=len(self._pieces),
        )
        self._chat.ended(self.turn, self.generation)


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


_OTHERS = "/undo takes back the last turn, /clear begins anew"
_WAYS = f"/drop N lets the model forget the oldest turns, {_OTHERS}"
