"""Tests of the folder of conversations."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from chat.test_conversation import say

from phicore.chat.conversation import Conversation
from phicore.chat.store import Store, data_path
from phicore.errors import ArgumentError, ConversationError

posix = pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")


def stored(store: Store, *users: str, name: str = "") -> Conversation:
    talk = Conversation(name)
    for user in users:
        say(talk, user)
    store.save(talk)
    return talk


def age(store: Store, name: str, seconds: int) -> None:
    for path in (store.path(name), store.rows_path(name)):
        if path.exists():
            os.utime(path, (seconds, seconds))


def test_data_path_is_the_variable_or_the_platforms(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PHICORE_DATA", str(tmp_path))
    assert data_path() == tmp_path
    monkeypatch.setenv("PHICORE_DATA", "~/x")
    assert data_path() == Path.home() / "x"
    monkeypatch.delenv("PHICORE_DATA")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert data_path().name == "phicore"


def test_conversation_gets_a_name_that_says_what_it_is_about(store: Store) -> None:
    first = stored(store, "Why is the sky blue, and what of the sea at night?")
    assert first.name.endswith("-why-is-the-sky-blue-and-what")
    assert stored(store, "Why is the sky blue, and what of it?").name == f"{first.name}-2"
    assert store.load(first.name) == first


def test_name_cannot_leave_the_folder(store: Store) -> None:
    talk = stored(store, "../../etc/passwd")
    assert store.path(talk.name).parent == store.folder
    for name in ("../x", "a/b", ".hidden", "", "a\nb", "x" * 101):
        with pytest.raises(ArgumentError, match="the name of a conversation has"):
            store.load(name)


@posix
def test_files_are_the_users_alone(store: Store) -> None:
    talk = stored(store, "hi")
    store.save_rows(talk.name, lambda path: path.write_bytes(b"x"))
    for path in (store.path(talk.name), store.rows_path(talk.name)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700


def test_newest_comes_first_and_damaged_files_are_told(store: Store) -> None:
    for index, name in enumerate(("b", "a", "c")):
        stored(store, "hi", name=name)
        age(store, name, 1000 + index)
    assert store.names() == ["c", "a", "b"]
    store.path("c").write_bytes(b"\xff\xfe")
    with pytest.raises(ConversationError, match=r"c\.json: damaged: not UTF-8 text"):
        store.load("c")
    store.path("a").write_text("{")
    with pytest.raises(ConversationError, match=r"a\.json: damaged: "):
        store.load("a")
    with pytest.raises(ConversationError, match="no conversation 'd'; /sessions lists them"):
        store.load("d")


def test_other_program_does_not_lose_what_this_one_writes(store: Store, tmp_path: Path) -> None:
    stored(store, "hi", name="a")
    one, two = Store(store.folder, 0), Store(store.folder, 0)
    first, second = one.load("a"), two.load("a")
    say(first, "from the first")
    assert not one.save(first)
    say(second, "from the second, which is longer")
    assert two.save(second)
    assert (first.name, second.name) == ("a", "a-2")
    assert store.load("a") == first
    assert store.load("a-2") == second
    assert not two.save(second)


def test_failed_write_leaves_the_old_file(store: Store, monkeypatch) -> None:
    talk = stored(store, "hi", name="a")
    before = store.path("a").read_bytes()
    say(talk, "more")

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ConversationError, match=r"a\.json: cannot be written: No space left"):
            store.save(talk)
    assert store.path("a").read_bytes() == before
    assert [path.name for path in store.folder.iterdir()] == ["a.json"]
    store.save(talk)
    assert store.load("a") == talk


def test_rename_takes_the_rows_along(store: Store) -> None:
    talk = stored(store, "hi", name="a")
    stored(store, "hi", name="b")
    store.save_rows("a", lambda path: path.write_bytes(b"x"))
    with pytest.raises(ArgumentError, match="there is a conversation 'b' already"):
        store.rename(talk, "b")
    store.rename(talk, "new name")
    assert sorted(path.name for path in store.folder.iterdir()) == [
        "b.json",
        "new name.json",
        "new name.rows",
    ]
    assert store.load("new name") == talk


def test_oldest_rows_are_removed_first(tmp_path: Path) -> None:
    store = Store(tmp_path / "chats", 250)
    for index, name in enumerate(("a", "b", "c")):
        stored(store, "hi", name=name)
        store.save_rows(name, lambda path: path.write_bytes(bytes(100)))
        age(store, name, 1000 + index)
        store.touch_rows("a")  # in use, though it is the oldest
    store.remove_old_rows()
    assert [store.rows_path(name).exists() for name in "abc"] == [True, False, True]
    assert len(store.names()) == 3


def test_empty_conversation_leaves_no_file(store: Store) -> None:
    talk = stored(store, "hi")
    store.remove(talk)
    assert list(store.folder.iterdir()) == []
    assert talk.name == ""


def test_folder_that_is_missing_has_no_conversations(store: Store) -> None:
    assert store.names() == []
