"""The requests of `soak.py`: random ones of every kind, and what is compared of their answers."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
CLOSE = 1e-5
"""By how much a log probability may differ."""

_WORDS = ("sea", "wind", "é", "🦖", "ship", "sail", "harbour", "the", "and", "12")
_SHARED = (
    "",
    "You are the captain of a ship. " * 10,
    "The harbour lies behind the island, and the wind is strong. " * 7,
)
_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "mood": {"enum": ["calm", "wild"]},
    },
    "required": ["name", "age", "mood"],
}
_COURSE = {"type": "object", "properties": {"degrees": {"type": "integer", "maximum": 359}}}
_TOOLS = [
    {"type": "function", "function": {"name": "steer", "parameters": _COURSE}},
    {"type": "function", "function": {"name": "anchor", "parameters": {"type": "object"}}},
]


@dataclass
class Question:
    """A request, and what the same request gave alone.

    Attributes:
        kind: What is special about it, for the count.
        path: The path of the server.
        body: The body, without `stream`.
        expected: What `told` returns for the answer; None as long as nobody has asked.
    """

    kind: str
    path: str
    body: dict[str, Any]
    expected: Any = None


def random_question(rng: random.Random, longest: int, earlier: list[Question]) -> Question:
    """Make a request.

    Args:
        longest: The largest number of tokens of an answer. A window has moved on by then.
        earlier: The requests that were answered already. A conversation goes on from one of them.
    """
    body: dict[str, Any] = {
        "max_tokens": rng.randint(1, 60),
        "seed": rng.randrange(-(2**63), 2**63),
        "temperature": rng.choice([0, 0.7, 1.0, 1.3]),
    }
    kinds = ("chat", "text", "long", "schema", "regex", "tool", "turn", "predicted", "choices")
    [kind] = rng.choices(kinds, (5, 4, 2, 3, 1, 2, 4, 2, 1))
    if rng.random() < 0.3:
        body |= {"presence_penalty": 0.5, "frequency_penalty": 0.2, "logit_bias": {"9": 2}}
    if rng.random() < 0.3:
        body["top_p"] = 0.9
    if rng.random() < 0.2:
        body["stop"] = ["a", "the"]
    content = _prompt(rng)
    messages = [{"role": "user", "content": content}]
    if kind == "text":
        return Question(kind, TEXT, body | {"prompt": content})
    if kind == "turn":
        said = [q for q in earlier if q.path == CHAT and q.expected[0][0] and "n" not in q.body]
        if said:
            before = rng.choice(said[-20:])
            answer = {"role": "assistant", "content": before.expected[0][0]}
            messages = [*before.body["messages"][-4:], answer, *messages]
    more: dict[str, dict[str, Any]] = {
        "long": {"max_tokens": longest, "ignore_eos": True, "stop": []},
        "schema": {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "sailor", "schema": _SCHEMA},
            },
            "max_tokens": 100,
        },
        "regex": {"guided_regex": "(yes|no|perhaps), [a-z]{3,9}!"},
        "tool": {"tools": _TOOLS, "tool_choice": rng.choice(["required", "auto"])},
        "predicted": {"prediction": {"type": "content", "content": content}},
        "choices": {"n": 2},
    }
    if kind in ("chat", "turn") and rng.random() < 0.3:
        body |= {"logprobs": True, "top_logprobs": rng.choice([0, 3])}
    return Question(kind, CHAT, body | {"messages": messages} | more.get(kind, {}))


def _prompt(rng: random.Random) -> str:
    words = " ".join(rng.choice(_WORDS) for _ in range(rng.randint(1, 40)))
    return rng.choice(_SHARED) + words


def told(answer: dict[str, Any]) -> list[Any]:
    """Return what must always be the same of an answer: text, calls, end and log probabilities."""
    found = []
    for choice in answer["choices"]:
        message = choice.get("message") or {"content": choice.get("text")}
        calls = [
            [call["function"]["name"], call["function"]["arguments"]]
            for call in message.get("tool_calls") or ()
        ]
        found.append([message["content"] or "", calls, choice["finish_reason"], _logprobs(choice)])
    return found


def _logprobs(choice: dict[str, Any]) -> list[Any]:
    """Return the bytes and log probability of each token of a choice, and of its alternatives."""
    content = (choice.get("logprobs") or {}).get("content") or []
    return [
        [[one["bytes"], one["logprob"]] for one in (token, *token["top_logprobs"])]
        for token in content
    ]


def are_same(found: list[Any], expected: list[Any]) -> bool:
    """Return whether answers are the same: all but log probabilities to the last bit.

    The sum over the vocabulary in a log probability is XLA's, whose order of summation differs with
    the number of rows, so it may differ by a few units in the last place.
    """
    if [choice[:3] for choice in found] != [choice[:3] for choice in expected]:
        return False
    ours, theirs = (
        [one for choice in answer for token in choice[3] for one in token]
        for answer in (found, expected)
    )
    return len(ours) == len(theirs) and all(
        one[0] == other[0] and abs(one[1] - other[1]) <= CLOSE
        for one, other in zip(ours, theirs, strict=True)
    )


class Joined:
    """Puts the events of a stream together to what `told` returns for the whole answer."""

    def __init__(self, count: int) -> None:
        self.choices: list[list[Any]] = [["", [], None, []] for _ in range(count)]

    def add(self, event: dict[str, Any]) -> None:
        """Add an event."""
        for part in event["choices"]:
            choice = self.choices[part["index"]]
            delta = part.get("delta") or {"content": part.get("text")}
            choice[0] += delta.get("content") or ""
            for call in delta.get("tool_calls") or ():
                while len(choice[1]) <= call["index"]:
                    choice[1].append(["", ""])
                function = call.get("function") or {}
                choice[1][call["index"]][0] += function.get("name") or ""
                choice[1][call["index"]][1] += function.get("arguments") or ""
            choice[2] = part.get("finish_reason") or choice[2]
            choice[3] += _logprobs(part)
