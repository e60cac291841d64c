"""The parameters of the sampler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from phicore.errors import ArgumentError
from phicore.settings import check_settings, setting
from phicore.values import as_kind


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The parameters of the sampler. The command line derives its sampling options from the fields.

    The defaults are llama.cpp's. With them, an eighth of a small model's answers go wrong. Without
    a filter, at a temperature of 0.7 and with a repeat penalty of 1.1, a third of the answers go
    wrong (docs/architecture.md).

    The bounds of temperature and penalty keep them, and logits divided by them, within float32.
    """

    temperature: float = setting(
        0.8,
        "Divide the logits by this before a token is drawn: a lower value is more predictable. 0 "
        "always takes the most probable token. Top-k, top-p and min-p then apply, in this order.",
        expected="0 (greedy), or 1e-6 to 1e6",
        check=lambda x: x == 0 or 1e-6 <= x <= 1e6,
        flags=("--temp", "-t"),
    )
    top_k: int = setting(
        40,
        "Keep the k most probable tokens, and tokens tied with the last of them. 0 keeps all.",
        expected="0 (all) to 2**31 - 1",
        check=lambda k: 0 <= k < 2**31,
    )
    top_p: float = setting(
        0.95,
        "Keep the smallest set of tokens whose probabilities sum to p or more. 1 keeps all.",
        expected="more than 0, at most 1",
        check=lambda p: 0 < p <= 1,
    )
    min_p: float = setting(
        0.05,
        "Drop tokens whose probability is less than this fraction of the most probable token's. "
        "0 drops none.",
        expected="0 to 1",
        check=lambda p: 0 <= p <= 1,
    )
    repeat_penalty: float = setting(
        1.0,
        "Make recent tokens less likely: positive logits are divided by this, and negative logits "
        "are multiplied. 1 is no penalty.",
        expected="1e-6 to 1e6",
        check=lambda x: 1e-6 <= x <= 1e6,
    )
    repeat_last_n: int = setting(
        64,
        "Number of recent tokens, including the prompt's, that the repeat penalty looks at. 0 "
        "turns the penalty off; -1 looks at all.",
        expected="-1 (all) or more",
        check=lambda n: n >= -1,
    )

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def has_filter(self) -> bool:
        return any(getattr(self, name) != neutral for name, neutral in FILTERS.items())

    @property
    def has_penalty(self) -> bool:
        return self.repeat_penalty != 1 and self.repeat_last_n != 0


FILTERS: Mapping[str, int | float] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
"""The fields that filter tokens, and the value of each that keeps all."""

GGUF_KEYS: Mapping[str, str] = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repeat_penalty": "general.sampling.penalty_repeat",
    "repeat_last_n": "general.sampling.penalty_last_n",
}
"""The keys of a file's recommendation for each field of `Sampling`. llama.cpp's converter copies
them from a model's generation_config.json."""
OTHER_KEYS: Mapping[str, float | str] = {
    "general.sampling.sequence": "",  # the order of the samplers
    "general.sampling.mirostat": 0,
    "general.sampling.xtc_probability": 0,
}
"""Recommendations that phicore has nothing for, and the values that turn them off."""


def recommended(metadata: Mapping[str, Any]) -> tuple[Sampling, list[str]]:
    """Read a file's recommendation. It is advice, so what cannot be used is left out.

    Returns:
        The sampling parameters, and the keys and values that were left out, as text.
    """
    found: dict[str, Any] = {}
    left_out = []
    for name, key in GGUF_KEYS.items():
        if key not in metadata:
            continue
        value = _without_effect(name, as_kind(metadata[key], float))
        try:
            Sampling(**{name: value})
        except ArgumentError:
            left_out.append(f"{key} {metadata[key]!r:.40}")
        else:
            found[name] = value
    for key, off in OTHER_KEYS.items():
        value = as_kind(metadata.get(key, off), type(off))
        if not isinstance(value, (int, float, str)) or value != off:
            left_out.append(f"{key} {metadata[key]!r:.40}")
    return Sampling(**found), left_out


def _without_effect(name: str, value: Any) -> Any:
    """Return the value that keeps all tokens, where another program's value means that."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return value
    if name in ("top_k", "repeat_last_n") and float(value).is_integer():
        value = int(value)
    if name == "top_k" and value <= 0:
        return 0
    if name == "top_p" and value >= 1:  # float32 may have rounded it up
        return 1.0
    if name == "min_p" and value <= 0:
        return 0.0
    if name == "temperature" and value <= 0:
        return 0.0
    return value
