"""Reads the fields of a request's body, with clear words about what is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from phicore.server.errors import ApiError, wrong_field

LARGEST = 2**63
"""Integers of a body are smaller than this."""
MOST_DEPTH = 200
"""The deepest nesting of a body. What looks at a body calls itself for each level of it."""


def parsed(body: bytes) -> dict[str, Any]:
    """Return the JSON object in a body.

    Raises:
        ApiError: If the body has something else, or a text in it is none: JSON can spell half of a
            character ("\\ud800"), which no library writes or splits into tokens.
    """
    try:
        found = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        problem = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(f"the body is not JSON: {problem:.200}", code="invalid_json") from None
    if not isinstance(found, dict):
        raise ApiError("the body must be a JSON object", code="invalid_json")
    if _is_deep(found):
        raise ApiError("the body is not JSON: it is nested too deeply", code="invalid_json")
    for name, value in found.items():
        try:
            json.dumps({name: value}, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise wrong_field(name, "it has half of a character, a lone surrogate") from None
    return found


def _is_deep(value: Any) -> bool:
    """Return whether a value is nested more deeply than `MOST_DEPTH`."""
    level = [value]
    for _ in range(MOST_DEPTH):
        inner = [each for each in level if isinstance(each, (dict, list))]
        if not inner:
            return False
        level = []
        for each in inner:
            level += each.values() if isinstance(each, dict) else each
    return True


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


class Fields:
    """The fields of a JSON object. A field that is null counts as absent.

    Args:
        body: The object.
    """

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._body = {name: value for name, value in body.items() if value is not None}

    def __contains__(self, name: str) -> bool:
        return name in self._body

    def get(self, name: str) -> Any:
        """Return a field's value, None if it is absent."""
        return self._body.get(name)

    def given(self, *names: str) -> str | None:
        """Return the first of these fields that is there.

        Raises:
            ApiError: If several are there that differ.
        """
        found = [name for name in names if name in self._body]
        if any(self._body[name] != self._body[found[0]] for name in found):
            raise wrong_field(found[1], f"give this field or {found[0]}, not both")
        return found[0] if found else None

    def flag(self, name: str, default: bool = False) -> bool:
        """Return a truth value."""
        value = self._body.get(name, default)
        if not isinstance(value, bool):
            raise wrong_field(name, f"expected true or false, got {_shown(value)}")
        return value

    def integer(self, name: str, least: int, most: int = LARGEST - 1) -> int | None:
        """Return an integer within bounds, None if the field is absent."""
        value = self._body.get(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():  # 1.0, as some programs write 1
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            expected = f"an integer from {least} to {most}"
            if most == LARGEST - 1:
                expected = f"an integer of {least} or more"
            raise wrong_field(name, f"expected {expected}, got {_shown(value)}")
        return value

    def number(self, name: str, least: float, most: float) -> float | None:
        """Return a number within bounds, None if the field is absent."""
        value = self._body.get(name)
        if value is None:
            return None
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not least <= value <= most:  # 1e999 is infinity
            expected = f"a number from {least:g} to {most:g}"
            raise wrong_field(name, f"expected {expected}, got {_shown(value)}")
        return float(value)

    def text(self, name: str) -> str | None:
        """Return a text, None if the field is absent."""
        value = self._body.get(name)
        if value is not None and not isinstance(value, str):
            raise wrong_field(name, f"expected a text, got {_shown(value)}")
        return value

    def texts(self, name: str, most: int) -> list[str]:
        """Return a text or a list of texts as a list, which is empty if the field is absent."""
        value = self._body.get(name)
        texts = [value] if isinstance(value, str) else [] if value is None else value
        is_good = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
        if not is_good or len(texts) > most:
            expected = f"a text or a list of up to {most} texts"
            raise wrong_field(name, f"expected {expected}, got {_shown(value)}")
        return texts

    def object(self, name: str) -> dict[str, Any] | None:
        """Return an object, None if the field is absent."""
        value = self._body.get(name)
        if value is not None and not isinstance(value, dict):
            raise wrong_field(name, f"expected an object, got {_shown(value)}")
        return value


def _shown(value: Any) -> str:
    """Return the beginning of a value as JSON shows it."""
    shown = json.dumps(value) if not isinstance(value, (list, dict)) else type(value).__name__
    return f"{shown:.60}"
