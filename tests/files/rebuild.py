"""Rebuilds published GGUF files as tiny models, from the table `published.json`.

An entry of the table has the keys of a published file with their types and numbers, as loaders
print them; no text. A rebuilt file has the same keys with the same types. Sizes are smaller: heads
keep their ratio, the vocabulary keeps its kind and its special tokens, layers become two.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as Kind

from phicore.gguf.random_models import random_matrix

HEAD_DIM = 64
LAYERS = 2
INTERMEDIATE = 512
KINDS = {
    **{"str": Kind.STRING, "bool": Kind.BOOL, "f32": Kind.FLOAT32, "f64": Kind.FLOAT64},
    **{"u8": Kind.UINT8, "i8": Kind.INT8, "u16": Kind.UINT16, "i16": Kind.INT16},
    **{"u32": Kind.UINT32, "i32": Kind.INT32, "u64": Kind.UINT64, "i64": Kind.INT64},
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NORMAL, CONTROL, BYTE = 1, 3, 6


@cache
def published() -> dict[str, dict[str, Any]]:
    """Return the entries of the table by name."""
    entries = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
    return {entry["name"]: entry for entry in entries}


class Rebuilt:
    """A published file in small: its metadata and its tensors."""

    def __init__(self, entry: dict[str, Any]) -> None:
        self._given: dict[str, tuple[str, Any]] = {
            key: tuple(pair) for key, pair in entry["metadata"].items()
        }
        self.arch = str(self._value("general.architecture"))
        self.types: dict[str, int] = entry["types"]
        self.tensor_count: int | None = entry["tensor_count"]
        heads = self._number("attention.head_count")
        kv_heads = self._number("attention.head_count_kv", heads)
        hidden, head_dim = self._number("embedding_length"), self._number("attention.key_length", 0)
        group = heads // kv_heads
        self.kv_heads = 1 if group > 4 else max(1, 4 // group)
        self.heads = self.kv_heads * group
        # Heads that are not the embedding divided by their number stay so.
        has_own_size = head_dim and head_dim * heads != hidden
        self.head_dim = HEAD_DIM
        self.hidden = self.heads * HEAD_DIM + (64 if has_own_size else 0)
        rotary, whole = self._number("rope.dimension_count", 0), head_dim or hidden // heads
        self.rotary_dim = HEAD_DIM * rotary // whole if rotary else HEAD_DIM
        self.layers = self._number("block_count")
        self.experts = self._number("expert_count", 0)
        self.special: list[str] = entry.get("special", [])
        self.has_equal_scores = entry.get("equal_scores", False)
        self.tokens, self.token_types = self._vocabulary()

    def _value(self, key: str, default: Any = None) -> Any:
        return self._given.get(key, ("", default))[1]

    def _number(self, name: str, default: int | None = None) -> int:
        value = self._value(f"{self.arch}.{name}", default)
        return int(value[0] if isinstance(value, list) else value)

    # ---- metadata --------------------------------------------------------------------------

    def _vocabulary(self) -> tuple[list[str], list[int]]:
        """Return tokens and their types: bytes, some words, and the file's special tokens."""
        is_sentencepiece = self._value("tokenizer.ggml.model") == "llama"
        if is_sentencepiece:
            pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
            types = [2, CONTROL, CONTROL, *[BYTE] * 256]
            words = ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁t", "he", "▁the", "▁a"]
        else:
            pieces, types = [], []
            alphabet = sorted(gguf_bytes())
            words = [*alphabet, "th", "the"]
        pieces, types = pieces + words, types + [NORMAL] * len(words)
        special = ["<|im_start|>", "<|im_end|>", *self.special]
        if self.arch.startswith("phi") and is_sentencepiece:
            special += ["<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"]
        pieces, types = pieces + special, types + [CONTROL] * len(special)
        for key, (kind, value) in self._given.items():
            if key.startswith("tokenizer.ggml.") and key.endswith(("_token_id", "_token_ids")):
                for id in value if kind.startswith("arr") else [value]:
                    if self._small_id(id, is_sentencepiece) is None:
                        pieces.append(special_piece(id))
                        types.append(CONTROL)
        unique = dict(zip(pieces, types, strict=True))
        return list(unique), list(unique.values())

    @staticmethod
    def _small_id(value: int, is_sentencepiece: bool) -> int | None:
        """Return an id that is the same in the small vocabulary."""
        return value if is_sentencepiece and value < 3 else None

    def metadata(self) -> dict[str, tuple[Any, Kind, Kind | None]]:
        """Return the values of the small file by key, with their types."""
        arch = self.arch
        sizes = {
            f"{arch}.attention.head_count": self.heads,
            f"{arch}.attention.head_count_kv": self.kv_heads,
            f"{arch}.attention.head_dim": self.head_dim,
            f"{arch}.attention.key_length": self.head_dim,
            f"{arch}.attention.value_length": self.head_dim,
            f"{arch}.block_count": LAYERS,
            f"{arch}.embedding_length": self.hidden,
            f"{arch}.feed_forward_length": INTERMEDIATE,
            f"{arch}.rope.dimension_count": self.rotary_dim,
            f"{arch}.vocab_size": len(self.tokens),
        }
        is_sentencepiece = self._value("tokenizer.ggml.model") == "llama"
        arrays: dict[str, list[Any]] = {
            "tokenizer.ggml.tokens": self.tokens,
            "tokenizer.ggml.token_type": self.token_types,
            # The logs show few scores; they fall with the id, as those of trained vocabularies.
            "tokenizer.ggml.scores": [
                -1000.0 if self.has_equal_scores else -float(id) for id in range(len(self.tokens))
            ],
            "tokenizer.ggml.merges": ["t h", "th e"],
        }
        found: dict[str, tuple[Any, Kind, Kind | None]] = {}
        for key, (kind, given) in self._given.items():
            value = given
            if key in sizes:
                value = [sizes[key]] * len(given) if isinstance(given, list) else sizes[key]
            elif key in arrays:
                value = [int(x) for x in arrays[key]] if kind == "arr[i32]" else arrays[key]
            elif key == "tokenizer.chat_template":
                value = TEMPLATE
            elif key.startswith("tokenizer.ggml.") and key.endswith("_token_id"):
                small = self._small_id(given, is_sentencepiece)
                value = self.tokens.index(special_piece(given)) if small is None else small
            elif key.endswith("_token_ids"):
                value = [self.tokens.index(special_piece(id)) for id in given]
            elif kind.startswith("arr") and not isinstance(given, list):
                value = ["a"] * 2 if kind == "arr[str]" else [1, 1]
            elif kind == "str" and given is True:
                value = "a text"
            if kind.startswith("arr"):
                found[key] = (value, Kind.ARRAY, KINDS[kind[4:-1]])
            else:
                found[key] = (value, KINDS[kind], None)
        return found

    # ---- tensors ---------------------------------------------------------------------------

    def matrix_type(self, columns: int) -> Type:
        """Return the type of most matrices, or Q8_0 where its blocks do not fit a row."""
        names = [name for name in self.types if name not in ("F32", "F16", "BF16")]
        most = max(names, key=self.types.__getitem__) if names else "F16"
        found = Type[most]
        return found if columns % gguf.GGML_QUANT_SIZES[found][0] == 0 else Type.Q8_0

    def tensors(self) -> dict[str, tuple[np.ndarray, Type]]:
        """Return the data and type of every tensor. Their number tells which ones a file has."""
        rng = np.random.default_rng(0)
        e, f, v = self.hidden, INTERMEDIATE, len(self.tokens)
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim

        def matrix(rows: int, columns: int) -> tuple[np.ndarray, Type]:
            kind = self.matrix_type(columns)
            return random_matrix(kind, rows, columns, rng, columns**-0.5), kind

        def vector(size: int, value: float = 1.0) -> tuple[np.ndarray, Type]:
            return np.full(size, value, np.float32), Type.F32

        layer: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (e,),
            "attn_output.weight": (e, q),
            "ffn_norm.weight": (e,),
        }
        if self.arch == "phi3":
            layer |= {"attn_qkv.weight": (q + 2 * kv, e), "ffn_up.weight": (2 * f, e)}
        else:
            layer |= {"attn_q.weight": (q, e), "attn_k.weight": (kv, e), "attn_v.weight": (kv, e)}
            if not self.experts:
                layer |= {"ffn_gate.weight": (f, e), "ffn_up.weight": (f, e)}
        if self.experts:
            experts = {"ffn_gate_exps.weight": (f, e), "ffn_up_exps.weight": (f, e)}
            experts["ffn_down_exps.weight"] = (e, f)
            layer |= {name: (self.experts, *shape) for name, shape in experts.items()}
            layer["ffn_gate_inp.weight"] = (self.experts, e)
        else:
            layer["ffn_down.weight"] = (e, f)
        if self.arch in ("qwen2", "phimoe"):
            layer |= {"attn_q.bias": (q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
        if self.arch == "phimoe":
            layer |= {f"{name}.bias": (e,) for name in ("attn_output", "attn_norm", "ffn_norm")}
        whole: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (v, e),
            "output_norm.weight": (e,),
        }
        head: dict[str, tuple[int, ...]] = {"output.weight": (v, e)}
        if self.arch == "phimoe":
            head |= {"output_norm.bias": (e,), "output.bias": (v,)}
        factors = self._factors()
        surplus = 0
        if self.tensor_count is not None:
            count = len(whole) + len(head) + len(factors) + self.layers * len(layer)
            surplus = self.tensor_count - count
        if surplus >= 1:
            factors = {"rope_freqs.weight": (self.rotary_dim // 2,)}
        elif surplus == -1:
            head = {}
        shapes = whole | head | factors
        shapes |= {f"blk.{i}.{name}": shape for i in range(LAYERS) for name, shape in layer.items()}
        found = {}
        for name, shape in shapes.items():
            if len(shape) == 3:
                data, kind = matrix(shape[0] * shape[1], shape[2])
                found[name] = data.reshape(*shape[:2], -1), kind
            elif len(shape) == 2 and not name.endswith("ffn_gate_inp.weight"):
                found[name] = matrix(*shape)
            elif len(shape) == 2:
                found[name] = rng.standard_normal(shape, np.float32), Type.F32
            else:
                found[name] = vector(shape[0], 0.01 if name.endswith("bias") else 1.0)
        return found

    def _factors(self) -> dict[str, tuple[int, ...]]:
        """Return the rotary factors of a model with LongRoPE."""
        original = self._value(f"{self.arch}.rope.scaling.original_context_length", 0)
        if not self.arch.startswith("phi") or not 0 < original < self._number("context_length"):
            return {}
        half = (self.rotary_dim // 2,)
        return {f"rope_factors_{kind}.weight": half for kind in ("short", "long")}


def special_piece(id: int) -> str:
    return f"<|special_{id}|>"


def gguf_bytes() -> list[str]:
    """Return the characters that stand for bytes in byte-level vocabularies."""
    from tokenizers import pre_tokenizers

    alphabet: list[str] = pre_tokenizers.ByteLevel.alphabet()
    return alphabet


def write(entry: dict[str, Any], path: Path) -> Path:
    """Write a published file in small."""
    rebuilt = Rebuilt(entry)
    writer = gguf.GGUFWriter(path, rebuilt.arch)
    for key, (value, kind, of) in rebuilt.metadata().items():
        if key != "general.architecture":
            writer.add_key_value(key, value, kind, sub_type=of)
    for name, (data, data_type) in rebuilt.tensors().items():
        raw = None if data.dtype == np.float32 else data_type
        writer.add_tensor(name, data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
