"""The page: conversations are kept, found, renamed, deleted, exported and imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from server.conftest import Served
from server.page.conftest import LONG, OpenTab, Tab, conversation_file


def exported(tab: Tab, folder: Path) -> Path:
    """Export all conversations; return the file."""
    with tab.page.expect_download() as download:
        tab.page.click("#export")
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def test_conversations_are_there_after_a_reload(tab: Tab):
    tab.ask("One")
    tab.new()
    tab.ask("Two")
    shown = tab.texts()
    tab.page.reload()
    tab.page.wait_for_selector("article")
    assert tab.titles() == ["Two", "One"]
    assert tab.texts() == shown
    tab.page.click("#conversations .title:has-text('One')")
    tab.page.wait_for_selector("article.user:has-text('One')")


def test_unsent_text_is_there_after_a_reload(tab: Tab):
    tab.page.fill("#text", "not yet")
    tab.page.reload()
    tab.page.wait_for_selector("body.ready")
    assert tab.page.input_value("#text") == "not yet"


def test_search_finds_words_in_messages_and_titles(tab: Tab):
    tab.ask("A long line about\nthe Ärmelkanal and ferries")
    tab.new()
    tab.ask("Something else")
    tab.page.keyboard.press("Control+k")
    assert tab.page.evaluate("document.activeElement.id") == "search"
    tab.page.keyboard.type("ferries ärmel")
    tab.page.wait_for_selector("mark")
    assert tab.titles() == ["A long line about"]
    assert tab.page.locator("mark").inner_text() == "ferries"
    assert tab.page.locator("#found").inner_text() == "1 found"
    tab.page.keyboard.press("Enter")
    tab.page.wait_for_selector("article.user:has-text('ferries')")
    tab.page.fill("#search", "absent")
    tab.page.wait_for_selector("text=Nothing is found.")
    tab.page.fill("#search", "else")
    tab.page.wait_for_selector("#conversations .name:text-is('Something else')")
    tab.page.press("#search", "Escape")
    tab.page.wait_for_selector("#conversations li:nth-child(2)")


def test_conversation_can_be_renamed(tab: Tab):
    tab.ask("Hello")
    tab.page.hover("#conversations li")
    tab.page.click("[aria-label='Rename Hello']")
    tab.page.fill(".rename", "Other")
    tab.page.keyboard.press("Enter")
    tab.page.wait_for_selector("h1:text-is('Other')")
    tab.page.reload()
    tab.page.wait_for_selector("article")
    assert tab.titles() == ["Other"]
    tab.page.click("[aria-label='Rename Other']")
    tab.page.fill(".rename", "Third")
    tab.page.keyboard.press("Escape")
    tab.page.wait_for_selector("#conversations .name:text-is('Other')")


def test_deleted_conversation_can_be_brought_back(tab: Tab):
    tab.ask("Hello")
    shown = tab.texts()
    tab.page.click("[aria-label='Delete Hello']")
    tab.page.wait_for_selector("#empty:not([hidden])")
    assert tab.titles() == []
    tab.page.click(".notice button:text-is('Undo')")
    tab.page.wait_for_selector("article")
    assert (tab.titles(), tab.texts()) == (["Hello"], shown)
    tab.page.reload()
    tab.page.wait_for_selector("article")
    tab.page.click("[aria-label='Delete Hello']")
    tab.page.wait_for_selector("#empty:not([hidden])")
    tab.page.reload()
    tab.page.wait_for_selector("body.ready")
    assert tab.titles() == []
    assert tab.messages()  # another tab may still offer to undo it
    script = """async ({ openStore }) => {
      const store = await openStore();
      const [conversation] = await store.conversations();
      await store.put({ conversations: [{ ...conversation, deleted: 1 }] });
      store.database.close();
    }"""
    tab.call("store", script)
    tab.page.reload()
    tab.page.wait_for_selector("body.ready")
    assert tab.messages() == []


def test_deleting_a_conversation_ends_its_answer(endless: Served, open_tab: OpenTab):
    tab = open_tab(endless)
    tab.set(**LONG)
    tab.write("Hello")
    endless.wait_for_rows(1)
    tab.page.click("[aria-label='Delete Hello']")
    endless.wait_for_rows(0)
    tab.page.wait_for_selector("#empty:not([hidden])")


def test_export_of_all_is_imported_elsewhere(
    tab: Tab, served: Served, open_tab: OpenTab, tmp_path: Path
):
    tab.set(system="Be brief.", temperature=0.9)
    tab.ask("One")
    tab.act("Answer again")
    tab.page.wait_for_selector(".place:text-is('2/2')")
    tab.end()
    tab.act("Previous answer")
    tab.new()
    tab.ask("Two")
    tab.act("Edit")
    tab.page.fill(".editor", "My own words")
    tab.page.click(".editing .primary")
    tab.page.wait_for_selector(".figures:text-is('edited by you')")
    path = exported(tab, tmp_path)
    other = open_tab(served)
    assert other.take(path) == "Conversations: 2 added."
    assert other.titles() == ["Two", "One"]
    assert other.take(path) == "Conversations: 0 added, 2 here already."
    assert len(other.titles()) == 2
    other.page.click("#conversations .title:has-text('One')")
    other.page.wait_for_selector("article")
    assert other.place() == "1/2"
    again = json.loads(exported(other, tmp_path).read_text())
    first = json.loads(path.read_text())
    by_id = {message["id"]: message for message in again["messages"]}
    assert by_id == {message["id"]: message for message in first["messages"]}
    assert {c["system"] for c in again["conversations"]} == {"Be brief.", ""}
    other.page.hover("article.assistant")
    other.act("Repeat")
    other.page.wait_for_selector(".same:text-is('same seed, the same text as 1/3')")


def test_import_leaves_the_conversation_that_is_open(tab: Tab, tmp_path: Path):
    tab.ask("One")
    path = exported(tab, tmp_path)
    tab.ask("Two")
    assert tab.take(path) == "Conversations: 0 added, 1 here already."
    tab.take(conversation_file(tmp_path))
    tab.ask("Three")
    assert tab.texts("user") == ["One", "Two", "Three"]
    assert sorted(tab.titles()) == ["Mine", "One"]


def test_imported_conversation_that_differs_comes_as_a_copy(tab: Tab, tmp_path: Path):
    assert tab.take(conversation_file(tmp_path)) == "Conversations: 1 added."
    assert tab.take(conversation_file(tmp_path, "Something else")) == "Conversations: 1 added."
    assert tab.titles() == ["Mine", "Mine"]
    texts = [message["text"] for message in tab.messages() if message["role"] == "assistant"]
    assert sorted(texts) == ["Hi", "Something else"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"format": "other"}, "has no conversations of phicore"),
        ({"version": 2}, "has version 2; this page reads 1"),
        ({"messages": {}}, "messages is no list"),
        ({"messages": [{"id": "<b>"}]}, "messages[0].id is missing or wrong"),
        ({"conversations": []}, "message q has no place"),
        ({"conversations": [None]}, "conversations[0].id is missing or wrong"),
    ],
)
def test_damaged_file_is_refused_as_a_whole(
    tab: Tab, tmp_path: Path, changes: dict[str, Any], problem: str
):
    text = tab.take(conversation_file(tmp_path, **changes))
    assert text.startswith("Nothing was imported.")
    assert problem in text
    assert tab.messages() == []


def test_messages_that_are_above_themselves_are_refused(tab: Tab, tmp_path: Path):
    path = conversation_file(tmp_path)
    content = json.loads(path.read_text())
    content["messages"][0]["parent"] = "a"
    path.write_text(json.dumps(content))
    assert "is above itself" in tab.take(path)
    path.write_text("{")
    assert "is not JSON" in tab.take(path)


def test_html_in_messages_and_titles_is_shown_as_text(tab: Tab, tmp_path: Path):
    html = "<img src=x onerror=alert(1)> <script>alert(2)</script> **<b>bold</b>**"
    path = conversation_file(tmp_path, f"{html}\n\n[x](javascript:alert(3)) `<i>`")
    content = json.loads(path.read_text())
    content["messages"][0]["text"] = content["conversations"][0]["title"] = html
    path.write_text(json.dumps(content))
    tab.take(path)
    tab.page.click("#conversations .title")
    tab.page.wait_for_selector("article.assistant")
    assert tab.texts("user") == [html]
    [shown] = tab.texts()
    assert shown.startswith(html.replace("**", ""))
    assert tab.titles() == [html]
    assert tab.page.locator("h1").inner_text() == html
    kinds = "article :is(img, script, b, i), h1 *, #conversations :is(img, script), [href^=java]"
    assert tab.page.locator(kinds).count() == 0


def test_two_tabs_keep_the_messages_of_both(tab: Tab, served: Served, open_tab: OpenTab):
    tab.ask("One")
    other = open_tab(tab.page.url, beside=tab)
    other.page.wait_for_selector("article")
    other.ask("Two")
    tab.page.wait_for_selector("article.user:has-text('Two')")
    tab.ask("Three")
    other.page.wait_for_selector("article.user:has-text('Three')")
    questions = ["One", "Two", "Three"]
    tab.page.reload()
    tab.page.wait_for_selector("article >> nth=5")
    assert tab.texts("user") == other.texts("user") == questions


def test_browser_that_keeps_nothing_is_told(served: Served, browser: Any, open_tab: OpenTab):
    tab = open_tab(served)
    tab.page.add_init_script("Object.defineProperty(window, 'indexedDB', { value: undefined });")
    tab.page.reload()
    assert "lost when this page is closed" in tab.notices()
    tab.write("Hello")
    tab.page.wait_for_selector("article.assistant[aria-busy=false]")
