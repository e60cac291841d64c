"""Tests of the real Phi-3 vocabulary, with the ids that llama.cpp's own tests expect."""

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer.vocabularies import PHI3_FILE, needs_phi3_file

from phicore.errors import TokenizerError
from phicore.gguf.reader import open_gguf
from phicore.text.tokenizer import Tokenizer

pytestmark = needs_phi3_file


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    with open_gguf(PHI3_FILE) as file:
        return Tokenizer.from_gguf(file.metadata)


def read_cases() -> list[tuple[str, list[int]]]:
    """Read llama.cpp's test cases, texts and ids; a separator at the end begins no case.

    llama.cpp's test-tokenizer-0 splits the file like this.
    """
    if not PHI3_FILE.exists():
        return []
    texts = PHI3_FILE.with_suffix(".gguf.inp").read_bytes().decode()
    inputs = texts.removesuffix("\n__ggml_vocab_test__\n").split("\n__ggml_vocab_test__\n")
    outputs = PHI3_FILE.with_suffix(".gguf.out").read_text().splitlines()
    return [
        (text, [int(id) for id in line.split()]) for text, line in zip(inputs, outputs, strict=True)
    ]


@pytest.mark.parametrize(("text", "ids"), read_cases())
def test_encode_llama_cpp_case_same_ids_and_back(
    tokenizer: Tokenizer, text: str, ids: list[int]
) -> None:
    assert tokenizer.encode(text, add_bos=False, parse_special=False) == ids
    assert tokenizer.decode(ids) == text


def test_from_gguf_phi3_has_its_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.source == "GGUF (llama)"
    assert tokenizer.vocab_size == 32064
    assert (tokenizer.add_bos, tokenizer.bos_token_id, tokenizer.eos_token_id) == (True, 1, 32000)
    assert {tokenizer.piece(id) for id in tokenizer.end_token_ids} == {"<|end|>", "<|endoftext|>"}
    assert not tokenizer.is_control(2)  # </s> is text, as in HTML


def test_encode_chat_prompt_special_tokens_swallow_newlines(tokenizer: Tokenizer) -> None:
    prompt = "<s><|user|>\nHello<|end|>\n<|assistant|>\n"
    assert tokenizer.encode(prompt) == [1, 32010, 15043, 32007, 32001]  # BOS is not doubled
    assert tokenizer.encode(prompt.removeprefix("<s>")) == [1, 32010, 15043, 32007, 32001]


@pytest.mark.parametrize("token", ["<s>", "<unk>", "<|endoftext|>"])
def test_encode_token_without_rstrip_keeps_newline(tokenizer: Tokenizer, token: str) -> None:
    ids = tokenizer.encode(f"{token}\na", add_bos=False)
    assert [tokenizer.piece(id) for id in ids] == [token, "▁", "<0x0A>", "a"]


def test_encode_fragment_after_special_token_gets_a_space(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a<|end|>b", add_bos=False)
    assert [tokenizer.piece(id) for id in ids] == ["▁a", "<|end|>", "▁b"]


def test_encode_without_special_only_user_defined_tokens_match(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<s><|end|></s>", add_bos=False, parse_special=False)
    assert tokenizer.piece(ids[-1]) == "</s>"
    assert not any(map(tokenizer.is_control, ids))
    assert tokenizer.decode(ids) == "<s><|end|></s>"
    assert tokenizer.encode("<s>", parse_special=False)[0] == 1  # text, so BOS comes before it
    assert len(tokenizer.encode("<s>", parse_special=False)) > 1


def test_decode_special_tokens_print_only_when_asked(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|user|>\nHi<|end|>")
    assert tokenizer.decode(ids) == "Hi"
    assert tokenizer.decode(ids, skip_special=False) == "<s><|user|> Hi<|end|>"


def test_stream_character_in_bytes_comes_out_whole(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    parts = [stream.push(id) for id in tokenizer.encode(" a🚀b", add_bos=False)]
    assert parts == ["", " a", "", "", "", "🚀", "b"]  # first, the space that encode put there
    assert stream.flush() == ""


def test_stream_incomplete_character_is_flushed_as_replacement(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    rocket = tokenizer.encode("🚀", add_bos=False)
    assert "".join(map(stream.push, rocket[:-1])) == ""
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"


def test_stream_that_continues_a_text_keeps_the_space(tokenizer: Tokenizer) -> None:
    (id,) = tokenizer.encode("there", add_bos=False)
    assert tokenizer.stream().push(id) == "there"
    assert tokenizer.stream(strip_space=False).push(id) == " there"


@given(ids=st.lists(st.integers(0, 32063) | st.integers(0, 300), max_size=40))
def test_stream_random_ids_add_up_to_decode(tokenizer: Tokenizer, ids: list[int]) -> None:
    stream = tokenizer.stream()
    text = "".join(map(stream.push, ids)) + stream.flush()
    data = b"".join(map(tokenizer.token_bytes, ids))
    assert text == tokenizer.decode(ids) == data.removeprefix(b" ").decode(errors="replace")


@given(text=st.text())
def test_decode_encoded_text_is_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, parse_special=False)
    assert tokenizer.decode(ids) == text.replace("▁", " ")  # SentencePiece's space is a space
    assert tokenizer.decode(ids) == tokenizer._backend.decode(ids)


def merge_best_neighbours(tokenizer: Tokenizer, scores: list[float], text: str) -> list[int]:
    """Encode by SentencePiece's rule: always join the best-scoring neighbours, leftmost first."""
    parts = list(text.replace(" ", "▁"))
    while True:
        joined = [tokenizer.token_id(a + b) for a, b in pairwise(parts)]
        ranks = [(-scores[id], at) for at, id in enumerate(joined) if id is not None]
        if not ranks:
            break
        _, at = min(ranks)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    ids = [(tokenizer.token_id(part), part) for part in parts]
    return [i for id, part in ids for i in ([id] if id else [3 + b for b in part.encode()])]


def test_encode_random_text_merges_as_sentencepiece_does(tokenizer: Tokenizer) -> None:
    with open_gguf(PHI3_FILE) as file:
        scores = file.metadata["tokenizer.ggml.scores"].tolist()
    draw = random.Random(0)
    alphabets = ["ab ing\n", "   \t\na", "<>|/'=-_.0123456789", "абвгд ежз", "日本語 文字🦙é"]
    for _ in range(500):
        text = "".join(draw.choices(draw.choice(alphabets), k=draw.randint(1, 30)))
        expected = merge_best_neighbours(tokenizer, scores, " " + text)
        assert tokenizer.encode(text, add_bos=False) == expected, text


def test_from_file_saved_tokenizer_gives_the_same_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer._backend.save(str(tmp_path / "tokenizer.json"))
    with open_gguf(PHI3_FILE) as file:
        again = Tokenizer.from_file(tmp_path / "tokenizer.json", file.metadata)
    assert again.source == str(tmp_path / "tokenizer.json")
    assert (again.add_bos, again.bos_token_id, again.end_token_ids) == (True, 1, {32000, 32007})
    for text, ids in read_cases():
        assert again.encode(text, add_bos=False, parse_special=False) == ids
        assert again.decode(ids) == text
    prompt = "<|user|>\nHello<|end|>\n<|assistant|>\n"
    assert again.encode(prompt) == tokenizer.encode(prompt)
    everything = range(tokenizer.vocab_size)
    assert all(again.token_bytes(id) == tokenizer.token_bytes(id) for id in everything)


def test_from_file_without_padding_fits_and_that_of_llama_2_does_not(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with open_gguf(PHI3_FILE) as file:
        metadata = file.metadata
    content = json.loads(tokenizer._backend.to_str())
    vocabulary = content["model"]["vocab"]
    own = content | {"added_tokens": [t for t in content["added_tokens"] if t["id"] < 32011]}
    own["model"]["vocab"] = {p: id for p, id in vocabulary.items() if id < 32011}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(own))
    again = Tokenizer.from_file(path, metadata)  # the model's own file ends there too
    assert again.vocab_size == 32064
    assert again.end_token_ids == tokenizer.end_token_ids

    llama = own | {"added_tokens": [t for t in own["added_tokens"] if t["id"] < 32000]}
    llama["model"]["vocab"] = {p: id for p, id in vocabulary.items() if id < 32000}
    path.write_text(json.dumps(llama))
    expected = r"token 32000: expected the special token '<\|endoftext\|>', found none"
    with pytest.raises(TokenizerError, match=expected):
        Tokenizer.from_file(path, metadata)
    assert Tokenizer.of(path, metadata).encode("<|user|>") == [1, 32010]
