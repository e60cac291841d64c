"""How far backends are from each other, or from a reference, on the same file.

All read the same tokens, whatever they would have said themselves (teacher forcing), so that one
difference does not make all that follows incomparable. Greedy text is compared besides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phicore.errors import ArgumentError
from phicore.lab.tracing import trace
from phicore.model import Model, load
from phicore.progress import Progress

MAX_ERROR = 1e-4
"""The largest relative error of the logits that the documentation promises."""

TRACED = 10
"""Results inside of the network may be this many times as far off as the logits."""

PROMPTS = (
    "Explain in a few sentences why the sky is blue.",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n",
    "Liste fünf Dinge auf, die man auf eine Wanderung mitnimmt: 1. Wasser, 2. Brot,",
    "0.1 + 0.2 = 0.30000000000000004; 7 * 8 = 56; the square root of 2 is 1.41421356",
)


@dataclass(frozen=True)
class Reading:
    """What a backend, or a reference, makes of some prompts.

    Attributes:
        logits: (T, V) float32 of each prompt.
        texts: The tokens of each that follow greedily.
    """

    name: str
    logits: list[np.ndarray]
    texts: list[list[int]]


@dataclass(frozen=True)
class Comparison:
    """One reading against another.

    Attributes:
        relative_error: norm(difference) / norm(reference) of all logits.
        kl_divergence: Mean over the positions, in nats, of the reference's probabilities to these.
        top1_agreement: At how many of the positions the best token is the same, as a share.
        first_divergent: The first token that differs in a greedy text, from 0 on, and which text;
            None if none does.
    """

    name: str
    reference: str
    relative_error: float
    kl_divergence: float
    top1_agreement: float
    positions: int
    first_divergent: tuple[int, int] | None
    is_within: bool


def read(model: Model, prompts: Sequence[Sequence[int]], n_gen: int) -> Reading:
    """Logits of prompts, given as tokens, and what follows each."""
    texts = []
    for ids in prompts:
        found: list[int] = []
        if n_gen:
            pieces = model.generate(
                list(ids), max_tokens=n_gen, temperature=0, repeat_penalty=1.0, ignore_eos=True
            )
            found = [piece.token_id for piece in pieces]
        texts.append(found)
    return Reading(model.backend, [model.logits(ids) for ids in prompts], texts)


def read_reference(path: Path) -> tuple[list[int], Reading]:
    """The tokens and the reading in a file that tools/make_reference.py has made.

    Raises:
        ArgumentError: If it is none.
    """
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in ("token_ids", "logits", "greedy_ids")}
    except (OSError, ValueError, KeyError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise ArgumentError(
            f"{path}: expected an .npz file with token_ids, logits and greedy_ids: {reason:.120}"
        ) from None
    ids, logits, text = arrays["token_ids"], arrays["logits"], arrays["greedy_ids"]
    if ids.ndim != 1 or text.ndim != 1 or logits.ndim != 2 or len(logits) != len(ids):
        raise ArgumentError(f"{path}: logits {logits.shape} are not those of {ids.shape} tokens")
    return ids.tolist(), Reading(path.name, [logits], [text.tolist()])


def compare(found: Reading, reference: Reading, max_error: float = MAX_ERROR) -> Comparison:
    """How far a reading is from another of the same prompts."""
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
        pairs = zip(a, b, strict=False)  # a reference may have fewer
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
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Compare backends with the first of them, or with a reference.

    Args:
        reference: The model.
        against: A file of tools/make_reference.py; its prompt is the only one then.
        is_traced: Find the first operation of the network at which a backend parts from the first
            one.
    Returns:
        `comparisons`, and `parts` if it was traced: plain data.
    """
    if len(backends) + (against is not None) < 2:
        raise ArgumentError("backends: expected two or more, or one and a reference")
    expected = None
    ids: list[list[int]] = []
    if against is not None:
        tokens, expected = read_reference(against)
        ids = [tokens]
    comparisons, parts = [], []
    first_trace: dict[str, np.ndarray] | None = None
    for name in backends:
        with load(reference, backend=name, progress=progress) as model:
            if not ids:
                ids = [model.encode(prompt, raw=True) for prompt in prompts]
            reading = read(model, ids, n_gen)
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
    """Where two traces part: the first operation beyond the bound, and the error of each."""
    errors: dict[str, float] = {}
    for name, theirs in expected.items():
        difference = np.linalg.norm(found[name].astype(np.float64) - theirs)
        size = float(np.linalg.norm(theirs.astype(np.float64)))
        errors[name] = float(difference) / size if size else float(difference)
    first = next((name for name, error in errors.items() if not error <= max_error), None)
    return {"operation": first, "errors": errors}
