"""What filters, tests and methods of texts charge the budget of a chat template."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jinja2.sandbox import SandboxedFormatter

from phicore.text.template_budget import (
    CALL,
    CURRENT,
    LONG,
    MOST_BYTES,
    NODE,
    UNIT,
    Budget,
    length,
)

# ---- results that may be much larger than what they are made of --------------------------------
# These functions have the parameters of Jinja's filters.


def bound_product(budget: Budget, *values: Any, **more: Any) -> None:
    """Bound a result by the product of the sizes of what it is made of."""
    size = 1
    for value in (*values, *more.values()):
        if isinstance(value, int):
            size *= max(abs(value), 1)
        elif not isinstance(value, (float, type(None))):
            size *= max(budget.weight(value)[0] - NODE, 1)
    budget.room(size)


def _replace(budget: Budget, s: Any, old: Any = "", new: Any = "", *_: Any, **more: Any) -> None:
    text, old, new = str(s), str(old), str(new)
    budget.room(len(text) + text.count(old) * len(new))


def _join(budget: Budget, value: Any, d: Any = "", *_: Any, **more: Any) -> None:
    budget.room(budget.weight(value)[0] + length(value) * len(str(d)))


def _join_by(budget: Budget, separator: Any, values: Any = (), *_: Any, **more: Any) -> None:
    _join(budget, values, separator)


def _json(
    budget: Budget,
    value: Any,
    ensure_ascii: Any = False,
    indent: Any = None,
    separators: Any = (),
    *_: Any,
    **more: Any,
) -> None:
    width = indent if isinstance(indent, int) else length(indent or "")
    size, depth = budget.weight(value)
    added = depth * width + sum(length(each) for each in separators or () if each)
    budget.room(6 * size + size // NODE * added)  # "é" may become six characters


def _sum(
    budget: Budget, iterable: Any, attribute: Any = None, start: Any = 0, *_: Any, **more: Any
) -> None:
    if not isinstance(start, (int, float)):  # lists, of which each sum is a new one
        budget.spend(budget.weight(iterable)[0] ** 2 >> LONG)


def bound_percent(budget: Budget, text: Any, *args: Any, **kwargs: Any) -> None:
    """Bound a text with % in it: its widths, and its values as often as they may occur."""
    text, values = str(text), (*args, *kwargs.values())
    _check_widths(budget, text)
    if "*" in text:
        budget.room(sum(abs(v) for v in _flat(values) if isinstance(v, int)))
    budget.room(len(text) + text.count("%") * sum(budget.weight(v)[0] for v in values))


def _flat(values: Iterable[Any]) -> list[Any]:
    return [item for v in values for item in (v if isinstance(v, tuple) else [v])]


def _check_widths(budget: Budget, text: str) -> None:
    for digits in re.findall(r"\d+", text):
        budget.room(int(digits) if len(digits) < 12 else MOST_BYTES + 1)


_GROWTH: Mapping[str, Callable[..., None]] = {
    **dict.fromkeys(("center", "indent", "batch", "slice", "wordwrap", "urlize"), bound_product),
    "xmlattr": bound_product,
    "replace": _replace,
    "join": _join,
    "tojson": _json,
    "sum": _sum,
    "format": bound_percent,
}
"""Filters whose result may be much larger than what they read."""
_METHOD_GROWTH: Mapping[str, Callable[..., None]] = {
    **dict.fromkeys(
        ("center", "ljust", "rjust", "zfill", "expandtabs", "translate"), bound_product
    ),
    "replace": _replace,
    "join": _join_by,
}
"""Methods of texts whose result may be much larger than what they read."""
_SORTING = ("sort", "dictsort", "groupby", "unique")
_SLOW = ("striptags", "title", "wordcount", "wordwrap", "urlize", "xmlattr", "pprint")
"""Filters with expressions that may look at each character many times."""
_SHALLOW = (
    *("attr", "count", "d", "default", "first", "items", "last", "length", "list", "map"),
    *("reject", "rejectattr", "reverse", "select", "selectattr"),
    *("boolean", "callable", "defined", "false", "filter", "float", "integer", "iterable"),
    *("mapping", "none", "number", "sameas", "sequence", "string", "test", "true", "undefined"),
)
"""Filters and tests that do not look into the items of what they read, or have other filters and
tests do so. (The filters `float` and `string` are not meant: see `_is_shallow`.)"""
_EXISTING = ("attr", "d", "default", "first", "last")
"""Filters that return a value which was there."""


def _is_shallow(name: str, is_test: bool) -> bool:
    return name in _SHALLOW and (is_test or name not in ("float", "string"))


def bounded_function(name: str, function: Callable[..., Any], is_test: bool) -> Callable[..., Any]:
    """Return a filter or a test that charges the budget."""
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0
    is_shallow, growth = _is_shallow(name, is_test), None if is_test else _GROWTH.get(name)
    makes = not is_test and name not in _EXISTING

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        budget = CURRENT.get()
        given: Sequence[Any] = args[skipped:]
        if is_shallow:
            budget.spend(CALL)
        else:
            given = [list(v) if isinstance(v, Iterator) else v for v in given]
            size = budget.walk(*given, *kwargs.values())
            budget.spend(CALL)
            if name in _SORTING:
                budget.spend(size >> 4)
            if name in _SLOW:
                budget.spend((size >> 2) + (size * size >> LONG))
            if growth is not None:
                growth(budget, *given, **kwargs)
        result = function(*args[:skipped], *given, **kwargs)
        return budget.made(result) if makes else result

    return bounded


class Formatter(SandboxedFormatter):
    """`str.format`, each field of which charges the budget."""

    def format_field(self, value: Any, format_spec: str) -> Any:
        budget = CURRENT.get()
        budget.walk(value)
        _check_widths(budget, format_spec)
        return budget.made(super().format_field(value, format_spec))

    def convert_field(self, value: Any, conversion: Any) -> Any:
        CURRENT.get().written(value)
        return super().convert_field(value, conversion)


def charge_text(budget: Budget, text: str | bytes, name: str, args: Sequence[Any]) -> None:
    """Charge a method of a text, some of which look for each character in an argument."""
    budget.spend(len(text) >> UNIT)
    for value in args:
        if isinstance(value, (str, bytes)):
            budget.spend(len(text) * len(value) >> LONG)
    if (growth := _METHOD_GROWTH.get(name)) is not None:
        growth(budget, text, *args)
