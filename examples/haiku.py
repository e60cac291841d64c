"""Fetch Phi-3 and print a haiku as the model writes it: `python examples/haiku.py`."""

import sys

import phicore

PROMPT = "<|user|>\nWrite a haiku about ice hockey<|end|>\n<|assistant|>"

with phicore.load(sys.argv[1] if len(sys.argv) > 1 else "phi-3-mini") as model:
    sampling = {"temperature": 1.0, "repeat_penalty": 1.2, "repeat_last_n": 64, "seed": 299792458}
    for piece in model.generate(PROMPT, raw=True, max_tokens=100, **sampling):
        print(piece.text, end="", flush=True)
print()
