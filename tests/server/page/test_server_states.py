"""The page: servers that want a key, load, refuse, break, or are not there."""

from __future__ import annotations

import threading
from pathlib import Path

from server.conftest import ENDLESS, HI, Served, ready, serving
from server.page.conftest import LONG, OpenTab, Tab, running
from starlette.applications import Starlette
from starlette.routing import Mount

import phicore
from phicore import Model
from phicore.server import Settings, app
from phicore.server.errors import ApiError

FAILURE = ApiError("the engine has failed", status=500)


def note(tab: Tab) -> str:
    """Return what the newest answer tells about itself."""
    found = tab.page.locator("article.assistant .note:not([hidden]) > span").last
    found.wait_for()
    return found.inner_text()


def test_key_is_asked_for_until_it_is_right(small_model: Model, open_tab: OpenTab):
    with ready(small_model, api_keys=["right"], settings=Settings(max_answer=4)) as served:
        tab = open_tab(served)
        tab.page.wait_for_selector("#key[open]")
        assert "needs an API key" in tab.page.locator("#key-problem").inner_text()
        tab.page.fill("#key-field", "wrong")
        tab.page.keyboard.press("Enter")
        tab.page.wait_for_selector("#key", state="hidden")
        tab.write("Hello")
        tab.page.wait_for_selector("#key[open]")
        assert "key is wrong" in tab.page.locator("#key-problem").inner_text()
        tab.page.fill("#key-field", "right")
        tab.page.keyboard.press("Enter")
        tab.page.wait_for_selector("article.assistant .seed")
        assert len([each for each in tab.messages() if each["role"] == "assistant"]) == 1
        assert tab.page.evaluate("sessionStorage.getItem('phicore-key')") == "right"
        assert "right" not in tab.page.evaluate("JSON.stringify(localStorage)")
        tab.page.reload()
        tab.page.wait_for_selector("#model:text-is('tiny')")
        assert tab.page.locator("#key[open]").count() == 0


def test_key_dialog_that_is_closed_leaves_the_question_and_offers_it_again(
    small_model: Model, open_tab: OpenTab
):
    with ready(small_model, api_keys=["right"], settings=Settings(max_answer=4)) as served:
        tab = open_tab(served)
        tab.page.wait_for_selector("#key[open]")
        tab.page.keyboard.press("Escape")
        tab.write("Hello")
        tab.page.wait_for_selector("#key[open]")
        tab.page.click("#key [data-close]")
        assert note(tab) == "this server needs an API key."
        tab.page.click(".note button:text-is('Enter a key')")
        tab.page.fill("#key-field", "right")
        tab.page.keyboard.press("Enter")
        tab.page.wait_for_selector("article.assistant .seed")


def test_question_waits_until_the_model_is_there(small_model: Model, open_tab: OpenTab):
    loaded = threading.Event()

    def load() -> Model:
        loaded.wait()
        return small_model

    with serving(load, settings=Settings(max_answer=4)) as served:
        try:
            tab = open_tab(served)
            tab.page.wait_for_selector("#state:text-is('Loading the model')")
            tab.write("Hello")
            assert note(tab) == "The model is loading. The answer begins when it is there."
        finally:
            loaded.set()
        tab.page.wait_for_selector("article.assistant .seed")
        tab.page.wait_for_selector("#state", state="hidden")
        assert "loading" not in tab.page.locator("article.assistant .note").inner_text()


def test_question_waits_while_the_queue_is_full(endless: Served, open_tab: OpenTab):
    tab = open_tab(endless)
    tab.set(**LONG)
    clients = [
        endless.client.chat.completions.create(
            model="tiny",
            messages=HI,
            stream=True,
            extra_body={"repetition_penalty": 1},
            max_tokens=ENDLESS["max_tokens"],
            temperature=0,
        )
        for _ in range(4)
    ]
    endless.wait_for_rows(4)
    tab.write("Hello")
    assert note(tab) == "The server answers others. This question waits."
    for each in clients:
        each.close()
    tab.until("document.querySelector('article.assistant .text').innerText.length > 0")
    tab.page.keyboard.press("Escape")
    tab.end()
    endless.wait_for_rows(0)


def test_connection_that_breaks_keeps_what_has_come(endless_path: Path, open_tab: OpenTab):
    with phicore.load(endless_path, "numpy") as model:
        with ready(model) as served:
            tab = open_tab(served)
            tab.write("Hello")
            tab.until("document.querySelector('article.assistant .text')?.innerText.length > 0")
            served.service.end_all(FAILURE)
            text = tab.end()
        assert text
        assert "What had come is kept" in note(tab)
        assert tab.messages()[-1]["state"] == "broken"
        tab.write("More")
        tab.page.wait_for_selector("#state:text-is('No server')")
        assert "cannot be reached" in note(tab)
        assert served.url in note(tab)
        assert [each["text"] for each in tab.messages()][1] == text


def test_broken_answer_is_repeated_from_its_beginning(endless: Served, open_tab: OpenTab):
    tab = open_tab(endless)
    tab.set(**LONG)
    tab.write("Hello")
    tab.until("document.querySelector('article.assistant .text')?.innerText.length > 40")
    endless.service.end_all(FAILURE)
    text = tab.end()
    assert "the engine has failed" in note(tab)
    tab.page.click(".note button:text-is('Repeat with the same seed')")
    tab.page.wait_for_selector(".place:text-is('2/2')")
    shown = tab.page.locator("article.assistant .text").inner_text
    for _ in range(3000):
        if len(shown()) > len(text) + 20:
            break
        tab.page.wait_for_timeout(20)
    tab.page.keyboard.press("Escape")
    again = tab.end()
    assert again.startswith(text)
    assert "the same text as far as it goes" in tab.page.locator(".same").inner_text()


def test_answer_of_a_page_that_was_closed_is_kept_as_far_as_it_came(
    endless: Served, open_tab: OpenTab
):
    tab = open_tab(endless)
    tab.set(**LONG)
    tab.write("Hello")
    tab.until("document.querySelector('article.assistant .text')?.innerText.length > 0")
    while not tab.messages()[-1]["text"]:
        tab.page.wait_for_timeout(50)
    tab.page.reload()
    tab.page.wait_for_selector("article.assistant")
    endless.wait_for_rows(0)
    assert tab.texts()[0]
    assert "closed" in note(tab)


def test_full_context_is_told_and_the_oldest_messages_can_be_left_out(
    served: Served, small_model: Model, open_tab: OpenTab
):
    tab = open_tab(served)
    tab.set(max_tokens=8)
    tab.ask("The first question. " * 7)
    tab.ask("The second question. " * 7)
    tab.ask("The third question. " * 7)
    assert len(small_model.encode(tab.bodies[-1]["messages"])) >= small_model.context
    told = note(tab)
    assert f"This model's maximum context length is {small_model.context} tokens." in told
    tab.page.click(".note button:text-is('Leave out the oldest messages')")
    tab.page.wait_for_selector("article.assistant:last-child .seed")
    tab.end()
    assert "oldest messages were left out" in note(tab)
    assert tab.bodies[-1]["messages"][-1]["content"].startswith("The third question.")
    assert len(tab.bodies[-1]["messages"]) < 5
    assert len(tab.texts("user")) == 3


def test_page_without_https_has_identifiers_and_copies(small_model: Model, open_tab: OpenTab):
    """Browsers have neither randomUUID nor navigator.clipboard for http://NAME, as on a phone."""
    settings = Settings(max_answer=8)
    with ready(small_model, settings=settings, allowed_hosts=["phone.test"]) as served:
        tab = open_tab(served.url.replace("127.0.0.1", "phone.test"))
        assert tab.page.evaluate("isSecureContext") is False
        tab.ask("Hello")
        tab.act("Copy", of="user")
        assert tab.notices() == "Copied."
        tab.page.focus("#text")
        tab.page.keyboard.press("Control+v")
        assert tab.page.input_value("#text") == "Hello"


def test_page_in_another_application_finds_its_server(small_model: Model, open_tab: OpenTab):
    inner = app(small_model, names=["tiny"], settings=Settings(max_answer=8))
    with running(Starlette(routes=[Mount("/llm", inner)])) as url:
        tab = open_tab(f"{url}/llm/")
        assert tab.ask("Hello")
        assert tab.texts("user") == ["Hello"]
    inner.state.service.close()
