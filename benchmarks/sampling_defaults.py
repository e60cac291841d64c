"""Measure how often a model's answers go wrong with various sampling parameters.

The defaults of `Sampling` were chosen by these figures. A small model answers a few plain questions
with many seeds and several settings, and this program judges each answer. An answer has gone wrong
if it contains

- a non-word: a lower-case word of three letters or more that is not among the 320,000 words of
  wordfreq's English list (which occur at least once in 100 million words) and is neither made of
  two common words (sailbuilding) nor of a prefix and a common word (undispersed);
- a loop: more than a fifth of its sequences of four words have occurred earlier in the answer
  ("seq-rep-4" of Welleck et al., "Neural Text Generation with Unlikelihood Training", 2019);
- a stray: 20 tokens in a row to which the model itself, before any sampling parameter applies,
  gives less than 5 % on average (the mean of their log probabilities is below -3).

An answer's last word is ignored if the answer was cut off for its length. Capitalized words are not
judged, since names are often invented. `--show 40` prints answers and the faults found in them, so
that you can see how well the program judges.

    uv run --with wordfreq==3.1.1 benchmarks/sampling_defaults.py

This takes about an hour on two cores. Answers are written to a file as they come, and a second run
continues where the first was stopped.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

import phicore
from phicore.network.sampling import Sampling

PROMPTS = (
    "Write a haiku about ice hockey",
    "Why is the sky blue?",
    "Tell me a short story about a lighthouse keeper.",
    "What is the capital of France, and what is it known for?",
    "How do I make a good cup of tea?",
)
LLAMA_CPP = Sampling(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05, repeat_penalty=1)
COOLER = Sampling(temperature=0.7, top_k=0, top_p=0.95, min_p=0.05, repeat_penalty=1)
SETTINGS = {
    "temperature 0.7, penalty 1.1": Sampling(
        temperature=0.7, top_k=0, top_p=1, min_p=0, repeat_penalty=1.1
    ),
    "llama.cpp's": LLAMA_CPP,
    "llama.cpp's, penalty 1.05": replace(LLAMA_CPP, repeat_penalty=1.05),
    "llama.cpp's, penalty 1.1": replace(LLAMA_CPP, repeat_penalty=1.1),
    "temperature 0.7, top-p 0.95, min-p 0.05": COOLER,
    "temperature 0.7, top-p 0.95, min-p 0.05, penalty 1.1": replace(COOLER, repeat_penalty=1.1),
}
DEFAULT = "the defaults"
COMMON = 1e-6  # once in a million words
PREFIXES = ("re", "un", "non", "pre")
NGRAM = 4
MOST_REPEATED = 0.2
STRETCH = 20
LEAST_LOG_PROBABILITY = -3.0
FAULTS = ("non-word", "loop", "stray")


Words = Mapping[str, float]
"""English words, each with its frequency as a fraction of all words."""


def is_word(word: str, known: Words) -> bool:
    """Return whether a word is known, or made of two known common words or a prefix and one."""
    if word in known:
        return True
    halves = [(word[:i], word[i:]) for i in range(2, len(word) - 3)]
    return any(
        (start in PREFIXES or (len(start) >= 4 and known.get(start, 0) >= COMMON))
        and known.get(end, 0) >= COMMON
        for start, end in halves
    )


@dataclass(frozen=True)
class Answer:
    """A model's answer, with the model's log probability of each token."""

    setting: str
    prompt: str
    seed: int
    text: str
    log_probabilities: list[float]
    finish_reason: str

    def words(self) -> list[str]:
        """Return the words in order, without numbers and without a last word that was cut off."""
        found = re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", self.text)
        return found[:-1] if self.finish_reason == "length" else found

    def non_words(self, known: Words) -> list[str]:
        """Return the lower-case words of three letters or more that are not English words."""
        plain = {w.replace("’", "'").removesuffix("'s") for w in self.words() if w.islower()}
        return sorted(w for w in plain if len(w) >= 3 and not is_word(w, known))

    def repeated(self) -> float:
        """Return the fraction of four-word sequences that have occurred earlier in the answer."""
        words = [word.lower() for word in self.words()]
        ngrams = [tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)]
        return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0

    def least_log_probability(self) -> float:
        """Return the mean log probability of the least probable 20 tokens in a row."""
        window = np.ones(min(STRETCH, len(self.log_probabilities)))
        return float(np.convolve(self.log_probabilities, window / len(window), "valid").min())

    def faults(self, known: Words) -> list[str]:
        """Return the faults of the answer, a selection of `FAULTS`."""
        found = (
            bool(self.non_words(known)),
            self.repeated() > MOST_REPEATED,
            self.least_log_probability() < LEAST_LOG_PROBABILITY,
        )
        return [fault for fault, is_there in zip(FAULTS, found, strict=True) if is_there]


def answer(
    model: phicore.Model, setting: str, sampling: Sampling, prompt: str, seed: int, most: int
) -> Answer:
    """Generate an answer of at most `most` tokens, and compute each token's log probability."""
    generation = model.generate(prompt, max_tokens=most, seed=seed, **asdict(sampling))
    pieces = list(generation)
    ids, start = [piece.token_id for piece in pieces], len(generation.prompt_ids)
    logits = model.logits([*generation.prompt_ids, *ids])[start - 1 : -1].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    chosen = logits[np.arange(len(ids)), ids] - np.log(np.exp(logits).sum(axis=1))
    return Answer(
        setting=setting,
        prompt=prompt,
        seed=seed,
        text="".join(piece.text for piece in pieces),
        log_probabilities=[round(float(x), 3) for x in chosen],
        finish_reason=str(pieces[-1].finish_reason),
    )


def kept(path: Path) -> Iterator[Answer]:
    """Yield the answers that a file holds; none if there is no such file."""
    if path.exists():
        for line in path.read_text().splitlines():
            yield Answer(**json.loads(line))


def collect(args: argparse.Namespace, settings: dict[str, Sampling]) -> list[Answer]:
    """Return all answers that the options ask for: read them from the file, or generate them."""
    found = {(a.setting, a.prompt, a.seed): a for a in kept(args.answers)}
    wanted = [(s, p, seed) for seed in range(args.seeds) for p in args.prompt for s in settings]
    with phicore.load(args.model, threads=args.threads) as model, args.answers.open("a") as file:
        for number, key in enumerate(wanted):
            if key not in found:
                print(f"\r{number} of {len(wanted)} answers", end="", file=sys.stderr)
                setting, prompt, seed = key
                found[key] = answer(model, setting, settings[setting], prompt, seed, args.tokens)
                print(json.dumps(asdict(found[key])), file=file, flush=True)
    print(file=sys.stderr)
    return [found[key] for key in wanted]


def report(answers: Sequence[Answer], known: Words, by: str) -> None:
    """Print a Markdown table of the answers that went wrong, a row for each setting or prompt."""
    print(f"| {by} | answers | {' | '.join(f'{f}s' for f in FAULTS)} | any |")
    print(f"| --- | --- |{' --- |' * (len(FAULTS) + 1)}")
    for name in dict.fromkeys(getattr(a, by) for a in answers):
        faults = [a.faults(known) for a in answers if getattr(a, by) == name]
        shares = [float(np.mean([fault in f for f in faults])) for fault in FAULTS]
        wrong = float(np.mean([bool(f) for f in faults]))
        error = (wrong * (1 - wrong) / len(faults)) ** 0.5
        cells = [name, str(len(faults)), *(f"{share:.1%}" for share in shares)]
        print(f"| {' | '.join(cells)} | {wrong:.1%} ± {error:.1%} |")


def show(answers: Sequence[Answer], known: Words, count: int) -> None:
    """Print `count` random answers with their faults; up to half of the answers are faulty ones."""
    mixed = random.Random(0).sample(answers, len(answers))
    wrong = [a for a in mixed if a.faults(known)][: count // 2]
    right = [a for a in mixed if not a.faults(known)][: count - len(wrong)]
    for a in wrong + right:
        print(
            f"{a.setting}, seed {a.seed}: {', '.join(a.faults(known)) or 'good'} "
            f"(non-words {a.non_words(known)}, repeated {a.repeated():.0%}, "
            f"least log probability {a.least_log_probability():.1f})\n  {a.prompt}\n  {a.text}\n"
        )


def english_words() -> Words:
    """Return wordfreq's English words with their frequencies; exit if wordfreq is missing."""
    try:
        from wordfreq import get_frequency_dict
    except ImportError:
        sys.exit(f"no word list; `uv run --with wordfreq==3.1.1 {sys.argv[0]}` installs it")
    return get_frequency_dict("en", wordlist="large")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--model", default="smollm2")
    option("--answers", type=Path, default=Path("answers.jsonl"), help="file for the answers")
    option("--seeds", type=int, default=40, help="answers to each prompt, with each setting")
    option("--tokens", type=int, default=200, help="largest number of tokens in an answer")
    option("--threads", type=int, help="number of threads (default: all CPUs)")
    option("--prompt", action="append", help="replaces the five prompts; may be given repeatedly")
    option("--defaults", action="store_true", help="use only the defaults, and compare prompts")
    option("--show", type=int, default=0, metavar="N", help="also print N answers")
    args = parser.parse_args()
    args.prompt = args.prompt or PROMPTS
    known = english_words()
    answers = collect(args, {DEFAULT: Sampling()} if args.defaults else SETTINGS)
    report(answers, known, "prompt" if args.defaults else "setting")
    if args.show:
        print()
        show(answers, known, args.show)


if __name__ == "__main__":
    main()
