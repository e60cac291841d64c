"""The dialect of Jinja that chat templates are written in, against transformers.

The expected prompts are what `render_jinja_template` of transformers 5.24 gives. Where transformers
is installed (`uv sync --group reference`), it is asked again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from phicore.text.chat_template import ChatTemplate

CLOCK = {
    "type": "function",
    "function": {"name": "clock", "description": "The <time> & date", "parameters": {}},
}
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "Århus"}}}
QUESTION = {"role": "user", "content": "a"}
TURNS = [QUESTION, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
SHOW = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


@dataclass(frozen=True)
class Case:
    source: str
    expected: str
    messages: list[dict[str, Any]] = field(default_factory=lambda: TURNS)
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "generation": Case(
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}<{{ m.content }}>{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}",
        "a<b>c",
    ),
    "generation without space around": Case(
        "{% for m in messages %}\n  {%- generation -%}\n {{ m.content }}, \n"
        "  {%- endgeneration -%}\n{% endfor %}",
        "a,b,c,",
    ),
    "generation sees variables and changes namespaces": Case(
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% generation %}"
        "{{ loop.index }}{{ m.content }}{% set ns.n = ns.n + 1 %}{% endgeneration %}"
        "{% endfor %}{{ ns.n }}",
        "1a2b3c3",
    ),
    "loop controls": Case(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% continue %}{% endif %}"
        "{{ m.content }}{% if loop.last %}{% break %}{% endif %}{% endfor %}",
        "ac",
    ),
    "tools": Case(
        SHOW + "{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}",
        "[user]a"
        '{"type": "function", "function": {"name": "clock", "description": "The <time> & date", '
        '"parameters": {}}}',
        [QUESTION],
        {"tools": [CLOCK]},
    ),
    "tojson": Case(
        SHOW + "{{ {'b': [1, 'é'], 'a': none} | tojson(indent=1, sort_keys=true) }}"
        "{{ ['é'] | tojson(ensure_ascii=true, separators=(',', ':')) }}",
        '[user]a{\n "a": null,\n "b": [\n  1,\n  "é"\n ]\n}["\\u00e9"]',
        [QUESTION],
    ),
    "tool calls": Case(
        "{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}"
        "{{ c.function.name }}({{ c.function.arguments | tojson }})"
        "{% endfor %}{% else %}[{{ m.role }} {{ m.name }}]{{ m.content }}{% endif %}{% endfor %}",
        '[user ]aclock({"zone": "Århus"})[tool clock]12:00',
        [
            QUESTION,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "name": "clock", "content": "12:00"},
        ],
    ),
    "keys without a value": Case(
        "{% for m in messages %}{{ m.content }}{{ m.name is defined }}"
        "{{ 'tool_calls' in m }}{% endfor %}",
        "aFalseFalse",
        [{"role": "user", "content": "a", "name": None, "tool_calls": None}],
    ),
    "documents": Case(
        SHOW + "{% for d in documents %}{{ d.title }}: {{ d.text }}{% endfor %}",
        "[user]aT: body",
        [QUESTION],
        {"documents": [{"title": "T", "text": "body"}]},
    ),
    "no tools and documents": Case(
        SHOW + "{{ tools is none }}{{ documents is none }}", "[user]aTrueTrue", [QUESTION]
    ),
    "reasoning": Case(
        "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.content }};"
        "{% endfor %}",
        "||a;so|so|b;",
        [QUESTION, {"role": "assistant", "content": "b", "reasoning": "so"}],
    ),
    "other variables": Case(
        SHOW + "{% if enable_thinking is defined and not enable_thinking %}<think></think>"
        "{% endif %}",
        "[user]a<think></think>",
        [QUESTION],
        {"enable_thinking": False},
    ),
    "dict": Case(
        SHOW + "{{ dict(x=1).x }}{{ dict.fromkeys(['k'], 2)['k'] }}", "[user]a12", [QUESTION]
    ),
    "parts": Case(
        "{% for m in messages %}{% for p in m.content %}"
        "{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{% endfor %}",
        "one two",
        [{"role": "user", "content": [{"type": "text", "text": t} for t in ("one ", "two")]}],
    ),
    "spelling of tokens": Case(
        SHOW + "{{ bos_token }}{{ eos_token }}", "[user]a<s></s>", [QUESTION]
    ),
}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_render_gives_what_transformers_gives(case: Case) -> None:
    assert (
        ChatTemplate(case.source, **TOKENS).render(case.messages, **case.options) == case.expected
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_transformers_still_gives_it(case: Case) -> None:
    theirs = pytest.importorskip(
        "transformers.utils.chat_template_utils",
        reason="needs transformers 5: uv sync --group reference",
    )
    options = dict(case.options)
    (rendered,), _ = theirs.render_jinja_template(
        [theirs._normalize_chat_messages(case.messages)],
        tools=options.pop("tools", None),
        documents=options.pop("documents", None),
        chat_template=case.source,
        add_generation_prompt=True,
        **TOKENS,
        **options,
    )
    assert rendered == case.expected
