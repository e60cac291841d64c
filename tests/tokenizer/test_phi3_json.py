"""Tests that Phi-3's tokenizer.json and its GGUF vocabulary give equal tokens.

The vocabulary is the real one. The tokenizer.json is made here, as transformers makes it for
Llama's family (convert_slow_tokenizer.py, `generate_merges` and `LlamaConverter`), with the added
tokens of Phi-3's tokenizer_config.json.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer.test_phi3 import pytestmark, read_cases
from tokenizer.vocabularies import PHI3_FILE
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from phicore.gguf.reader import open_gguf
from phicore.text.tokenizer import Tokenizer

__all__ = ["pytestmark"]  # skips without the vocabulary

TRAINED = 32000  # tokens from SentencePiece's training; the tokens after them were added
KEEP_SPACE = {"<unk>", "<s>", "<|endoftext|>"}  # other added tokens swallow spaces after them


def merges(pieces: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Return all pairs of pieces that together make a piece, the best first."""
    ids = {piece: id for id, piece in enumerate(pieces)}
    found = []
    for piece, score in zip(pieces[3:], scores[3:], strict=True):
        cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        pairs = [(a, b, score) for a, b in cuts if a in ids and b in ids]
        found += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    found.sort(key=lambda pair: (pair[2], len(pair[0]), len(pair[1])), reverse=True)
    return [(a, b) for a, b, _ in found]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer]:
    """Make one tokenizer from the GGUF file and one from a tokenizer.json."""
    with open_gguf(PHI3_FILE) as file:
        metadata = dict(file.metadata)
    pieces = metadata["tokenizer.ggml.tokens"]
    trained, scores = pieces[:TRAINED], metadata["tokenizer.ggml.scores"].tolist()[:TRAINED]
    backend = Backend(
        models.BPE(
            vocab={piece: id for id, piece in enumerate(trained)},
            merges=merges(trained, scores),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    for piece in (*trained[:3], *(p for p in pieces[TRAINED:] if not p.startswith("[PAD"))):
        rstrip, special = piece not in KEEP_SPACE, piece != "</s>"
        token = AddedToken(piece, rstrip=rstrip, normalized=False, special=special)
        (backend.add_special_tokens if special else backend.add_tokens)([token])
    path: Path = tmp_path_factory.mktemp("phi3") / "tokenizer.json"
    backend.save(str(path))
    return Tokenizer.from_gguf(metadata), Tokenizer.of(path, metadata, explicit=True)


def assert_same(both: tuple[Tokenizer, Tokenizer], text: str) -> None:
    ours, theirs = both
    for parse_special in (True, False):
        ids = ours.encode(text, parse_special=parse_special)
        assert ids == theirs.encode(text, parse_special=parse_special), (text, parse_special)
        assert ours.decode(ids) == theirs.decode(ids)


CORPUS = (
    "<|system|>\nYou are helpful.<|end|>\n<|user|>\nHi  there<|end|>\n<|assistant|>\n",
    "<s><|user|> \t\n x <|endoftext|>\n\ny</s> \nz<|placeholder1|>  w<unk> v",
    "def f(x):\n    return {k: v ** 2 for k, v in x.items()}  # <|end|>\n\n\n",
    "Größe, naïve, Ελληνικά, русский, العربية, עברית, हिन्दी, ไทย, 日本語, 한국어, 你好，世界。",
    "🚀 👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \ufeff \u200b \u2028 \x00 \x7f ½ ﬁ 𝕳",
    "▁▁ <0x0A> 1,000,000.00 3.14e-10 don't I'LL 'tis --- ....",
    *("", " ", "   ", "\n", "\t\r\n", " a", "a ", "</s>", "<|end|>", " <|end|> "),
)


def test_corpus_gives_the_same_tokens(both: tuple[Tokenizer, Tokenizer]):
    assert [t.source.rpartition("/")[2] for t in both] == ["GGUF (llama)", "tokenizer.json"]
    for text in (*CORPUS, *(text for text, _ in read_cases())):
        assert_same(both, text)


PARTS = [
    *("<|end|>", "<|user|>", "</s>", "<s>", "<unk>", "<|endoftext|>", "<|", "|>", "<0x0A>", "▁"),
    *(
        " ",
        "  ",
        "\n",
        "\t",
        "\r",
        "\u00a0",
        "\u200b",
        "\u0301",
        "é",
        "你",
        "🚀",
        "the",
        "ing",
        "'s",
    ),
]


@settings(max_examples=300)
@given(st.lists(st.sampled_from(PARTS) | st.text(max_size=4), max_size=14).map("".join))
def test_any_text_gives_the_same_tokens(both: tuple[Tokenizer, Tokenizer], text: str):
    assert_same(both, text)


def test_padding_has_a_spelling_in_the_file_alone(both: tuple[Tokenizer, Tokenizer]):
    """The two tokenizers differ only in ids that no text gives."""
    ours, theirs = both
    assert ours.vocab_size == theirs.vocab_size == 32064
    differ = [id for id in range(32064) if ours.piece(id) != theirs.piece(id)]
    assert differ == list(range(32011, 32064))
