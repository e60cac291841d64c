"""Laws of reading requests: whatever JSON has, the outcome is options or one clear error."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from phicore.server.chat import messages_of
from phicore.server.errors import ApiError
from phicore.server.fields import Fields, parsed
from phicore.server.openapi import description
from phicore.server.parameters import NEXT_SEED, options_of

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
    | st.sampled_from([10**400, -(2**63), 2**64, -0.0, 1e308, "none", "auto"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.sampled_from(["1", "type"]), inner, max_size=3)
    ),
    max_leaves=6,
)
SCHEMA = description(["m"], has_keys=True)["components"]["schemas"]
NAMES = sorted(
    SCHEMA["ChatRequest"]["properties"].keys() | {"tools", "response_format", "typical_p"}
)


def tried(function: Callable[[], Any]) -> Any:
    """Return a function's result, or the error that it raises on purpose."""
    try:
        return function()
    except ApiError as error:
        return error


def outcome(body: dict[str, Any]) -> Any:
    """Return the options of a body, or the error."""
    return tried(
        lambda: options_of(Fields(body), default_tokens=-1, most_tokens=None, vocab_size=100)
    )


@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4))
def test_any_values_give_options_or_an_error_that_names_a_field(body: dict[str, Any]):
    found = outcome(body)
    if isinstance(found, ApiError):
        error = found.body["error"]
        assert error["param"] in {*body, "stream_options", "include_usage"}
        assert error["param"] in error["message"]
        assert "\n" not in error["message"]
        assert len(error["message"]) < 300
    else:
        assert 0 <= found.seed < 2**64
        assert 1 <= found.choices <= 128
        assert found.arguments["max_tokens"] == -1 or found.arguments["max_tokens"] >= 1


@given(VALUES)
def test_any_messages_are_taken_or_refused(messages: Any):
    found = tried(lambda: messages_of(Fields({"messages": messages})))
    if isinstance(found, ApiError):
        assert (found.status, found.param) == (400, "messages")
    else:
        assert all(isinstance(message["role"], str) for message in found)


@given(st.binary(max_size=40) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_body_is_an_object_or_an_error(body: bytes):
    found = tried(lambda: parsed(body))
    assert found.status == 400 if isinstance(found, ApiError) else isinstance(found, dict)


@given(st.integers(-(2**63), 2**63 - 1))
def test_seed_is_taken_modulo(seed: int):
    assert outcome({"seed": seed}).seed == seed % 2**64


def test_step_between_the_seeds_of_choices_reaches_every_seed():
    """It is odd, so no two of 2**64 choices have the same seed."""
    assert NEXT_SEED % 2 == 1
