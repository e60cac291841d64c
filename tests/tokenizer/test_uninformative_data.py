"""Vocabularies whose data says nothing of how text is split, or contradicts the spellings."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
from tokenizer.vocabularies import (
    CONTROL,
    LLAMA_TOKENS,
    NORMAL,
    PHI3_FILE,
    gpt2,
    llama,
    longer,
    needs_phi3_file,
    pieces_of,
)

from phicore.errors import TokenizerError
from phicore.gguf.reader import open_gguf
from phicore.text.tokenizer import Tokenizer


@pytest.mark.parametrize("score", [-1000.0, 0.0])
def test_from_gguf_equal_scores_are_refused(score: float) -> None:
    with pytest.raises(TokenizerError, match=r"scores: 4 of 4 .* placeholder.*tokenizer\.json$"):
        Tokenizer.from_gguf(llama(scores=[score] * len(LLAMA_TOKENS)))


def test_from_gguf_placeholder_scores_of_the_gguf_package_are_refused() -> None:
    """`LlamaHfVocab` of the package writes -1000 for every token, and converters use it."""
    base = object.__new__(gguf.LlamaHfVocab)
    scores = [base.get_token_score(id) for id in range(len(LLAMA_TOKENS))]
    with pytest.raises(TokenizerError, match="have the same score -1000, a placeholder"):
        Tokenizer.from_gguf(llama(scores=scores))


def test_from_gguf_equal_scores_beside_merges_take_the_merges() -> None:
    merges = ["a b", "▁ a", "s >"]
    equal = {"scores": [0.0] * len(LLAMA_TOKENS), "merges": merges}
    tokenizer = Tokenizer.from_gguf(llama(**equal))
    assert pieces_of(tokenizer, "abc", add_bos=False) == ["▁", "ab", "c"]
    real = Tokenizer.from_gguf(llama(merges=merges))  # scores that say something come first
    assert pieces_of(real, "abc", add_bos=False) == ["▁ab", "c"]
    with pytest.raises(TokenizerError, match="merges: 1 merges make none of"):
        Tokenizer.from_gguf(llama(**equal | {"merges": ["s >"]}))


def test_from_gguf_missing_types_are_those_that_the_spellings_tell() -> None:
    found, right = Tokenizer.from_gguf(llama(token_type=None)), Tokenizer.from_gguf(llama())
    for text in ("ab é ü", "a</s>b"):
        assert found.encode(text) == right.encode(text)
    assert found.is_control(2)


@pytest.mark.parametrize(
    "changes",
    [
        {"add_bos_token": 0, "add_space_prefix": 1},
        {"add_bos_token": np.uint8(0), "add_space_prefix": [True]},
        {"eos_token_id": 2.0, "bos_token_id": np.array([1])},
    ],
    ids=["numbers", "arrays", "ids"],
)
def test_from_gguf_values_in_another_type_say_the_same(changes: dict[str, Any]) -> None:
    wanted = {"add_bos_token": bool(changes.get("add_bos_token", True)), "bos_token_id": 1}
    found, right = Tokenizer.from_gguf(llama(**changes)), Tokenizer.from_gguf(llama(**wanted))
    assert found.encode("ab c") == right.encode("ab c")
    assert found.end_token_ids == right.end_token_ids


def test_from_gguf_equal_scores_where_no_token_is_merged_are_taken() -> None:
    tokens = [*LLAMA_TOKENS[:259], "▁", "a", "b"]
    metadata = llama(tokens=tokens, scores=[0.0] * 262, token_type=llama_types(262))
    assert pieces_of(Tokenizer.from_gguf(metadata), "ab", add_bos=False) == ["▁", "a", "b"]


def llama_types(count: int) -> list[int]:
    types: list[int] = llama()["tokenizer.ggml.token_type"].tolist()
    return types[:count]


def words(count: int, **changes: Any) -> dict[str, Any]:
    """Return the metadata of a byte-level vocabulary with `count` words that no merge makes."""
    return longer(gpt2(**changes), [f"word{i}" for i in range(count)], [NORMAL] * count)


@pytest.mark.parametrize("merges", [[], ["a b"]], ids=["none", "a few"])
def test_from_gguf_missing_merges_are_refused(merges: list[str]) -> None:
    with pytest.raises(TokenizerError, match=r"merges: . merges make none of .* tokenizer\.json$"):
        Tokenizer.from_gguf(words(9, merges=merges))


def test_from_gguf_names_where_the_tokenizer_may_be() -> None:
    url = "https://example.org/owner/model"
    metadata = words(9, merges=[]) | {"general.base_model.0.repo_url": url}
    with pytest.raises(TokenizerError, match=rf"tokenizer\.json \(the file names {url}\)$"):
        Tokenizer.from_gguf(metadata)


def test_from_gguf_types_all_alike_are_corrected() -> None:
    metadata = llama(token_type=[NORMAL] * len(LLAMA_TOKENS), bos_token_id=1, eos_token_id=2)
    metadata = longer(metadata, ["<|user|>"], [NORMAL])
    tokenizer, right = Tokenizer.from_gguf(metadata), Tokenizer.from_gguf(llama())
    for text in ("ab é ü", "<s>", "a</s>b"):
        assert tokenizer.encode(text) == right.encode(text)
    assert pieces_of(tokenizer, "a<|user|>", add_bos=False) == ["▁a", "<|user|>"]
    assert [tokenizer.is_control(id) for id in (1, 2, 271)] == [True, True, True]
    assert tokenizer.decode(tokenizer.encode("ü")) == "ü"


@pytest.mark.parametrize("piece", ["<|im_start|>", "<｜User｜>", "<｜end▁of▁sentence｜>"])
def test_from_gguf_special_token_marked_as_normal_is_a_control_token(piece: str) -> None:
    tokenizer = Tokenizer.from_gguf(
        longer(gpt2(), [piece], [NORMAL]) if piece != "<|end|>" else gpt2()
    )
    id = tokenizer.token_id(piece)
    assert id is not None
    assert tokenizer.encode(f"a{piece}") == [tokenizer.token_id("a"), id]
    assert tokenizer.is_control(id)


@pytest.mark.parametrize("piece", ["<tag>", "<||>", "<| |>", "a<|b|>", "[INST]"])
def test_from_gguf_text_that_only_resembles_a_special_token_stays_text(piece: str) -> None:
    tokenizer = Tokenizer.from_gguf(longer(gpt2(), [piece], [NORMAL]))
    assert not tokenizer.is_control(260)


def test_from_gguf_list_of_end_tokens_ends_at_each() -> None:
    metadata = llama(eos_token_ids=np.array([2, 5], np.int32))
    assert {2, 5} <= Tokenizer.from_gguf(metadata).end_token_ids
    with pytest.raises(TokenizerError, match="eos_token_ids: expected 0 to 270, found 999"):
        Tokenizer.from_gguf(llama(eos_token_ids=[999]))
    tokenizer = Tokenizer.from_gguf(llama(eos_token_id=[2, 7]))
    assert tokenizer.eos_token_id == 2
    assert {2, 7} <= tokenizer.end_token_ids


# ---- what tokens are like follows from the vocabulary ------------------------------------------


@pytest.mark.parametrize("architecture", ["phi3", "phimoe", "llama", "something"])
def test_encode_phi3_vocabulary_swallows_white_space_in_any_architecture(architecture: str) -> None:
    names = ["<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"]
    metadata = longer(llama(architecture=architecture), names, [CONTROL] * len(names))
    tokenizer = Tokenizer.from_gguf(metadata)
    found = pieces_of(tokenizer, "<|user|>\nab<|end|>\n<|assistant|>\n", add_bos=False)
    assert found == ["<|user|>", "▁ab", "<|end|>", "<|assistant|>"]
    assert pieces_of(tokenizer, "<|endoftext|> ", add_bos=False)[1:] == ["▁", "▁"]


def test_encode_phi3_architecture_with_another_vocabulary_swallows_nothing() -> None:
    metadata = longer(llama(architecture="phi3"), ["<|im_end|>"], [CONTROL])
    found = pieces_of(Tokenizer.from_gguf(metadata), "<|im_end|>\nab", add_bos=False)
    assert found == ["<|im_end|>", "▁", "<0x0A>", "ab"]


@needs_phi3_file
def test_encode_real_phi3_vocabulary_is_the_same_in_a_llama_file() -> None:
    with open_gguf(PHI3_FILE) as file:
        metadata = dict(file.metadata)
    text = "<|user|>\nHi<|end|>\n<|assistant|>\n"
    ids = [
        Tokenizer.from_gguf(metadata | {"general.architecture": name}).encode(text)
        for name in ("phi3", "llama")
    ]
    assert ids[0] == ids[1]
    assert len(ids[0]) == 5
