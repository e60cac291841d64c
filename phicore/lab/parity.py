"""Compares the results of backends on one file with each other or with a reference.

All backends read the same tokens, whichever tokens they would generate (teacher forcing). So one
difference does not make all later positions incomparable. Greedy text is compared as well.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phicore.errors import ArgumentError
from phicore.lab.tracing import trace
from phicore.loading import load
from phicore.model import Model
from phicore.progress import Progress, silent

MAX_ERROR = 1e-4
"""The largest relative error of the logits that the documentation promises."""

REFERENCE = ("token_ids", "logits", "greedy_ids")
"""The arrays in a file of reference logits."""

TRACED = 10
"""The bound for results within the network, as a multiple of the bound for the logits."""

PROMPTS = (
    "Explain in a few sentences why the sky is blue.",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n",
    "Liste fünf Dinge auf, die man auf eine Wanderung mitnimmt: 1. Wasser, 2. Brot,",
    "0.1 + 0.2 = 0.30000000000000004; 7 * 8 = 56; the square root of 2 is 1.41421356",
)


@dataclass(frozen=True)
class Reading:
    """The results of a backend or of a reference for some prompts.

    Attributes:
        logits: The logits of each prompt, (T, V) float32.
        texts: The greedy answer to each prompt, as tokens.
    """

    name: str
    logits: list[np.ndarray]
    texts: list[list[int]]


@dataclass(frozen=True)
class Comparison:
    """The differences between a reading and a reference reading.

    Attributes:
        relative_error: norm(difference) / norm(reference) over all logits.
        kl_divergence: The mean over all positions of the Kullback-Leibler divergence from the
            reference's probabilities to the reading's, in nats.
        top1_agreement: The fraction of positions at which the best token is the same.
        positions: The number of positions.
        first_divergent: The index of the first token that differs in a greedy text, and the index
            of that text, both from 0. None if no token differs.
        is_within: Whether the relative error is within the bound.
    """

    name: str
    reference: str
    relative_error: float
    kl_divergence: float
    top1_agreement: float
    positions: int
    first_divergent: tuple[int, int] | None
    is_within: bool


def read(
    model: Model, prompts: Sequence[Sequence[int]], n_gen: int, progress: Progress = silent
) -> Reading:
    """Compute the logits of prompts, given as tokens, and `n_gen` tokens of each greedy answer."""
    texts: list[list[int]] = [[] for _ in prompts]
    what, total = f"{model.backend}: greedy texts", n_gen * len(prompts)
    for number, ids in enumerate(prompts if n_gen else ()):
        for piece in model.generate(
            list(ids), max_tokens=n_gen, temperature=0, repeat_penalty=1.0, ignore_eos=True
        ):
            texts[number].append(piece.token_id)
            progress(what, number * n_gen + len(texts[number]), total + 1)
    if n_gen:
        progress(what, total + 1, total + 1)  # also if a text has ended with the context
    return Reading(model.backend, [model.logits(ids) for ids in prompts], texts)


def read_reference(path: Path) -> tuple[list[int], Reading]:
    """Read the tokens and the reading from a file that tools/make_reference.py made.

    Raises:
        ArgumentError: If the file cannot be read or is not such a file.
    """
    try:
        with zipfile.ZipFile(path) as file:  # np.load alone takes files of other kinds, too
            arrays = {name: np.load(file.open(f"{name}.npy")) for name in REFERENCE}
    except OSError as error:
        raise ArgumentError(f"{path}: {error.strerror}", parameter="against") from None
    except (zipfile.BadZipFile, zlib.error, ValueError, KeyError, EOFError):
        problem = f"{path}: expected an .npz file with {', '.join(REFERENCE)}"
        raise ArgumentError(problem, parameter="against") from None
    ids, logits, text = arrays["token_ids"], arrays["logits"], arrays["greedy_ids"]
    if ids.ndim != 1 or text.ndim != 1 or logits.ndim != 2 or len(logits) != len(ids):
        raise ArgumentError(f"{path}: logits {logits.shape} do not fit {ids.shape} tokens")
    return ids.tolist(), Reading(path.name, [logits], [text.tolist()])


def compare(found: Reading, reference: Reading, max_error: float = MAX_ERROR) -> Comparison:
    """Compare a reading with a reference reading of the same prompts.

    Raises:
        ArgumentError: If the logits have different shapes.
    """
    difference = size = divergence = 0.0
    same = positions = 0
    for ours, theirs in zip(found.logits, reference.logits, strict=True):
        if ours.shape != theirs.shape:
            raise ArgumentError(
                f"{reference.name}: logits {theirs.shape}, the model's have {ours.shape}; "
                "was it made from this file?"
            )
        a, b = ours.astype(np.float64), theirs.astype(np.float64)
        difference += float(((a - b) ** 2).sum())
        size += float((b**2).sum())
        log_p, log_q = _log_softmax(b), _log_softmax(a)
        divergence += float((np.exp(log_p) * (log_p - log_q)).sum())
        same += int((a.argmax(axis=1) == b.argmax(axis=1)).sum())
        positions += len(a)
    error = float(np.sqrt(difference / size)) if size else float("inf")
    return Comparison(
        name=found.name,
        reference=reference.name,
        relative_error=error,
        kl_divergence=divergence / positions,
        top1_agreement=same / positions,
        positions=positions,
        first_divergent=_first_divergent(found.texts, reference.texts),
        is_within=error <= max_error,  # false for NaN
    )


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def _first_divergent(
    ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]
) -> tuple[int, int] | None:
    found = []
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        pairs = zip(a, b, strict=False)  # a reference may have fewer tokens
        found += [(i, number) for i, (x, y) in enumerate(pairs) if x != y][:1]
    return min(found, default=None)


def parity(
    reference: str | None,
    backends: Sequence[str],
    *,
    against: Path | None = None,
    prompts: Sequence[str] = PROMPTS,
    n_gen: int = 32,
    max_error: float = MAX_ERROR,
    is_traced: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Compare backends with the first of them, or all of them with a reference.

    Args:
        reference: The model's reference; None is the default model.
        against: A file that tools/make_reference.py made. Its prompt is then the only prompt.
        is_traced: Whether to find the first operation at which a backend differs from the first
            backend.
    Returns:
        Plain data: `model`, `max_error`, `comparisons` and, if traced, `parts`.
    Raises:
        ArgumentError: If there are fewer than two readings to compare, or the file does not fit.
    """
    if len(backends) + (against is not None) < 2:
        raise ArgumentError("expected two or more, or one with --against", parameter="backends")
    expected = None
    ids: list[list[int]] = []
    if against is not None:
        tokens, expected = read_reference(against)
        ids = [tokens]
    comparisons, parts = [], []
    first_trace: dict[str, np.ndarray] | None = None
    for name in backends:
        with load(reference, backend=name, progress=progress, prefix_cache_bytes=0) as model:
            if not ids:
                ids = [model.encode(prompt, raw=True) for prompt in prompts]
            reading = read(model, ids, n_gen, progress)
            traced = trace(model.engine, ids[0][:256]) if is_traced else {}
        if expected is None:
            expected = reading
        else:
            comparisons.append(asdict(compare(reading, expected, max_error)))
        if first_trace is None:
            first_trace = traced
        elif is_traced:
            parts.append({"name": name, **first_part(traced, first_trace, TRACED * max_error)})
    found = {"model": str(model.path.name), "max_error": max_error, "comparisons": comparisons}
    return found | {"parts": parts} if is_traced else found


def first_part(
    found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], max_error: float
) -> dict[str, Any]:
    """Compare two traces.

    Returns:
        `operation`, the first operation whose error is above the bound or None, and `errors`, the
        relative error of each operation.
    """
    errors: dict[str, float] = {}
    for name, theirs in expected.items():
        difference = np.linalg.norm(found[name].astype(np.float64) - theirs)
        size = float(np.linalg.norm(theirs.astype(np.float64)))
        errors[name] = float(difference) / size if size else float(difference)
    first = next((name for name, error in errors.items() if not error <= max_error), None)
    return {"operation": first, "errors": errors}
