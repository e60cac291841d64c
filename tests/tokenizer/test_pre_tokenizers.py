"""How text is cut into words, compared with other programs' regular expressions and merges.

`regex` is an engine of its own. `tiktoken` splits and merges, and Mistral's tokenizers run on it.
"""

from __future__ import annotations

import random
import unicodedata
from functools import cache
from pathlib import Path

import pytest
import regex
import tiktoken
from tokenizer.vocabularies import CONTROL, NORMAL, byte_level
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from phicore.text.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from phicore.text.tokenizer import Tokenizer as Ours

RULES = {rule: name for name, rule in reversed(PRE_TOKENIZERS.items())}
PROJECT = Path(__file__).parents[2]
SCRIPTS = [
    *("the don't I'M we'LL HTTPServer camelCase x²½ ٣٤ 1234567 3.14 a_b", "Ünïcödé naïve Straße"),
    *("Привет, мир! Ёлка", "日本語、テスト。漢字", "中文字符，测试", "안녕하세요 세계"),
    *("שלום עולם", "مرحبا بالعالم", "नमस्ते दुनिया", "สวัสดีชาวโลก", "Γειά σου Κόσμε"),
    *("🦙🚀👩\u200d👧 ✓→∞≠", "\t\ttabs\r\n\r\nlines\n\n\n   end ", "a/b//\n/* c */ {x[0] = -1};"),
    "e\u0301 ﬁ Å \u00a0\u2003x",
]


@cache
def texts() -> list[str]:
    """Return a thousand texts and more: lines of documents, many scripts, and both in pieces."""
    lines = [
        line
        for path in [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    drawn = random.Random(7)
    alphabet = "".join(SCRIPTS)
    mixed = ["".join(drawn.choices(alphabet, k=drawn.randrange(1, 40))) for _ in range(500)]
    joined = ["".join(drawn.choices([*SCRIPTS, " ", "\n", "  "], k=3)) for _ in range(300)]
    return [text for text in dict.fromkeys([*SCRIPTS, *lines, *mixed, *joined]) if text]


def cut(pattern: str, text: str) -> list[str]:
    """Return the matches of a pattern and the texts between them."""
    pieces, end = [], 0
    for match in regex.finditer(pattern, text):
        pieces += [text[end : match.start()], match.group()]
        end = match.end()
    return [piece for piece in [*pieces, text[end:]] if piece]


def splits(rule: PreTokenizer) -> pre_tokenizers.PreTokenizer:
    parts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule.patterns]
    return pre_tokenizers.Sequence(parts)


@pytest.mark.parametrize("rule", RULES, ids=RULES.values())
def test_patterns_cut_as_another_engine_does(rule: PreTokenizer) -> None:
    assert len(texts()) > 1000
    ours = splits(rule)
    for text in texts():
        pieces = [text]
        for pattern in rule.patterns:
            pieces = [part for piece in pieces for part in cut(pattern, piece)]
        assert [piece for piece, _ in ours.pre_tokenize_str(text)] == pieces


@cache
def trained(rule: PreTokenizer) -> list[str]:
    """Return a byte-level vocabulary of 600 tokens, in the order in which they were learned."""
    learner = Tokenizer(models.BPE())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    learner.pre_tokenizer = pre_tokenizers.Sequence([splits(rule), to_bytes])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        texts(),
        trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False),
    )
    return sorted(learner.get_vocab(), key=learner.get_vocab().__getitem__)


@pytest.mark.parametrize("name", ["tekken", "llama-bpe", "glm4", "gpt-4o", "seed-coder", "gpt-2"])
def test_encode_gives_the_tokens_of_tiktoken(name: str) -> None:
    """tiktoken joins the pair whose union has the lowest rank, and takes whole words first."""
    rule = PRE_TOKENIZERS[name]
    pieces = trained(rule)
    assert len(pieces) == 600
    ours = Ours.from_gguf(byte_level(pieces, name) | {"tokenizer.ggml.add_bos_token": False})
    theirs = tiktoken.Encoding(
        name,
        pat_str=rule.patterns[0],
        mergeable_ranks={ours.token_bytes(id): id for id in range(len(pieces))},
        special_tokens={},
    )
    for text in texts():
        assert ours.encode(text, add_bos=False) == theirs.encode(text)


def test_encode_qwen2_composes_characters_first() -> None:
    rule = PRE_TOKENIZERS["qwen2"]
    tokenizer = Ours.from_gguf(byte_level(trained(rule), "qwen2"))
    composed = "é Å 한"
    decomposed = unicodedata.normalize("NFD", composed)
    assert decomposed != composed
    assert tokenizer.encode(decomposed) == tokenizer.encode(composed)


@pytest.mark.parametrize(
    ("name", "adds_bos"), [("tekken", True), ("llama3", True), ("qwen2", False), ("dbrx", False)]
)
def test_from_gguf_name_says_whether_text_begins_with_bos(name: str, adds_bos: bool) -> None:
    metadata = byte_level([*trained(PRE_TOKENIZERS["gpt-2"]), "<s>"], name)
    metadata |= {"tokenizer.ggml.bos_token_id": 600}
    metadata["tokenizer.ggml.token_type"] = [NORMAL] * 600 + [CONTROL]
    assert Ours.from_gguf(metadata).add_bos is adds_bos


def test_patterns_are_those_that_transformers_takes_for_gguf_files() -> None:
    mapping = pytest.importorskip(
        "transformers.integrations.gguf.gguf_tokenizer_mapping",
        reason="needs transformers 5: uv sync --group reference",
    )
    theirs = mapping.GGUF_PRE_TOKENIZER_SPLITS
    shared = PRE_TOKENIZERS.keys() & theirs.keys()
    assert len(shared) > 20
    assert {name: PRE_TOKENIZERS[name].patterns for name in shared} == {
        name: (theirs[name],) for name in shared
    }
