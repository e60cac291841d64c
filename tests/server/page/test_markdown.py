"""The page: Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from server.page.conftest import Tab, conversation_file

SHOWN = """(markdown, parts) => {
  const shown = [];
  for (const all of [parts, [parts.join('')]]) {
    const element = document.createElement('div');
    const view = new markdown.MarkdownView(element);
    let text = '';
    for (const part of all) view.write(text += part, true);
    view.write(text, false);
    shown.push(element.innerHTML);
  }
  return shown;
}"""

BITS = [
    *("\n", "\n\n", "  ", "    ", "\t", "- ", "* ", "1. ", "2. ", "> ", "# ", "### ", "---\n"),
    *("```", "```py\n", "~~~\n", "`", "**", "*", "_", "~~", "[", "](https://a.b/c)", "]("),
    *("| a | b |\n|---|:-:|\n", "|", "\\", "<b>", "https://a.b/(c).", "word", "x", " ", "é", "1"),
]


def html(tab: Tab, text: str) -> str:
    """Return what is shown for a text, without the parts of blocks of code."""
    return tab.call("markdown", SHOWN, [text])[1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "a *b* **c** ***d*** ~~e~~",
            "<p>a <em>b</em> <strong>c</strong> <em><strong>d</strong></em> <del>e</del></p>",
        ),
        ("2 * 3 * 4, snake_case_name, a_b_", "<p>2 * 3 * 4, snake_case_name, a_b_</p>"),
        ("**a*b**c***", "<p><strong>a*b</strong>c***</p>"),
        ("`a` ``b`c`` `d", "<p><code>a</code> <code>b`c</code> `d</p>"),
        (r"\*a\* \`b\`", "<p>*a* `b`</p>"),
        ("one\ntwo  \nthree\n\nfour", "<p>one<br>two<br>three</p><p>four</p>"),
        ("# a #\n### b", "<h3>a</h3><h5>b</h5>"),
        ("- a\n- b\n  - c\n\ntext", "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul><p>text</p>"),
        ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
        ("- a\n\n- b", "<ul><li><p>a</p></li><li><p>b</p></li></ul>"),
        ("1. a\n   more\n2. b", "<ol><li>a<br>more</li><li>b</li></ol>"),
        ("> a\n> - b", "<blockquote><p>a</p><ul><li>b</li></ul></blockquote>"),
        ("a\n***\nb", "<p>a</p><hr><p>b</p>"),
        ("<b>&amp;</b>", "<p>&lt;b&gt;&amp;amp;&lt;/b&gt;</p>"),
        ("a<br>b", "<p>a<br>b</p>"),
        ("[a](javascript:alert(1)) [b](data:x) [c](//x.y)", "<p>a b c</p>"),
    ],
)
def test_markdown_is_shown_as_in_commonmark(tab: Tab, text: str, expected: str):
    assert html(tab, text) == expected


@pytest.mark.parametrize(
    ("text", "url", "label"),
    [
        ("see https://a.b/c_(d).", "https://a.b/c_(d)", "https://a.b/c_(d)"),
        ('[**a**](https://a.b "title")', "https://a.b", "<strong>a</strong>"),
        ("<mailto:a@b.c>", "mailto:a@b.c", "mailto:a@b.c"),
        ("![picture](http://a.b/c.png)", "http://a.b/c.png", "picture"),
    ],
)
def test_links_open_elsewhere_and_pictures_are_links(tab: Tab, text: str, url: str, label: str):
    anchor = f'<a href="{url}" target="_blank" rel="noopener noreferrer">{label}</a>'
    assert anchor in html(tab, text)
    assert "<img" not in html(tab, text)


def test_code_is_kept_as_it_is_and_can_be_copied(tab: Tab, tmp_path: Path):
    code = "\tif a < b:\n\n    **x** `y` <b>\n"
    listed = "".join(f"   {line}" for line in code.splitlines(True))
    text = f"```py title\n{code}```\n\n1. Do this:\n   ```\n{listed}   ```"
    tab.take(conversation_file(tmp_path, text))
    tab.page.click("#conversations .title")
    tab.page.wait_for_selector("article.assistant pre >> nth=1")
    assert tab.page.locator("article.assistant pre").all_text_contents() == [code, code]
    assert tab.page.locator(".code-head span").all_inner_texts() == ["py", ""]
    tab.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.page.locator(".copy-code").first.click()
    tab.page.wait_for_selector(".copy-code:text-is('Copied')")
    assert tab.page.evaluate("navigator.clipboard.readText()") == code


def test_table_has_its_cells_and_sides(tab: Tab):
    found = html(tab, "| a | b | c |\n|:--|:-:|--:|\n| 1 | `x` | **y** \\| z |\n| 2 |\n\nafter")
    assert '<th>a</th><th class="center">b</th><th class="right">c</th>' in found
    assert '<td>1</td><td class="center"><code>x</code></td>' in found
    assert '<td class="right"><strong>y</strong> | z</td>' in found
    assert '<tr><td>2</td><td class="center"></td><td class="right"></td></tr>' in found
    assert found.endswith("<p>after</p>")


def test_text_that_comes_in_parts_is_shown_as_the_whole_text(tab: Tab):
    """The law of the incremental reader: the parts in which a text comes make no difference."""

    @settings(max_examples=300, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.sampled_from(BITS), min_size=1, max_size=30))
    @example(["1. a\n\n", "2", ". b"])
    @example(["- a\n\n", "-", "--\n", "b"])
    @example(["```\na\n", "``", "`\nb"])
    @example(["| a | b |\n", "|--", "-|---|\n", "| 1"])
    def check(parts: list[str]) -> None:
        streamed, whole = tab.call("markdown", SHOWN, parts)
        assert streamed == whole

    check()


def test_what_is_complete_is_not_drawn_again(tab: Tab):
    """A long answer would otherwise cost more with each token, and lose the user's selection."""
    script = """async (markdown) => {
      const element = document.createElement('div');
      const view = new markdown.MarkdownView(element);
      const changed = [];
      const observer = new MutationObserver((records) => changed.push(...records));
      const options = { childList: true, characterData: true, subtree: true };
      let text = Array.from({ length: 200 }, (_, i) => `Paragraph **${i}**.`).join('\\n\\n');
      text += '\\n\\n```js\\n' + 'let a = 1;\\n'.repeat(200);
      view.write(text, true);
      const nodes = [...element.querySelectorAll('*')];
      observer.observe(element, options);
      for (let i = 0; i < 50; i++) view.write(text += 'more();\\n', true);
      await Promise.resolve();
      return {
        same: nodes.every((node, i) => node === element.querySelectorAll('*')[i]),
        targets: [...new Set(changed.map((record) => record.target.parentNode.localName))],
        settled: view.count,
      };
    }"""
    assert tab.call("markdown", script) == {"same": True, "targets": ["code"], "settled": 200}


@pytest.mark.parametrize(
    "text",
    ["[" * 20000, "*a _b " * 5000, ">" * 20000, "- a " * 20000, "`a``b" * 5000, "~a* " * 5000],
    ids=["brackets", "emphasis", "quotes", "items", "code", "strikes"],
)
def test_text_that_is_made_to_be_slow_is_shown(tab: Tab, text: str):
    shown: Any = tab.call(
        "markdown",
        """(markdown, text) => {
          const element = document.createElement('div');
          new markdown.MarkdownView(element).write(text, false);
          return element.textContent.length;
        }""",
        text,
    )
    assert shown > 0
