"""/v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from phicore.engine import Request as EngineRequest
from phicore.engine.request import MOST_LOGPROBS
from phicore.model import Model
from phicore.server.answers import Answering, Echo
from phicore.server.errors import wrong_field
from phicore.server.fields import Fields
from phicore.server.logprobs import TextLogprobs
from phicore.server.parameters import MOST_CHOICES, Options, check_ids, options_of
from phicore.server.service import Service
from phicore.server.shapes import TextShape

DEFAULT_TOKENS = 16
"""The number of tokens of an answer whose request does not say it, as in OpenAI's API."""
Prompt = str | list[int]


async def completions(service: Service, request: Request) -> Response:
    """Continue texts."""
    fields = Fields(await service.body(request))
    model = service.model
    name = service.check_model(fields)
    prompts = _prompts_of(fields, model.vocab_size)
    is_echo = fields.flag("echo")
    options = options_of(
        fields,
        default_tokens=DEFAULT_TOKENS,
        most_tokens=service.settings.max_answer,
        vocab_size=model.vocab_size,
        least_tokens=0 if is_echo else 1,
    )
    count = fields.integer("logprobs", 0, MOST_LOGPROBS)
    if len(prompts) * options.choices > MOST_CHOICES:
        raise wrong_field("prompt", f"expected at most {MOST_CHOICES} answers in a request")
    service.check_room()

    def prepared() -> list[EngineRequest]:
        requests: list[EngineRequest] = []
        for prompt in prompts:
            requests += options.requests(model, prompt, raw=isinstance(prompt, str), logprobs=count)
        return requests

    spell = partial(Options.spelled, options, prompt="prompt")
    requests = await service.in_pool(request, prepared, spell)
    service.check_prompts(requests, "prompt")
    echoes: list[Echo] = []
    for index, prompt in enumerate(prompts if is_echo else []):
        ids = requests[index * options.choices].prompt_ids
        echo = partial(_echo, model, prompt, ids, count)
        echoes.append(await service.in_pool(request, echo, spell, is_long=count is not None))
    logprobs = []
    if count is not None:
        offsets = [len(text) for text, _ in echoes for _ in range(options.choices)]
        offsets = offsets or [0] * len(requests)
        logprobs = [TextLogprobs(model.tokenizer, offset) for offset in offsets]
    answering = Answering(service, TextShape(), options, name, "prompt", logprobs, echoes)
    if options.arguments["max_tokens"] == 0:
        return answering.echoed(requests)
    return await answering.respond(request, requests)


def _echo(model: Model, prompt: Prompt, ids: Sequence[int], count: int | None) -> Echo:
    """Return the text of a prompt, and its log probabilities if somebody wants them."""
    text = prompt
    if not isinstance(text, str):
        text = model.tokenizer.decode(text, skip_special=False)
    if count is None:
        return text, None
    return text, TextLogprobs(model.tokenizer).prompt(text, ids, model.score(ids, count))


def _prompts_of(fields: Fields, vocab_size: int) -> list[Prompt]:
    """Read a text, a list of texts, a list of tokens, or a list of such lists.

    Raises:
        ApiError: If the field has something else.
    """
    prompt = fields.get("prompt")
    prompts = [prompt] if isinstance(prompt, str) or _are_ids(prompt) else prompt
    is_list = isinstance(prompts, list) and prompts
    if not is_list or not all(isinstance(each, str) or _are_ids(each) for each in prompts):
        expected = "a text, a list of texts, tokens' ids, or lists of tokens' ids"
        raise wrong_field("prompt", f"expected {expected}")
    for each in prompts:
        check_ids("prompt", [] if isinstance(each, str) else each, vocab_size)
    return prompts


def _are_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(id) is int for id in prompt)
