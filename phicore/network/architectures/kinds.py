"""Kinds of GGUF files that are no language model for phicore: what each is, and what it is for.

Source: `GGUFType` and `MODEL_ARCH_NAMES` of the gguf package, and the names that the converters for
image and speech models write.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from gguf.constants import MODEL_ARCH_NAMES

ADAPTER = (
    "a LoRA adapter, which changes a model and is none; merge it into its base model "
    "(llama.cpp's llama-export-lora does) and run the result"
)
PROJECTOR = (
    "a projector of images or sound, which a multimodal model needs beside it; run the model's own "
    "file, with text"
)
IMPORTANCE = (
    "an importance matrix, from which llama-quantize makes a quantized file; run such a file"
)
VOCABULARY = (
    "a vocabulary without weights; run a model's file (`phicore tokenize` works with this one)"
)
EMBEDDING = "a model that makes embeddings of texts, and writes none"
RERANKER = "a model that ranks texts, and writes none"
ENCODER = "a model that reads one text to write another (an encoder and a decoder)"
DIFFUSION = "a model that makes images or videos"
TEXT_DIFFUSION = "a model that writes text by diffusion, not token by token"
SPEECH = "a model of speech or sound"

TYPES: Mapping[str, str] = {
    "adapter": ADAPTER,
    "imatrix": IMPORTANCE,
    "mmproj": PROJECTOR,
    "clip-vision": PROJECTOR,
    "vocab": VOCABULARY,
}
"""Meanings of `general.type`."""
ARCHITECTURES: Mapping[str, str] = {
    **dict.fromkeys(("clip", "mmproj"), PROJECTOR),
    **dict.fromkeys(
        (
            *("bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "eurobert"),
            *("jina-bert-v2", "jina-bert-v3", "gemma-embedding", "llama-embed"),
        ),
        EMBEDDING,
    ),
    **dict.fromkeys(("t5", "t5encoder"), ENCODER),
    **dict.fromkeys(("dream", "llada", "llada-moe", "rnd1"), TEXT_DIFFUSION),
    **dict.fromkeys(
        (
            *("sd1", "sd3", "sdxl", "flux", "aura", "hidream", "lumina2", "qwen_image", "pig"),
            *("hyvid", "wan", "ltxv", "cosmos", "chroma", "z_image", "kontext"),
        ),
        DIFFUSION,
    ),
    **dict.fromkeys(
        ("whisper", "wavtokenizer-dec", "parler-tts", "kokoro", "dia", "orpheus", "moshi"), SPEECH
    ),
}
"""Meanings of `general.architecture`."""
POOLING = {1: EMBEDDING, 2: EMBEDDING, 3: EMBEDDING, 4: RERANKER}
"""Meanings of `pooling_type`; 0 is none."""


def other_kind(
    metadata: Mapping[str, Any], tensors: Collection[str], known: Collection[str] = ()
) -> str | None:
    """Say what a file is, if it is no language model.

    Args:
        metadata: The metadata of the file.
        tensors: The names of its tensors.
        known: The architectures that can be run. Plugins may have added one of `ARCHITECTURES`.
    Returns:
        The end of a sentence that begins with "this file is", or None.
    """
    name, kind = metadata.get("general.architecture"), metadata.get("general.type")
    if isinstance(kind, str) and kind in TYPES:
        return TYPES[kind]
    if "adapter.type" in metadata or any(t.endswith((".lora_a", ".lora_b")) for t in tensors):
        return ADAPTER
    if any(key.startswith("imatrix.") for key in metadata):
        return IMPORTANCE
    if not isinstance(name, str):
        return None
    if name in ARCHITECTURES and name not in known:
        return ARCHITECTURES[name]
    if any(key.startswith("clip.") for key in metadata):
        return PROJECTOR
    if f"{name}.classifier.output_labels" in metadata:
        return RERANKER
    pooling = metadata.get(f"{name}.pooling_type")
    if isinstance(pooling, int) and pooling in POOLING:
        return POOLING[pooling]
    if not tensors and "tokenizer.ggml.tokens" in metadata:
        return VOCABULARY
    return None


def is_of_llama_cpp(name: str) -> bool:
    """Return whether llama.cpp has an architecture of this name."""
    return name in MODEL_ARCH_NAMES.values()
