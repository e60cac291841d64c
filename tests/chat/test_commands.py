"""Tests of the commands of a chat, and of what counts as one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phicore.chat import commands
from phicore.chat.blocks import content, is_open
from phicore.chat.chat import Chat
from phicore.chat.replies import Reply
from phicore.chat.settings import PARAMETERS
from phicore.chat.store import Store
from phicore.errors import ArgumentError, ConversationError, PhicoreError
from phicore.network.sampling import Sampling


@pytest.fixture
def run(chat: Chat, finish):
    """Return a function that runs a command, and the answer that it begins."""

    def command(line: str) -> Reply:
        found = commands.split(line)
        assert found is not None
        reply = commands.run(chat, *found)
        if reply.answering is not None:
            finish(reply.answering)
        return reply

    return command


def fails(run, line: str) -> str:
    with pytest.raises(PhicoreError) as caught:
        run(line)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/help", ("help", "")),
        ("  /SET  top_k   5 ", ("set", "top_k   5")),
        ("/system a\nb", ("system", "a\nb")),
        ("/?", ("?", "")),
        ("/etc/hosts is what?", None),
        ("//help", None),
        ("/", None),
        ("hello /help", None),
        ("/2", None),
    ],
)
def test_split(line: str, expected) -> None:
    assert commands.split(line) == expected


def test_message_may_begin_with_two_slashes() -> None:
    assert commands.message_of("//help me") == "/help me"
    assert commands.message_of("/etc") == "/etc"


@pytest.mark.parametrize(
    ("text", "opened", "said"),
    [
        ("hello", False, "hello"),
        ('"""', True, ""),
        ('"""a\nb', True, "a\nb"),
        ('"""a\n\n b\n"""', False, "a\n\n b"),
        ('"""one line"""', False, "one line"),
        ('"""a""" b', False, '"""a""" b'),
        ('"""A program."""\nx = 1\n', False, '"""A program."""\nx = 1'),  # pasted
        ('"""a"""\n"""b"""', False, '"""a"""\n"""b"""'),
        ('say """', False, 'say """'),
        ('/system """a', True, '/system """a'),
        ('/system """a\nb"""', False, '/system """a\nb"""'),
    ],
)
def test_blocks(text: str, opened: bool, said: str) -> None:
    assert (is_open(text), content(text)) == (opened, said)


def test_every_command_is_in_the_help_and_explained(run) -> None:
    reply = run("/help")
    assert [row[0].split()[0] for row in reply.rows[1:]] == [
        f"/{c.name}" for c in commands.COMMANDS
    ]
    for name in commands.BY_NAME:
        assert run(f"/help {name}").lines[1].endswith(".")
    for name in PARAMETERS:
        assert "Expected: " in run(f"/help {name}").lines[1]


def test_unknown_command_has_a_hint(run) -> None:
    assert fails(run, "/retyr").startswith("there is no command /retyr; did you mean /retry? (")
    assert fails(run, "/zzzz").startswith("there is no command /zzzz; /help lists them (")
    assert fails(run, "/bye now") == "/bye has no argument"


# ---- parameters --------------------------------------------------------------------------------


def test_set_alone_shows_every_parameter(run, chat: Chat) -> None:
    run("/set top_k 7")
    rows = {name: (value, source) for name, value, source in run("/set").rows[1:]}
    assert rows.keys() == {*PARAMETERS, "seed"}
    assert rows["top_k"] == ("7", "set")
    assert rows["min_p"] == (f"{Sampling().min_p:g}", "default")
    assert rows["stop"] == ("none", "default")


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("/set temperature 0.2", "temperature", 0.2),
        ("/set temperature=0.2", "temperature", 0.2),
        ("/set top-k = 3", "top_k", 3),
        ("/set max_tokens -1", "max_tokens", -1),
        ("/set stop END 'a b'", "stop", ["END", "a b"]),
        ("/set stop =", "stop", []),
        ("/set processors frequency-penalty=0.5", "processors", ["frequency-penalty=0.5"]),
    ],
)
def test_set(run, chat: Chat, line: str, name: str, value) -> None:
    if line.endswith("="):
        chat.set("stop", ["x"])
        line = "/set stop none"
    run(line)
    assert chat.options()[name] == value
    assert chat.conversation.settings[name] == value
    run(f"/set {name} default")
    assert name not in chat.conversation.settings
    assert chat.options() == chat.defaults() | chat.conversation.settings


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("/set temperature -1", "temperature: expected 0 (greedy), or 1e-6 to 1e6, got -1.0"),
        ("/set temperature hot", "temperature: expected 0 (greedy), or 1e-6 to 1e6, got 'hot'"),
        ("/set temperature nan", "temperature: expected 0 (greedy), or 1e-6 to 1e6, got nan"),
        ("/set top_p 0", "top_p: expected more than 0, at most 1, got 0.0"),
        ("/set top_k 1.5", "top_k: expected 0 (all) to 2**31 - 1, got '1.5'"),
        ("/set max_tokens 0", "max_tokens: expected 1 or more, or -1 (until the context is full)"),
        ("/set stop 'a", 'stop: expected strings, got "\'a"'),
        ("/set processors nothing", "processor: expected one of logit-bias, frequency-penalty"),
        ("/set seed -1", "seed: expected 0 to 2**64 - 1, or random, got -1"),
        ("/seed x", "seed: expected 0 to 2**64 - 1, or random, got 'x'"),
        ("/set temperatur 1", "no parameter 'temperatur': expected temperature, top_k"),
        ("/set !", "expected /set NAME VALUE, got '!'"),
    ],
)
def test_set_is_checked_as_the_options_are(run, chat: Chat, line: str, error: str) -> None:
    before = dict(chat.conversation.settings), chat.next_seed
    assert fails(run, line).startswith(error)
    assert (chat.conversation.settings, chat.next_seed) == before


def test_settings_are_kept_with_the_conversation(run, chat: Chat, store: Store) -> None:
    chat.set("top_k", 7)
    run_message(chat, "Hello")
    run("/set min_p 0.1")
    assert store.load(chat.conversation.name).settings == {
        "max_tokens": 8,
        "top_k": 7,
        "min_p": 0.1,
    }


def run_message(chat: Chat, text: str) -> None:
    with chat.ask(text) as answering:
        list(answering)


def test_seed(run, chat: Chat) -> None:
    assert run("/seed").lines == ["the next answer has the seed 1, and each one after it one more"]
    run("/seed 9")
    run_message(chat, "Hello")
    assert run("/seed").lines == [
        "the last answer has the seed 9",
        "the next answer has the seed 10, and each one after it one more",
    ]
    assert run("/seed random").lines[-1] == "the next answer has a random seed"


def test_system(run, chat: Chat) -> None:
    assert run("/system").lines == ["no system message; /system TEXT sets it"]
    for line, expected in (
        ("/system Be brief.", "Be brief."),
        ('/system "Be brief."', "Be brief."),
        ('/system """a\nb"""', "a\nb"),
        ('/system ""', ""),
        ("/system -", None),
    ):
        run(line)
        assert chat.conversation.system == expected
    run("/system hello")
    assert run("/system").lines == ["hello"]


# ---- turns -------------------------------------------------------------------------------------


def test_retry_edit_undo_redo_branch(run, chat: Chat) -> None:
    chat.set("temperature", 2)
    run_message(chat, "Hello")
    assert run("/retry").answering.turn.user == "Hello"
    assert run("/retry 1").answering.text == chat.conversation.turns[0].answer
    edited = run("/edit Goodbye").answering
    assert (edited.turn.user, edited.turn.parent) == ("Goodbye", None)
    assert run("/edit").draft == "Goodbye"
    assert run("/edit").edits
    rows = run("/branch").rows
    assert [row[0] for row in rows[1:]] == [" 1", " 2", " 3", "*4"]
    assert run("/branch 2").turn.seed == 2
    assert chat.conversation.last.seed == 2
    assert fails(run, "/branch 5") == "branch: expected 1 to 4, got 5"
    assert run("/undo").lines[0] == "1 turn undone: Hello"
    assert fails(run, "/undo") == "there is no turn to undo"
    assert run("/redo").turn.user == "Hello"
    assert len(chat.conversation.turns) == 4


@pytest.mark.parametrize("line", ["/retry", "/edit", "/edit x", "/undo", "/redo", "/branch"])
def test_command_without_a_turn_says_so(run, line: str) -> None:
    assert fails(run, line).startswith("there is no ")


def test_drop_keeps_the_system_message(run, chat: Chat) -> None:
    run("/system the sea")
    for text in ("one", "two", "three"):
        run_message(chat, text)
    assert run("/drop 2").lines == [
        "the model sees the system message and the last turn from now on; the file keeps all"
    ]
    assert fails(run, "/drop 2") == "expected a number of turns from 1 to 1, got 2"
    assert fails(run, "/drop x") == "drop: expected a number of turns, got 'x'"
    run_message(chat, "four")
    said = [m["content"] for m in chat.conversation.messages_of(chat.conversation.last)]
    assert (said[0], said[1], said[-1]) == ("the sea", "three", "four")


# ---- conversations -----------------------------------------------------------------------------


def test_save_load_clear_sessions(run, chat: Chat, store: Store) -> None:
    assert fails(run, "/save") == "there is nothing to save yet"
    assert run("/sessions").lines == ["no conversations yet"]
    run_message(chat, "Hello")
    assert run("/save first").lines == [f"saved: {store.path('first')}"]
    assert run("/clear").lines == ["a new conversation; /load first goes back to the old one"]
    assert chat.conversation.turns == []
    assert chat.conversation.settings == {"max_tokens": 8}
    run_message(chat, "Goodbye")
    run("/save second")
    rows = run("/sessions").rows
    assert sorted(row[1:] for row in rows[1:]) == [
        ("first", "1", "Hello"),
        ("second", "1", "Goodbye"),
    ]
    assert fails(run, "/save first").startswith("there is a conversation 'first' already")
    reply = run("/load first")
    assert reply.lines[0].startswith("first: 1 turn, begun 20")
    assert reply.turn.user == "Hello"
    assert fails(run, "/load third") == "there is no conversation 'third'; /sessions lists them"
    assert fails(run, "/load ../first").startswith("the name of a conversation has ")
    store.path("second").write_text("{}")
    assert f"{store.path('second')}: not a conversation of phicore chat" in run("/sessions").lines
    number = store.names().index("first") + 1
    assert run(f"/load {number}").turn.user == "Hello"


def test_message_whose_answer_a_killed_program_has_lost_is_told(
    run, chat: Chat, store: Store
) -> None:
    chat.ask("Hello")  # is kept before the answer begins
    name = store.names()[0]
    assert run(f"/load {name}").lines[1:] == [
        "the program was ended before it answered the last message; /retry answers it"
    ]
    with run("/retry").answering as answering:
        list(answering)
    assert len(run(f"/load {name}").lines) == 1


def test_save_that_fails_says_so(run, chat: Chat, store: Store) -> None:
    store.folder.write_text("a file in the place of the folder")
    run_message(chat, "Hello")
    for line in ("/save", "/save name"):
        assert "cannot be written: " in fails(run, line)
    assert chat.conversation.name == ""


def test_save_exports(run, chat: Chat, tmp_path: Path) -> None:
    run_message(chat, "Hello")
    run(f"/save {tmp_path}/a.md")
    run(f"/save {tmp_path}/a.json")
    assert "## User\n\nHello\n" in (tmp_path / "a.md").read_text()
    messages = json.loads((tmp_path / "a.json").read_text())["messages"]
    assert messages[0] == {"role": "user", "content": "Hello"}
    assert fails(run, f"/save {tmp_path}/a.md").endswith("exists already; take another name")
    with pytest.raises(ConversationError, match="cannot be written"):
        run(f"/save {tmp_path}/none/a.md")


def test_without_a_store_conversations_are_not_kept(run, chat: Chat) -> None:
    chat.store = None
    run_message(chat, "Hello")
    for line in ("/save", "/load x", "/sessions"):
        assert "conversations are not kept with --no-history" in fails(run, line)


def test_copy_takes_the_answer_or_its_last_code(run, chat: Chat) -> None:
    assert fails(run, "/copy") == "there is no answer to copy"
    run_message(chat, "Hello")
    turn = chat.conversation.last
    text = "Look:\n```python\nx = 1\n```\nand\n~~~\n```\ny\n~~~\n"
    chat.conversation.turns = [turn.__class__(**{**vars(turn), "answer": text})]
    assert run("/copy").copied == text
    assert run("/copy code").copied == "```\ny\n"
    chat.conversation.turns = [turn.__class__(**{**vars(turn), "answer": "none"})]
    assert fails(run, "/copy code") == "the last answer has no block of code"
    with pytest.raises(ArgumentError, match="copy: expected nothing, or code, got 'x'"):
        run("/copy x")


def test_stats(run, chat: Chat, store: Store) -> None:
    assert run("/stats").lines[-1] == "context: 0 of 320 tokens (0%)"
    run_message(chat, "Tell me of the sea")
    turn = chat.conversation.last
    lines = run("/stats").lines
    assert lines[1].startswith(f"last answer: seed 1, prompt {turn.prompt_tokens} tokens (0 known)")
    assert lines[-2].startswith(f"context: {chat.used()} of 320 tokens")
    assert lines[-1] == f"conversation: {store.path(chat.conversation.name)}"


def test_bye_ends(run) -> None:
    assert run("/bye").ends
    assert run("/quit").ends
