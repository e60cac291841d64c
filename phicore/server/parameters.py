"""The fields that chat and text completions have in common, and what they mean to `Model.request`.

Fields that nobody knows are ignored, as OpenAI's clients expect. A field that is known but cannot
be honoured is an error that names it, since a client would otherwise trust a wrong answer.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from phicore.engine import Request
from phicore.model import Model
from phicore.network.processors import AnswerPenalty, LogitBias, LogitsProcessor
from phicore.server.errors import ApiError, wrong_field
from phicore.server.fields import Fields
from phicore.server.formats import format_of

MOST_STOPS = 16
LONGEST_STOP = 1000
MOST_CHOICES = 128
NEXT_SEED = 0x9E3779B97F4A7C15
"""The seed of choice i is the request's seed plus i times this, modulo 2**64. (The number is 2**64
divided by the golden ratio, so that requests with consecutive seeds share no choice.)"""
TINY = 1e-9
"""What stands for a top_p of 0, which keeps the most probable token alone."""

_ALWAYS: tuple[Any, ...] = (False, [], {}, "", "none")
_OFF: Mapping[str, tuple[Any, ...]] = {
    # Tools, where they are not honoured, and their old form.
    "tools": _ALWAYS,
    "tool_choice": ("none", "auto"),
    "functions": _ALWAYS,
    "function_call": ("none", "auto"),
    # What OpenAI's own models have.
    "audio": _ALWAYS,
    "modalities": (["text"],),
    "web_search_options": _ALWAYS,
    "reasoning_effort": ("none",),
    "store": (False,),
    # Completions.
    "suffix": _ALWAYS,
    "best_of": (1,),
    # Other servers.
    "use_beam_search": (False,),
    "prompt_logprobs": (False, 0),
    "min_tokens": (0,),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "chat_template": _ALWAYS,
    "length_penalty": (1,),
    "typical_p": (1,),
    "tfs_z": (1,),
    "mirostat": (0,),
    "dynatemp_range": (0,),
    "xtc_probability": (0,),
    "dry_multiplier": (0,),
    "top_n_sigma": (-1,),
    "truncate_prompt_tokens": (),
    "bad_words": _ALWAYS,
    "allowed_token_ids": (),
    "logits_processors": _ALWAYS,
}
"""Fields that are known but not honoured, and the values that ask for nothing."""


@dataclass(frozen=True)
class Options:
    """What a request asks for beside its prompt.

    Attributes:
        arguments: Arguments of `Model.request`.
        seed: The seed of the first choice.
        choices: The number of answers to each prompt.
        stream: Whether the answer is a stream of events.
        has_usage: Whether a stream ends with the numbers of tokens.
        end_ids: Tokens that end the answer beside the model's.
        max_tokens: The field that limits the answer, for errors.
        format: The field that constrains the answer, for errors.
    """

    arguments: Mapping[str, Any]
    seed: int
    choices: int
    stream: bool
    has_usage: bool
    end_ids: frozenset[int]
    max_tokens: str
    format: str

    def spelled(self, parameter: str, prompt: str) -> str:
        """Return the field of the request for a parameter of `Model.request`.

        Args:
            prompt: The field that has the prompt.
        """
        names = {
            "prompt": prompt,
            "prompt_ids": prompt,
            "max_tokens": self.max_tokens,
            "repeat_penalty": "repetition_penalty",
            "processor": "logit_bias",
            **dict.fromkeys(("json_schema", "regex", "grammar"), self.format),
        }
        return names.get(parameter, parameter)

    def requests(self, model: Model, prompt: Any, **arguments: Any) -> list[Request]:
        """Make the requests for the choices of a prompt.

        Args:
            arguments: Further arguments of `Model.request`.
        """
        given = {**self.arguments, **arguments}
        given["max_tokens"] = given["max_tokens"] or 1  # no tokens: the engine is not asked
        first = model.request(prompt, seed=self.seed, **given)
        if self.end_ids:
            first = replace(first, ends=first.ends | self.end_ids)
        seeds = [(self.seed + i * NEXT_SEED) % 2**64 for i in range(1, self.choices)]
        return [first, *(replace(first, seed=seed) for seed in seeds)]


def options_of(
    fields: Fields,
    *,
    default_tokens: int,
    most_tokens: int | None,
    vocab_size: int,
    least_tokens: int = 1,
    honoured: Collection[str] = (),
) -> Options:
    """Read the fields that chat and text completions have in common.

    Args:
        default_tokens: The number of tokens of an answer whose request does not say it.
        most_tokens: The largest number of tokens of an answer.
        vocab_size: The number of tokens that the model knows.
        least_tokens: The smallest number of tokens that a request may ask for.
        honoured: Fields that the endpoint honours and others do not.
    Raises:
        ApiError: If a field is wrong or cannot be honoured.
    """
    refuse_unknown(fields, honoured)
    limit = fields.given("max_completion_tokens", "max_tokens", "n_predict")
    arguments: dict[str, Any] = {
        "max_tokens": _max_tokens(fields, limit, default_tokens, most_tokens, least_tokens),
        "stop": _stops(fields),
        "processors": _processors(fields, vocab_size),
        "ignore_eos": fields.flag("ignore_eos"),
        "speculation": fields.flag("speculation", True),
        "prediction": _prediction(fields),
        **_sampling(fields),
    }
    format, format_field = format_of(fields)
    arguments |= format
    stream = fields.flag("stream")
    stream_options = Fields(fields.object("stream_options") or {})
    if not stream and "stream_options" in fields:
        raise wrong_field("stream_options", "only together with stream")
    seed = fields.integer("seed", -(2**63), 2**64 - 1)
    return Options(
        arguments,
        secrets.randbits(32) if seed is None else seed % 2**64,
        fields.integer("n", 1, MOST_CHOICES) or 1,
        stream,
        stream_options.flag("include_usage"),
        frozenset(_token_ids(fields, "stop_token_ids", vocab_size)),
        limit or "max_tokens",
        format_field,
    )


def refuse_unknown(fields: Fields, honoured: Collection[str] = ()) -> None:
    """Refuse a field that is known but cannot be honoured.

    Args:
        honoured: Fields that the endpoint honours and others do not.
    Raises:
        ApiError: If there is one.
    """
    for name, neutral in _OFF.items():
        value = fields.get(name)
        is_off = any(value == other and type(value) is type(other) for other in neutral)
        is_off = is_off or (isinstance(value, float) and value in neutral)
        if value is not None and not is_off and name not in honoured:
            raise ApiError(
                f"{name}: this server cannot do what the field asks for; leave it out",
                param=name,
                code="unsupported_parameter",
            )


def _stops(fields: Fields) -> list[str]:
    stops = fields.texts("stop", MOST_STOPS)
    if any(len(stop) > LONGEST_STOP for stop in stops):
        raise wrong_field("stop", f"expected texts of at most {LONGEST_STOP} characters")
    return stops


def _prediction(fields: Fields) -> str | None:
    """Read OpenAI's predicted output: a text, or parts of type text."""
    given = fields.object("prediction")
    if given is None:
        return None
    content = given.get("content")
    texts = [content]
    if isinstance(content, list):
        parts = [p if isinstance(p, dict) and p.get("type") == "text" else {} for p in content]
        texts = [part.get("text") for part in parts]
    if given.get("type") != "content" or not all(isinstance(text, str) for text in texts):
        expected = "the type content, and a content that is a text or a list of parts of type text"
        raise wrong_field("prediction", f"expected {expected}")
    return "".join(map(str, texts))


def _max_tokens(
    fields: Fields, name: str | None, default: int, most: int | None, least: int
) -> int:
    value = default
    if name is not None:
        is_all = fields.get(name) == -1  # as llama.cpp and `Model.request` mean it
        value = -1 if is_all else int(fields.integer(name, least) or 0)
    if most is not None:
        return most if value == -1 else min(value, most)
    return value


def _sampling(fields: Fields) -> dict[str, Any]:
    """Read the parameters of the sampler. Those that are absent are the model's own."""
    penalty = fields.given("repetition_penalty", "repeat_penalty")
    top_k, top_p = fields.integer("top_k", -1, 2**31 - 1), fields.number("top_p", 0, 1)
    temperature = fields.number("temperature", 0, 1e6)
    return {
        "temperature": 0.0 if temperature is not None and temperature < 1e-6 else temperature,
        "top_k": 0 if top_k == -1 else top_k,
        "top_p": TINY if top_p == 0 else top_p,
        "min_p": fields.number("min_p", 0, 1),
        "repeat_penalty": None if penalty is None else fields.number(penalty, 1e-6, 1e6),
        "repeat_last_n": fields.integer("repeat_last_n", -1, 2**31 - 1),
    }


def _processors(fields: Fields, vocab_size: int) -> list[LogitsProcessor]:
    """Make the logits processors for a bias and for OpenAI's penalties."""
    found: list[LogitsProcessor] = []
    if bias := fields.object("logit_bias"):
        found.append(LogitBias(_biases(bias, vocab_size)))
    frequency = fields.number("frequency_penalty", -2, 2) or 0.0
    presence = fields.number("presence_penalty", -2, 2) or 0.0
    if frequency or presence:
        found.append(AnswerPenalty(frequency=frequency, presence=presence))
    return found


def _biases(bias: Mapping[str, Any], vocab_size: int) -> dict[int, float]:
    values = Fields(bias)
    found = {}
    for name in bias:
        if not (name.isascii() and name.isdigit() and len(name) < 10):
            raise wrong_field("logit_bias", f"expected a token's id, got {name!r:.40}")
        try:
            found[int(name)] = values.number(name, -100, 100) or 0.0
        except ApiError as error:
            raise wrong_field("logit_bias", error.problem) from None
    check_ids("logit_bias", found, vocab_size)
    return found


def _token_ids(fields: Fields, name: str, vocab_size: int) -> Sequence[int]:
    ids = fields.get(name) or []
    if not isinstance(ids, list) or not all(type(id) is int for id in ids):
        raise wrong_field(name, "expected a list of tokens' ids")
    check_ids(name, ids, vocab_size)
    return ids


def check_ids(field: str, ids: Iterable[int], vocab_size: int) -> None:
    """Check that tokens are in the vocabulary.

    Raises:
        ApiError: If one is not.
    """
    for id in ids:
        if not 0 <= id < vocab_size:
            raise wrong_field(field, f"token id {id}: expected 0 to {vocab_size - 1}")
