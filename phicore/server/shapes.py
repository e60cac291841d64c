"""The objects of OpenAI's API: chat and text completions, whole and in a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from phicore.server.jobs import Job

REASONS: Mapping[str, str] = {"context": "length"}
"""Finish reasons of phicore that OpenAI's API calls otherwise."""


class Shape(Protocol):
    """How the answers of an endpoint look.

    Attributes:
        prefix: The beginning of their identifiers.
        whole: The kind of a whole answer.
        chunk: The kind of a part of a stream.
    """

    prefix: str
    whole: str
    chunk: str

    def choice(self, text: str, logprobs: Any) -> dict[str, Any]:
        """Return the parts of a whole choice that the endpoints have not in common."""

    def first(self) -> dict[str, Any] | None:
        """Return the beginning of a choice in a stream, if there is one without text."""

    def part(self, text: str, logprobs: Any) -> dict[str, Any]:
        """Return a part of a choice in a stream; without text, it is the last one."""


class ChatShape:
    """How the answers of /v1/chat/completions look."""

    prefix = "chatcmpl"
    whole = "chat.completion"
    chunk = "chat.completion.chunk"

    def choice(self, text: str, logprobs: Any) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": logprobs}

    def first(self) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def part(self, text: str, logprobs: Any) -> dict[str, Any]:
        return {"delta": {"content": text} if text or logprobs else {}, "logprobs": logprobs}


class TextShape:
    """How the answers of /v1/completions look."""

    prefix = "cmpl"
    whole = chunk = "text_completion"

    def choice(self, text: str, logprobs: Any) -> dict[str, Any]:
        return {"text": text, "logprobs": logprobs}

    def first(self) -> dict[str, Any] | None:
        return None

    def part(self, text: str, logprobs: Any) -> dict[str, Any]:
        return {"text": text, "logprobs": logprobs}


def usage(jobs: Sequence[Job], prompts: Sequence[Job]) -> dict[str, Any]:
    """Return the numbers of tokens of answers, and the times of the first one.

    Args:
        jobs: All answers.
        prompts: The first answer to each prompt, so that a prompt counts once.
    """
    prompt = sum(job.timings.prompt_tokens or len(job.request.prompt_ids) for job in prompts)
    generated = sum(job.count for job in jobs)
    cached = sum(job.timings.cached_tokens for job in prompts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
        "timings": _timings(jobs[0]),
    }


def _timings(job: Job) -> dict[str, Any]:
    """Return the times of an answer, with llama-server's names, which several clients show."""
    times = job.timings
    prompt_n, predicted_n = times.prompt_tokens - times.cached_tokens, times.generated_tokens
    return {
        "cache_n": times.cached_tokens,
        "prompt_n": prompt_n,
        "prompt_ms": 1000 * times.prompt_s,
        "prompt_per_second": times.prompt_tokens_per_s,
        "predicted_n": predicted_n,
        "predicted_ms": 1000 * times.decode_s,
        "predicted_per_second": times.decode_tokens_per_s,
        "compile_ms": 1000 * times.compile_s,
    }
