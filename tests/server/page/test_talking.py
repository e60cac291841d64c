"""The page: questions, answers, versions, seeds and settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from server.conftest import Served
from server.page.conftest import LONG, OpenTab, Tab

from phicore import Model


def test_answer_is_that_of_the_model_with_the_seed_that_is_shown(tab: Tab, small_model: Model):
    text = tab.ask("Hello")
    [answer] = [each for each in tab.messages() if each["role"] == "assistant"]
    shown = tab.page.locator("article.assistant .seed").inner_text()
    assert shown == f"seed {answer['seed']}"
    assert text == small_model.generate("Hello", seed=answer["seed"], max_tokens=24).text()
    assert tab.texts("user") == ["Hello"]
    assert tab.page.locator("article.assistant .text").inner_text()


def test_figures_of_an_answer_are_those_of_the_server(tab: Tab, small_model: Model):
    tab.set(max_tokens=5)
    tab.ask("Hello")
    figures = tab.page.locator("article.assistant .figures").inner_text()
    [answer] = [each for each in tab.messages() if each["role"] == "assistant"]
    tokens = answer["figures"]["tokens"]
    expected = list(small_model.generate("Hello", seed=answer["seed"], max_tokens=5))
    assert tokens == len(expected)
    prompt = len(small_model.encode("Hello"))
    used = 100 * (prompt + tokens) / small_model.context
    assert re.search(r"\d+\.\d tokens/s", figures)
    assert re.search(r"first token [\d.]+ m?s", figures)
    assert f"{tokens} token" in figures
    assert f"context {used:.1f} %" in figures or f"context {used:.0f} %" in figures
    assert tab.page.locator("#context-text").inner_text() in figures.replace("context", "Context")


def test_details_tell_with_what_an_answer_was_made(tab: Tab):
    tab.set(system="Be brief.", temperature=0.7)
    tab.ask("Hello")
    details = tab.page.locator("article.assistant .about")
    assert details.is_hidden()
    tab.act("Details")
    text = details.inner_text()
    assert "temperature 0.7" in text
    assert "Be brief." in text
    assert tab.messages()[-1]["fingerprint"] in text


def test_answer_is_shown_as_it_comes_and_escape_stops_it(endless: Served, open_tab: OpenTab):
    tab = open_tab(endless)
    tab.set(**LONG)
    tab.write("Hello")
    tab.until("document.querySelector('article.assistant .text')?.innerText.length > 0")
    assert tab.page.locator("article.assistant").get_attribute("aria-busy") == "true"
    assert tab.page.locator("#send").is_hidden()
    assert endless.service.worker.count == 1
    tab.page.keyboard.press("Escape")
    text = tab.end()
    assert text
    endless.wait_for_rows(0)
    note = tab.page.locator("article.assistant .note").inner_text()
    assert note == "You have stopped this answer."
    assert tab.messages()[-1]["state"] == "stopped"
    tab.page.wait_for_selector("article.assistant .figures > :text('context')")
    figures = tab.messages()[-1]["figures"]
    assert figures["tokens"] > 0
    assert figures["promptTokens"] > 0


def test_button_stops_an_answer_too(endless: Served, open_tab: OpenTab):
    tab = open_tab(endless)
    tab.set(**LONG)
    tab.write("Hello")
    tab.page.click("#stop")
    tab.end()
    endless.wait_for_rows(0)
    assert tab.page.evaluate("document.activeElement.id") == "text"


def test_new_answer_stands_beside_the_old_one(tab: Tab):
    first = tab.ask("Hello")
    shown = tab.texts()
    tab.act("Answer again")
    tab.page.wait_for_selector("article.assistant .place:text-is('2/2')")
    second = tab.end()
    assert first != second
    assert len(tab.messages()) == 3
    tab.act("Previous answer")
    assert tab.place() == "1/2"
    assert tab.texts() == shown
    tab.page.reload()
    tab.page.wait_for_selector("article")
    assert tab.place() == "1/2"
    assert tab.texts() == shown
    tab.act("Next answer")
    assert tab.place() == "2/2"


def test_edited_question_stands_beside_the_old_one_with_what_followed(tab: Tab):
    tab.ask("One")
    tab.ask("Two")
    before = tab.texts("user"), tab.texts()
    tab.act("Edit", of="user", at=0)
    tab.page.fill(".editor", "Three")
    tab.page.click(".editing .primary")
    tab.page.wait_for_selector("article.user .place:text-is('2/2')")
    tab.end()
    assert tab.texts("user") == ["Three"]
    assert [message["content"] for message in tab.bodies[-1]["messages"]] == ["Three"]
    tab.act("Previous version", of="user", at=0)
    assert (tab.texts("user"), tab.texts()) == before


def test_editing_can_be_given_up(tab: Tab):
    tab.ask("One")
    tab.page.keyboard.press("ArrowUp")
    assert tab.page.input_value(".editor") == "One"
    tab.page.fill(".editor", "Two")
    tab.page.keyboard.press("Escape")
    assert tab.texts("user") == ["One"]
    assert len(tab.bodies) == 1


def test_edited_answer_is_what_the_model_reads_next(tab: Tab):
    first = tab.ask("One")
    tab.act("Edit")
    tab.page.fill(".editor", "My own words")
    tab.page.click(".editing .primary")
    assert tab.place() == "2/2"
    tab.ask("Two")
    assert [m["content"] for m in tab.bodies[-1]["messages"]] == ["One", "My own words", "Two"]
    tab.act("Previous answer", at=0)
    assert first in [message["text"] for message in tab.messages()]
    assert len(tab.texts("user")) == 1


def test_repeated_answer_has_the_same_text_and_says_so(tab: Tab):
    tab.set(temperature=2, top_k=0, top_p=1, min_p=0)
    first = tab.ask("Hello")
    tab.act("Repeat")
    tab.page.wait_for_selector("article.assistant .place:text-is('2/2')")
    assert tab.end() == first
    assert tab.bodies[1] == {**tab.bodies[0], "seed": tab.messages()[1]["seed"]}
    assert tab.page.locator(".same").inner_text() == "same seed, the same text as 1/2"


def test_changed_text_with_the_same_seed_is_told(tab: Tab):
    """The page compares texts; it does not take the promise for granted."""
    tab.ask("Hello")
    answer = tab.messages()[-1]
    other = {**answer, "id": "other", "text": "else", "fingerprint": "fp_other"}
    found = tab.call("figures", "(m, [a, b]) => m.comparison(b, [a, b])", [answer, other])
    assert found["isSame"] is False
    assert "not the text of 1/2" in found["text"]
    assert "the program has changed" in found["text"]
    warm = {**other, "sampling": {"temperature": 1}}
    assert tab.call("figures", "(m, [a, b]) => m.comparison(b, [a, b])", [answer, warm]) is None


def test_seed_of_an_answer_is_used_until_it_is_taken_away(tab: Tab):
    tab.ask("Hello")
    seed = tab.messages()[-1]["seed"]
    tab.page.click("article.assistant .seed")
    assert str(seed) in tab.notices()
    assert tab.page.locator("#pinned").inner_text() == f"Seed {seed}"
    tab.act("Answer again with seed")
    tab.page.wait_for_selector(".same:text-is('same seed, the same text as 1/2')")
    assert tab.bodies[-1]["seed"] == seed
    tab.page.click("#pinned button")
    tab.ask("Again")
    assert "seed" not in tab.bodies[-1]


def test_settings_are_sent_and_kept_with_the_conversation(tab: Tab):
    settings = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.02,
        "repetition_penalty": 1.1,
        "max_tokens": 3,
        "seed": 9007199254740991,
    }
    tab.set(system="Be brief.", **settings)
    tab.ask("Hello")
    body = tab.bodies[-1]
    assert {name: body[name] for name in settings} == settings
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert tab.messages()[-1]["seed"] == settings["seed"]
    tab.page.reload()
    tab.page.wait_for_selector("article")
    tab.page.click("#open-settings")
    assert tab.page.input_value("#set-top_k") == "20"
    assert tab.page.input_value("#system") == "Be brief."


def test_settings_can_be_those_of_new_conversations(tab: Tab):
    tab.page.click("#open-settings")
    tab.page.fill("#set-temperature", "0.3")
    tab.page.click("#save-defaults")
    tab.page.keyboard.press("Escape")
    tab.new()
    tab.ask("Hello")
    assert tab.bodies[-1]["temperature"] == 0.3


def test_settings_show_the_models_own_and_refuse_wrong_numbers(tab: Tab, small_model: Model):
    tab.until("document.querySelector('#model').textContent")
    tab.page.click("#open-settings")
    own = tab.page.get_attribute("#set-temperature", "placeholder")
    assert float(own) == small_model.sampling.temperature
    tab.page.fill("#set-top_p", "7")
    assert tab.page.get_attribute("#set-top_p", "aria-invalid") == "true"
    tab.page.keyboard.press("Escape")
    tab.ask("Hello")
    assert "top_p" not in tab.bodies[-1]


def test_text_file_goes_into_the_message(tab: Tab, tmp_path: Path):
    path = tmp_path / "notes.md"
    path.write_text("# Notes\n```\ncode\n```\n")
    tab.page.set_input_files("#file", path)
    assert tab.page.locator("#chips li").inner_text() == "notes.md"
    tab.ask("Read this")
    content = tab.bodies[-1]["messages"][0]["content"]
    assert content == "notes.md:\n````\n# Notes\n```\ncode\n```\n````\n\nRead this"
    assert tab.page.locator(".attachment summary").inner_text() == "notes.md"
    assert tab.page.locator("#chips").is_hidden()


def test_file_can_be_dropped_and_removed(tab: Tab):
    drop = """() => {
      const dataTransfer = new DataTransfer();
      dataTransfer.items.add(new File(['text'], 'dropped.txt'));
      for (const type of ['dragenter', 'dragover', 'drop']) {
        const options = { dataTransfer, bubbles: true, cancelable: true };
        document.querySelector('#messages').dispatchEvent(new DragEvent(type, options));
      }
    }"""
    tab.page.evaluate(drop)
    tab.page.click("[aria-label='Remove dropped.txt']")
    assert tab.page.locator("#chips").is_hidden()
    assert tab.page.locator(".drop").is_hidden()


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a\x00b"])
def test_file_that_is_no_text_is_refused(tab: Tab, tmp_path: Path, content: bytes):
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    tab.page.set_input_files("#file", path)
    assert "picture.png is not a text" in tab.notices()
    assert tab.page.locator("#chips").is_hidden()


def test_two_conversations_are_answered_at_the_same_time(endless: Served, open_tab: OpenTab):
    tab = open_tab(endless)
    tab.set(**LONG)
    tab.write("One")
    tab.page.wait_for_selector("#stop:not([hidden])")
    tab.new()
    tab.write("Two")
    endless.wait_for_rows(2)
    tab.until("document.querySelectorAll('.busy').length === 2")
    tab.page.click("#conversations .title:has-text('One')")
    tab.page.wait_for_selector("article.user:has-text('One')")
    tab.page.keyboard.press("Escape")
    endless.wait_for_rows(1)
    tab.page.click("#conversations .title:has-text('Two')")
    tab.page.wait_for_selector("article.user:has-text('Two')")
    tab.page.click("#stop")
    endless.wait_for_rows(0)


def test_click_on_a_conversation_counts_while_the_list_changes(tab: Tab):
    tab.ask("One")
    tab.new()
    tab.ask("Two")
    tab.page.hover("#conversations .title:has-text('One')")
    tab.page.mouse.down()
    tab.call(
        "store",
        """async ({ openStore }) => {
          const store = await openStore();
          const [two] = (await store.conversations()).filter(({ title }) => title === 'Two');
          await store.put({ conversations: [{ ...two, title: 'Three' }] });
          new BroadcastChannel('phicore').postMessage({}); // as another tab does
        }""",
    )
    tab.page.wait_for_timeout(300)  # without the press, the list would have changed long ago
    tab.page.mouse.up()
    tab.page.wait_for_selector("article.user:has-text('One')")
    tab.page.wait_for_selector("#conversations .title:has-text('Three')")


def test_shift_enter_makes_a_line_and_composed_text_is_not_sent(tab: Tab):
    tab.page.fill("#text", "one")
    tab.page.keyboard.press("Shift+Enter")
    tab.page.keyboard.type("two")
    assert tab.page.input_value("#text") == "one\ntwo"
    composing: dict[str, Any] = {"key": "Enter", "isComposing": True, "bubbles": True}
    tab.page.dispatch_event("#text", "keydown", composing)
    assert tab.texts("user") == []
    tab.page.keyboard.press("Enter")
    tab.end()
    assert tab.texts("user") == ["one\ntwo"]
