"""Measures llama.cpp with and without its own lookup decoding, for `speculation.py`.

It is run by a Python that has llama-cpp-python. It reads one object of JSON from standard input
(`model`, a path; `prompts`, lists of token ids; `count`, the tokens of an answer; `ends`, the end
tokens; `threads`; `runs`) and writes one: for each prompt the medians of the tokens per second,
greedy, without lookup and with it, and the number of tokens.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

from llama_cpp import Llama
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

GUESSED = 7  # as many as phicore guesses at most; the library's default of 10 was not faster


def answer(llama: Any, prompt: list[int], count: int, ends: set[int]) -> tuple[list[int], float]:
    """Generate an answer; return its tokens, and the seconds after the first."""
    llama.reset()
    tokens: list[int] = []
    started = 0.0
    for token in llama.generate(prompt, temp=0.0, repeat_penalty=1.0, reset=False):
        tokens.append(token)
        if len(tokens) == 1:
            started = time.perf_counter()
        if len(tokens) == count or token in ends:
            break
    return tokens, time.perf_counter() - started


def main() -> None:
    given = json.load(sys.stdin)
    options = {"model_path": given["model"], "n_ctx": 2048, "verbose": False}
    options |= {"n_threads": given["threads"], "n_threads_batch": given["threads"]}
    lookup = LlamaPromptLookupDecoding(num_pred_tokens=GUESSED)
    engines = [Llama(**options), Llama(**options, draft_model=lookup)]
    found = []
    for prompt in given["prompts"]:
        speeds: list[list[float]] = [[], []]
        count = 0
        for _ in range(given["runs"]):
            for engine, kept in zip(engines, speeds, strict=True):
                tokens, seconds = answer(engine, prompt, given["count"], set(given["ends"]))
                kept.append((len(tokens) - 1) / seconds)
                count = len(tokens)
        found.append([*(round(statistics.median(kept), 1) for kept in speeds), count])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
