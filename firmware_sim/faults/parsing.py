"""``[[fault]]`` tables as structs; what is wrong is told with its key, its value and what is allowed. No I/O."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args, get_type_hints

import msgspec

from firmware_sim.errors import SettingsError
from firmware_sim.faults.kinds import KINDS, Fault

T = TypeVar("T")
_WHERE = re.compile(r"^(?P<what>.*?)(?: - at `\$(?P<path>[^`]*)`)?$", re.DOTALL)
_UNKNOWN = re.compile(r"unknown field `(?P<key>[^`]*)`")


def parse_faults(tables: Sequence[Mapping[str, Any]]) -> tuple[Fault, ...]:
    """All faults of a scenario.

    Args:
        tables: its ``[[fault]]`` tables, as TOML gives them.

    Raises:
        SettingsError: a table is not a fault; it says which one, the key, the value, and what is allowed.
    """
    return tuple(
        parse_table(table, KINDS, where=f"[[fault]] number {number}") for number, table in enumerate(tables, 1)
    )


def parse_table(table: Mapping[str, Any], kinds: Mapping[str, type[T]], *, where: str) -> T:
    """One table whose key ``kind`` says what it is.

    Args:
        table: as TOML gives it.
        kinds: structs by kind.
        where: what an error calls the table.

    Raises:
        SettingsError: it says where, the key, the value, and what is allowed.
    """
    kind = table.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise SettingsError(f"{where}: kind: expected one of {', '.join(sorted(kinds))}, got {kind!r}")
    try:
        return msgspec.convert(table, kinds[kind])
    except msgspec.ValidationError as error:
        raise SettingsError(f"{where} ({kind}): {_told(str(error), table, kinds[kind])}") from error


def _told(message: str, table: Mapping[str, Any], kind: type[Any]) -> str:
    """Msgspec's words, with the value and the keys that there are."""
    unknown = _UNKNOWN.search(message)
    if unknown is not None and unknown["key"] in table:
        allowed = ", ".join(sorted(field.name for field in msgspec.structs.fields(kind)))
        return f"{unknown['key']}: unknown key; allowed are {allowed}, got {table[unknown['key']]!r}"
    match = _WHERE.match(message)
    if match is None or not match["path"]:
        return message
    path = match["path"].lstrip(".")
    key = re.split(r"[.\[]", path)[0]
    return f"{path}: {match['what']}{_allowed(kind, key)}, got {table.get(key)!r}"


def _allowed(kind: type[Any], key: str) -> str:
    """What may be said under a key, where msgspec does not say it."""
    if key == "target":
        return '; allowed are "all", a share from 0 to 1, a list of devices\' names, or {profile = "NAME"}'
    choices = [value for value in get_args(get_type_hints(kind).get(key)) if isinstance(value, str)]
    return f"; allowed are {', '.join(choices)}" if choices else ""
