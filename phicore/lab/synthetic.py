"""Models with random weights and the sizes and types of real ones, for benchmarks.

The time of a step depends on the shapes and types of the weights, not on their values, so a
benchmark needs no download. Blocks of K-quants are written directly, with random codes and
sub-scales. Their float16 scales give the weights the standard deviation with which Phi-3 was
initialized. So numbers stay finite through all layers. The text is meaningless.

The mix of types is llama.cpp's Q4_K_M for architecture `phi3`. Both phicore and llama.cpp read the
files.
"""

from __future__ import annotations

import itertools
import math
import shutil
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as Type

from phicore.disk.replacing import remove_left, replacing
from phicore.errors import ArgumentError, SourceError
from phicore.gguf.random_models import START, Sizes, add_sizes, add_vocabulary, random_blocks
from phicore.progress import Progress

VERSION = 2  # of the contents; it is part of the file's name, so a new version writes a new file
WEIGHT_STD = 0.02  # transformers' Phi3Config.initializer_range
CONTEXT = 4096
SLIDING_WINDOW = 2047
POOL_BLOCKS = 65537  # a prime above all numbers of rows, so that all rows of a matrix differ

_RESERVED = 64  # ids at the end of the vocabulary for control tokens and padding, as in Phi-3's
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}{{ '<|assistant|>\\n' }}"
)


@dataclass(frozen=True)
class TensorSpec:
    """The name, shape and type of a tensor in a file. Its rows have `shape[-1]` values."""

    name: str
    shape: tuple[int, ...]
    type: Type

    @property
    def size_bytes(self) -> int:
        block_size, block_bytes = GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block_size * block_bytes


@dataclass(frozen=True)
class SyntheticModel(Sizes):
    """The sizes of a `phi3` model, and the tensors that follow from them."""

    def tensors(self) -> Iterator[TensorSpec]:
        """Yield every tensor, in file order, with its type in the recipe Q4_K_M.

        In this recipe, fused queries, keys and values are Q5_K. The last matrix of a layer is Q6_K
        in the first and last eighth of the layers, and in every third layer between them.

        Source: llama.cpp, `llama_tensor_get_type`.
        """
        hidden, intermediate = self.hidden_size, self.intermediate_size
        layers = self.num_hidden_layers
        qkv = (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
        eighth = layers // 8
        yield TensorSpec("token_embd.weight", (self.vocab_size, hidden), Type.Q4_K)
        for i in range(layers):
            is_finer = i < eighth or i >= 7 * layers // 8 or (i - eighth) % 3 == 2
            down = Type.Q6_K if is_finer else Type.Q4_K
            yield TensorSpec(f"blk.{i}.attn_norm.weight", (hidden,), Type.F32)
            yield TensorSpec(f"blk.{i}.attn_qkv.weight", (qkv, hidden), Type.Q5_K)
            yield TensorSpec(f"blk.{i}.attn_output.weight", (hidden, hidden), Type.Q4_K)
            yield TensorSpec(f"blk.{i}.ffn_norm.weight", (hidden,), Type.F32)
            yield TensorSpec(f"blk.{i}.ffn_up.weight", (2 * intermediate, hidden), Type.Q4_K)
            yield TensorSpec(f"blk.{i}.ffn_down.weight", (hidden, intermediate), down)
        yield TensorSpec("output_norm.weight", (hidden,), Type.F32)
        yield TensorSpec("output.weight", (self.vocab_size, hidden), Type.Q6_K)


MODELS = {
    "phi-3-mini": SyntheticModel(32, 3072, 8192, 32, 32),
    "phi-3-medium": SyntheticModel(40, 5120, 17920, 40, 10),
    "tiny": SyntheticModel(2, 256, 512, 4, 4, vocab_size=1024),
    "phi-3-mini-4-layers": SyntheticModel(4, 3072, 8192, 32, 32),
    "phi-3-mini-8-layers": SyntheticModel(8, 3072, 8192, 32, 32),
    "phi-3-mini-16-layers": SyntheticModel(16, 3072, 8192, 32, 32),
}


def synthetic_model(name: str, progress: Progress = lambda *_: None) -> Path:
    """Return the file of a model of `MODELS` in the user's cache, and write it if it is missing.

    Raises:
        ArgumentError: If there is no such model.
        SourceError: If the disk has no room for the file, or if it cannot be written.
    """
    if name not in MODELS:
        raise ArgumentError(f"no synthetic model {name!r}; there are: {', '.join(MODELS)}")
    import platformdirs

    folder = platformdirs.user_cache_path("phicore") / "synthetic"
    path = folder / f"{name}-q4_k_m-{VERSION}.gguf"
    if path.is_file():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_left(folder)  # gigabytes, if a process was killed
        _check_room(folder, sum(t.size_bytes for t in MODELS[name].tensors()))
        with replacing(path) as new:
            write_model(new, name, progress)
    except OSError as error:
        raise SourceError(f"{path}: cannot be written: {error.strerror or error}") from error
    return path


def _check_room(folder: Path, size_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < 1.01 * size_bytes:  # 1 % for the metadata
        raise SourceError(
            f"{folder}: the model needs {size_bytes / 1e9:.2f} GB, the disk has "
            f"{free / 1e9:.2f} GB free; make room for it"
        )


def write_model(path: Path, name: str, progress: Progress = lambda *_: None) -> None:
    """Write a model of `MODELS` to a GGUF file, one tensor after another."""
    model = MODELS[name]
    rng = np.random.default_rng(0)
    tensors = list(model.tensors())
    types = sorted({t.type for t in tensors} - {Type.F32})
    pools = {
        t: random_blocks(t, POOL_BLOCKS, GGML_QUANT_SIZES[t][0], rng, WEIGHT_STD) for t in types
    }
    writer = gguf.GGUFWriter(path, "phi3")
    try:
        _add_config(writer, name, model)
        words = itertools.islice(_words(), model.vocab_size - len(START) - _RESERVED)
        add_vocabulary(writer, [*words], model.vocab_size, _CHAT_TEMPLATE)
        for tensor in tensors:
            dtype = np.dtype(np.float32)  # tells the writer that the shape counts values, not bytes
            writer.add_tensor_info(
                tensor.name, tensor.shape, dtype, tensor.size_bytes, raw_dtype=tensor.type
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done, total = 0, sum(tensor.size_bytes for tensor in tensors)
        for tensor in tensors:
            if tensor.type == Type.F32:
                data = np.ones(tensor.shape, np.float32)  # a norm's initial values
            else:
                pool = np.roll(pools[tensor.type], rng.integers(POOL_BLOCKS), axis=0)
                data = np.resize(pool, tensor.size_bytes)
            writer.write_tensor_data(data)
            done += tensor.size_bytes
            progress(f"writing {name}", done, total)
    finally:
        writer.close()


def _add_config(writer: gguf.GGUFWriter, name: str, model: SyntheticModel) -> None:
    writer.add_name(f"phi3 {name}, random weights")  # llama.cpp detects Phi-3's tokenizer by "phi3"
    writer.add_context_length(CONTEXT)
    writer.add_rope_scaling_orig_ctx_len(CONTEXT)
    add_sizes(writer, model)
    writer.add_sliding_window(SLIDING_WINDOW)
    writer.add_file_type(LlamaFileType.MOSTLY_Q4_K_M)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _words() -> Iterator[str]:
    """Yield distinct pieces without end: characters, then words of one, two and more syllables.

    Each word is two earlier pieces joined, so the tokenizer can build it by merging pairs.
    """
    yield from "▁" + string.ascii_letters + string.digits + string.punctuation
    syllables = [c + v for c in "bcdfghjklmnpqrstvwxz" for v in "aeiou"]
    for count in itertools.count(1):
        for parts in itertools.product(syllables, repeat=count):
            word = "".join(parts)
            yield from (word, f"▁{word}")
