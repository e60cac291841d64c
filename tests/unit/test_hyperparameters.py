"""Tests of hyperparameters: which are read, which are refused, and with which messages."""

from typing import Any

import gguf
import numpy as np
import pytest

from phicore.errors import BackendError, GGUFError
from phicore.network.architectures import BUILT_IN, Architecture, architecture_of
from phicore.network.architectures.keys import ELSEWHERE, REFUSED
from phicore.network.config import Phi3Config

PHI3 = {
    "general.architecture": "phi3",
    "general.name": "Phi 3 Mini",
    "phi3.embedding_length": 3072,
    "phi3.feed_forward_length": 8192,
    "phi3.block_count": 32,
    "phi3.attention.head_count": 24,
    "phi3.attention.head_count_kv": 8,
    "phi3.context_length": 4096,
    "phi3.attention.layer_norm_rms_epsilon": 1e-5,
    "phi3.rope.dimension_count": 96,
    "phi3.rope.freq_base": 20000.0,
    "phi3.attention.sliding_window": 1000,
    "tokenizer.ggml.model": "llama",
}
ABSENT = object()


def metadata(arch: str = "phi3", **changes: Any) -> dict[str, Any]:
    """Return the metadata of a valid file with changes, such as `block_count=3`.

    The value ABSENT removes a key. A dot in a key is written as two underscores.
    """
    result = {k.replace("phi3.", f"{arch}.", 1): v for k, v in PHI3.items()}
    result["general.architecture"] = arch
    for name, value in changes.items():
        key = f"{arch}.{name.replace('__', '.')}"
        if value is ABSENT:
            del result[key]
        else:
            result[key] = value
    return result


def config_of(values: dict[str, Any]) -> Phi3Config:
    return architecture_of(values).config(values)


def message(values: dict[str, Any]) -> str:
    with pytest.raises(GGUFError) as caught:
        config_of(values)
    return str(caught.value)


def test_config_reads_every_key():
    config = config_of(metadata(rope__dimension_count=96))
    assert (config.architecture, config.hidden_size, config.intermediate_size) == (
        *("phi3", 3072),
        8192,
    )
    assert (config.num_hidden_layers, config.num_attention_heads) == (32, 24)
    assert (config.num_key_value_heads, config.head_dim, config.rotary_dim) == (8, 128, 96)
    assert (config.max_position_embeddings, config.sliding_window) == (4096, 1000)
    assert (config.rms_norm_eps, config.rope_theta) == (1e-5, 20000.0)


def test_config_defaults_follow_from_other_keys():
    config = config_of(
        metadata(
            attention__head_count_kv=ABSENT,
            rope__dimension_count=ABSENT,
            rope__freq_base=ABSENT,
        )
    )
    assert config.num_key_value_heads == 24
    assert config.rotary_dim == config.head_dim == 128
    assert config.rope_theta == 10000.0


def test_config_key_length_gives_the_head_size():
    config = config_of(
        metadata(embedding_length=1000, attention__key_length=112, attention__value_length=112)
    )
    assert (config.hidden_size, config.head_dim) == (1000, 112)


def test_config_keys_with_neutral_values_are_fine():
    neutral = metadata(
        rope__scaling__type="none", expert_count=0, attention__causal=True, vocab_size=9
    )
    assert config_of(neutral) == config_of(metadata())


REQUIRED = (
    *("embedding_length", "feed_forward_length", "block_count", "context_length"),
    *("attention.head_count", "attention.layer_norm_rms_epsilon"),
)


@pytest.mark.parametrize("name", REQUIRED)
def test_config_missing_key_is_named(name: str):
    values = {k: v for k, v in metadata().items() if k != f"phi3.{name}"}
    expected = f"phi3.{name}: missing; the file is incomplete or was made for another use"
    assert message(values) == expected


@pytest.mark.parametrize("arch", [None, "phi2", "PHI3", 3])
def test_config_other_architecture_is_refused(arch: Any):
    values = metadata() | {"general.architecture": arch}
    if arch is None:
        assert message(values) == "general.architecture: missing; is this a model file?"
    else:
        expected = (
            f"general.architecture: {arch!r} is not supported "
            "(supported: phi3, phimoe, llama, qwen2)"
        )
        hint = "; llama.cpp runs this file" if arch == "phi2" else ""
        assert message(values) == expected + hint


@pytest.mark.parametrize("arch", [np.array([1, 2]), ["phi3"]], ids=["array", "list"])
def test_config_architecture_that_is_an_array_is_refused(arch: Any):
    expected = (
        f"general.architecture: {arch!r} is not supported (supported: phi3, phimoe, llama, qwen2)"
    )
    assert message(metadata() | {"general.architecture": arch}) == expected


def test_config_no_metadata_says_so():
    assert message({}) == "general.architecture: missing; is this a model file?"


BAD_VALUES = [
    ("block_count", "32", "expected an integer, found '32'"),
    ("block_count", 32.5, "expected an integer, found 32.5"),
    ("block_count", True, "expected an integer, found True"),
    ("block_count", [*[32] * 50, 31], "expected one number for all layers, found [32, 32,"),
    ("attention__scale", 0.5, "0.5 contradicts the attention scale 0.088"),
    ("block_count", 0, "expected 1 to 2147483647, found 0"),
    ("embedding_length", 2**31, "expected 1 to 2147483647, found 2147483648"),
    ("attention__head_count", -1, "expected 1 to 2147483647, found -1"),
    ("attention__head_count_kv", 0, "expected 1 to 2147483647, found 0"),
    ("attention__sliding_window", -1, "expected 0 to 2147483647, found -1"),
    ("attention__layer_norm_rms_epsilon", "tiny", "expected a number, found 'tiny'"),
    ("attention__layer_norm_rms_epsilon", False, "expected a number, found False"),
    ("attention__layer_norm_rms_epsilon", 0.0, "expected 1e-30 to 1, found 0.0"),
    ("attention__layer_norm_rms_epsilon", 1e-40, "expected 1e-30 to 1, found 1e-40"),
    ("attention__layer_norm_rms_epsilon", 1e5, "expected 1e-30 to 1, found 100000.0"),
    ("rope__freq_base", float("nan"), "expected 1 to 1e+30, found nan"),
    ("rope__freq_base", float("inf"), "expected 1 to 1e+30, found inf"),
    ("rope__freq_base", -1e4, "expected 1 to 1e+30, found -10000.0"),
    ("rope__freq_base", 1e39, "expected 1 to 1e+30, found 1e+39"),  # infinite in float32
    ("rope__freq_base", 1e-42, "expected 1 to 1e+30, found 1e-42"),  # infinite reciprocal
    ("rope__scaling__attn_factor", 1e20, "expected 0.01 to 100, found 1e+20"),
    ("rope__dimension_count", 95, "expected an even number up to the head size 128, found 95"),
    ("rope__dimension_count", 130, "expected an even number up to the head size 128, found 130"),
    ("attention__value_length", 64, "64 contradicts the head dim 128"),
    ("attention__head_dim", 96, "96 contradicts the head dim 128"),
    (
        *("attention__layer_norm_epsilon", 1e-6),
        "1e-06 contradicts phi3.attention.layer_norm_rms_epsilon 1e-05",
    ),
    ("rope__dimension_count_swa", 64, "64 contradicts phi3.rope.dimension_count 96"),
    ("rope__freq_base_swa", "x", "'x' contradicts phi3.rope.freq_base 20000.0"),
    ("embedding_length", 3073, "3073 is not a multiple of phi3.attention.head_count 24"),
    ("expert_count", 16, "16 is not supported (supported: 0)"),
    ("rope__scaling__type", "dynamic", "'dynamic' is not supported"),
    ("rope__scaling__factor", 4.0, "a scaling of 4 is not supported for this architecture"),
    ("rope__scaling__factor", -1.0, "expected 0 to 1e+30, found -1.0"),
    ("rope__scaling__yarn_ext_factor", 1.0, "1.0 is not supported (supported: 0 or -1)"),
    ("attention__causal", False, "False is not supported (supported: True)"),
    ("expert_count", np.array([1, 2]), "array([1, 2]) is not supported (supported: 0)"),
    ("block_count", [], "expected an integer, found []"),
    ("block_count", np.array([1, 2]), "expected one number for all layers, found array([1, 2])"),
    ("attention__head_count", ["x", "x"], "expected an integer, found 'x'"),
    ("attention__value_length", np.array([128, 2]), "2 contradicts the head dim 128"),
    ("attention__value_length", [[128]], "[128] contradicts the head dim 128"),
    ("logit_scale", 2.0, "2.0 is not supported (supported: 0 or 1)"),
    ("ssm__conv_kernel", 4, "this hyperparameter is not supported: it belongs to another kind"),
    ("attention__q_lora_rank", 4, "this hyperparameter is not supported: it belongs to another"),
    ("attention__new_idea", 1, "this hyperparameter is not known; it might change the network"),
]


@pytest.mark.parametrize(("name", "value", "expected"), BAD_VALUES, ids=lambda v: str(v)[:30])
def test_config_bad_value_names_key_and_value(name: str, value: Any, expected: str):
    text = message(metadata(**{name: value}))
    assert text.startswith(f"phi3.{name.replace('__', '.')}: {expected}")
    assert len(text) < 150


REDUNDANT: list[dict[str, Any]] = [
    {"attention__head_dim": 128, "attention__key_length": 128},  # ollama
    {"attention__layer_norm_epsilon": 1e-5},
    {"rope__scaling__original_context_length": 0},
    {"attention__head_count": np.array([24] * 32), "attention__head_count_kv": [8] * 32},
    {"attention__scale": float(np.float32(128**-0.5))},
    {"feed_forward_length": np.array([8192] * 32), "attention__value_length": [128] * 32},
    {"rope__scaling__type": "linear", "rope__scaling__factor": 1.0},
    {"rope__scaling__type": "yarn", "rope__scaling__yarn_beta_fast": 32.0},
    {"rope__scaling__factor": 0.0},
    {"final_logit_softcapping": 0.0, "attention__clamp_kqv": np.array([0.0] * 32)},
    {"attention__sliding_window_pattern": [True] * 32},
    {"rope__dimension_sections": [0, 0, 0, 0]},
    {"expert_count": [], "expert_weights_scale": 1.0, "expert_gating_func": 1},
    {"vocab_size": 7, "tensor_data_layout": "Meta AI original pth"},
]


@pytest.mark.parametrize("keys", REDUNDANT, ids=lambda keys: next(iter(keys)))
def test_config_keys_that_repeat_or_are_neutral_change_nothing(keys: dict[str, Any]):
    assert config_of(metadata(**keys)) == config_of(metadata())


def test_config_contradiction_of_scaling_names_both_keys():
    values = metadata("llama", rope__scaling__type="none", rope__scaling__factor=4.0)
    values["llama.rope.dimension_count"] = 128
    expected = "llama.rope.scaling.factor: 4 contradicts llama.rope.scaling.type 'none'"
    assert message(values) == expected
    values["llama.rope.scale_linear"] = 2.0
    expected = "llama.rope.scaling.factor: 4 contradicts llama.rope.scale_linear 2"
    assert message(values) == expected


def test_config_scaling_is_linear_or_refused():
    whole = {"rope__dimension_count": 128}
    for keys in (
        {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0},
        {"rope__scaling__factor": 4.0},
        {"rope__scale_linear": 4.0},
        {"rope__scaling__factor": 4.0, "rope__scale_linear": 4.0},
        {"rope__scaling__factor": 4, "rope__scaling__type": ""},
        {"rope__scaling__factor": [4.0], "rope__scaling__type": ["linear"]},
        {"rope__scaling__factor": 0.0, "rope__scale_linear": 4.0},
    ):
        assert config_of(metadata("llama", **whole, **keys)).rope_scaling_factor == 4.0
    values = metadata("llama", **whole, rope__scaling__type="yarn", rope__scaling__factor=4.0)
    expected = "a scaling of 4 of the type 'yarn' is not supported (supported: linear)"
    assert message(values) == f"llama.rope.scaling.factor: {expected}"


@pytest.mark.parametrize("factor", [1e-20, 1e30, float("inf"), float("nan"), -1.0, "x", True])
@pytest.mark.parametrize("key", ["rope__scaling__factor", "rope__scale_linear"])
def test_config_scaling_out_of_range_is_refused(key: str, factor: Any):
    whole = {"rope__dimension_count": 128, "rope__scaling__factor": 4.0}
    assert message(metadata("llama", **whole | {key: factor})).startswith("llama.rope.scal")


def keys_of(group: type) -> set[str]:
    """Return the keys of the gguf package that begin with the architecture's name."""
    found = set()
    for name, value in vars(group).items():
        if isinstance(value, str) and value.startswith("{arch}."):
            found.add(value.removeprefix("{arch}."))
        elif isinstance(value, type) and not name.startswith("_"):
            found |= keys_of(value)
    return found


@pytest.mark.parametrize("architecture", BUILT_IN.values(), ids=BUILT_IN)
def test_every_key_of_the_gguf_package_is_used_or_neutral_or_refused(architecture: Architecture):
    """A new version of the package shows here which keys are new."""
    tables = {
        "read": {*architecture.keys.values()},
        "repeated": {*architecture.repeated},
        "harmless": {*architecture.harmless},
        "neutral": {*architecture.neutral} - {*architecture.keys.values()},
        **{kind: {*names} for kind, names in REFUSED.items()},
    }
    known = keys_of(gguf.constants.Keys)
    assert len(known) > 100
    found = {name for names in tables.values() for name in names}
    elsewhere = {key for key in known if key.partition(".")[0] in ELSEWHERE}
    assert known - found - elsewhere == set()
    assert sum(map(len, tables.values())) == len(found), "a key is in two tables"


def test_config_heads_not_in_groups_are_refused():
    assert message(metadata(attention__head_count_kv=7)) == (
        "phi3.attention.head_count: 24 is not a multiple of phi3.attention.head_count_kv 7"
    )


def test_config_experts_are_two_of_some():
    config = config_of(metadata("phimoe", expert_count=16, expert_used_count=2))
    assert config.num_local_experts == 16
    assert config_of(metadata()).num_local_experts == 0


@pytest.mark.parametrize(
    ("used", "count", "expected"),
    [
        (1, 16, "expected 2 of 2 or more experts (phimoe.expert_count), found 1 of 16"),
        (2, 1, "expected 2 of 2 or more experts (phimoe.expert_count), found 2 of 1"),
        ([2], 16, "expected 2 of 2 or more experts (phimoe.expert_count), found [2] of 16"),
        (
            np.array([2, 2]),
            16,
            "expected 2 of 2 or more experts (phimoe.expert_count), found array([2, 2]) of 16",
        ),
    ],
    ids=str,
)
def test_config_other_numbers_of_experts_are_refused(used: Any, count: int, expected: str):
    values = metadata("phimoe", expert_count=count, expert_used_count=used)
    assert message(values) == f"phimoe.expert_used_count: {expected}"
    del values["phimoe.expert_used_count"]
    assert message(values).endswith(f"found None of {count}")


def test_config_model_of_experts_without_their_number_is_refused():
    assert message(metadata("phimoe")).startswith("phimoe.expert_count: missing")


def test_config_llama_partial_rotation_is_refused():
    assert message(metadata("llama")) == (
        "llama.rope.dimension_count: 96 of 128 channels: partial rotation is not supported for "
        "this architecture"
    )
    config_of(metadata("llama", rope__dimension_count=128))


@pytest.mark.parametrize(
    ("layers", "kv_heads", "context", "window"),
    [
        pytest.param(32, 8, 4096, 2047, id="mini-4k"),
        pytest.param(40, 8, 4096, 2047, id="medium-4k"),
        pytest.param(32, 32, 131072, None, id="mini-128k"),  # its window exceeds the context
        pytest.param(40, 10, 131072, None, id="medium-128k"),  # its window equals the context
        pytest.param(24, 8, 4096, None, id="other"),
    ],
)
def test_config_file_without_window_gets_the_family_s(
    layers: int, kv_heads: int, context: int, window: int | None
):
    changes: dict[str, Any] = {"block_count": layers, "context_length": context}
    changes |= {"attention__head_count": 160, "attention__head_count_kv": kv_heads}
    changes |= {"embedding_length": 160 * 128, "attention__sliding_window": ABSENT}
    assert config_of(metadata(**changes)).sliding_window == window


@pytest.mark.parametrize(("value", "window"), [(0, None), (1, 1), (4095, 4095), (4096, None)])
def test_config_window_of_zero_or_the_context_is_none(value: int, window: int | None):
    config = config_of(metadata(attention__sliding_window=value))
    assert config.sliding_window == window


def test_config_llama_without_window_has_none():
    changes = {"rope__dimension_count": 128, "attention__sliding_window": ABSENT}
    assert config_of(metadata("llama", **changes)).sliding_window is None


def test_share_of_devices_is_heads_and_channels():
    config = architecture_of(metadata()).config(metadata())
    share = config.share(4)
    assert (share.num_attention_heads, share.num_key_value_heads) == (6, 2)
    assert share.intermediate_size == 2048
    assert (share.hidden_size, share.head_dim) == (config.hidden_size, config.head_dim)
    assert config.share(1) == config


def test_share_of_too_many_devices_is_refused():
    config = architecture_of(metadata()).config(metadata())
    with pytest.raises(BackendError, match="3 cannot share 8 heads of keys and 8192 channels"):
        config.share(3)
