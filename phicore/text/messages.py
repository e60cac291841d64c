"""Messages of a chat: their checks, and the forms in which chat templates can take them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from phicore.errors import TokenizerError

Message = Mapping[str, Any]
"""A message of a chat, with the keys "role" ("system", "user", "assistant" or another), "content"
(a text, or a list of parts {"type": "text", "text": ...}), and other keys that the template reads,
such as `tool_calls`."""
Turns = list[dict[str, Any]]

# The keys in which programs pass the reasoning of a message. Templates read the first or second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_UNREADABLE = ("image", "audio", "video", "file", "input_image", "input_audio", "input_file")
_START = 20  # characters of a text that a template must show if it cuts the text
_PROBE = re.compile("phicoreprobe[a-j]+x")
_PART_OF_PYTHON = re.compile("'text': ['\"]")
_LETTERS = str.maketrans("0123456789", "abcdefghij")


def checked(messages: Sequence[Message], keep_none: bool = False) -> Turns:
    """Check messages and convert them to plain data, in the form that `transformers` passes.

    Reasoning is stored under each key that templates read.

    Args:
        messages: The messages.
        keep_none: Whether the content None is kept. Other keys with None are always dropped.
    Raises:
        TokenizerError: If there is no message, or a message is malformed or has an image.
    """
    if not messages:
        raise TokenizerError("messages: expected at least one, found none")
    turns = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        expected = f"{where}: expected text for 'role' and 'content', found {message!r:.80}"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TokenizerError(expected)
        turn = {str(key): plain(value) for key, value in message.items() if value is not None}
        content = turn.get("content", "")
        if not isinstance(content, (str, list)) or (content == "" and set(turn) == {"role"}):
            raise TokenizerError(expected)
        _check_parts(where, content)
        if keep_none:
            turn.setdefault("content", None)
        for name in _REASONING:
            if name in turn:
                turn = {"thinking": turn[name], **turn, "reasoning_content": turn[name]}
                break
        turns.append(turn)
    return turns


def _check_parts(where: str, content: str | list[Any]) -> None:
    for part in content if isinstance(content, list) else []:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind.removesuffix("_url") in _UNREADABLE:
            raise TokenizerError(f"{where}: a model reads text here; leave out the part {kind!r}")


def plain(value: Any) -> Any:
    """Convert data to JSON's types, so that a template gets no objects with methods of their own.

    Raises:
        TokenizerError: If the data has a value of another type.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    for kind in (bool, str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if value is None:
        return None
    raise TokenizerError(f"messages: expected data of JSON's types, found {value!r:.80}")


def with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Return data with `change` applied to each string in it, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {with_texts(k, change): with_texts(item, change) for k, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [with_texts(item, change) for item in value]
    return value


# ---- forms ---------------------------------------------------------------------------------


def arrangements(messages: Sequence[Message]) -> Iterator[list[Turns]]:
    """Return the forms of messages that a template may need, the most faithful ones first.

    Some templates know no developer's message, some only a system message at the start, and some
    no system message. Each item is one way to place these messages, and has the forms that the
    contents can have: as they are, with None or an empty text beside tool calls, as texts, and as
    lists of parts.

    Raises:
        TokenizerError: If `checked` raises it.
    """
    turns = checked(messages)
    forms = [turns, checked(messages, keep_none=True)]
    forms.append([{"content": "", **turn} for turn in turns])
    forms += [[_with_content(turn, kind) for turn in turns] for kind in (str, list)]
    found: list[list[Turns]] = []
    for place in (list, _as_system, partial(_without_system, start=1), _without_system):
        placed = _distinct(map(place, forms))
        if placed not in found:
            yield placed
            found.append(placed)


def _distinct(all_turns: Iterable[Turns]) -> list[Turns]:
    found: list[Turns] = []
    for turns in all_turns:
        if turns not in found:
            found.append(turns)
    return found


def _with_content(turn: dict[str, Any], kind: type) -> dict[str, Any]:
    content = turn.get("content")
    if content is None or isinstance(content, kind):
        return turn
    if kind is list:
        return turn | {"content": [{"type": "text", "text": content}]}
    if any(not isinstance(part, dict) or "text" not in part for part in content):
        return turn  # a part that is no text must not vanish
    return turn | {"content": text_of(turn)}


def _as_system(turns: Turns) -> Turns:
    """Give a developer's messages the role that came before it."""
    return [turn | {"role": "system"} if turn["role"] == "developer" else turn for turn in turns]


def _without_system(turns: Turns, start: int = 0) -> Turns:
    """Move the text of each instruction from index `start` on to the user message after it.

    Without one, the text goes to the end of the user message before it, or becomes one.
    """
    moved = _as_system(turns)
    for index in range(len(turns) - 1, start - 1, -1):
        turn = moved[index]
        if turn["role"] != "system":
            continue
        text = text_of(turn)
        after = [i for i in range(index + 1, len(moved)) if moved[i]["role"] == "user"]
        if text and after:
            moved[after[0]] = _joined(text, moved[after[0]])
        elif text and index and moved[index - 1]["role"] == "user":
            moved[index - 1] = _joined(moved[index - 1], text)
        elif text:
            moved[index] = turn | {"role": "user"}
            continue
        del moved[index]
    return moved


def _joined(first: str | dict[str, Any], second: str | dict[str, Any]) -> dict[str, Any]:
    """Join a text and a turn by a blank line, in this order or the other."""
    turn = first if isinstance(first, dict) else second
    assert isinstance(turn, dict)
    if not isinstance(turn.get("content", ""), list):
        texts = [text if isinstance(text, str) else text_of(text) for text in (first, second)]
        return turn | {"content": "\n\n".join(texts)}
    if isinstance(first, str):
        return turn | {"content": [{"type": "text", "text": f"{first}\n\n"}, *turn["content"]]}
    return turn | {"content": [*turn["content"], {"type": "text", "text": f"\n\n{second}"}]}


def text_of(turn: Mapping[str, Any]) -> str:
    """Return the text of a message; parts are joined without anything between them."""
    return "".join(texts_of(turn))


def texts_of(turn: Mapping[str, Any]) -> list[str]:
    """Return the text of a message, or the text of each of its parts."""
    content = turn.get("content") or ""
    if isinstance(content, str):
        return [content]
    return [str(part.get("text") or "") for part in content if isinstance(part, dict)]


# ---- what a template leaves out ------------------------------------------------------------


def lost_turns(turns: Turns, prompt: str, rendered: Callable[[Turns], str]) -> list[int]:
    """Return the indices of the messages whose text a template leaves out of the prompt.

    This appends a distinctive text to each text, renders the messages again, and looks for the
    distinctive texts. Templates may change the case of a text, or cut a long one. A list of parts
    that is written as Python prints it counts as left out.

    Args:
        turns: The messages.
        prompt: The result of `rendered` for them.
        rendered: Renders messages. It may raise TokenizerError.
    """
    numbers = itertools.count()
    marked = [_marked(turn, numbers) for turn in turns]
    try:
        shown = rendered([turn for turn, _ in marked]).lower()
    except TokenizerError:  # the template checks texts, so this cannot tell
        return []

    is_shown_well = _probes_in(shown)  # all in one pass, since there may be thousands
    prompt = prompt.lower()

    def is_lost(probe: str, text: str) -> bool:
        if probe in is_shown_well:
            return not is_shown_well[probe]
        start = text.strip()[:_START]
        return len(start) < _START or start.lower() not in prompt

    return [
        index
        for index, (_, texts) in enumerate(marked)
        if any(is_lost(probe, text) for probe, text in texts.items())
    ]


def _probes_in(shown: str) -> dict[str, bool]:
    """Return the distinctive texts in a prompt, and whether each is in no part of Python's form."""
    found: dict[str, bool] = {}
    for line in shown.split("\n"):
        part = _PART_OF_PYTHON.search(line)
        for match in _PROBE.finditer(line):
            is_part = part is not None and match.start() >= part.end()
            is_printed = is_part and line[match.end() : match.end() + 1] in ("'", '"')
            found[match[0]] = found.get(match[0], True) and not is_printed
    return found


def _marked(turn: dict[str, Any], numbers: Iterator[int]) -> tuple[dict[str, Any], dict[str, str]]:
    """Append distinctive letters to each text of a message; return it, and the texts by these."""
    texts = {}

    def marked(text: str) -> str:
        if not text.strip():
            return text
        digits = str(next(numbers)).translate(_LETTERS)
        probe = f"phicoreprobe{digits}x"
        texts[probe] = text
        return text + probe

    content = turn.get("content")
    if isinstance(content, str):
        turn = turn | {"content": marked(content)}
    elif isinstance(content, list):
        is_text = [isinstance(part, dict) and isinstance(part.get("text"), str) for part in content]
        pairs = zip(content, is_text, strict=True)
        parts = [part | {"text": marked(part["text"])} if text else part for part, text in pairs]
        turn = turn | {"content": parts}
    return turn, texts
