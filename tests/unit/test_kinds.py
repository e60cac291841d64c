"""Files that are no language model for phicore say what they are, and what they are for."""

from __future__ import annotations

from typing import Any

import gguf
import pytest

from phicore.errors import GGUFError
from phicore.network.architectures import BUILT_IN, architecture_of
from phicore.network.architectures.kinds import ARCHITECTURES, TYPES

LLAMA = {"general.architecture": "llama", "tokenizer.ggml.tokens": ["a"]}
CASES: list[tuple[dict[str, Any], list[str], str]] = [
    ({"general.type": "adapter", "adapter.type": "lora"}, [], "LoRA adapter"),
    ({}, ["blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"], "LoRA adapter"),
    ({"general.type": "mmproj"}, ["v.blk.0.ln1.weight"], "projector"),
    ({"general.architecture": "clip", "clip.has_vision_encoder": True}, [], "projector"),
    ({"general.type": "imatrix"}, ["blk.0.ffn_up.weight.in_sum2"], "importance matrix"),
    ({"imatrix.chunk_count": 3}, ["blk.0.ffn_up.weight.in_sum2"], "importance matrix"),
    ({"general.type": "model"}, [], "vocabulary without weights"),
    ({"general.type": "vocab"}, [], "vocabulary without weights"),
    ({"general.architecture": "nomic-bert"}, ["token_embd.weight"], "embeddings"),
    ({"general.architecture": "bert", "bert.pooling_type": 2}, ["token_embd.weight"], "embeddings"),
    ({"llama.pooling_type": 1}, ["token_embd.weight"], "embeddings"),
    ({"llama.pooling_type": 4}, ["token_embd.weight"], "ranks"),
    ({"llama.classifier.output_labels": ["yes", "no"]}, ["token_embd.weight"], "ranks"),
    ({"general.architecture": "t5"}, ["enc.blk.0.attn_q.weight"], "encoder and a decoder"),
    ({"general.architecture": "flux"}, ["double_blocks.0.img_mod.lin.weight"], "images or videos"),
    ({"general.architecture": "llada"}, ["token_embd.weight"], "by diffusion"),
    ({"general.architecture": "whisper"}, ["encoder.conv1.weight"], "speech"),
]


@pytest.mark.parametrize(("changes", "tensors", "expected"), CASES)
def test_other_kind_of_file_says_what_it_is(
    changes: dict[str, Any], tensors: list[str], expected: str
):
    with pytest.raises(GGUFError) as caught:
        architecture_of(LLAMA | changes, tensors=tensors)
    message = str(caught.value)
    assert message.startswith("this file is a")
    assert expected in message
    assert "\n" not in message


def test_architecture_of_a_plugin_comes_before_what_its_name_means():
    added = BUILT_IN | {"bert": BUILT_IN["llama"]}
    found = architecture_of({"general.architecture": "bert"}, added)
    assert found is BUILT_IN["llama"]


def test_language_model_is_no_other_kind():
    metadata = LLAMA | {"general.type": "model", "llama.pooling_type": 0}
    assert architecture_of(metadata, tensors=["token_embd.weight"]).name == "llama"


def test_types_of_the_gguf_package_are_known():
    types = {value for name, value in vars(gguf.GGUFType).items() if not name.startswith("_")}
    assert types - {*TYPES} == {"model"}


def test_kinds_of_architectures_are_not_those_that_run():
    assert not {"phi3", "phimoe", "llama", "qwen2"} & {*ARCHITECTURES}
