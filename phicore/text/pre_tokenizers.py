"""Pre-tokenizers of byte-level vocabularies: the rules that cut text into words before merging.

A GGUF file names its pre-tokenizer in `tokenizer.ggml.pre`. The names are llama.cpp's, and many
names stand for the same rule. The regular expressions are those of the models' tokenizer.json
files; llama.cpp spells some of them differently, because its own engine needs it.

Source: llama.cpp (llama-vocab.cpp) for the names and for what each implies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PreTokenizer:
    """A rule that cuts text into words, with other properties that its name implies.

    Attributes:
        patterns: Regular expressions, applied in order. Each is applied to every piece that the
            previous expression produced; its matches and the text between them become pieces.
        ignores_merges: Whether a word that is a token becomes this token directly, without merges.
        adds_bos: Whether a text begins with BOS if the file does not say.
        composes: Whether text is first normalized to Unicode's composed form (NFC). llama.cpp does
            not do this, but the models' own tokenizers do.
    """

    patterns: tuple[str, ...]
    ignores_merges: bool = False
    adds_bos: bool = False
    composes: bool = False


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_MARKS}|{_BLANKS}"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|{_BLANKS}"
_SEED_CODER = rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_BLANKS}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}"
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}"
)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"

_RULES: Mapping[PreTokenizer, tuple[str, ...]] = {
    PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")): ("default",),
    PreTokenizer((_GPT2,)): (
        *("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "gigachat"),
        *("a.x-4.0", "mellum", "modern-bert", "exaone4"),
        *("jina-es", "jina-de", "jina-v2-es", "jina-v2-de"),
    ),
    PreTokenizer((r"\p{N}", _GPT2)): (
        *("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b", "mellum2"),
    ),
    PreTokenizer((r"\p{N}", _GPT2), composes=True): ("command-r",),
    PreTokenizer((_LLAMA3,), ignores_merges=True, adds_bos=True): (
        *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0"),
        *("lfm2", "jina-v5-nano"),
    ),
    PreTokenizer((_LLAMA3,)): ("dbrx", "smaug-bpe", "chatglm-bpe"),
    PreTokenizer((_LLAMA3,), ignores_merges=True): ("glm4", "glm5"),
    PreTokenizer((_QWEN2,), composes=True): ("qwen2",),
    PreTokenizer((_QWEN2,)): (
        *("deepseek-r1-qwen", "megrez", "kormo", "f2llmv2", "stablelm2", "hunyuan"),
        *("solar-open", "grok-2"),
    ),
    PreTokenizer((_GPT4O,)): ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"),
    PreTokenizer((_TEKKEN,), ignores_merges=True, adds_bos=True): ("tekken",),
    PreTokenizer((_SEED_CODER,)): ("seed-coder",),
    PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")): (
        "deepseek-coder",
    ),
    PreTokenizer((_BLOOM,)): ("poro-chat", "bloom", "gpt3-finnish"),
    PreTokenizer((_BLOOM, r"\p{N}")): ("viking",),
}

_QWEN2_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_QWEN2_IDS = slice(151643, 151646)


def recognized(pieces: Sequence[str]) -> str | None:
    """Return the name of the pre-tokenizer of a vocabulary that is known by its tokens, or None.

    Files from before April 2024 do not name it.
    """
    if {"<|begin_of_text|>", "<|eot_id|>"}.issubset(pieces):
        return "llama-bpe"
    return "qwen2" if list(pieces[_QWEN2_IDS]) == _QWEN2_TOKENS else None


PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    name: rule for rule, names in _RULES.items() for name in names
}
"""The rules by the value of `tokenizer.ggml.pre`. llama.cpp also has names for vocabularies that
are not byte-level, and for rules that no architecture of phicore needs."""
