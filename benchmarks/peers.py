"""Compare the speed and the errors of other engines and of phicore's backends on one GGUF file.

Each engine is a process of its own, which loads the file once (`engines/`); each may be run by a
Python of its own. Only one process computes at a time. The engines take turns within a round, and
every second round goes in reverse order, so that a slow minute of the machine affects all engines.
A ratio is the median of the rounds' ratios, to llama.cpp if it takes part. An uncounted first round
warms up. What took an engine longer than `--patience` in that round is not repeated.

The peers: `llama.cpp` (llama-cpp-python), `ik_llama.cpp` (its programs), `mlx-lm`,
`onnxruntime-genai` and `transformers`. Without `--peer`, all that this Python has are run.

    uv run --with llama-cpp-python==0.3.36 benchmarks/peers.py --quick
    uv run benchmarks/peers.py --peer llama.cpp=PYTHON --peer ik_llama.cpp=build/bin/llama-bench
    uv run --with mlx-lm benchmarks/peers.py --backend mlx --model smollm2

The sections (`--sections`):

- decode: the median time of a greedy step. A step reads all weights, so its share of the memory's
  bandwidth is given too; the bandwidth is sampled before each turn;
- prompts: the time from a prompt's tokens to the first token of the answer (`--prompts`).
  `jax-fast` is the JAX backend with `--fast-prefill`;
- many: the tokens of eight sequences at once (`--sequences`), and this speed over that of one;
- long: prompts of 2,000 and 4,000 tokens (`--depths`), the part of their time that exceeds as many
  tokens in prompts of 512 (which is attention), and a step after them over the least time that the
  bandwidth allows for the weights and the live keys and values;
- products: the time of `mx.quantized_matmul` alone for all matrices of a token (MLX);
- starts: the time from starting a process to the first token of a prompt of 16, with warm caches,
  and the process's peak memory, mapped pages of the file included, over the size of the file;
- errors: the relative error of the logits of 100 random tokens and, for a model that has learned
  something, of texts, against float32 on NumPy: of all logits together, and at the median position,
  since one unstable position can outweigh all others. Where llama.cpp does not take part, a model
  of its arithmetic stands beside.

`--json FILE` writes the results, `--from FILE...` makes tables of written results (those of one
file and processor are joined), and `--into DOCUMENT` puts them between the document's two marks.
`--remember` appends the run to the history, and `--check` says which figures are worse than the
history's for the same processor and file, beyond noise (the exit status is then 3).

Run nothing else meanwhile: llama.cpp's threads wait for each other after every operation, so a busy
machine slows it several times more than phicore. The share of the CPUs that others took is printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import history
from contenders import contenders
from figures import Result, about, cells, markdown, merged, replaced
from measuring import Measurement, Plan

from phicore.cli.terminal import table
from phicore.errors import PhicoreError
from phicore.gguf.reader import open_gguf
from phicore.lab.synthetic import MODELS, synthetic_model
from phicore.sources import resolve

SECTIONS = ("decode", "prompts", "many", "long", "products", "starts", "errors")
QUICK = {
    "sections": ["decode", "prompts", "starts"],
    "prompts": [16, 128],
    "rounds": 2,
    "starts": 1,
    "steps": 16,
}
HISTORY = Path(__file__).with_name("history.jsonl")
WORSE = 3  # exit status


def main() -> None:
    args = options()
    try:
        results = [_read(path) for path in args.from_] or [measured(args)]
        if args.json:
            Path(args.json).write_text(json.dumps(results[-1].as_data(), indent=1) + "\n")
        if args.remember:
            for result in results:
                history.append(args.history, result)
        report(merged(results), args)
        status = WORSE if args.check and not check(results, args.history) else 0
    except (PhicoreError, ValueError, OSError) as error:
        sys.exit(f"peers: {error}")
    sys.exit(status)


def measured(args: argparse.Namespace) -> Result:
    """Measure what the options ask for."""
    path = resolve(args.model).path if args.model else synthetic_model(args.synthetic)
    with open_gguf(path) as file:
        weights = sum(tensor.n_elements for tensor in file.tensors.values())
    names = (args.peer, args.backend)
    found = contenders(*names, path, weights, args.threads, args.device, args.onnx)
    plan = Plan(
        path=path,
        has_texts=args.model is not None,
        **{
            name: getattr(args, name)
            for name in ("sections", "prompts", "depths", "steps", "rounds", "starts", "patience")
        },
        sequences=args.sequences,
        threads=args.threads,
    )
    return Measurement(plan, found, say=lambda line: print(line, file=sys.stderr)).run()


def report(results: list[Result], args: argparse.Namespace) -> None:
    """Print the tables, or put them into a document."""
    if args.into:
        document = Path(args.into)
        content = "\n".join(markdown(result, with_spans=args.spans) for result in results)
        document.write_text(replaced(document.read_text(), content))
        return
    for result in results:
        if args.markdown:
            print(markdown(result, with_spans=args.spans))
            continue
        print(*about(result), sep="\n", end="\n\n")
        columns, *lines = cells(result, with_spans=args.spans)
        table(columns, lines)
        print()


def check(results: list[Result], path: Path) -> bool:
    """Print which figures are worse than the history's; return whether none is."""
    is_good = True
    earlier = history.read(path)
    for result in results:
        runs = history.compared_with(result, earlier)
        found = history.worse(result, earlier)
        name = f"{result.head['file']} on {result.head['processor']}"
        if not runs:
            print(f"{name}: the history has no run to compare with")
        elif not found:
            print(f"{name}: no figure is worse than in the last {len(runs)} runs, beyond noise")
        for one in found:
            print(f"worse: {one}")
        is_good = is_good and not found
    return is_good


def _read(path: str) -> Result:
    try:
        return Result.from_data(json.loads(Path(path).read_text()))
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: expected a file that --json has written") from None


# ---- options ------------------------------------------------------------------------------------


def positive(text: str) -> int:
    """Parse an option's number, which must be 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text!r}")
    return number


def numbers(text: str) -> list[int]:
    """Parse the numbers of an option such as 128,512, without repetitions and zeros."""
    found = list(dict.fromkeys(int(number) for number in text.split(",")))
    if min(found) < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, such as 128,512; got {text!r}")
    return [number for number in found if number]


def words(text: str) -> list[str]:
    """Parse the words of an option such as jax,mlx, without repetitions."""
    return list(dict.fromkeys(filter(None, text.split(","))))


def sections(text: str) -> list[str]:
    """Parse names of sections."""
    found = words(text)
    if unknown := [name for name in found if name not in SECTIONS]:
        raise argparse.ArgumentTypeError(f"no section {unknown[0]!r}; {', '.join(SECTIONS)}")
    return found


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--model", help="a GGUF file, or another model reference of phicore")
    option("--synthetic", choices=MODELS, default="phi-3-mini", help="model of random weights")
    peer = "a peer, or none; NAME, or NAME=PATH of a Python that has it (or of llama-bench)"
    option("--peer", action="append", help=peer)
    backend = "phicore's backends, with jax-fast; an empty word is none (default: all)"
    option("--backend", type=words, help=backend)
    option("--device", default="cpu", help="the device of phicore and mlx-lm")
    option("--onnx", metavar="FOLDER", help="the model of onnxruntime-genai (engines/onnx_peer.py)")
    option("--threads", type=positive, help="number of threads (default: all CPUs)")
    option("--quick", action="store_true", help="two minutes: fewer sections, prompts and rounds")
    names = ",".join(SECTIONS)
    option("--sections", type=sections, default=[*SECTIONS], help=f"from {names}")
    option("--prompts", type=numbers, default=[16, 128, 512], help="lengths of prompts")
    option("--depths", type=numbers, default=[2000, 4000], help="prompts of the section long")
    option("--sequences", type=numbers, default=[8], help="how many decode at once, e.g. 2,4,8")
    option("--steps", type=positive, default=32, help="tokens to decode")
    option("--rounds", type=positive, default=3, help="rounds that count")
    option("--starts", type=positive, default=3, help="fresh processes of each engine")
    option("--patience", type=float, default=30.0, help="seconds; longer ones are not repeated")
    option("--from", dest="from_", nargs="+", default=[], metavar="FILE", help="show results")
    option("--json", metavar="FILE", help="write the results")
    option("--markdown", action="store_true", help="print Markdown")
    option("--spans", action=argparse.BooleanOptionalAction, help="least and greatest values")
    option("--into", metavar="DOCUMENT", help="replace the tables of a Markdown document")
    option("--remember", action="store_true", help="append the run to the history")
    option("--check", action="store_true", help="compare with the history; status 3 if worse")
    option("--history", type=Path, default=HISTORY, help="the history's file")
    given = parser.parse_args(arguments)
    if given.quick:
        defaults = parser.parse_args([])
        for name, value in QUICK.items():
            if getattr(given, name) == getattr(defaults, name):
                setattr(given, name, value)
    if given.spans is None:
        given.spans = not given.into
    return given


if __name__ == "__main__":
    main()
