"""onnxruntime-genai, Microsoft's own way to run Phi-3 on a CPU.

It reads no GGUF file with quantized weights: its model builder makes an ONNX model from weights in
float16, and rounds them to 4 bits anew, in blocks of 32 weights. So the two engines do not multiply
equal numbers, and errors are not compared. For the speed only shapes and bits count: the builder's
int4 has 4.5 bits a weight (a float16 scale for 32 codes, symmetric), where Q4_K_M has 5.0 in
Phi-3-mini, since some matrices have 5 or 6 bits; multiply by that before you compare decoding. With
`int4_accuracy_level=4` its activations have 8 bits, as llama.cpp's and those of `--fast-prefill`.

    pip install onnxruntime-genai torch transformers onnx_ir
    python -m onnxruntime_genai.models.builder -m microsoft/Phi-3-mini-4k-instruct -o FOLDER \
        -p int4 -e cpu --extra_options int4_accuracy_level=4
    benchmarks/peers.py --peer onnxruntime-genai=PYTHON --onnx FOLDER

`-i CHECKPOINT` in place of the name reads a checkpoint from disk, which may be one of random
weights that `transformers.Phi3ForCausalLM(Phi3Config()).save_pretrained` has written beside a
tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime_genai as og


class OnnxGenai:
    """onnxruntime-genai's model in a folder that its builder has written."""

    def __init__(self, model: str, threads: int | None = None) -> None:
        config = og.Config(model)
        if threads:
            session = {"session_options": {"intra_op_num_threads": threads}}
            config.overlay(json.dumps({"model": {"decoder": session}}))
        self._model = og.Model(config)
        described = json.loads((Path(model) / "genai_config.json").read_text())["model"]
        self.vocab_size = described["vocab_size"]
        self._context = described["context_length"]

    def about(self) -> str:
        return f"onnxruntime-genai {og.__version__}, int4 weights of its own"

    def tokens(self, ids: list[int], count: int) -> Iterator[int]:
        """Yield `count` greedily chosen tokens after `ids`."""
        for tokens in self._greedy([ids], count):
            yield int(tokens[0])

    def steps(self, prompts: list[list[int]], count: int) -> Iterator[None]:
        """Yield after each of `count` greedy steps of several sequences at once."""
        for _ in self._greedy(prompts, count):
            yield

    def _greedy(self, prompts: list[list[int]], count: int) -> Iterator[np.ndarray]:
        params = og.GeneratorParams(self._model)
        length = len(prompts[0]) + count + 1
        params.set_search_options(
            do_sample=False, max_length=length, min_length=length, batch_size=len(prompts)
        )
        generator = og.Generator(self._model, params)
        generator.append_tokens(np.array(prompts, np.int32))
        for _ in range(count):
            generator.generate_next_token()
            yield generator.get_next_tokens()
