"""Tests of `Model.generate`: pieces, seeds, prompts, and independence of generations."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from api.tiny_models import spoilt, write_tiny

import phicore
from phicore import ArgumentError, ContextError, Model, PhicoreError, Piece
from phicore.network.processors import LogitBias

IDS = [1, 276, 310, 281, 275, 291]  # "Hello"


def run(model: Model, prompt: object = "Hello", **options: object) -> list[Piece]:
    options = {"max_tokens": 12, "temperature": 0, "ignore_eos": True} | options
    return list(model.generate(prompt, **options))


def ids(pieces: list[Piece]) -> list[int]:
    return [piece.token_id for piece in pieces]


def text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


# ---- pieces ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_text_of_the_pieces_is_what_the_tokens_decode_to(model: Model, seed: int) -> None:
    """Some tokens are bytes of incomplete characters, so pieces differ from tokens."""
    pieces = run(model, max_tokens=60, temperature=3.0, seed=seed)
    assert len(pieces) == 60
    assert text(pieces) == model.tokenizer.decode(ids(pieces))
    assert "" in [piece.text for piece in pieces]


def test_text_after_a_raw_prompt_continues_it(model: Model) -> None:
    pieces = run(model, "the", raw=True, max_tokens=60)
    prompt = model.encode("the", raw=True)
    assert "the" + text(pieces) == model.tokenizer.decode([*prompt, *ids(pieces)])


def test_only_the_last_piece_has_a_finish_reason(model: Model) -> None:
    assert [piece.finish_reason for piece in run(model, max_tokens=3)] == [None, None, "length"]


def test_generation_text_is_what_is_still_to_come(model: Model) -> None:
    pieces = run(model)
    generation = model.generate("Hello", max_tokens=12, temperature=0, ignore_eos=True)
    assert next(generation) == pieces[0]
    assert generation.text() == text(pieces[1:])
    assert generation.text() == ""


def test_generation_tells_its_prompt_seed_and_figures(model: Model) -> None:
    generation = model.generate("Hello", max_tokens=5, ignore_eos=True)
    assert generation.prompt_ids == model.encode("Hello")
    assert 0 <= generation.seed < 2**64
    list(generation)
    timings = generation.timings
    assert timings.prompt_tokens == len(generation.prompt_ids)
    assert timings.generated_tokens == 5
    assert timings.first_token_s > 0
    assert timings.decode_tokens_per_s > 0


# ---- prompts ---------------------------------------------------------------------------------


def test_string_is_a_user_message(model: Model) -> None:
    message = {"role": "user", "content": "Hello"}
    assert model.encode("Hello") == model.encode([message])
    assert model.encode("Hello")[1] == model.tokenizer.token_id("<|user|>")
    assert run(model, "Hello") == run(model, [message])


def test_system_message_is_the_first_of_the_list(model: Model) -> None:
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    assert model.encode("b", system="a") == model.encode(messages)
    assert model.encode("b", system="a") != model.encode("b")


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda i: np.array(i, np.uint16)])
def test_token_ids_are_taken_as_they_are(model: Model, kind) -> None:
    assert model.encode(kind(IDS)) == IDS
    assert model.encode(kind(IDS[1:])) == IDS[1:]  # no BOS is added
    assert run(model, kind(IDS)) == run(model, "Hello", raw=True)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "prompt: expected at least one token, got none"),
        ([1, 352], {}, "token id 352: expected 0 to 351"),
        ([-1], {}, "token id -1: expected 0 to 351"),
        ([1, 2.5], {}, "found 2.5 in the list"),
        ([True], {}, "found True in the list"),
        (np.array([1.0]), {}, "in the list"),
        (np.array([[1, 2]]), {}, "in the list"),
        (["Hello"], {}, "found 'Hello' in the list"),
        (7, {}, "prompt: expected a string, messages or token ids"),
        (None, {}, "prompt: expected a string, messages or token ids"),
        (b"Hello", {}, "prompt: expected a string, messages or token ids"),
        (IDS, {"raw": True}, "only for a prompt that is a string"),
        (IDS, {"system": "x"}, "only for a prompt that is a string"),
        ("Hello", {"raw": True, "system": "x"}, "a raw prompt has no system message"),
        (
            "Hello",
            {"max_tokens": 0},
            "max_tokens: expected 1 or more, or -1 (until the context is full), got 0",
        ),
        ("Hello", {"max_tokens": 1.5}, "max_tokens"),
        ("Hello", {"max_tokens": True}, "max_tokens"),
        ("Hello", {"seed": -1}, "seed: expected 0 to"),
        ("Hello", {"seed": 2**64}, "seed: expected 0 to"),
        ("Hello", {"seed": "x"}, "seed: expected 0 to"),
        ("Hello", {"temperature": -1}, "temperature: expected 0 (greedy), or 1e-6 to 1e6, got -1"),
        ("Hello", {"temperature": "hot"}, "temperature: expected float, got 'hot'"),
        ("Hello", {"top_p": 2}, "top_p: expected more than 0, at most 1, got 2"),
        ("Hello", {"top_k": 1.5}, "top_k: expected int, got 1.5"),
        ("Hello", {"stop": ""}, "stop: expected strings"),
        ("Hello", {"stop": [""]}, "stop: expected strings"),
        ("Hello", {"stop": [5]}, "stop: expected strings"),
        ("Hello", {"stop": 5}, "stop: expected strings"),
    ],
)
def test_wrong_argument_is_told_at_once(model: Model, prompt, options, message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        model.generate(prompt, **options)
    assert message in str(caught.value)


def test_prompt_that_fills_the_context(model: Model) -> None:
    (piece,) = run(model, [1] * 319)
    assert piece.finish_reason == "context"
    with pytest.raises(ContextError, match="the prompt has 320 tokens and the context holds 320"):
        model.generate([1] * 320)


def test_numpy_integers_are_numbers_too(model: Model) -> None:
    options = {"max_tokens": np.int64(3), "seed": np.uint32(5), "top_k": np.int32(9)}
    assert run(model, temperature=1.0, **options) == run(
        model, temperature=1.0, max_tokens=3, seed=5, top_k=9
    )


# ---- on every backend ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"temperature": 1.0}, {"temperature": 0.8, "top_k": 50, "top_p": 0.95}]
)
def test_seed_gives_the_same_text_on_every_backend(model, on_backend: Model, options) -> None:
    expected = run(model, max_tokens=24, seed=11, **options)
    assert run(on_backend, max_tokens=24, seed=11, **options) == expected
    assert run(on_backend, max_tokens=24, seed=12, **options) != expected


def test_greedy_text_is_the_same_on_every_backend(model: Model, on_backend: Model) -> None:
    assert run(on_backend, max_tokens=24) == run(model, max_tokens=24)


def test_interleaved_generations_do_not_disturb_each_other(on_backend: Model) -> None:
    options = {"max_tokens": 12, "temperature": 1.0, "ignore_eos": True}
    prompts = [("Hello", 1), ("the other one", 2)]
    alone = [run(on_backend, prompt, temperature=1.0, seed=seed) for prompt, seed in prompts]
    both = [on_backend.generate(prompt, seed=seed, **options) for prompt, seed in prompts]
    together = list(zip(*both, strict=True))
    assert [list(pieces) for pieces in zip(*together, strict=True)] == alone


def test_early_close_leaves_the_model_usable(on_backend: Model) -> None:
    expected = run(on_backend)
    with on_backend.generate("Hello", max_tokens=12, temperature=0, ignore_eos=True) as generation:
        assert next(generation) == expected[0]
        assert next(generation) == expected[1]
    assert list(generation) == []
    unused = on_backend.generate("Hello")
    unused.close()
    assert list(unused) == []
    assert run(on_backend) == expected


def test_warm_generation_does_not_compile(on_backend: Model, caplog) -> None:
    """Other lengths, seeds and sampling values do not compile again if the cache size stays."""
    options = {"ignore_eos": True, "temperature": 0.9, "top_p": 0.9}
    list(on_backend.generate([1] * 10, max_tokens=4, **options))
    if on_backend.backend == "jax":
        import jax

        jax.config.update("jax_log_compiles", True)
    try:
        with caplog.at_level(logging.WARNING):
            generation = on_backend.generate(
                [2] * 14, max_tokens=40, seed=3, **(options | {"temperature": 1.2, "top_k": 7})
            )
            assert len(list(generation)) == 40
    finally:
        if on_backend.backend == "jax":
            jax.config.update("jax_log_compiles", False)
    assert generation.timings.compile_s == 0.0
    # JAX also logs each compilation.
    assert not [r for r in caplog.records if "Finished XLA compilation" in r.getMessage()]


def test_scores_that_are_no_numbers_are_an_error(tmp_path, backend_name: str) -> None:
    """Damaged weights once gave one token again and again, and exit code 0."""
    path = spoilt(write_tiny(tmp_path / "m.gguf"), "blk.1.ffn_down.weight", np.nan)
    with phicore.load(path, backend_name) as model, pytest.raises(PhicoreError, match="not finite"):
        list(model.generate("Hello", max_tokens=3, ignore_eos=True))


def test_context_that_is_absurd_costs_nothing(tmp_path) -> None:
    """Rotary tables were once made for the whole context, which took 8 GB for this file."""
    path = write_tiny(tmp_path / "m.gguf", max_position_embeddings=2**31 - 1)
    with phicore.load(path, "numpy") as model:
        assert len(list(model.generate("Hello", max_tokens=3, ignore_eos=True))) == 3


# ---- stop strings that are control tokens ------------------------------------------------------


def forced(model: phicore.Model, piece: str, **options: Any) -> list[Any]:
    """Generate with a bias that always chooses one token."""
    token = model.tokenizer.token_id(piece)
    assert token is not None
    return list(
        model.generate(
            "Hi", max_tokens=4, temperature=0, processors=[LogitBias({token: 1e9})], **options
        )
    )


@pytest.mark.parametrize("stop", ["<|user|>", "<|user|>\n", ["x", "<|user|>"]])
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_stop_string_that_is_a_control_token_ends_at_that_token(
    model: phicore.Model, stop: str | list[str], ignore_eos: bool
) -> None:
    pieces = forced(model, "<|user|>", stop=stop, ignore_eos=ignore_eos)
    assert [piece.finish_reason for piece in pieces] == ["stop"]
    assert pieces[0].text == ""


def test_control_token_that_is_no_stop_string_does_not_end(model: phicore.Model) -> None:
    assert len(forced(model, "<|user|>", stop="<|assistant|>")) == 4


@pytest.mark.parametrize("stop", ["a<|user|>", "\n<|user|>", "<|user|>a"])
def test_stop_string_of_a_control_token_and_text_is_refused(
    model: phicore.Model, stop: str
) -> None:
    with pytest.raises(ArgumentError, match=r"^stop: .* has the control token '<\|user\|>' in it"):
        model.generate("Hi", stop=stop)


def test_stop_string_with_a_character_that_the_vocabulary_lacks_is_text(
    model: phicore.Model,
) -> None:
    assert len(forced(model, "a", stop="漢")) == 4


def test_control_tokens_come_from_the_template_and_the_assistant(model: phicore.Model) -> None:
    user = model.tokenizer.token_id("<|user|>")
    turn = {"role": "user", "content": "a<|user|>"}
    for messages, count in (
        ([turn], 1),
        ([{"role": "system", "content": "<|user|>"}, turn], 1),
        ([{"role": "user", "content": [{"type": "text", "text": "<|user|>"}]}], 1),
        ([turn, {"role": "assistant", "content": "<|user|>"}, turn], 3),
    ):
        assert model.encode(messages).count(user) == count
    assert model.encode("a<|user|>", raw=True).count(user) == 1


@pytest.mark.parametrize(
    "parts",
    [["<|us", "er|>"], ["a<", "|user|", ">"], ["<|user|", "", ">b"], ["<|user|>", "<|user"]],
)
def test_control_token_across_parts_of_a_message_is_text(
    model: phicore.Model, parts: list[str]
) -> None:
    content = [{"type": "text", "text": text} for text in parts]
    whole = [{"role": "user", "content": "".join(parts)}]
    ids = model.encode([{"role": "user", "content": content}])
    assert ids.count(model.tokenizer.token_id("<|user|>")) == 1
    assert model.tokenizer.decode(ids) == model.tokenizer.decode(model.encode(whole))


def test_tools_keys_and_marks_add_no_control_token(tmp_path: Path) -> None:
    template = "{{ tools | tojson }}{{ documents | tojson }}{% for m in messages %}{{ m | tojson }}"
    path = write_tiny(tmp_path / "m.gguf", lambda w: set_template(w, template + "{% endfor %}"))
    with phicore.load(path, "numpy") as model:
        token = "<|user|>"
        ids = model.encode(
            [{"role": "user", "content": "a", "x": {token: {"type": token}}}],
            tools=[{"name": token, "type": token}],
            documents=[{token: token, "role": token}],
        )
        assert model.tokenizer.token_id(token) not in ids
        assert model.tokenizer.decode(ids).count(token) == 7
        text = "a\ufdd0.b\ufdd00.c"
        turns = [{"role": "assistant", "content": text}, {"role": "user", "content": text}]
        assert model.tokenizer.decode(model.encode(turns)).count(text) == 2


def set_template(writer: Any, template: str) -> None:
    key = "tokenizer.chat_template"
    for values in writer.kv_data:
        values.pop(key, None)
    writer.add_chat_template(template)


def test_control_token_in_a_text_is_told(
    model: phicore.Model, caplog: pytest.LogCaptureFixture
) -> None:
    model.encode("a<|user|>")
    assert "'<|user|>' is text in a message" in caplog.text


def test_end_token_that_is_ignored_ends_where_it_is_a_stop_string(model: phicore.Model) -> None:
    assert len(forced(model, "<|end|>", ignore_eos=True)) == 4
    assert len(forced(model, "<|end|>", ignore_eos=True, stop="<|end|>")) == 1
