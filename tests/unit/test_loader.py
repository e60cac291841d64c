"""Tests of loading parameters from tensors: all architectures, and inconsistent files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from phicore.backend import Backend
from phicore.errors import GGUFError
from phicore.gguf.reader import GGUFFile, GGUFTensor, open_gguf
from phicore.network.architectures import architecture_of
from phicore.network.architectures.llama import rows_for_half_rotation
from phicore.network.weights import load_params, read_config
from phicore.testing.tiny_models import Q4_K_M, Tiny, Types, write_model

TINY = Tiny(vocab_size=40, max_position_embeddings=30)
ROTARY_TABLE = gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ATTN_ROT_EMBD]
MATRICES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


class Host(Backend):
    """The part of a backend that loading needs; weights are dense NumPy arrays."""

    xp = np

    def asarray(self, x: np.ndarray) -> np.ndarray:
        return np.array(x)

    def to_numpy(self, x: np.ndarray) -> np.ndarray:
        return x


def quiet(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that writes a model, changes its tensors and loads its parameters."""

    def call(
        tiny: Tiny = TINY,
        types: Types = Type.F32,
        change: Callable[[GGUFFile], None] = lambda file: None,
        progress: Callable[[str, int, int], None] = quiet,
    ) -> dict[str, Any]:
        path = write_model(tmp_path / "m.gguf", tiny, types, tokenizer=False)
        with open_gguf(path) as file:
            architecture = architecture_of(file.metadata)
            config = read_config(file, architecture)
            change(file)
            return dict(load_params(Host(), architecture, config, file, progress))

    return call


def test_load_params_has_the_reference_s_names_and_shapes(load: Callable[..., dict[str, Any]]):
    params = load()
    assert set(params) == {"embed_tokens", "lm_head", "norm", "layers"}
    assert params["embed_tokens"].shape == params["lm_head"].shape == (40, 512)
    assert len(params["layers"]) == 2
    shapes = {name: a.shape for name, a in params["layers"][1].items()}
    assert shapes == {
        "input_layernorm": (512,),
        "qkv_proj": ((8 + 2 * 4) * 64, 512),
        "o_proj": (512, 512),
        "post_attention_layernorm": (512,),
        "gate_up_proj": (2 * 768, 512),
        "down_proj": (512, 768),
    }


MOE = replace(TINY, arch="phimoe", intermediate_size=256, num_local_experts=3)


def test_load_params_experts_have_an_axis_in_front(load: Callable[..., dict[str, Any]]):
    params = load(MOE, Q4_K_M)
    assert set(params) == {"embed_tokens", "lm_head", "lm_head_bias", "norm", "norm_bias", "layers"}
    assert params["lm_head_bias"].shape == (40,)
    shapes = {name: a.shape for name, a in params["layers"][1].items()}
    assert shapes == {
        "input_layernorm": (512,),
        "input_layernorm_bias": (512,),
        "qkv_proj": ((8 + 2 * 4) * 64, 512),
        "qkv_proj_bias": ((8 + 2 * 4) * 64,),
        "o_proj": (512, 512),
        "o_proj_bias": (512,),
        "post_attention_layernorm": (512,),
        "post_attention_layernorm_bias": (512,),
        "router": (3, 512),
        "experts_gate_up_proj": (3, 2 * 256, 512),
        "experts_down_proj": (3, 512, 256),
    }


@pytest.mark.parametrize(
    "name", ["blk.1.ffn_up_exps.weight", "blk.0.ffn_norm.bias", "output.weight", "output.bias"]
)
def test_load_params_missing_tensor_of_a_model_of_experts_is_named(
    load: Callable[..., dict[str, Any]], name: str
):
    with pytest.raises(GGUFError) as caught:
        load(MOE, change=lambda file: file.tensors.pop(name))
    assert str(caught.value) == f"m.gguf: tensor '{name}' is missing"


def test_load_params_other_number_of_experts_is_told(load: Callable[..., dict[str, Any]]):
    def change(file: GGUFFile) -> None:
        name = "blk.0.ffn_down_exps.weight"
        whole = file.tensors[name]
        file.tensors[name] = replace(whole, shape=(2, *whole.shape[1:]), data=whole.data[:2])

    with pytest.raises(GGUFError) as caught:
        load(MOE, change=change)
    assert str(caught.value) == (
        "m.gguf: tensor 'blk.0.ffn_down_exps.weight': expected shape [3, 512, 256] by the "
        "hyperparameters, found [2, 512, 256]"
    )


def test_load_params_tied_model_has_no_head(load: Callable[..., dict[str, Any]]):
    params = load(replace(TINY, tie_word_embeddings=True))
    assert "lm_head" not in params


@pytest.mark.parametrize(
    "data_type", [Type.F32, Type.F16, Type.Q4_0, Type.Q4_K, Type.Q6_K], ids=lambda t: t.name
)
def test_load_params_llama_file_gives_the_same_as_phi3(
    load: Callable[..., dict[str, Any]], data_type: Type
):
    """A network gives equal bits from a phi3 file and from a split, permuted llama file."""
    phi3 = load(TINY, data_type)
    llama = load(replace(TINY, arch="llama"), data_type)
    for name in set(phi3) - {"layers"}:
        assert np.array_equal(phi3[name], llama[name]), name
    for ours, theirs in zip(phi3["layers"], llama["layers"], strict=True):
        assert set(ours) == set(theirs)
        for name in ours:
            assert np.array_equal(ours[name], theirs[name]), name


def test_load_params_parts_of_several_types_load(load: Callable[..., dict[str, Any]]):
    layer = load(replace(TINY, arch="llama"), Q4_K_M)["layers"][0]
    assert all(np.isfinite(layer[name]).all() for name in MATRICES)


def test_load_params_reports_bytes_up_to_the_total(load: Callable[..., dict[str, Any]]):
    calls: list[tuple[str, int, int]] = []
    load(progress=lambda *call: calls.append(call))
    what, done, total = zip(*calls, strict=True)
    assert set(what) == {"loading"}
    assert list(done) == sorted(done)
    assert set(total) == {done[-1]}


@pytest.mark.parametrize(
    "name",
    [
        *("token_embd.weight", "output_norm.weight", "blk.0.attn_norm.weight"),
        *("blk.1.attn_qkv.weight", "blk.0.attn_output.weight", "blk.1.ffn_up.weight"),
        *("blk.0.ffn_norm.weight", "blk.1.ffn_down.weight"),
    ],
)
def test_load_params_missing_tensor_is_named(load: Callable[..., dict[str, Any]], name: str):
    with pytest.raises(GGUFError) as caught:
        load(change=lambda file: file.tensors.pop(name))
    assert str(caught.value) == f"m.gguf: tensor '{name}' is missing"


def test_load_params_surplus_tensors_are_named(load: Callable[..., dict[str, Any]]):
    def change(file: GGUFFile) -> None:
        norm = file.tensors["output_norm.weight"]
        for name in ("blk.0.attn_q_norm.weight", "a", "b", "c"):
            file.tensors[name] = replace(norm, name=name)

    with pytest.raises(GGUFError) as caught:
        load(change=change)
    assert str(caught.value) == (
        "m.gguf: 4 tensors that this version does not use, which would give wrong text: "
        "blk.0.attn_q_norm.weight, a, b"
    )


@pytest.mark.parametrize(
    "name",
    [
        # As the gguf package names them, with and without its suffix, and as others did.
        *(f"{ROTARY_TABLE.format(bid=0)}{end}" for end in ("", ".weight")),
        gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS],
        *("blk.0.attn.rot_embd", "layers.0.rope.freqs"),
    ],
)
def test_load_params_rotary_tables_of_old_converters_are_ignored(
    load: Callable[..., dict[str, Any]], name: str
):
    def change(file: GGUFFile) -> None:
        file.tensors[name] = file.tensors["output_norm.weight"]

    assert set(load(change=change)) == set(load())


def scaled(file: GGUFFile, name: str, *scales: float) -> None:
    """Put the scales of an NVFP4 matrix beside it, as llama.cpp's converter writes them."""
    for end, values in ((".scale", scales), (".input_scale", [7.0] * len(scales))):
        data = np.array(values, "<f4").view(np.uint8)
        sidecar = name.removesuffix(".weight") + end
        file.tensors[sidecar] = GGUFTensor(sidecar, Type.F32, (len(scales),), data)


def test_load_params_nvfp4_matrix_is_multiplied_by_the_scale_beside_it(
    load: Callable[..., dict[str, Any]],
):
    def change(file: GGUFFile) -> None:
        scaled(file, "blk.0.attn_output.weight", 0.25)
        scaled(file, "output.weight", 3.0)

    plain, params = load(types=Type.NVFP4), load(types=Type.NVFP4, change=change)
    for ours, theirs, scale in (
        (params["layers"][0]["o_proj"], plain["layers"][0]["o_proj"], 0.25),
        (params["lm_head"], plain["lm_head"], 3.0),
        (params["layers"][1]["o_proj"], plain["layers"][1]["o_proj"], 1.0),
    ):
        assert np.array_equal(ours, theirs * np.float32(scale))
        assert np.abs(theirs).max() > 0


def test_load_params_nvfp4_rows_of_llama_keep_their_scale(load: Callable[..., dict[str, Any]]):
    tiny = replace(TINY, arch="llama")

    def change(file: GGUFFile) -> None:
        scaled(file, "blk.0.attn_q.weight", 2.0)
        scaled(file, "blk.0.attn_v.weight", 0.5)

    plain = load(tiny, Type.NVFP4)["layers"][0]["qkv_proj"]
    found = load(tiny, Type.NVFP4, change)["layers"][0]["qkv_proj"]
    q = TINY.num_attention_heads * TINY.head_dim
    kv = TINY.num_key_value_heads * TINY.head_dim
    factors = np.repeat(np.float32([2.0, 1.0, 0.5]), [q, kv, kv])
    assert np.array_equal(found, plain * factors[:, None])


def test_load_params_nvfp4_experts_have_a_scale_each(load: Callable[..., dict[str, Any]]):
    tiny = replace(TINY, arch="phimoe", num_local_experts=3)

    def change(file: GGUFFile) -> None:
        scaled(file, "blk.0.ffn_down_exps.weight", 1.0, 2.0, 0.5)

    plain = load(tiny, Type.NVFP4)["layers"][0]["experts_down_proj"]
    found = load(tiny, Type.NVFP4, change)["layers"][0]["experts_down_proj"]
    factors = np.float32([1.0, 2.0, 0.5])
    assert np.array_equal(found, plain * factors[:, None, None])


@pytest.mark.parametrize(
    ("types", "scales", "expected"),
    [
        (Type.Q4_0, [2.0], "blk.0.attn_output.scale"),  # its codes stay in memory
        (Type.NVFP4, [float("nan")], "'blk.0.attn_output.scale': expected finite numbers"),
        (Type.NVFP4, [1.0, 2.0], r"'blk.0.attn_output.scale': expected shape \[1\]"),
    ],
)
def test_load_params_scale_that_cannot_be_applied_is_an_error(
    load: Callable[..., dict[str, Any]], types: Type, scales: list[float], expected: str
):
    with pytest.raises(GGUFError, match=expected):
        load(types=types, change=lambda file: scaled(file, "blk.0.attn_output.weight", *scales))


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("blk.0.attn_qkv.weight", (1023, 512), [1024, 512]),
        ("blk.1.ffn_down.weight", (768, 512), [512, 768]),
        ("output_norm.weight", (511,), [512]),
        ("output_norm.weight", (1, 512), [512]),
        ("output.weight", (39, 512), [40, 512]),
        ("token_embd.weight", (40, 256), [40, 512]),
    ],
)
def test_load_params_misshapen_tensor_says_both_shapes(
    load: Callable[..., dict[str, Any]], name: str, shape: tuple[int, ...], expected: list[int]
):
    def change(file: GGUFFile) -> None:
        data = np.zeros((*shape[:-1], 4 * shape[-1]), np.uint8)
        file.tensors[name] = GGUFTensor(name, Type.F32, shape, data)

    with pytest.raises(GGUFError) as caught:
        load(change=change)
    assert str(caught.value) == (
        f"m.gguf: tensor '{name}': expected shape {expected} by the hyperparameters, "
        f"found {list(shape)}"
    )


def test_load_params_type_without_values_is_named(load: Callable[..., dict[str, Any]]):
    def change(file: GGUFFile) -> None:
        name = "blk.0.attn_output.weight"
        data = np.zeros((512, 512), np.uint8)
        file.tensors[name] = GGUFTensor(name, Type.I8, (512, 512), data)

    with pytest.raises(GGUFError, match=r"tensor 'blk\.0\.attn_output\.weight': type I8 cannot"):
        load(change=change)


def test_vocab_size_is_the_embedding_s(tmp_path: Path):
    path = write_model(tmp_path / "m.gguf", TINY, Type.F32, tokenizer=False)
    with open_gguf(path) as file:
        architecture = architecture_of(file.metadata)
        assert read_config(file, architecture).vocab_size == 40
        del file.tensors["token_embd.weight"]
        with pytest.raises(GGUFError, match=r"m\.gguf: tensor 'token_embd\.weight' is missing"):
            read_config(file, architecture)


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (3, 4), (5, 16)])
def test_rows_for_half_rotation_undoes_the_conversion(heads: int, head_dim: int):
    rows = np.arange(heads * head_dim * 6, dtype=np.uint8).reshape(heads * head_dim, 6)
    # llama.cpp, convert_hf_to_gguf.py, LlamaModel.permute
    permuted = rows.reshape(heads, 2, len(rows) // heads // 2, 6).swapaxes(1, 2).reshape(rows.shape)
    tensor = GGUFTensor("q", Type.Q4_0, (heads * head_dim, 32), permuted)
    assert np.array_equal(rows_for_half_rotation(tensor, heads).data, rows)


def test_rows_for_half_rotation_neighbours_become_halves():
    rows = np.arange(8, dtype=np.uint8)[:, None]  # two heads of four channels
    tensor = GGUFTensor("q", Type.I8, (8, 1), rows)
    assert rows_for_half_rotation(tensor, 2).data[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


LONG = replace(TINY, original_max_position_embeddings=16)


@pytest.fixture
def factors(tmp_path: Path) -> Callable[..., Any]:
    """Return a function that writes a LongRoPE model, changes it and loads its factors."""

    def call(
        change: Callable[[GGUFFile], None] = lambda file: None, tiny: Tiny = LONG, **config: Any
    ) -> Any:
        path = write_model(tmp_path / "m.gguf", tiny, Type.F32, tokenizer=False)
        with open_gguf(path) as file:
            change(file)
            architecture = architecture_of(file.metadata)
            found = replace(architecture.config(file.metadata), **config)
            return architecture.rope_factors(found, file)

    return call


def vector(name: str, values: list[float]) -> Callable[[GGUFFile], None]:
    data = np.array(values, np.float32)

    def change(file: GGUFFile) -> None:
        file.tensors[name] = GGUFTensor(name, Type.F32, data.shape, data.view(np.uint8))

    return change


def test_rope_factors_of_long_rope(factors: Callable[..., Any]):
    found = factors()
    steps = np.arange(1, 33, dtype=np.float32)
    assert np.array_equal(found.short, 1 + steps / 64)
    assert np.array_equal(found.long, 1 + steps / 8)
    assert found.scale == pytest.approx(
        np.sqrt(1 + np.log(LONG.max_position_embeddings / 16) / np.log(16))
    )


def test_rope_factors_of_llama_are_one_set(factors: Callable[..., Any]):
    found = factors(tiny=replace(LONG, arch="llama", original_max_position_embeddings=64))
    assert found.short is found.long or np.array_equal(found.short, found.long)
    assert (found.scale, found.short[0], found.short[-1]) == (1, 1, 8)


def test_rope_factors_are_none_without_tensors(factors: Callable[..., Any]):
    assert factors(tiny=TINY) is None


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (
            lambda file: file.tensors.pop("rope_factors_long.weight"),
            {},
            "tensor 'rope_factors_long.weight' is missing",
        ),
        (
            vector("rope_factors_short.weight", [1.0] * 31),
            {},
            "tensor 'rope_factors_short.weight': expected shape [32] by the hyperparameters, "
            "found [31]",
        ),
        (
            vector("rope_factors_long.weight", [1.0] * 31 + [0.0]),
            {},
            "tensor 'rope_factors_long.weight': expected numbers from 1e-06 to 1e+06, found 0",
        ),
        (
            vector("rope_factors_long.weight", [1.0] * 31 + [float("nan")]),
            {},
            "tensor 'rope_factors_long.weight': expected numbers from 1e-06 to 1e+06, found nan",
        ),
        (
            vector("rope_factors_short.weight", [1.0] * 31 + [3e38]),
            {},
            "tensor 'rope_factors_short.weight': expected numbers from 1e-06 to 1e+06, found 3e+38",
        ),
        (
            vector("rope_factors_short.weight", [1e-45] + [1.0] * 31),
            {},
            "tensor 'rope_factors_short.weight': expected numbers from 1e-06 to 1e+06, "
            "found 1.4013e-45",
        ),
        (
            lambda file: None,
            {"original_max_position_embeddings": None},
            "phi3.rope.scaling.original_context_length: expected 2 or more with the rope factors "
            "of this file, found nothing",
        ),
    ],
    ids=["missing", "shape", "zero", "nan", "large", "small", "original"],
)
def test_rope_factors_that_are_wrong_are_named(
    factors: Callable[..., Any], change: Any, config: dict[str, Any], message: str
):
    with pytest.raises(GGUFError) as caught:
        factors(change, **config)
    assert str(caught.value) == f"m.gguf: {message}"


def test_rope_factors_that_the_hyperparameters_ask_for_but_are_not_there(
    factors: Callable[..., Any],
):
    with pytest.raises(GGUFError, match=r"rope_factors_long.weight are missing"):
        factors(tiny=TINY, attention_factor=1.2)


def test_rope_factors_of_an_extended_context_must_be_there(factors: Callable[..., Any]):
    with pytest.raises(GGUFError, match=r"rope_factors_long.weight are missing"):
        factors(tiny=TINY, original_max_position_embeddings=16)


def test_rope_factors_scale_of_another_architecture_is_refused(factors: Callable[..., Any]):
    with pytest.raises(GGUFError) as caught:
        factors(tiny=replace(TINY, arch="llama"), attention_factor=1.5)
    assert str(caught.value) == (
        "m.gguf: llama.rope.scaling.attn_factor: 1.5 is not supported (supported: 1)"
    )
