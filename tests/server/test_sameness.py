"""The same seed gives the same text over HTTP: alone, together, streamed, with a warm cache."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from server.conftest import Served, ready

import phicore

pytestmark = pytest.mark.as_for_users
COUNT = 12


def bodies(seed: int) -> list[dict[str, Any]]:
    """Return random requests, some with a beginning in common."""
    rng = random.Random(seed)
    shared = "The sea is wide and the wind is strong today. " * 2

    def body() -> dict[str, Any]:
        start = shared if rng.random() < 0.5 else ""
        words = " ".join(rng.choice(["ship", "sail", "wave", "é", "🦖"]) for _ in range(9))
        found: dict[str, Any] = {
            "messages": [{"role": "user", "content": start + words}],
            "max_tokens": rng.randint(1, 40),
            "seed": rng.randrange(-(2**63), 2**63),
            "temperature": rng.choice([0, 0.7, 1.3]),
            "top_p": rng.choice([1, 0.9]),
        }
        if rng.random() < 0.3:
            found |= {"presence_penalty": 0.5, "logit_bias": {"9": 2}}
        if rng.random() < 0.3:
            found["stop"] = ["a", "e"]
        return found

    return [body() for _ in range(COUNT)]


def text_of(served: Served, body: dict[str, Any], stream: bool) -> tuple[str, str]:
    """Return the text and the reason of an answer."""
    if not stream:
        choice = served.client.chat.completions.create(model="tiny", **body).choices[0]
        return choice.message.content or "", choice.finish_reason
    text, reason = "", ""
    for chunk in served.client.chat.completions.create(model="tiny", **body, stream=True):
        text += chunk.choices[0].delta.content or ""
        reason = chunk.choices[0].finish_reason or reason
    return text, reason


def alone(model: phicore.Model, body: dict[str, Any]) -> tuple[str, str]:
    """Return what `Model.generate` gives for a request, with nothing in the cache."""
    from phicore.network.processors import AnswerPenalty, LogitBias

    model.engine.prefixes.clear()
    options = {name: body[name] for name in ("max_tokens", "temperature", "top_p")}
    options |= {"seed": body["seed"] % 2**64, "stop": body.get("stop", [])}
    if "logit_bias" in body:
        options["processors"] = [LogitBias({9: 2}), AnswerPenalty(presence=0.5)]
    pieces = list(model.generate(body["messages"], **options))
    return "".join(p.text for p in pieces), pieces[-1].finish_reason or ""


@pytest.mark.parametrize(
    ("backend", "seed"), [("jax", 1), pytest.param("jax", 2, marks=pytest.mark.complete)]
)
def test_text_is_the_same_alone_together_streamed_and_with_a_warm_cache(
    tiny_path: Path, backend: str, seed: int
):
    made = bodies(seed)
    with phicore.load(tiny_path, backend) as model:
        expected = [alone(model, body) for body in made]
        model.engine.prefixes.clear()
        with ready(model) as served, ThreadPoolExecutor(COUNT) as pool:
            for stream in (False, True):
                in_turn = [text_of(served, body, stream) for body in made]
                assert in_turn == expected
                together = list(pool.map(lambda b, s=stream: text_of(served, b, s), made))
                assert together == expected
            assert served.service.worker.model.engine.is_idle
            hits = served.service.metrics.text(None).decode()
            assert 'prefix_cache_hits_total{model_name="tiny"} 0.0' not in hits
