"""mlx-lm, with the weights of a GGUF file.

mlx-lm cannot read K-quants. So its model gets the file's weights in the layout of phicore's MLX
backend, which is MLX's own format and exact: both engines multiply equal numbers. Types whose
groups have 16 weights (Q6_K, Q2_K) do not fit this layout. For mlx-lm `mx.quantize` quantizes them
with as many bits in groups of 32, as mlx-lm's converter would.

On a GPU mlx-lm runs in float16, as it does by default. On a CPU it runs in float32, since MLX
rounds sums to half precision there.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from phicore_mlx import affine
from phicore_mlx.affine import LAYOUTS

from phicore.errors import PhicoreError
from phicore.gguf.reader import GGUFFile, GGUFTensor, open_gguf
from phicore.network.architectures import architecture_of
from phicore.network.architectures.llama import rows_for_half_rotation
from phicore.network.config import Phi3Config

NAMES = {
    "phi3": {
        "attn_qkv": "self_attn.qkv_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_up": "mlp.gate_up_proj",
        "ffn_down": "mlp.down_proj",
    },
    "llama": {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    },
}


class MlxLm:
    """mlx-lm's model, filled with the weights of a GGUF file."""

    def __init__(self, model: str, device: str = "cpu") -> None:
        path = Path(model)
        if device == "cpu":
            mx.set_default_device(mx.cpu)
        is_gpu = mx.default_device().type == mx.DeviceType.gpu
        self._dtype = mx.float16 if is_gpu else mx.float32
        with open_gguf(path) as file:
            config = architecture_of(file.metadata).config(file.metadata)
            is_special = any(name.startswith("rope_") for name in file.tensors)
            if (
                config.architecture not in NAMES
                or is_special
                or config.rotary_dim != config.head_dim
            ):
                raise PhicoreError(
                    f"{path.name}: mlx-lm gets no model of this kind here; the demo model and "
                    "those of --synthetic are of a kind that it gets"
                )
            self.vocab_size = file.tensors["token_embd.weight"].shape[0]
            self._model = _model(config, file)
            self._layouts: dict[str, dict[str, int]] = {}
            weights = [pair for name in file.tensors for pair in self._weights(name, file, config)]
            nn.quantize(self._model, class_predicate=lambda name, _: self._layouts.get(name, False))
            self._model.load_weights(weights)
            mx.eval(self._model.parameters())

    def about(self) -> str:
        where = f"{mx.default_device().type.name}, {self._dtype}"
        return f"mlx-lm {version('mlx-lm')}, MLX {version('mlx')} ({where})"

    def _weights(
        self, name: str, file: GGUFFile, config: Phi3Config
    ) -> Iterator[tuple[str, mx.array]]:
        """Yield the names and arrays of the mlx-lm parameters that a tensor of the file becomes."""
        tensor, target = file.tensors[name], _target(name, config.architecture)
        if config.architecture == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            heads = config.num_attention_heads
            is_key = name.endswith("attn_k.weight")
            heads = config.num_key_value_heads if is_key else heads
            tensor = rows_for_half_rotation(tensor, heads)
        if tensor.type not in LAYOUTS or len(tensor.shape) == 1:
            yield f"{target}.weight", mx.array(tensor.dequantize()).astype(self._dtype)
            return
        codes, scales, biases, layout = _quantized(tensor)
        self._layouts[target] = layout
        yield f"{target}.weight", codes
        yield f"{target}.scales", scales.astype(self._dtype)
        yield f"{target}.biases", biases.astype(self._dtype)

    def tokens(self, ids: list[int], count: int) -> Iterator[int]:
        from mlx_lm.generate import generate_step

        for token, _ in generate_step(mx.array(ids), self._model, max_tokens=count):
            yield int(token)

    def logits(self, ids: list[int]) -> np.ndarray:
        return np.array(self._model(mx.array(ids)[None])[0].astype(mx.float32))


def _model(config: Phi3Config, file: GGUFFile) -> nn.Module:
    from mlx_lm.models import llama, phi3

    module = phi3 if config.architecture == "phi3" else llama
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    args = {name: getattr(config, name) for name in names}
    return module.Model(
        module.ModelArgs(
            model_type=config.architecture,
            num_key_value_heads=config.num_key_value_heads,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_theta,
            vocab_size=file.tensors["token_embd.weight"].shape[0],
            tie_word_embeddings="output.weight" not in file.tensors,
            **args,
        )
    )


def _target(name: str, architecture: str) -> str:
    """Return mlx-lm's name for a tensor, without `.weight`."""
    name = name.removesuffix(".weight")
    whole = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
    }
    if name in whole:
        return whole[name]
    _, number, part = name.split(".")
    norms = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    return f"model.layers.{number}.{({**norms, **NAMES[architecture]})[part]}"


def _quantized(tensor: GGUFTensor) -> tuple[mx.array, mx.array, mx.array, dict[str, int]]:
    layout = LAYOUTS[tensor.type]
    choice = {"group_size": layout.group_size, "bits": layout.bits}
    if layout.is_split:
        return *mx.quantize(mx.array(tensor.dequantize()), **choice), choice
    arrays = affine.transcode([tensor])
    codes, scales, biases = (mx.array(arrays[name]) for name in ("codes", "scales", "biases"))
    return codes, scales, biases, choice
