"""Fixtures: a real Chromium without a window, and the page of a real server in it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from server.conftest import WAIT_S, Served, ready
from starlette.types import ASGIApp

import phicore
from phicore import Model
from phicore.server import Settings

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
LONG = {"temperature": 0, "repetition_penalty": 1}
"""Settings with which the endless model does not end."""
WATCH = """
window.violations = [];
addEventListener('securitypolicyviolation', (event) =>
  window.violations.push(`${event.violatedDirective}: ${event.blockedURI} ${event.sample}`));
"""


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Start the browser that is installed here; without one, skip the test."""
    reason = "needs playwright; `uv sync --group browser` installs it"
    sync_api = pytest.importorskip("playwright.sync_api", reason=reason)
    given = os.environ.get("PHICORE_CHROMIUM")
    path = given or next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("needs Chromium; install Debian's package chromium, or set PHICORE_CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=path,
            args=["--host-resolver-rules=MAP phone.test 127.0.0.1", "--disable-dev-shm-usage"],
        )
        yield found
        found.close()


class Tab:
    """The page in a tab, and what a user does with it.

    Attributes:
        page: Playwright's object for the tab.
        bodies: The bodies of the requests for answers that the page has sent.
    """

    def __init__(self, page: Any) -> None:
        self.page = page
        self.bodies: list[dict[str, Any]] = []
        self.problems: list[str] = []
        page.set_default_timeout(1000 * WAIT_S)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", self._told)
        page.on("request", self._requested)

    def _told(self, message: Any) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.problems.append(message.text)

    def _requested(self, request: Any) -> None:
        if request.url.endswith("/v1/chat/completions"):
            self.bodies.append(request.post_data_json)

    def check(self) -> None:
        """Check that nothing went wrong that the user does not see.

        Raises:
            AssertionError: If a script failed, or did what the content policy forbids.
        """
        assert self.problems == []
        assert self.page.evaluate("window.violations") == []

    # ---- what a user does ------------------------------------------------------------------

    def write(self, text: str) -> None:
        """Send a message, and do not wait."""
        self.page.fill("#text", text)
        self.page.keyboard.press("Enter")

    def ask(self, text: str) -> str:
        """Send a message and return the text of the answer."""
        count = len(self.page.query_selector_all("article"))
        self.write(text)
        self.page.locator("article").nth(count + 1).wait_for()
        return self.end()

    def end(self) -> str:
        """Wait for the end of the answer; return the text of the newest one."""
        self.page.wait_for_selector("#stop", state="hidden")
        self.page.wait_for_selector("article:last-child[aria-busy=false]")
        return self.messages()[-1]["text"]

    def act(self, name: str, of: str = "assistant", at: int = -1) -> None:
        """Press a button of a message.

        Args:
            name: The beginning of its name.
            of: The role of the message.
            at: The number of the message among those.
        """
        article = self.page.locator(f"article.{of}").nth(at)
        article.hover()
        article.locator(f"button[aria-label^='{name}'], button:text-is('{name}')").first.click()

    def set(self, **settings: Any) -> None:
        """Change settings."""
        self.page.click("#open-settings")
        for name, value in settings.items():
            self.page.fill("#system" if name == "system" else f"#set-{name}", str(value))
        self.page.keyboard.press("Escape")
        self.page.wait_for_selector("#settings", state="hidden")

    def new(self) -> None:
        self.page.keyboard.press("Control+Shift+O")
        self.page.wait_for_selector("#empty:not([hidden])")

    def until(self, expression: str) -> None:
        """Wait until an expression of JavaScript is true.

        Raises:
            AssertionError: If it is not in a minute. (Playwright's own function for this evaluates
                a text in the page, which the page's content policy forbids.)
        """
        for _ in range(int(WAIT_S / 0.02)):
            if self.page.evaluate(expression):
                return
            self.page.wait_for_timeout(20)
        raise AssertionError(f"{expression} did not become true")

    def take(self, path: Path) -> str:
        """Import a file; return what the page tells."""
        self.page.set_input_files("#import-file", path)
        text = self.notices()
        self.page.click(".notice [aria-label^=Close]")
        return text

    # ---- what is there ---------------------------------------------------------------------

    def texts(self, role: str = "assistant") -> list[str]:
        """Return the texts that are shown."""
        return self.page.locator(f"article.{role} .text").all_inner_texts()

    def place(self, role: str = "assistant", at: int = -1) -> str:
        """Return which version of a message is shown, such as "1/2"."""
        return self.page.locator(f"article.{role}").nth(at).locator(".place").inner_text()

    def titles(self) -> list[str]:
        return self.page.locator("#conversations .name").all_inner_texts()

    def notices(self) -> str:
        self.page.wait_for_selector(".notice")
        return " ".join(self.page.locator(".notice > span").all_inner_texts())

    def messages(self) -> list[dict[str, Any]]:
        """Return all messages that the browser keeps, the oldest first."""
        script = """async () => {
          const { openStore } = await import('./js/store.js');
          const store = await openStore();
          const found = await store.allMessages();
          store.database.close();
          return found.sort((a, b) => a.created - b.created);
        }"""
        return self.page.evaluate(script)

    def call(self, module: str, script: str, argument: Any = None) -> Any:
        """Call a function of JavaScript with a module of the page and an argument."""
        full = f"async (given) => ({script})(await import('./js/{module}.js'), given)"
        return self.page.evaluate(full, argument)


OpenTab = Callable[..., Tab]


def conversation_file(folder: Path, text: str = "Hi", **changes: Any) -> Path:
    """Write a file that the page can import, with a question and an answer.

    Args:
        text: The text of the answer.
        changes: Other parts of the file.
    """
    time = 1700000000000
    conversation = {"id": "c", "title": "Mine", "created": time, "updated": time}
    question = {"id": "q", "conversation": "c", "role": "user", "text": "Well?", "created": time}
    answer = {**question, "id": "a", "parent": "q", "role": "assistant", "text": text}
    content = {
        "format": "phicore-conversations",
        "version": 1,
        "conversations": [conversation],
        "messages": [{**question, "parent": None}, answer],
        **changes,
    }
    path = folder / "conversations.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def open_tab(browser: Any) -> Iterator[OpenTab]:
    """Return a function that opens the page of a server in a new profile of the browser."""
    tabs: list[Tab] = []
    contexts: list[Any] = []

    def opened(served: Served | str, beside: Tab | None = None, **options: Any) -> Tab:
        if beside is None:
            contexts.append(browser.new_context(viewport={"width": 1200, "height": 800}, **options))
            contexts[-1].add_init_script(WATCH)
        context = contexts[-1] if beside is None else beside.page.context
        tabs.append(Tab(context.new_page()))
        tabs[-1].page.goto(served if isinstance(served, str) else served.url)
        tabs[-1].page.wait_for_selector("body.ready")
        return tabs[-1]

    yield opened
    for tab in tabs:
        if not tab.page.is_closed():
            tab.check()
    for context in contexts:
        context.close()


@contextmanager
def running(application: ASGIApp) -> Iterator[str]:
    """Run an application on a free port, in a thread; return the beginning of its addresses."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(application, log_config=None))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(WAIT_S)


@pytest.fixture(scope="session")
def small_model(tiny_path: Path) -> Iterator[Model]:
    with phicore.load(tiny_path, "numpy") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def served(small_model: Model) -> Iterator[Served]:
    """Serve a small model whose answers are short."""
    with ready(small_model, settings=Settings(max_answer=24)) as found:
        yield found


@pytest.fixture
def tab(served: Served, open_tab: OpenTab) -> Tab:
    """Open the page of a small model."""
    return open_tab(served)
