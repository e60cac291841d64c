"""The tests' own model files: readable by the gguf package, of the intended scale, reproducible."""

import hashlib
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from phicore.gguf import random_models
from phicore.testing import tiny_models
from phicore.testing.tiny_models import Tiny, Type

GOLDEN = Path(__file__).parent / "golden"


def read_tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def read_values(path: Path) -> dict[str, np.ndarray]:
    return {
        name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for name, tensor in read_tensors(path).items()
    }


def test_types_are_all_that_gguf_dequantizes() -> None:
    def is_readable(data_type: Type) -> bool:
        block_bytes = gguf.GGML_QUANT_SIZES[data_type][1]
        try:
            gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), data_type)
        except NotImplementedError:
            return False
        return True

    assert set(random_models.TYPES) == {data_type for data_type in Type if is_readable(data_type)}


@pytest.mark.parametrize("data_type", random_models.TYPES, ids=lambda data_type: data_type.name)
@pytest.mark.parametrize("std", [0.03, 0.3])
def test_random_matrix_every_type_has_the_scale_asked_for(data_type: Type, std: float) -> None:
    rng = np.random.Generator(np.random.PCG64(1))
    rows = random_models.random_matrix(data_type, 64, 512, rng, std)
    values = gguf.quants.dequantize(rows, data_type)
    assert values.shape == (64, 512)
    assert np.isfinite(values).all()
    # Ternary types round values to 0 or the largest of their block, which spreads them by 15 %.
    assert values.std() == pytest.approx(std, rel=0.2)
    # The codes of IQ4_NL are centred on -0.08 standard deviations.
    assert abs(values.mean()) < 0.1 * std


def test_random_blocks_scales_differ_between_blocks() -> None:
    rng = np.random.Generator(np.random.PCG64(1))
    blocks = random_models.random_blocks(Type.Q6_K, 16, 256, rng, 0.03)
    assert len(np.unique(blocks[:, 208:].view("<f2"))) > 12


@pytest.mark.parametrize("arch", ["phi3", "llama"])
def test_write_model_metadata_says_what_tiny_says(tmp_path: Path, arch: str) -> None:
    tiny = Tiny(arch=arch)
    reader = gguf.GGUFReader(tiny_models.write_model(tmp_path / "m.gguf", tiny, tiny_models.Q4_K_M))

    def get(key: str) -> object:
        return reader.get_field(key).contents()

    assert get("general.architecture") == arch
    assert get(f"{arch}.embedding_length") == tiny.hidden_size
    assert get(f"{arch}.feed_forward_length") == tiny.intermediate_size
    assert get(f"{arch}.block_count") == tiny.num_hidden_layers
    assert get(f"{arch}.attention.head_count") == tiny.num_attention_heads
    assert get(f"{arch}.attention.head_count_kv") == tiny.num_key_value_heads
    assert get(f"{arch}.rope.dimension_count") == tiny.head_dim
    assert get("tokenizer.ggml.model") == "llama"
    for key in ("tokens", "scores", "token_type"):
        assert len(get(f"tokenizer.ggml.{key}")) == tiny.vocab_size


def test_write_model_phi3_has_fused_matrices_of_mixed_types(tmp_path: Path) -> None:
    tensors = read_tensors(tiny_models.write_model(tmp_path / "m.gguf", Tiny(), tiny_models.Q4_K_M))
    qkv, up = tensors["blk.0.attn_qkv.weight"], tensors["blk.0.ffn_up.weight"]
    assert (qkv.tensor_type, qkv.shape.tolist()) == (Type.Q5_K, [512, 1024])
    assert (up.tensor_type, up.shape.tolist()) == (Type.Q4_K, [512, 1536])
    assert tensors["output.weight"].tensor_type == Type.Q6_K


@pytest.mark.parametrize("data_type", [Type.F32, Type.Q8_0, Type.Q4_K], ids=lambda t: t.name)
def test_write_model_llama_is_the_phi3_network_unfused(tmp_path: Path, data_type: Type) -> None:
    phi3 = read_values(tiny_models.write_model(tmp_path / "phi3.gguf", Tiny(), data_type))
    tiny = Tiny(arch="llama")
    llama = read_values(tiny_models.write_model(tmp_path / "llama.gguf", tiny, data_type))

    q, k, v = np.split(phi3["blk.1.attn_qkv.weight"], [512, 768])
    gate, up = np.split(phi3["blk.1.ffn_up.weight"], 2)
    np.testing.assert_array_equal(llama["blk.1.attn_v.weight"], v)
    np.testing.assert_array_equal(llama["blk.1.ffn_gate.weight"], gate)
    np.testing.assert_array_equal(llama["blk.1.ffn_up.weight"], up)
    np.testing.assert_array_equal(llama["blk.1.ffn_down.weight"], phi3["blk.1.ffn_down.weight"])
    # Rows i and i + D/2 of a head, which RoPE rotates together, become rows 2i and 2i + 1.
    half = tiny.head_dim // 2
    for rows, permuted in ((q, llama["blk.1.attn_q.weight"]), (k, llama["blk.1.attn_k.weight"])):
        for head in range(len(rows) // tiny.head_dim):
            own = slice(head * tiny.head_dim, (head + 1) * tiny.head_dim)
            np.testing.assert_array_equal(permuted[own][0::2], rows[own][:half])
            np.testing.assert_array_equal(permuted[own][1::2], rows[own][half:])


def test_write_model_options_change_the_file(tmp_path: Path) -> None:
    tiny = Tiny(sliding_window=5, tie_word_embeddings=True, original_max_position_embeddings=16)
    path = tiny_models.write_model(tmp_path / "m.gguf", tiny, Type.Q4_0)
    assert gguf.GGUFReader(path).get_field("phi3.attention.sliding_window").contents() == 5
    tensors = read_tensors(path)
    assert "output.weight" not in tensors
    assert tensors["rope_factors_long.weight"].shape.tolist() == [tiny.head_dim // 2]


def test_write_model_vocabulary_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size: expected at least"):
        tiny_models.write_model(tmp_path / "m.gguf", Tiny(vocab_size=300), Type.F16)


def test_write_model_bytes_depend_on_the_seed_alone(tmp_path: Path) -> None:
    def write(seed: int) -> bytes:
        path = tiny_models.write_model(tmp_path / "m.gguf", Tiny(), tiny_models.Q4_K_M, seed=seed)
        return path.read_bytes()

    assert write(1) == write(1)
    assert write(1) != write(2)


@pytest.mark.parametrize("case", tiny_models.cases(), ids=lambda case: case.name)
def test_case_file_is_the_one_the_reference_was_computed_on(
    tmp_path: Path, case: tiny_models.Case
) -> None:
    """When this fails, the writer has changed: run tools/make_reference.py again."""
    digest = hashlib.sha256(case.write(tmp_path / "m.gguf").read_bytes()).hexdigest()
    with np.load(GOLDEN / "phi3.npz") as golden:
        assert digest == golden[f"{case.name}/sha256"]


def test_cases_have_distinct_names_and_seeds() -> None:
    cases = tiny_models.cases()
    assert len({case.name for case in cases}) == len({case.seed for case in cases}) == len(cases)
    assert replace(cases[0].tiny, vocab_size=352) == Tiny()
