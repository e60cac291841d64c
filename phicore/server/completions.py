"""/v1/completions."""

from __future__ import annotations

from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from phicore.engine import Request as EngineRequest
from phicore.server.answers import Answering, refuse_logprobs
from phicore.server.errors import wrong_field
from phicore.server.fields import Fields
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
    most = service.settings.max_answer
    options = options_of(
        fields,
        default_tokens=DEFAULT_TOKENS,
        most_tokens=most,
        vocab_size=model.vocab_size,
    )
    if "logprobs" in fields:
        raise refuse_logprobs("logprobs")
    if len(prompts) * options.choices > MOST_CHOICES:
        raise wrong_field("prompt", f"expected at most {MOST_CHOICES} answers in a request")
    is_echo = fields.flag("echo")
    service.check_room()

    def prepared() -> tuple[list[EngineRequest], list[str]]:
        requests: list[EngineRequest] = []
        for prompt in prompts:
            requests += options.requests(model, prompt, raw=isinstance(prompt, str))
        if not is_echo:
            return requests, []
        decode = partial(model.tokenizer.decode, skip_special=False)
        return requests, [p if isinstance(p, str) else decode(p) for p in prompts]

    spell = partial(Options.spelled, options, prompt="prompt")
    requests, echoes = await service.in_pool(prepared, spell)
    service.check_prompts(requests, "prompt")
    answering = Answering(service, TextShape(), options, name, echoes, "prompt")
    return await answering.respond(request, requests)


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
