"""Tests of the ends of a generation: end tokens, stop strings, length, context."""

from __future__ import annotations

from pathlib import Path

import pytest
from api.tiny_models import with_value, write_tiny

import phicore
from phicore import Model, Piece
from phicore.text.stop_strings import StopStrings


@pytest.fixture(scope="module")
def greedy(model: Model) -> list[Piece]:
    """Generate 24 tokens greedily, with no reason to stop earlier."""
    return list(model.generate("Hello", max_tokens=24, temperature=0, ignore_eos=True))


def run(model: Model, **options: object) -> list[Piece]:
    return list(model.generate("Hello", **({"max_tokens": 24, "temperature": 0} | options)))


def text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_end_token_stops_and_prints_nothing(tmp_path: Path, greedy: list[Piece]) -> None:
    """Even an end token that the vocabulary marks as text is not part of the answer."""
    end = next(i for i, piece in enumerate(greedy) if i > 2 and piece.text)
    first = [piece.token_id for piece in greedy].index(greedy[end].token_id)
    edit = with_value("tokenizer.ggml.eos_token_id", greedy[end].token_id)
    with phicore.load(write_tiny(tmp_path / "m.gguf", edit), backend="numpy") as model:
        pieces = run(model)
        assert [p.token_id for p in pieces] == [p.token_id for p in greedy[: first + 1]]
        assert pieces[-1].finish_reason == "stop"
        expected = model.tokenizer.decode([p.token_id for p in greedy[:first]])
        assert text(pieces) == expected
        assert run(model, ignore_eos=True) == greedy


def test_length(model: Model, greedy: list[Piece]) -> None:
    pieces = run(model, max_tokens=5, ignore_eos=True)
    assert len(pieces) == 5
    assert pieces[-1].finish_reason == "length"


def test_context_ends_before_max_tokens(tiny: Path, greedy: list[Piece]) -> None:
    with phicore.load(tiny, backend="numpy", ctx=14) as model:
        pieces = run(model, ignore_eos=True)
        assert len(model.encode("Hello")) + len(pieces) == 14
        assert pieces[-1].finish_reason == "context"
        assert [p.token_id for p in pieces] == [p.token_id for p in greedy[:5]]
        assert run(model, max_tokens=5, ignore_eos=True)[-1].finish_reason == "length"


@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_stop_string_ends_the_text_wherever_it_is(model, greedy, length: int) -> None:
    """Most of the stop strings span several tokens."""
    whole = text(greedy)
    for start in range(0, len(whole) - length, 3):
        stop = whole[start : start + length]
        pieces = run(model, stop=stop, ignore_eos=True)
        assert text(pieces) == whole[: whole.index(stop)]
        assert pieces[-1].finish_reason == "stop"
        assert all(piece.finish_reason is None for piece in pieces[:-1])


def test_stop_string_is_never_shown_in_part(model: Model, greedy: list[Piece]) -> None:
    whole = text(greedy)
    stop = whole[4:9]
    shown = ""
    for piece in model.generate("Hello", max_tokens=24, temperature=0, stop=stop, ignore_eos=True):
        shown += piece.text
        assert whole[: whole.index(stop)].startswith(shown)


def test_held_text_comes_at_the_end_when_nothing_follows(model, greedy) -> None:
    whole = text(greedy)
    pieces = run(model, stop=[whole[-3:] + "never", "ε"], ignore_eos=True)
    assert text(pieces) == whole
    assert len(pieces) == len(greedy)
    assert pieces[-1].finish_reason == "length"


def test_held_text_comes_when_the_string_turns_out_another(model, greedy) -> None:
    whole = text(greedy)
    assert text(run(model, stop=whole[2:5] + "never", ignore_eos=True)) == whole


def test_stop_as_a_string_is_one_string(model: Model, greedy: list[Piece]) -> None:
    stop = text(greedy)[5:7]
    assert run(model, stop=stop) == run(model, stop=[stop]) == run(model, stop=(stop,))


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("given", "stops", "shown"),
    [
        ("abcabd!", ["abd"], "abc"),
        ("aaab", ["aab"], "a"),
        ("aaaa", ["aab"], "aaaa"),
        ("one\n\nUser: two", ["\nUser:"], "one\n"),
        ("xyz", ["z", "yz"], "x"),
        ("nothing", [], "nothing"),
        ("ends with st", ["stop"], "ends with st"),
    ],
)
def test_stop_strings_do_not_depend_on_the_cuts(size: int, given: str, stops, shown: str) -> None:
    strings = StopStrings(stops)
    parts = [given[i : i + size] for i in range(0, len(given), size)]
    assert "".join(map(strings.push, parts)) + strings.flush() == shown
