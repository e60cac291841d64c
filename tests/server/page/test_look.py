"""The page: themes, phones, names and contrast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from api.tiny_models import write_tiny
from server.conftest import Served, ready
from server.page.conftest import LONG, OpenTab, Tab

import phicore
from phicore.server import Settings

ANSWER = """# A heading

Text with `code`, a [link](https://example.org) and a list:

1. One
2. Two

> A quotation

| a | b |
|---|---|
| 1 | a_rather_long_word_that_does_not_fit_into_the_width_of_a_phone_with_others |

```py
def a_long_line_of_code(that="does not fit into the width of a phone", because="it is long"):
```
"""

CONTRASTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
  const parse = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3]));
  const ground = (element) => {
    if (!element) return [255, 255, 255];
    const color = parse(getComputedStyle(element).backgroundColor);
    return color[3] === 1 ? color.slice(0, 3) : over(color, ground(element.parentElement));
  };
  const luminance = (color) => {
    const [r, g, b] = color.map((c) => c / 255).map((c) =>
      c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  for (const element of document.querySelectorAll('body *')) {
    const isText = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    const isField = element.matches('input, textarea');
    if (!(isText || isField) || !element.checkVisibility({ visibilityProperty: true })) continue;
    if (element.closest('.hidden, :disabled, [inert], .skip')) continue;
    const modal = document.querySelector('dialog[open]');
    if (modal && !modal.contains(element)) continue;
    const style = getComputedStyle(element, isField ? '::placeholder' : null);
    const under = ground(element);
    const colors = [over(parse(style.color), under), under].map(luminance).sort((a, b) => b - a);
    const ratio = (colors[0] + 0.05) / (colors[1] + 0.05);
    const text = element.textContent.trim() || element.placeholder;
    const what = `${element.localName}.${element.className} ${text}`;
    found.push([Math.round(100 * ratio) / 100, what.slice(0, 80)]);
  }
  return found;
}"""

NAMELESS = """() => {
  const textOf = (elements) => elements.map((each) => each?.textContent ?? '').join(' ');
  const name = (element) => {
    const ids = element.getAttribute('aria-labelledby')?.split(' ');
    if (ids) return textOf(ids.map((id) => document.getElementById(id)));
    const isField = element.matches('input, textarea, select');
    return element.ariaLabel || textOf([...(element.labels ?? [])])
      || (isField ? '' : element.textContent);
  };
  const kinds = ['button', 'input:not([hidden])', 'textarea', 'select', 'a[href]', 'dialog', 'nav',
    'progress', 'article', '[role=group]', 'summary'];
  return [...document.querySelectorAll(kinds.join(', '))].filter((each) => !name(each).trim())
    .map((each) => each.outerHTML);
}"""


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Serve a model with a context that holds a long answer."""
    path = write_tiny(
        tmp_path_factory.mktemp("models") / "roomy.gguf", max_position_embeddings=4000
    )
    with (
        phicore.load(path, "numpy") as model,
        ready(model, settings=Settings(max_answer=24)) as found,
    ):
        yield found


@pytest.fixture
def full(roomy: Served, open_tab: OpenTab) -> Callable[..., Tab]:
    """Return a function that opens a page with a conversation of many kinds of text."""

    def opened(**options: Any) -> Tab:
        tab = open_tab(roomy, **options)
        tab.ask("A question that is long enough to be wrapped on the width of a phone")
        tab.act("Edit", of="assistant")
        tab.page.fill(".editor", ANSWER)
        tab.page.click(".editing .primary")
        tab.page.wait_for_selector(".place:text-is('2/2')")
        tab.ask("Another")
        tab.act("Repeat")
        tab.page.wait_for_selector(".same")
        return tab

    return opened


def check_contrast(tab: Tab) -> None:
    """Check that texts have the contrast that WCAG's level AA asks for."""
    found = tab.page.evaluate(CONTRASTS)
    assert len(found) > 3
    assert [each for each in found if each[0] < 4.5] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_contrast(full: Callable[..., Tab], scheme: str):
    tab = full(color_scheme=scheme)
    check_contrast(tab)
    tab.page.click("#open-settings")
    check_contrast(tab)
    tab.page.keyboard.press("Escape")
    tab.page.keyboard.press("Control+/")
    check_contrast(tab)


def test_contrast_that_is_too_low_is_found(tab: Tab):
    tab.page.evaluate("document.querySelector('#empty h2').style.color = 'rgb(190 190 190)'")
    low = [each for each in tab.page.evaluate(CONTRASTS) if each[0] < 4.5]
    assert [text for _, text in low] == ["h2. What is on your mind?"]


def test_theme_follows_the_system_and_can_be_chosen(tab: Tab):
    def is_dark() -> bool:
        ground = "getComputedStyle(document.body).backgroundColor"
        return tab.page.evaluate(f"{ground}.match(/\\d+/g).every((c) => c < 60)")

    assert not is_dark()
    tab.page.emulate_media(color_scheme="dark")
    assert is_dark()
    tab.page.select_option("#theme", "light")
    assert not is_dark()
    tab.page.reload()
    tab.page.wait_for_selector("body.ready")
    assert not is_dark()
    assert tab.page.input_value("#theme") == "light"
    tab.page.emulate_media(color_scheme="light")
    tab.page.select_option("#theme", "dark")
    assert is_dark()


@pytest.mark.parametrize("width", [320, 390, 768, 1200])
def test_nothing_is_wider_than_the_window(full: Callable[..., Tab], width: int):
    tab = full()
    tab.page.set_viewport_size({"width": width, "height": 700})
    wide = """() => [...document.querySelectorAll('body *')].filter((each) =>
      each.checkVisibility({ visibilityProperty: true }) && !each.closest('.hidden, pre, .table')
      && each.getBoundingClientRect().right > innerWidth + 0.5).map((each) => each.outerHTML)"""
    assert tab.page.evaluate(wide) == []
    assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert tab.page.evaluate("document.querySelector('#scroller').scrollWidth") <= width
    tab.page.click("#open-settings")
    assert tab.page.evaluate(wide) == []


def test_list_of_conversations_covers_the_page_on_a_phone(served: Served, open_tab: OpenTab):
    tab = open_tab(served)
    tab.page.set_viewport_size({"width": 390, "height": 700})
    tab.ask("Hello")
    tab.page.locator("#sidebar").wait_for(state="hidden")
    tab.page.click("#menu")
    tab.page.wait_for_selector("#conversations .title")
    assert tab.page.evaluate("document.querySelector('#main').inert")
    assert tab.page.get_attribute("#menu", "aria-expanded") == "true"
    tab.page.keyboard.press("Escape")
    tab.page.wait_for_selector("#sidebar", state="hidden")
    assert tab.page.evaluate("document.activeElement.id") == "menu"
    tab.page.click("#menu")
    tab.page.click("#conversations .title")
    tab.page.wait_for_selector("#sidebar", state="hidden")


def test_everything_that_can_be_used_has_a_name(full: Callable[..., Tab]):
    tab = full()
    assert tab.page.evaluate(NAMELESS) == []
    tab.page.evaluate("document.querySelector('#send').ariaLabel = ''")
    assert len(tab.page.evaluate(NAMELESS)) == 1
    ids = "[...document.querySelectorAll('[id]')].map((each) => each.id)"
    found = tab.page.evaluate(ids)
    assert len(found) == len(set(found))
    levels = tab.page.evaluate("[...document.querySelectorAll('h1')].length")
    assert levels == 1


def test_answer_is_spoken_in_sentences_and_not_in_tokens(endless: Served, open_tab: OpenTab):
    tab = open_tab(endless)
    tab.set(**LONG)
    tab.write("Hello")
    tab.until("document.querySelector('article.assistant .text')?.innerText.length > 40")
    live = tab.page.locator("#spoken")
    assert live.get_attribute("aria-live") == "polite"
    assert tab.page.locator("article [aria-live], article[aria-live]").count() == 0
    tab.page.keyboard.press("Escape")
    tab.end()
    spoken = [text.strip() for text in live.locator("p").all_inner_texts()]
    shown = tab.page.locator("article.assistant .text").evaluate("each => each.textContent")
    assert "".join(spoken).split() == shown.split()
    blocks = tab.page.locator("article.assistant .text > *").count()
    assert len(spoken) <= blocks


def test_keyboard_reaches_everything_and_focus_is_seen(full: Callable[..., Tab]):
    tab = full()
    tab.page.focus(".skip")
    seen = []
    for _ in range(60):
        tab.page.keyboard.press("Tab")
        script = """() => {
          const { activeElement: each } = document;
          if (each === document.body) return null;
          const field = each.id === 'text' ? each.closest('form') : each;
          const style = getComputedStyle(field);
          return [each.id || each.ariaLabel || each.className || each.localName,
            style.outlineStyle !== 'none' || style.boxShadow !== 'none'];
        }"""
        if (found := tab.page.evaluate(script)) is None:
            break
        seen.append(found)
    names = [name for name, _ in seen]
    assert {"new", "search", "export", "theme", "open-help", "open-settings", "text"} <= {*names}
    assert {"Copy", "Answer again", "Previous answer"} <= {*names}
    assert [name for name, is_seen in seen if not is_seen] == []


def test_help_lists_the_keys_and_escape_closes_it(tab: Tab):
    tab.page.keyboard.press("Control+/")
    tab.page.wait_for_selector("#help[open]")
    text = tab.page.locator("#help").inner_text()
    for words in ("Send", "A new line", "Stop the answer", "Search", "New conversation"):
        assert words in text
    tab.page.keyboard.press("Escape")
    tab.page.wait_for_selector("#help", state="hidden")


def test_nothing_moves_for_those_who_do_not_want_it(endless: Served, open_tab: OpenTab):
    tab = open_tab(endless, reduced_motion="reduce")
    tab.set(**LONG)
    tab.write("Hello")
    tab.until("document.querySelector('article.assistant .text')?.innerText.length > 0")
    assert tab.page.evaluate("document.getAnimations().length") == 0
    tab.page.emulate_media(reduced_motion="no-preference")
    assert tab.page.evaluate("document.getAnimations().length") > 0
    tab.page.keyboard.press("Escape")
    tab.end()


def test_long_answer_is_followed_unless_the_user_looks_elsewhere(
    endless: Served, open_tab: OpenTab
):
    tab = open_tab(endless)
    tab.set(**LONG)
    tab.page.set_viewport_size({"width": 390, "height": 400})
    tab.write("Hello")
    scroller = "document.querySelector('#scroller')"
    rest = f"{scroller}.scrollHeight - {scroller}.scrollTop - {scroller}.clientHeight"
    tab.until("document.querySelector('#scroller').scrollHeight > 900")
    assert tab.page.evaluate(rest) < 100
    tab.page.evaluate("document.querySelector('#scroller').scrollTop = 0")
    tab.page.wait_for_selector("#to-end:not([hidden])")
    tab.until("document.querySelector('#scroller').scrollHeight > 1200")
    assert tab.page.evaluate("document.querySelector('#scroller').scrollTop") == 0
    tab.page.click("#to-end")
    tab.until(f"{rest} < 100")
    tab.page.keyboard.press("Escape")
    tab.end()


def test_content_policy_stops_html_styles_and_other_sites(served: Served, open_tab: OpenTab):
    """The policy of the page is there and works; all other tests see no violation of it."""
    _, _, headers = served.get("/")
    assert headers["content-security-policy"].startswith("default-src 'self';")
    tab = open_tab(served)
    script = """() => {
      let problem;
      try {
        document.body.innerHTML = '<b>x</b>';
      } catch (error) {
        problem = error.name;
      }
      document.body.setAttribute('style', 'color: red');
      document.body.append(Object.assign(new Image(), { src: 'https://example.org/x.png' }));
      return problem;
    }"""
    assert tab.page.evaluate(script) == "TypeError"
    tab.until("window.violations.length >= 3")
    kinds = {each.partition(":")[0] for each in tab.page.evaluate("window.violations")}
    assert kinds == {"require-trusted-types-for", "style-src-attr", "img-src"}
    tab.page.evaluate("window.violations = []")
    tab.problems.clear()
