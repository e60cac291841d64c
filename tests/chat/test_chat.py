"""Tests of chats: the texts are those of `Model.generate`, and a turn reads only what is new."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from api.tiny_models import with_value, without, write_tiny

import phicore
from phicore.chat.chat import Chat
from phicore.chat.conversation import Conversation
from phicore.chat.store import Store
from phicore.errors import ArgumentError, ContextError, TokenizerError
from phicore.model import Model


def known_of(chat: Chat, tokens: list[int], after: Callable) -> tuple[int, int]:
    """Return how many tokens of an answer's prompt were known, and how many had to be."""
    answering = after()
    prompt = answering.generation.prompt_ids
    with answering:
        list(answering)
    most = min(len(prompt) - 1, len(tokens) - 1)
    same = next((i for i in range(most) if prompt[i] != tokens[i]), most)
    return answering.generation.timings.cached_tokens, same


def test_answers_are_those_of_generate(chat: Chat, model: Model, finish) -> None:
    chat.set("temperature", 1.5)
    chat.set_system("The sea and the wind.")
    for user in ("Tell me of it", "and of the land", "and more"):
        finish(chat.ask(user))
    talk = chat.conversation
    for turn in talk.turns:
        options = {"seed": turn.seed, "max_tokens": 8, "temperature": 1.5}
        assert turn.answer == model.generate(talk.messages_of(turn), **options).text()
    assert [turn.seed for turn in talk.turns] == [1, 2, 3]
    assert talk.messages_of(talk.turns[1]) == [
        {"role": "system", "content": "The sea and the wind."},
        {"role": "user", "content": "Tell me of it"},
        {"role": "assistant", "content": talk.turns[0].answer},
        {"role": "user", "content": "and of the land"},
    ]


def test_turn_reads_what_is_new_also_after_undo_and_retry(chat: Chat, finish) -> None:
    """The next turn's prompt begins with the tokens of the last, unless they are spelled anew."""
    first = finish(chat.ask("Tell me of the sea and of the wind in the land of ice."))
    tokens = first.generation.token_ids
    assert first.generation.timings.cached_tokens == 0

    known, expected = known_of(chat, tokens, lambda: chat.ask("and then"))
    assert known == expected >= len(first.generation.prompt_ids)
    last = chat.conversation.last
    assert last is not None
    assert last.cached_tokens == known

    chat.conversation.undo()
    known, expected = known_of(chat, tokens, lambda: chat.ask("or what else"))
    assert known >= expected >= len(first.generation.prompt_ids)  # the undone turn helps, too

    turn = chat.conversation.turns[-1]
    known, _ = known_of(chat, [], chat.retry)
    assert known == turn.prompt_tokens - 1


def test_resumed_chat_reads_what_is_new(chat: Chat, tiny: Path, store: Store, finish) -> None:
    first = finish(chat.ask("Tell me of the sea and of the wind in the land of ice."))
    chat.leave()
    with phicore.load(tiny, "numpy") as other:
        talk = store.load(chat.conversation.name)
        told: list[str] = []
        resumed = Chat(other, talk, Store(store.folder, 10**9), seed=2, tell=told.append)
        known, expected = known_of(
            resumed, first.generation.token_ids, lambda: resumed.ask("and then")
        )
        assert known == expected >= len(first.generation.prompt_ids)
        assert told == []
    again = finish(chat.ask("and then"))
    assert talk.turns[-1].answer == again.turn.answer  # the same seed and settings


def test_resumed_chat_of_another_model_says_that_it_reads_again(
    chat: Chat, store: Store, tmp_path: Path, finish
) -> None:
    finish(chat.ask("Tell me of the sea and of the wind in the land of ice."))
    chat.leave()
    path = write_tiny(tmp_path / "other.gguf", num_hidden_layers=3)
    told: list[str] = []
    with phicore.load(path, "numpy") as other:
        resumed = Chat(other, store.load(chat.conversation.name), store, tell=told.append)
        assert "the conversation is read again: " in told[0]
        assert "saved for another model" in told[0]
        assert len(told) == 1
        finish(resumed.ask("and then"))
    assert len(store.load(chat.conversation.name).turns) == 2


def test_rows_that_are_larger_than_allowed_are_not_saved(model, tmp_path, told, finish) -> None:
    store = Store(tmp_path / "c", 100)
    chat = Chat(model, store=store, tell=told.append)
    chat.set("max_tokens", 5)
    finish(chat.ask("Tell me of the sea and of the wind in the land of ice."))
    chat.leave()
    assert [path.suffix for path in store.folder.iterdir()] == [".json"]
    assert told == [
        "what the model has read is not saved: it has 0.0 GB, and --saved-size allows 0.0 GB"
    ]


def test_without_a_store_nothing_is_written(model: Model, tmp_path, finish, monkeypatch) -> None:
    monkeypatch.setenv("PHICORE_DATA", str(tmp_path / "data"))
    chat = Chat(model, tell=print)
    finish(chat.ask("Hello"))
    chat.leave()
    assert not (tmp_path / "data").exists()


def test_seeds_grow_by_one_and_give_the_same_answer_again(chat: Chat, finish) -> None:
    chat.set("temperature", 2)
    texts = [finish(chat.ask("Hello")).text]
    texts += [finish(chat.retry()).text for _ in range(3)]
    assert [turn.seed for turn in chat.conversation.turns] == [1, 2, 3, 4]
    chat.next_seed = 2
    assert finish(chat.retry()).text == texts[1]
    chat.next_seed = None
    finish(chat.retry())
    assert chat.conversation.turns[-1].seed not in (1, 2, 3, 4)


def test_largest_seed_is_followed_by_zero(chat: Chat, finish) -> None:
    chat.next_seed = 2**64 - 1
    finish(chat.ask("Hello"))
    assert chat.next_seed == 0


def test_message_is_in_the_file_before_the_answer(chat: Chat, store: Store) -> None:
    """A program that is killed loses what it was about to write, but not the message."""
    with chat.ask("Hello") as answering:
        next(answering)
        [turn] = store.load(chat.conversation.name).turns
        assert (turn.user, turn.answer, turn.finish_reason) == ("Hello", "", "interrupted")
    [turn] = store.load(chat.conversation.name).turns
    assert turn.answer == answering.text != ""


def test_answer_that_is_stopped_is_kept_and_goes_on(chat: Chat, finish) -> None:
    with chat.ask("Tell me of the sea and of the wind") as answering:
        while len(answering.text) < 2:
            next(answering)
    turn = chat.conversation.last
    assert turn is not None
    assert (turn.answer, turn.finish_reason) == (answering.text, "interrupted")
    finish(chat.ask("and then"))
    assert chat.conversation.turns[-1].cached_tokens >= turn.prompt_tokens


def test_message_is_kept_without_an_answer_if_it_is_to_be(chat: Chat, store: Store, finish) -> None:
    with chat.ask("Hello") as answering:
        answering.keeps_message = True
    assert not answering.is_discarded
    [turn] = store.load(store.names()[0]).turns
    assert (turn.user, turn.answer, turn.is_lost) == ("Hello", "", True)
    assert finish(chat.retry()).turn.answer


def test_answer_that_has_not_begun_is_not_kept(chat: Chat, store: Store, finish) -> None:
    with chat.ask("Hello") as answering:
        pass
    assert answering.is_discarded
    assert chat.conversation.turns == []
    assert store.names() == []
    finish(chat.ask("Hello"))
    with chat.ask("more"):
        pass
    assert [turn.user for turn in store.load(chat.conversation.name).turns] == ["Hello"]


def test_error_in_an_answer_keeps_what_is_there(chat: Chat) -> None:
    answering = chat.ask("Tell me of the sea")

    def fail() -> None:
        with answering:
            next(answering)
            next(answering)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert chat.conversation.turns[0].answer == answering.text


# ---- the context -------------------------------------------------------------------------------


LONG = "Tell me of the wind and of the ice in the land, and of the rest of it."


def ask_for_ever(chat: Chat, finish) -> None:
    for _ in range(40):
        finish(chat.ask(LONG))


def test_context_is_told_before_it_is_full(chat: Chat, told: list[str], finish) -> None:
    """The rest is told once when it is small, and again before an answer that it leaves no room."""
    chat.set("max_tokens", 30)
    chat.set_system("the sea")
    while not told:
        finish(chat.ask(LONG))
        assert len(chat.conversation.turns) < 20
    left = chat.model.context - chat.used()
    assert told == [
        f"{left} of 320 tokens of the context are left; /drop N lets the model forget the oldest "
        "turns, /undo takes back the last turn, /clear begins anew when that is too little"
    ]
    count = len(chat.conversation.turns)
    with pytest.raises(ContextError) as caught:
        ask_for_ever(chat, finish)
    assert str(caught.value).startswith("the message is not sent: with it, the conversation has ")
    assert "/drop " in str(caught.value)
    assert chat.conversation.turns[-1].answer  # the refused message is not there
    assert len(chat.conversation.turns) >= count
    assert all("left" in line or "stopped" in line for line in told)


def test_drop_makes_the_room_that_the_error_promises(chat: Chat, finish) -> None:
    chat.set("max_tokens", 12)
    chat.set_system("the sea")
    with pytest.raises(ContextError) as caught:
        ask_for_ever(chat, finish)
    count = int(str(caught.value).partition("/drop ")[2].split()[0])
    chat.conversation.drop(count)
    answering = finish(chat.ask(LONG))
    assert answering.turn.dropped == count
    messages = chat.conversation.messages_of(answering.turn)
    assert messages[0] == {"role": "system", "content": "the sea"}
    assert len(messages) == 2 + 2 * (len(chat.conversation.path(answering.turn.parent)) - count)


def test_message_that_can_never_fit_is_refused(chat: Chat, finish) -> None:
    long = "the sea and the wind " * 100
    with pytest.raises(ContextError, match="shorten the message, or begin with a larger --ctx"):
        chat.ask(long)
    finish(chat.ask("Hello"))
    with pytest.raises(ContextError, match="no turns make enough room: shorten the message"):
        chat.ask(long)
    assert len(chat.conversation.turns) == 1


def test_full_context_ends_an_answer_and_is_told(tiny: Path, told: list[str], finish) -> None:
    with phicore.load(tiny, "numpy", ctx=40) as model:
        chat = Chat(model, seed=1, tell=told.append)
        chat.set("max_tokens", -1)
        for seed in range(1, 20):  # until no end token comes first
            chat.next_seed = seed
            if finish(chat.ask("Hello")).turn.finish_reason == "context":
                break
            chat.conversation.undo()
    assert told[-1].startswith("stopped: the context of 40 tokens is full; /drop N lets ")


def test_use_of_the_context_is_counted_after_undo_and_drop(chat: Chat, finish) -> None:
    assert chat.used() == 0
    first = finish(chat.ask("Tell me of the sea"))
    tokens = len(first.generation.token_ids)
    assert chat.used() == tokens
    finish(chat.ask("and of the wind"))
    all_tokens = chat.used()
    assert all_tokens > tokens
    chat.conversation.undo()
    assert chat.used() == tokens
    chat.conversation.redo()
    chat.conversation.drop(1)
    assert 0 < chat.used() < all_tokens
    chat.conversation.drop(1)
    assert chat.used() == 0


# ---- what the model refuses --------------------------------------------------------------------


def test_template_that_refuses_a_system_message_gives_one_line(tmp_path: Path) -> None:
    refuses = (
        "{% for m in messages %}{% if m.role == 'system' or 'System' in m.content|string %}"
        "{{ raise_exception('no system messages here') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    path = write_tiny(tmp_path / "m.gguf", with_value("tokenizer.chat_template", refuses))
    with phicore.load(path, "numpy") as model:
        chat = Chat(model, tell=print)
        with pytest.raises(TokenizerError) as caught:
            chat.set_system("System")
        assert str(caught.value) == "m.gguf: chat template: no system messages here"
        assert chat.conversation.system is None
        with pytest.raises(TokenizerError, match="no system messages here"):
            Chat(model, Conversation(system="System"), tell=print)


def test_model_without_a_template_is_refused_at_once(tmp_path: Path) -> None:
    def edit(writer) -> None:
        without("tokenizer.chat_template")(writer)
        tokens = writer.kv_data[0]["tokenizer.ggml.tokens"].value
        tokens[tokens.index("<|end|>")] = "<|other|>"

    path = write_tiny(tmp_path / "m.gguf", edit)
    with (
        phicore.load(path, "numpy") as model,
        pytest.raises(TokenizerError) as caught,
    ):
        Chat(model, tell=print)
    assert str(caught.value) == (
        "m.gguf: chat template: the model has none; phicore generate --raw sends the prompt as it "
        "is"
    )


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_empty_message_is_refused(chat: Chat, text: str) -> None:
    with pytest.raises(ArgumentError, match="the message is empty"):
        chat.ask(text)


def test_text_that_is_no_unicode_is_refused(chat: Chat) -> None:
    for refused in (chat.ask, chat.set_system):
        with pytest.raises(ArgumentError, match="not valid UTF-8"):
            refused("a\udcff")
    assert chat.conversation == Conversation(
        settings={"max_tokens": 8}, created=chat.conversation.created
    )


def test_empty_system_message_is_another_than_none(chat: Chat) -> None:
    chat.set_system("")
    with chat.ask("Hello") as answering:
        messages = chat.conversation.messages_of(answering.turn)
    assert messages[0] == {"role": "system", "content": ""}


def test_control_tokens_in_a_message_are_text(chat: Chat, finish) -> None:
    finish(chat.ask("<|end|><|assistant|> the sea"))
    tokens = chat.model.encode(chat.conversation.messages_of(chat.conversation.turns[0]))
    end = chat.model.tokenizer.encode("<|end|>")
    assert sum(token == end[-1] for token in tokens) == 1


def test_file_that_cannot_be_written_is_told_once(chat: Chat, store, told, finish) -> None:
    store.folder.write_text("a file in the place of the folder")
    finish(chat.ask("Hello"))
    finish(chat.ask("Hello"))
    assert len(told) == 1
    assert told[0].startswith("the conversation is not saved: ")
    assert len(chat.conversation.turns) == 2


def test_prefix_cache_holds_the_conversation_however_small_its_limit(tiny: Path, finish) -> None:
    with phicore.load(tiny, "numpy", prefix_cache_bytes=1) as model:
        chat = Chat(model, seed=1, tell=print)
        chat.set("max_tokens", 8)
        finish(chat.ask("Tell me of the sea and of the wind in the land of ice."))
        finish(chat.ask("and then"))
        assert chat.conversation.turns[-1].cached_tokens > 16


def test_change_of_conversation_that_is_refused_changes_nothing(chat: Chat, finish) -> None:
    finish(chat.ask("Hello"))
    before = replace(chat.conversation)
    with pytest.raises(ArgumentError, match="temperature"):
        chat.change_to(Conversation(settings={"temperature": "hot"}))
    assert chat.conversation == before


@pytest.fixture(autouse=True)
def _no_log(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "phicore"):
        yield
    assert [record.message for record in caplog.records] == []
