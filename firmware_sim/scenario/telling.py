"""What is wrong in a scenario file, for people: its line, its key, what is allowed, and what came. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from firmware_sim.scenario.toml_lines import Path as Keys
from firmware_sim.scenario.toml_lines import line_of, path_of

_AT = re.compile(r" - at `(\$[^`]*)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `([^`]+)`")
_MISSING = re.compile(r"Object missing required field `([^`]+)`")
_MSGSPECS = re.compile(r"Expected `|Invalid ")
"""How msgspec's words begin; ours say what is allowed already."""
_OWN_WORDS = re.compile(r"([a-z][a-z0-9_]*): ")
"""How a check of ours begins, which says itself what is allowed and what came."""
_FAULT = re.compile(r"\[\[fault\]\] number (\d+)(?: \(\w+\))?: ([a-z_]+)")
_LONGEST = 120
_LIMITS = (("ge", "at least"), ("gt", "more than"), ("le", "at most"), ("lt", "less than"))
_SIMPLE: dict[Any, str] = {
    msgspec.inspect.IntType: "a whole number",
    msgspec.inspect.FloatType: "a number",
    msgspec.inspect.BoolType: "true or false",
    msgspec.inspect.StrType: "text",
    msgspec.inspect.DateTimeType: "a moment with its time zone, such as 2026-03-02T00:00:00Z",
}


def said_of(where: str, text: str, message: str, fields: Any, kind: Any, *, below: str = "$") -> str:
    """An error of msgspec with its line, its key, what is allowed there, and what came.

    Args:
        where: what the file is called.
        text: what it holds.
        message: msgspec's.
        fields: what was decoded, from `below` on.
        kind: the type that was expected there.
        below: where in the file the decoded part begins, such as ``$.task``.
    """
    at = _AT.search(message)
    inside = path_of(at[1]) if at else ()
    what = _AT.sub("", message)
    if at and at[1].endswith("[...]"):
        inside = (*inside, _wrong_entry(_value_at(fields, inside), _type_at(kind, inside)))
    if unknown := _UNKNOWN.search(what):
        allowed = ", ".join(_keys_at(kind, inside, fields))
        inside, what = (*inside, unknown[1]), f"there is no such key; expected {allowed}"
        what += _came(_value_at(fields, inside))
    elif missing := _MISSING.search(what):
        inside, what = (*inside, missing[1]), "this key is missing"
        what += f"; expected {allowed_by(_type_at(kind, inside, fields))}"
    elif own := _own_key(what, _value_at(fields, inside)):
        inside, what = (*inside, own), what.removeprefix(f"{own}: ")
    elif at and _MSGSPECS.match(what):
        allowed = allowed_by(_type_at(kind, inside, fields)) or what.removeprefix("Expected ").split(", got")[0]
        what = f"expected {allowed}{_came(_value_at(fields, inside))}"
    return placed(where, text, (*path_of(below), *inside), what)


def said_of_fault(where: str, text: str, message: str) -> str:
    """An error about a ``[[fault]]`` with its line; the message has all the rest."""
    found = _FAULT.search(message)
    line = line_of(text, ("fault", int(found[1]) - 1, found[2])) if found else None
    return f"{where}: line {line}: {message}" if line is not None else f"{where}: {message}"


def placed(where: str, text: str, key: Keys, what: str) -> str:
    """A sentence about a key, with its line; the line of its table where the key is not there itself.

    Args:
        where: what the file is called.
        text: what it holds.
        key: the path of it.
        what: what is wrong.
    """
    line = line_of(text, key)
    place = f"line {line}: " if line is not None else ""
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")
    return f"{where}: {place}{name}{': ' if name else ''}{what[:1].lower()}{what[1:]}"


def allowed_by(here: Any) -> str:
    """What a type takes, in words; empty where there are none for it."""
    here = _without_none(here)
    if isinstance(here, msgspec.inspect.LiteralType):
        return f"one of {', '.join(map(str, here.values))}"
    if isinstance(here, msgspec.inspect.StrType) and here.pattern is not None:
        return f"text matching {here.pattern}"
    if isinstance(here, msgspec.inspect.UnionType):
        return " or ".join(filter(None, map(allowed_by, here.types)))
    if isinstance(here, msgspec.inspect.DictType | msgspec.inspect.StructType):
        return "a table"
    if isinstance(here, msgspec.inspect.VarTupleType | msgspec.inspect.TupleType | msgspec.inspect.ListType):
        return "an array"
    limits = [
        f"{words} {limit:,}" if isinstance(limit, int) else f"{words} {limit:g}"
        for name, words in _LIMITS
        if (limit := getattr(here, name, None)) is not None
    ]
    simple = _SIMPLE.get(type(here), "")
    return f"{simple}, {' and '.join(limits)}" if simple and limits else simple


def _came(value: Any) -> str:
    """What came, cut where it is long."""
    if value is None:
        return ""
    shown = str(value) if isinstance(value, bool) or not hasattr(value, "isoformat") else value.isoformat()
    shown = repr(value) if isinstance(value, str) else shown.lower() if isinstance(value, bool) else shown
    return f", got {shown if len(shown) <= _LONGEST else shown[:_LONGEST] + '...'}"


def _own_key(what: str, value: Any) -> str | None:
    """The key of a table that an error of a check of ours is about."""
    own = _OWN_WORDS.match(what)
    return own[1] if own and isinstance(value, Mapping) and own[1] in value else None


def _wrong_entry(table: Any, here: Any) -> str:
    """The key of the first value in a table of numbers that is not allowed."""
    kind = getattr(_without_none(here), "value_type", None)
    for name, value in (table or {}).items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or value <= (getattr(kind, "gt", None) or 0):
            return str(name)
    return "..."


def _value_at(fields: Any, path: Keys) -> Any:
    """What stands at a path; None where nothing does."""
    for part in path:
        try:
            fields = fields[part]
        except (KeyError, IndexError, TypeError):
            return None
    return fields


def _keys_at(kind: Any, path: Keys, fields: Any) -> list[str]:
    """The keys that the table at a path may have."""
    here = _type_at(kind, path, fields)
    return (
        sorted(field.encode_name for field in here.fields)
        if isinstance(here, msgspec.inspect.StructType)
        else ["other keys"]
    )


def _type_at(kind: Any, path: Keys, fields: Any = None) -> Any:
    """The type at a path: of unions of tables, the one whose kind was said."""
    here = _chosen(msgspec.inspect.type_info(kind), fields)
    for part in path:
        fields = _value_at(fields, (part,))
        here = _chosen(_inside(here, part), fields)
    return here


def _inside(here: Any, part: str | int) -> Any:
    """The type of a field, of a table's values, or of an array's items."""
    if isinstance(here, msgspec.inspect.StructType):
        return next((field.type for field in here.fields if field.encode_name == part), None)
    if isinstance(here, msgspec.inspect.DictType):
        return here.value_type
    if isinstance(here, msgspec.inspect.TupleType) and isinstance(part, int):
        return here.item_types[min(part, len(here.item_types) - 1)]
    return getattr(here, "item_type", None)


def _chosen(here: Any, fields: Any) -> Any:
    """A union's table with the kind that the file says, or its only one."""
    here = _without_none(here)
    if not isinstance(here, msgspec.inspect.UnionType):
        return here
    tables = [one for one in here.types if isinstance(one, msgspec.inspect.StructType)]
    said = [
        one for one in tables if one.tag_field and isinstance(fields, Mapping) and fields.get(one.tag_field) == one.tag
    ]
    return said[0] if said else here


def _without_none(here: Any) -> Any:
    """A type, of which it does not matter that it may be left out."""
    while isinstance(here, msgspec.inspect.Metadata):
        here = here.type
    if isinstance(here, msgspec.inspect.UnionType):
        types = [one for one in here.types if not isinstance(one, msgspec.inspect.NoneType)]
        if len(types) == 1:
            return _without_none(types[0])
    return here
