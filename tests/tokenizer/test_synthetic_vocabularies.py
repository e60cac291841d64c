"""Tests with small vocabularies made here: missing, wrong and inconsistent metadata of files."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizer.vocabularies import (
    CONTROL,
    GPT2_TOKENS,
    LLAMA_TOKENS,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    gpt2,
    llama,
    longer,
    pieces_of,
)

from phicore.errors import TokenizerError
from phicore.text.tokenizer import Tokenizer

CONTRACTIONS = "I'm we'LL"
PRE_TOKENIZER_CASES = {
    "gpt-2": [
        (CONTRACTIONS, ["I", "'m", " we", "'", "LL"]),
        ("12345 67", ["12345", " 67"]),
        ("a  b\n\n c ", ["a", " ", " b", "\n\n", " c", " "]),
        ("Hi!?\n", ["Hi", "!?", "\n"]),
        ("日本語、ok", ["日本語", "、", "ok"]),
    ],
    "smollm": [
        (CONTRACTIONS, ["I", "'m", " we", "'", "LL"]),
        ("a12 3", ["a", "1", "2", " ", "3"]),
        ("x²½", ["x", "²", "½"]),
    ],
    "default": [
        (CONTRACTIONS, ["I", "'", "m", " we", "'", "LL"]),  # punctuation is split off first
        ("a1234 567", ["a", "123", "4", " ", "567"]),
        ("a == b", ["a", " ", "==", " b"]),
    ],
    "llama-bpe": [
        (CONTRACTIONS, ["I", "'m", " we", "'LL"]),
        ("12345 67", ["123", "45", " ", "67"]),
        ("a  b\n\n c ", ["a", " ", " b", "\n\n", " c", " "]),
        ("Hi!?\n\nX", ["Hi", "!?\n\n", "X"]),
        ("  \n  x", ["  \n", " ", " x"]),
        ("🦙.cpp", ["🦙.", "cpp"]),
        ("日本語、ok", ["日本語", "、ok"]),
    ],
    "qwen2": [
        (CONTRACTIONS, ["I", "'m", " we", "'LL"]),
        ("123 4", ["1", "2", "3", " ", "4"]),
    ],
    "gpt-4o": [
        (CONTRACTIONS, ["I'm", " we'LL"]),
        ("camelCase HTTPServer", ["camel", "Case", " HTTPServer"]),
        ("1234", ["123", "4"]),
        ("a/b//\n", ["a", "/b", "//\n"]),
        ("क्षि", ["क्षि"]),  # marks stay with their letters
    ],
}
PRE_TOKENIZER_CASES["dbrx"] = PRE_TOKENIZER_CASES["llama-bpe"]


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [(pre, *case) for pre, cases in PRE_TOKENIZER_CASES.items() for case in cases],
)
def test_pre_tokenizer_named_in_the_file_splits_its_way(
    pre: str, text: str, words: list[str]
) -> None:
    tokenizer = Tokenizer.from_gguf(gpt2(pre))
    spans = [span for _, span in tokenizer._backend.pre_tokenizer.pre_tokenize_str(text)]
    assert [text[start:stop] for start, stop in spans] == words
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_pre_tokenizer_missing_is_refused_unless_the_vocabulary_is_known() -> None:
    """llama.cpp takes its old default, which cuts Llama 3's text in other places."""
    with pytest.raises(TokenizerError, match=r"tokenizer\.ggml\.pre: missing, .* tokenizer\.json$"):
        Tokenizer.from_gguf(gpt2(None))
    old = longer(gpt2(None), ["<|begin_of_text|>", "<|eot_id|>"], [CONTROL] * 2)
    assert Tokenizer.from_gguf(old).source == "GGUF (gpt2, llama-bpe)"
    filler = [f"w{i}" for i in range(151643 - 260)]
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    types = [UNUSED] * len(filler) + [CONTROL] * len(names)
    old = longer(gpt2(None), filler + names, types)
    assert Tokenizer.from_gguf(old).source == "GGUF (gpt2, qwen2)"


def test_pre_tokenizer_llama_bpe_takes_whole_words_and_adds_bos() -> None:
    merges = ["a b"]  # none for "abc"
    tokenizer = Tokenizer.from_gguf(gpt2("llama-bpe", merges=merges))
    assert pieces_of(tokenizer, "abc") == ["<|end|>", "abc"]
    tokenizer = Tokenizer.from_gguf(gpt2("dbrx", merges=merges))
    assert pieces_of(tokenizer, "abc") == ["ab", "c"]


def test_encode_user_defined_token_matches_either_way() -> None:
    tokenizer = Tokenizer.from_gguf(gpt2())
    for parse_special in (True, False):
        pieces = pieces_of(tokenizer, "a<user defined>b", parse_special=parse_special)
        assert pieces == ["a", "<user defined>", "b"]
    assert tokenizer.token_bytes(259) == b"<user defined>"


def test_encode_add_bos_option_overrides_the_file() -> None:
    tokenizer = Tokenizer.from_gguf(llama())
    assert tokenizer.encode("") == [1]
    assert pieces_of(tokenizer, "ab") == ["<s>", "▁ab"]
    assert pieces_of(tokenizer, "ab", add_bos=False) == ["▁ab"]
    assert pieces_of(Tokenizer.from_gguf(llama(add_bos_token=False)), "ab") == ["▁ab"]


def test_encode_without_space_prefix_decodes_without_stripping() -> None:
    tokenizer = Tokenizer.from_gguf(llama(add_space_prefix=False))
    assert pieces_of(tokenizer, "ab", add_bos=False) == ["ab"]
    ids = tokenizer.encode(" ab")
    assert (pieces_of(tokenizer, " ab")[1:], tokenizer.decode(ids)) == (["▁ab"], " ab")


def test_encode_text_never_merges_into_a_control_token() -> None:
    tokenizer = Tokenizer.from_gguf(llama())  # "<" and "s>" are pieces, and "<s>" is BOS
    pieces = pieces_of(tokenizer, "<s>", add_bos=False, parse_special=False)
    assert pieces == ["▁", "<", "s>"]
    assert tokenizer.encode("<s>", add_bos=False) == [1]


def test_encode_unlisted_character_becomes_bytes() -> None:
    tokenizer = Tokenizer.from_gguf(llama())
    assert pieces_of(tokenizer, "éü", add_bos=False) == ["▁", "é", "<0xC3>", "<0xBC>"]
    assert tokenizer.decode(tokenizer.encode("éü")) == "éü"


def test_encode_lone_surrogate_is_refused() -> None:
    with pytest.raises(TokenizerError, match=r"text: expected valid Unicode, found .* at 1"):
        Tokenizer.from_gguf(llama()).encode("a\udc80")


def test_encode_bos_where_there_is_none_is_refused() -> None:
    with pytest.raises(TokenizerError, match="add_bos: this vocabulary has no BOS token"):
        Tokenizer.from_gguf(gpt2(bos_token_id=None)).encode("a", add_bos=True)


@pytest.mark.parametrize("id", [-1, 260])
@pytest.mark.parametrize("method", ["piece", "token_bytes", "is_control", "stream", "decode"])
def test_token_id_out_of_range_is_refused(method: str, id: int) -> None:
    tokenizer = Tokenizer.from_gguf(gpt2())
    calls: dict[str, Callable[[], object]] = {
        "stream": lambda: tokenizer.stream().push(id),
        "decode": lambda: tokenizer.decode([id]),
    }
    with pytest.raises(TokenizerError, match=f"token id: expected 0 to 259, found {id}"):
        calls.get(method, lambda: getattr(tokenizer, method)(id))()


def test_end_tokens_come_from_keys_and_spellings() -> None:
    tokenizer = Tokenizer.from_gguf(gpt2(eot_token_id=3, eom_token_id=np.uint32(4)))
    assert tokenizer.end_token_ids == {3, 4, 258}
    assert tokenizer.eos_token_id is None


def test_end_token_of_another_type_counts_as_control() -> None:
    tokenizer = Tokenizer.from_gguf(gpt2(token_type=[NORMAL] * 260))
    assert tokenizer.encode("<|end|>") == [258]
    assert tokenizer.is_control(258)


def test_empty_token_gets_a_name() -> None:
    pieces = [*gpt2()["tokenizer.ggml.tokens"][:259], ""]
    tokenizer = Tokenizer.from_gguf(gpt2(tokens=pieces, token_type=[NORMAL] * 260))
    assert tokenizer.piece(259) == "[EMPTY_259]"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "tokenizer.ggml.model: missing"),
        (llama(model="bert"), r"tokenizer.ggml.model: 'bert' is not supported \(supported: gpt2"),
        (llama(model=3), "tokenizer.ggml.model: expected str, found 3"),
        (gpt2("deepseek-v3"), "tokenizer.ggml.pre: 'deepseek-v3' is not supported; give"),
        (gpt2(merges=None), "tokenizer.ggml.merges: missing"),
        (gpt2(merges=["a b", "ab"]), "tokenizer.ggml.merges: expected two tokens .*'ab'"),
        (gpt2(merges=["a xyz"]), "tokens and merges do not fit: .*xyz"),
        (llama(tokens=None), "tokenizer.ggml.tokens: missing"),
        (llama(tokens=[1, 2]), "tokenizer.ggml.tokens: expected strings, found 1"),
        (llama(tokens=[*LLAMA_TOKENS[:-1], "ab"]), "tokenizer.ggml.tokens: 'ab' has two ids"),
        (llama(tokens=["a\udc80", *LLAMA_TOKENS[1:]]), "tokens: expected UTF-8, found .*udc80"),
        (llama(tokens=[*LLAMA_TOKENS[:-1], "a" * 999]), "at most 256 characters .* found 999"),
        (llama(tokens=[*LLAMA_TOKENS[:3], "<0x>", *LLAMA_TOKENS[4:]]), "expected a byte .*'<0x>'"),
        (llama(scores=None), "tokenizer.ggml.scores: missing"),
        (llama(scores=[0.0]), "tokenizer.ggml.scores: expected 271 finite numbers"),
        (llama(scores=[float("nan")] * 271), "tokenizer.ggml.scores: expected 271 finite numbers"),
        (llama(scores=["x"] * 271), "tokenizer.ggml.scores: expected 271 finite numbers"),
        (llama(token_type=[[1], []]), "tokenizer.ggml.token_type: expected 271 finite numbers"),
        (llama(token_type=7), "tokenizer.ggml.token_type: expected array, found 7"),
        (llama(token_type=[7] * 271), "tokenizer.ggml.token_type: expected 0 to 6, found 7; give"),
        (llama(token_type=[1.5] * 271), "token_type: expected 0 to 6, found 1.5; give"),
        (llama(token_type=[3] * 271), "token_type: every token is special, so none is text; give"),
        (llama(eos_token_id=271), "tokenizer.ggml.eos_token_id: expected 0 to 270, found 271"),
        (llama(bos_token_id=-2), "tokenizer.ggml.bos_token_id: expected 0 to 270, found -2"),
        (llama(eot_token_id="x"), "tokenizer.ggml.eot_token_id: expected int, found 'x'"),
        (llama(add_bos_token=2), "tokenizer.ggml.add_bos_token: expected bool, found 2"),
        (llama(tokens=[]), "tokenizer.ggml.tokens: no token in it; give"),
        (gpt2(tokens=[]), "tokenizer.ggml.tokens: no token in it; give"),
        (gpt2(add_bos_token=True, bos_token_id=None), "tokenizer.ggml.bos_token_id: expected an"),
    ],
)
def test_from_gguf_bad_metadata_is_an_error_that_names_the_key(
    metadata: dict[str, Any], message: str
) -> None:
    with pytest.raises(TokenizerError, match=message) as raised:
        Tokenizer.from_gguf(metadata)
    assert "\n" not in str(raised.value)


def save(tokenizer: Tokenizer, path: Path, **changes: Any) -> Path:
    content = json.loads(tokenizer._backend.to_str()) | changes
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_from_file_without_bos_key_asks_the_post_processor(tmp_path: Path) -> None:
    own = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    original = Tokenizer.from_gguf(llama())
    tokenizer = Tokenizer.from_file(save(original, tmp_path / "a", post_processor=own), {})
    assert (tokenizer.add_bos, tokenizer.bos_token_id) == (True, 1)
    assert pieces_of(tokenizer, "ab") == ["<s>", "▁ab"]
    silent = Tokenizer.from_file(save(original, tmp_path / "b"), {})
    assert (silent.add_bos, silent.bos_token_id) == (False, None)


def test_from_file_ignores_truncation_and_padding(tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    path = save(Tokenizer.from_gguf(gpt2()), tmp_path / "tokenizer.json", truncation=truncation)
    assert len(Tokenizer.from_file(path, {}).encode("hello")) == 5


def test_from_file_ids_that_only_the_model_has_print_nothing(tmp_path: Path) -> None:
    path = save(Tokenizer.from_gguf(gpt2()), tmp_path / "tokenizer.json")
    names = ["[PAD260]", "<|placeholder7|>", "<unused0>", "", "anything"]
    types = [UNKNOWN, CONTROL, USER_DEFINED, CONTROL, UNUSED]
    metadata = longer(gpt2(), names, types)
    tokenizer = Tokenizer.from_file(path, metadata)
    assert tokenizer.vocab_size == 265
    assert (tokenizer.piece(261), tokenizer.token_bytes(261)) == ("", b"")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "tokenizer.json: cannot be read: No such file"),
        (b"", "tokenizer.json: not a tokenizer.json"),
        (b'{"version": "1.0"}', "tokenizer.json: not a tokenizer.json"),
        (b"\xff\xfe", "tokenizer.json: not a tokenizer.json"),
    ],
)
def test_from_file_unreadable_file_is_refused(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_file(path, {})


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tokenizer.ggml.tokens": ["a"]}, "expected at most 1 tokens, found 260"),
        (
            gpt2(tokens=[*GPT2_TOKENS[:100], "other", *GPT2_TOKENS[101:]]),
            f"not of this model: token 100: expected 'other', found {GPT2_TOKENS[100]!r}",
        ),
        (
            longer(gpt2(), ["<|user|>", "<tag>"], [CONTROL, USER_DEFINED]),
            "token 260: expected the special token '<|user|>', found none",
        ),
        (
            longer(gpt2(), ["<tag>"], [USER_DEFINED]),
            "token 260: expected the special token '<tag>'",
        ),
        (
            gpt2(token_type=[*[NORMAL] * 257, CONTROL, CONTROL, NORMAL]),
            "token 257: expected the special token 'abc', found none",
        ),
        (gpt2(token_type=[1, 2]), "tokenizer.ggml.token_type: expected 260 finite numbers"),
    ],
)
def test_from_file_of_another_model_is_refused(
    tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    path = save(Tokenizer.from_gguf(gpt2()), tmp_path / "tokenizer.json")
    with pytest.raises(TokenizerError, match=re.escape(message)):
        Tokenizer.from_file(path, metadata)


def test_of_file_that_was_found_and_does_not_fit_takes_the_ggufs_own(tmp_path: Path) -> None:
    path = save(Tokenizer.from_gguf(gpt2()), tmp_path / "tokenizer.json")
    assert Tokenizer.of(path, gpt2()).source == str(path)
    other = longer(gpt2(), ["<|user|>"], [CONTROL])
    tokenizer = Tokenizer.of(path, other)
    assert tokenizer.encode("<|user|>") == [260]
    assert tokenizer.source.startswith(f"GGUF (gpt2, gpt-2) instead of {path}: not of this model: ")
    with pytest.raises(
        TokenizerError, match=r"not of this model: .*; give the model's own, or none"
    ):
        Tokenizer.of(path, other, explicit=True)


def test_of_file_that_does_not_fit_and_no_other_tells_what_is_wrong_with_it(tmp_path: Path) -> None:
    path = save(Tokenizer.from_gguf(gpt2()), tmp_path / "tokenizer.json")
    message = r"model: 't5' is not supported .* of no use: .* not of this model: token 260: [^;]*$"
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.of(path, longer(gpt2(model="t5"), ["<|user|>"], [CONTROL]))


@pytest.mark.parametrize("metadata", [{}, gpt2()], ids=["alone", "with-model"])
def test_from_file_with_a_huge_id_allocates_nothing(tmp_path: Path, metadata: Any) -> None:
    original = Tokenizer.from_gguf(gpt2())
    model = json.loads(original._backend.to_str())["model"]
    model["vocab"]["huge"] = 2**32 - 1
    path = save(original, tmp_path / "tokenizer.json", model=model)
    with pytest.raises(TokenizerError, match=r"expected at most .* tokens, found 4294967296"):
        Tokenizer.from_file(path, metadata)


POST_PROCESSOR = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<none>", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {},
}


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        ("post_processor", POST_PROCESSOR),
    ],
    ids=["normalizer", "post_processor"],
)
def test_from_file_that_makes_the_library_panic_is_refused(
    tmp_path: Path, part: str, value: Any
) -> None:
    path = save(Tokenizer.from_gguf(gpt2()), tmp_path / "tokenizer.json", **{part: value})
    with pytest.raises(TokenizerError, match=r"tokenizer.json: not a tokenizer.json: ") as raised:
        Tokenizer.from_file(path, gpt2())
    assert "\n" not in str(raised.value)


def test_encode_text_that_makes_the_library_panic_is_refused(tmp_path: Path) -> None:
    pattern = {"Regex": "(a+)+$"}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    original = Tokenizer.from_gguf(gpt2())
    path = save(original, tmp_path / "tokenizer.json", pre_tokenizer=split)
    tokenizer = Tokenizer.from_file(path, gpt2())
    with pytest.raises(TokenizerError, match=r"tokenizer.json cannot split it: .*retry-limit"):
        tokenizer.encode("a" * 3000 + "b")


@pytest.mark.parametrize("decoder", [None, {"type": "WordPiece", "prefix": "##", "cleanup": True}])
def test_from_file_other_decoder_is_refused(tmp_path: Path, decoder: Any) -> None:
    path = save(Tokenizer.from_gguf(gpt2()), tmp_path / "tokenizer.json", decoder=decoder)
    with pytest.raises(TokenizerError, match="decoder: expected ByteLevel"):
        Tokenizer.from_file(path, {})
