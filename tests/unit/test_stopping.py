"""Tests of stop strings, compared with a search in the whole text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phicore.errors import ArgumentError
from phicore.text.stop_strings import StopStrings

# Few letters, so that stop strings occur, overlap and begin again within themselves.
texts = st.text("ab\n", max_size=12)


def naive(text: str, stops: list[str]) -> str:
    """Read a text by characters and return the part before the first complete stop string."""
    for end in range(1, len(text) + 1):
        ended = [end - len(s) for s in stops if text[:end].endswith(s)]
        if ended:
            return text[: min(ended)]
    return text


def run(stops: StopStrings, pieces: list[str]) -> list[str]:
    return [*(stops.push(piece) for piece in pieces), stops.flush()]


@given(
    pieces=st.lists(texts, max_size=8),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)
def test_push_any_split_gives_the_text_before_the_first_stop(pieces: list[str], stops: list[str]):
    expected = naive("".join(pieces), stops)
    strings = StopStrings(stops)
    assert "".join(run(strings, pieces)) == expected
    assert strings.is_stopped == (expected != "".join(pieces))


def test_push_overlapping_stops_do_not_depend_on_the_split():
    """A bug made the split decide: one piece ended at "abcd", two pieces at "bc"."""
    for pieces in (["xabcd"], ["xabc", "d"], list("xabcd")):
        assert "".join(run(StopStrings(["abcd", "bc"]), pieces)) == "xa"


def test_push_holds_back_no_more_than_needed():
    stops = StopStrings(["\n\nUser:"])
    assert run(stops, ["Hi", " there\n", "\nUs", "ually", "\n"]) == [
        *("Hi", " there", "", "\n\nUsually", ""),
        "\n",
    ]
    assert not stops.is_stopped


def test_push_after_a_stop_gives_nothing():
    stops = StopStrings("END")
    assert run(stops, ["one EN", "D two", " three"]) == ["one ", "", "", ""]
    assert stops.is_stopped


def test_push_without_stops_passes_everything():
    assert run(StopStrings([]), ["a", "", "b"]) == ["a", "", "b", ""]


@pytest.mark.parametrize("stops", ["", [""], ["a", ""], [3], [b"a"]])
def test_stop_strings_empty_or_no_text_is_refused(stops: object):
    with pytest.raises(ArgumentError, match="stop: expected strings of at least one character"):
        StopStrings(stops)  # type: ignore[arg-type]
