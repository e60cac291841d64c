"""Tests of the tree of turns, and of the files that it is written to."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phicore.chat.conversation import Conversation, Turn
from phicore.chat.files import from_json, to_json, to_markdown, to_messages
from phicore.errors import ArgumentError, ConversationError


def say(talk: Conversation, user: str, answer: str = "yes", parent: int | str | None = "") -> Turn:
    turn = Turn(
        number=talk.next_number,
        parent=talk.current if parent == "" else parent,
        user=user,
        answer=answer,
        seed=7,
        system=talk.system,
        dropped=talk.dropped,
        options={"temperature": 0.5, "stop": ["x"]},
        model="smollm2",
        backend="numpy",
    )
    talk.add(turn)
    return turn


@pytest.fixture
def talk() -> Conversation:
    found = Conversation("a-name", "Be brief.")
    for user in ("one", "two", "three"):
        say(found, user)
    return found


def contents(talk: Conversation, dropped: int = 0) -> list[str]:
    messages = talk.messages("next", talk.current, system=talk.system, dropped=dropped)
    return [message["content"] for message in messages]


def test_messages_are_the_path_with_the_system_message(talk: Conversation) -> None:
    assert contents(talk) == ["Be brief.", "one", "yes", "two", "yes", "three", "yes", "next"]
    assert contents(talk, 2) == ["Be brief.", "three", "yes", "next"]
    roles = [m["role"] for m in talk.messages("next", talk.current, system=None, dropped=2)]
    assert roles == ["user", "assistant", "user"]


def test_undo_keeps_the_turns_and_redo_takes_it_back(talk: Conversation) -> None:
    assert [turn.user for turn in talk.undo(2)] == ["two", "three"]
    assert contents(talk) == ["Be brief.", "one", "yes", "next"]
    assert len(talk.turns) == 3
    assert [talk.redo().user, talk.redo().user] == ["two", "three"]
    with pytest.raises(ArgumentError, match="there is no turn after this one"):
        talk.redo()


def test_redo_goes_to_what_was_undone_and_not_to_another_branch(talk: Conversation) -> None:
    say(talk, "three again", parent=2)
    talk.go(3)
    talk.undo()
    talk.undo()
    assert [talk.redo().number, talk.redo().number] == [2, 3]
    talk.undo(2)
    assert [talk.redo().number, talk.redo().number] == [2, 3]
    talk.undo()
    say(talk, "another")
    talk.undo()
    assert talk.redo().user == "another"


@pytest.mark.parametrize("count", [0, -1, 4])
def test_undo_and_drop_of_turns_that_are_not_there_are_refused(talk, count: int) -> None:
    for command in (talk.undo, talk.drop):
        with pytest.raises(ArgumentError, match=f"number of turns from 1 to 3, got {count}"):
            command(count)
    assert (talk.current, talk.dropped) == (3, 0)
    with pytest.raises(ArgumentError, match="there is no turn to undo"):
        Conversation().undo()


def test_alternatives_are_the_turns_in_the_same_place(talk: Conversation) -> None:
    say(talk, "three again", parent=2)
    assert [turn.number for turn in talk.alternatives()] == [3, 4]
    assert contents(talk)[-3:] == ["three again", "yes", "next"]
    talk.go(3)
    assert contents(talk)[-3:] == ["three", "yes", "next"]
    assert Conversation().alternatives() == []


def test_dropped_turns_come_back_when_the_turns_after_them_are_undone(talk: Conversation) -> None:
    talk.drop(2)
    talk.undo(2)
    assert talk.dropped == 1
    say(talk, "other")
    assert contents(talk, talk.dropped) == ["Be brief.", "other", "yes", "next"]


def test_discarded_turn_leaves_no_trace(talk: Conversation) -> None:
    turn = say(talk, "four")
    talk.discard(turn.number)
    assert (talk.current, len(talk.turns)) == (3, 3)


# ---- files -------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("say"), TEXT),
        st.tuples(st.sampled_from(["undo", "redo", "drop", "retry"]), st.integers(1, 2)),
        st.tuples(st.just("system"), st.none() | TEXT),
    ),
    max_size=12,
)


@given(STEPS)
def test_file_has_everything(steps) -> None:
    """Whatever was done, the file gives the same conversation, with the same messages."""
    talk = Conversation("n")
    for what, value in steps:
        if what == "say":
            say(talk, value, value[::-1])
        elif what == "system":
            talk.system = value
        elif what == "retry" and talk.last is not None:
            say(talk, talk.last.user, "again", talk.last.parent)
        elif what in ("undo", "drop"):
            with suppress(ArgumentError):
                getattr(talk, what)(value)
        elif what == "redo" and talk.children(talk.current):
            talk.redo()
    found = from_json(to_json(talk), "n")
    assert found == talk
    assert contents(found, found.dropped) == contents(talk, talk.dropped)
    assert [found.messages_of(t) for t in found.turns] == [talk.messages_of(t) for t in talk.turns]


def test_file_is_readable_and_says_what_is_the_same_once(talk: Conversation) -> None:
    text = to_json(talk)
    assert text.count('"temperature": 0.5') == 1
    assert text.count("Be brief.") == 2  # for the next turn, and for the first
    assert '   "user": "two",' in text.splitlines()
    assert json.loads(text)["title"] == "one"


def damaged(talk: Conversation, change) -> str:
    said = json.loads(to_json(talk))
    change(said)
    return json.dumps(said)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("phicore_chat"), "not a conversation of phicore chat"),
        (lambda s: s.update(phicore_chat=2), "expected a conversation of version 1, found 2"),
        (lambda s: s.update(turns=5), "damaged: expected a list of turns"),
        (lambda s: s.update(current=9), "damaged: there is no turn 9"),
        (lambda s: s.update(system=5), "damaged: system: expected str | None, found 5"),
        (lambda s: s.update(dropped=-1), "damaged: dropped: expected int, found -1"),
        (lambda s: s["turns"].append("x"), "damaged: expected a turn, found 'x'"),
        (lambda s: s["turns"][1].update(parent=3), "damaged: there is no turn 3"),  # a circle
        (lambda s: s["turns"][1].pop("user"), "damaged: a turn lacks 'user'"),
        (lambda s: s["turns"][1].update(number=1), "damaged: there are two turns 1"),
        (lambda s: s["turns"][1].update(seed=True), "damaged: seed: expected int, found True"),
        (lambda s: s["turns"][0].update(options=[]), "damaged: options: expected Mapping"),
    ],
)
def test_damaged_file_is_told_in_a_line(talk: Conversation, change, message: str) -> None:
    with pytest.raises(ConversationError) as caught:
        from_json(damaged(talk, change), "n")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=30) | st.just("[" * 100_000))
def test_text_that_is_no_conversation_is_refused(text: str) -> None:
    with pytest.raises(ConversationError):
        from_json(text, "n")


def test_every_shorter_file_is_refused(talk: Conversation) -> None:
    text = to_json(talk).rstrip()
    for end in range(0, len(text), 7):
        with pytest.raises(ConversationError, match="damaged"):
            from_json(text[:end], "n")


def test_exports_have_the_path(talk: Conversation) -> None:
    say(talk, "another", "no", parent=2)
    messages = json.loads(to_messages(talk))["messages"]
    assert [m["role"] for m in messages] == ["system", *["user", "assistant"] * 3]
    assert messages[-2:] == [
        {"role": "user", "content": "another"},
        {"role": "assistant", "content": "no"},
    ]
    text = to_markdown(talk)
    assert text.startswith(
        "# one\n\n**System:** Be brief.\n\n## User\n\none\n\n## Assistant\n\nyes"
    )
    assert "three" not in text
