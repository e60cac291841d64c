"""The objects of OpenAI's API: chat and text completions, whole and in a stream."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from phicore.server.jobs import Job
from phicore.server.tools import ToolReader

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

    def choice(self, index: int, text: str, logprobs: Any) -> dict[str, Any]:
        """Return the parts of a whole choice that the endpoints have not in common."""

    def first(self) -> dict[str, Any] | None:
        """Return the beginning of a choice in a stream, if there is one without text."""

    def parts(
        self, index: int, text: str, logprobs: Any, *, is_last: bool
    ) -> Iterable[dict[str, Any]]:
        """Return the parts of a choice in a stream that its next text makes, perhaps none."""

    def end(self) -> dict[str, Any]:
        """Return the last part of a choice in a stream, which has no text."""

    def reason(self, index: int, reason: str, choice: Mapping[str, Any] | None) -> str:
        """Return the finish reason that the client gets.

        Args:
            index: The number of the choice.
            reason: The reason of phicore.
            choice: The whole choice; None in a stream.
        """


class ChatShape:
    """How the answers of /v1/chat/completions look.

    Args:
        readers: What finds the calls of tools in each choice.
    """

    prefix = "chatcmpl"
    whole = "chat.completion"
    chunk = "chat.completion.chunk"

    def __init__(self, readers: Sequence[ToolReader]) -> None:
        self._readers = readers

    def choice(self, index: int, text: str, logprobs: Any) -> dict[str, Any]:
        message = {**self._readers[index].message(text), "refusal": None}
        return {"message": message, "logprobs": logprobs}

    def first(self) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def parts(
        self, index: int, text: str, logprobs: Any, *, is_last: bool
    ) -> Iterable[dict[str, Any]]:
        deltas = self._readers[index].deltas(text, is_last=is_last)
        if logprobs and not deltas:
            deltas = [{"content": ""}]
        for number, delta in enumerate(deltas):
            yield {"delta": delta, "logprobs": None if number else logprobs}

    def end(self) -> dict[str, Any]:
        return {"delta": {}, "logprobs": None}

    def reason(self, index: int, reason: str, choice: Mapping[str, Any] | None) -> str:
        if choice is None:
            has_calls = self._readers[index].has_calls
        else:
            has_calls = "tool_calls" in choice["message"]
        return "tool_calls" if has_calls and reason == "stop" else REASONS.get(reason, reason)


class TextShape:
    """How the answers of /v1/completions look."""

    prefix = "cmpl"
    whole = chunk = "text_completion"

    def choice(self, index: int, text: str, logprobs: Any) -> dict[str, Any]:
        return {"text": text, "logprobs": logprobs}

    def first(self) -> dict[str, Any] | None:
        return None

    def parts(
        self, index: int, text: str, logprobs: Any, *, is_last: bool
    ) -> Iterable[dict[str, Any]]:
        if text or logprobs:
            yield {"text": text, "logprobs": logprobs}

    def end(self) -> dict[str, Any]:
        return {"text": "", "logprobs": None}

    def reason(self, index: int, reason: str, choice: Mapping[str, Any] | None) -> str:
        return REASONS.get(reason, reason)


def usage(jobs: Sequence[Job], prompts: Sequence[Job]) -> dict[str, Any]:
    """Return the numbers of tokens of answers, and the times of the first one.

    Args:
        jobs: All answers.
        prompts: The first answer to each prompt, so that a prompt counts once.
    """
    prompt = sum(job.timings.prompt_tokens or len(job.request.prompt_ids) for job in prompts)
    generated = sum(job.count for job in jobs)
    cached = sum(job.timings.cached_tokens for job in prompts)
    drafted = sum(job.timings.drafted_tokens for job in jobs)
    accepted = sum(job.timings.accepted_tokens for job in jobs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": drafted - accepted,
        },
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
