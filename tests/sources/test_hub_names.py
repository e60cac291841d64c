"""Tests of the parts of an `hf:` reference and of choosing among a repository's files."""

from __future__ import annotations

import errno

import pytest

from phicore.errors import SourceError
from phicore.sources.hub import HubReference, _one_line_errors, choose, model_names, split_parts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf:o/r", ("o/r", None, None, None)),
        ("hf://o/r", ("o/r", None, None, None)),
        ("hf:o/r/m.gguf", ("o/r", None, "m.gguf", None)),
        ("hf:o/r/a/b/m.GGUF", ("o/r", None, "a/b/m.GGUF", None)),
        ("hf:o/r:Q4_K_M", ("o/r", None, None, "Q4_K_M")),
        ("hf:o/r@v1.0", ("o/r", "v1.0", None, None)),
        ("hf:o/r@dev/a/m.gguf", ("o/r", "dev", "a/m.gguf", None)),
        ("hf:o/r@dev:q4", ("o/r", "dev", None, "q4")),
        ("hf:o/r@refs/pr/3/m.gguf", ("o/r", "refs/pr/3", "m.gguf", None)),
        ("hf:o/r@refs/pr/3:q4", ("o/r", "refs/pr/3", None, "q4")),
    ],
)
def test_reference_parts(text: str, expected: tuple[str | None, ...]) -> None:
    ref = HubReference.parse(text)
    assert (ref.repo, ref.revision, ref.file, ref.tag) == expected
    assert ref.text == text


@pytest.mark.parametrize(
    "text", ["hf:", "hf:r", "hf:o/r/", "hf:o/r/m.bin", "hf:o/r@", "hf:o/r:", "hf:o/r/m.gguf:q4"]
)
def test_reference_malformed_raises_with_the_forms(text: str) -> None:
    with pytest.raises(SourceError, match=r"expected hf:owner/repo, hf:"):
        HubReference.parse(text)


def test_model_names_are_ggufs_by_first_part() -> None:
    names = ["b.gguf", "README.md", "mmproj-b.gguf", "imatrix.gguf", "c-00002-of-00002.gguf"]
    assert model_names([*names, "c-00001-of-00002.gguf"]) == ["b.gguf", "c-00001-of-00002.gguf"]


def test_split_parts_counts_from_any_part() -> None:
    expected = [f"a/m-{part}-of-00003.gguf" for part in ("00001", "00002", "00003")]
    assert split_parts("a/m-00003-of-00003.gguf") == expected
    assert split_parts("m.gguf") == ["m.gguf"]


@pytest.mark.parametrize(
    ("tag", "name", "matches"),
    [
        ("q4_k_m", "m-Q4_K_M.gguf", True),
        ("Q4_K_M", "m.Q4_K_M-00001-of-00002.gguf", True),
        ("Q4_K_M", "Q4_K_M/m-00001-of-00002.gguf", True),
        ("Q4_K_M", "m_Q4_K_M.gguf", True),
        ("Q4_K", "m-Q4_K_M.gguf", False),
        ("Q4_XS", "m-IQ4_XS.gguf", False),
        ("f16", "m-fp16.gguf", False),
        ("F16", "m-BF16.gguf", False),
        ("Q4_0", "m-Q4_0_4_4.gguf", False),
        (".*", "m-Q4_0.gguf", False),
    ],
)
def test_tag_matches_whole_words(tag: str, name: str, matches: bool) -> None:
    assert choose([name], tag) == ([name] if matches else [])


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["m-IQ2_XS.gguf"], ["m-IQ2_XS.gguf"]),
        (["m-Q8_0.gguf", "m-Q4_K_M.gguf", "m-F16.gguf"], ["m-Q4_K_M.gguf"]),
        (["m-fp16.gguf", "m-q4.gguf"], ["m-q4.gguf"]),
        (["m-Q8_0.gguf", "m-Q5_K_M.gguf"], ["m-Q5_K_M.gguf"]),
        (["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"], ["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"]),
        (["a.gguf", "b.gguf"], ["a.gguf", "b.gguf"]),
    ],
)
def test_choice_without_a_tag_prefers_q4_k_m(names: list[str], chosen: list[str]) -> None:
    assert choose(names, None) == chosen


def test_full_disk_is_one_line() -> None:
    ref = HubReference.parse("hf:o/r")
    with (
        pytest.raises(SourceError, match=r"^hf:o/r: the disk of .* is full; make room"),
        _one_line_errors(ref),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
