"""Log probabilities on the host, from the arrays that a step returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from phicore.text.logprobs import TokenLogprobs


def of_tokens(
    tokens: Sequence[int], found: Mapping[str, np.ndarray], count: int
) -> list[TokenLogprobs]:
    """Return the log probabilities of tokens, each with those of the `count` likeliest tokens.

    Args:
        tokens: N tokens.
        found: The result of `network.logprobs.logprobs` for these tokens on the host, with N rows
            or more.
    """
    chosen = found["chosen"].tolist()
    ids, likeliest = found["ids"][:, :count].tolist(), found["likeliest"][:, :count].tolist()
    return [
        TokenLogprobs(token, chosen[i], tuple(zip(ids[i], likeliest[i], strict=True)))
        for i, token in enumerate(tokens)
    ]
