"""JSON schemas of Python classes: Pydantic models, dataclasses, typed dictionaries."""

from __future__ import annotations

import enum
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    Required,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from phicore.errors import ArgumentError

SIMPLE: Mapping[Any, Mapping[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    None: {"type": "null"},
    type(None): {"type": "null"},
    Any: {},
}


def schema_of(kind: Any) -> Mapping[str, Any]:
    """Return the JSON schema of a type.

    Args:
        kind: A Pydantic model, a dataclass, a TypedDict, or another type whose values have a form
            in JSON: str, int, float, bool, None, Any, list, tuple, dict with keys of str, Literal,
            enumerations, and unions of these.
    Raises:
        ArgumentError: If a type has no form in JSON.
    """
    definitions: dict[str, Any] = {}
    found = _schema(kind, definitions)
    return {**found, "$defs": definitions} if definitions else found


def _schema(kind: Any, definitions: dict[str, Any]) -> Mapping[str, Any]:
    if hasattr(kind, "model_json_schema"):
        return _of_pydantic(kind, definitions)
    try:
        if kind in SIMPLE:
            return SIMPLE[kind]
    except TypeError:  # not hashable, so not a type
        pass
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Annotated, NotRequired, Required):
        return _schema(args[0], definitions)
    if origin is Literal:
        return {"enum": list(args)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(arg, definitions) for arg in args]}
    if kind is list or origin is list:
        return {"type": "array", **({"items": _schema(args[0], definitions)} if args else {})}
    if origin is tuple:
        return _of_tuple(args, definitions)
    if kind is dict or (origin is dict and args[0] is str):
        values = _schema(args[1], definitions) if args else {}
        return {"type": "object", "additionalProperties": values}
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return {"enum": [member.value for member in kind]}
    if isinstance(kind, type) and (is_dataclass(kind) or is_typeddict(kind)):
        return _of_class(kind, definitions)
    raise ArgumentError(
        parameter="json_schema",
        expected="a JSON schema, or a class whose values have a form in JSON",
        got=kind,
    )


def _of_tuple(args: tuple[Any, ...], definitions: dict[str, Any]) -> Mapping[str, Any]:
    if len(args) == 2 and args[1] is ...:
        return {"type": "array", "items": _schema(args[0], definitions)}
    items = [_schema(arg, definitions) for arg in args]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}


def _of_class(kind: type, definitions: dict[str, Any]) -> Mapping[str, Any]:
    """Define the object of a dataclass or a TypedDict, which may contain itself."""
    name = f"{kind.__module__}.{kind.__qualname__}".replace("~", "").replace("/", "")
    reference = {"$ref": f"#/$defs/{name}"}
    if name in definitions:
        return reference
    definitions[name] = {}
    hints = get_type_hints(kind, include_extras=True)
    if is_typeddict(kind):
        wanted = {Required: True, NotRequired: False}  # __required_keys__ cannot read annotations
        origins = {name: get_origin(hint) for name, hint in hints.items()}
        keys = kind.__required_keys__  # type: ignore[attr-defined]
        required = [n for n in hints if wanted.get(origins[n], n in keys)]
    else:
        members = [field for field in fields(kind) if field.init]
        hints = {field.name: hints[field.name] for field in members}
        defaults = {f.name: (f.default, f.default_factory) for f in members}
        required = [n for n in hints if defaults[n] == (MISSING, MISSING)]
    definitions[name] = {
        "type": "object",
        "properties": {member: _schema(hint, definitions) for member, hint in hints.items()},
        "required": required,
        "additionalProperties": False,
    }
    return reference


def _of_pydantic(kind: Any, definitions: dict[str, Any]) -> Mapping[str, Any]:
    """Take a model's own schema, whose definitions join the others."""
    schema = dict(kind.model_json_schema())
    definitions |= schema.pop("$defs", {})
    schema.setdefault("additionalProperties", False)
    return schema


_ONE = ("additionalProperties", "items", "contains", "propertyNames")
_MANY = ("anyOf", "oneOf", "prefixItems")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")


def closed(schema: Any) -> Any:
    """Return a schema whose objects have the named properties alone, unless it says otherwise.

    A schema allows other properties by default, and a small model would invent them for ever. As in
    llama.cpp and other servers, an object that names its properties has no others. Whatever follows
    the new schema follows the old one, too. A schema with `allOf` stays as it is, since each part
    would forbid the properties of the others.
    """
    return schema if _has_all_of(schema) else _closed(schema)


def _closed(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    found = dict(schema)
    for name in found.keys() & set(_ONE):
        found[name] = _closed(found[name])
    for name in found.keys() & set(_MANY):
        if isinstance(found[name], list):
            found[name] = [_closed(each) for each in found[name]]
    for name in found.keys() & set(_NAMED):
        if isinstance(found[name], Mapping):
            found[name] = {key: _closed(each) for key, each in found[name].items()}
    if "properties" in found and "patternProperties" not in found:
        found.setdefault("additionalProperties", False)
    return found


def _has_all_of(schema: Any) -> bool:
    if isinstance(schema, Mapping):
        return "allOf" in schema or any(map(_has_all_of, schema.values()))
    return isinstance(schema, list) and any(map(_has_all_of, schema))
