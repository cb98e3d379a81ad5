"""Where a key stands in a TOML file, so that an error about its value can name the line. Pure.

Not a TOML parser: it is asked about files that one has accepted. It knows tables, arrays of tables and keys that stand
at the beginning of a line, as people write them.
"""

from __future__ import annotations

import re

from fl_protocol.errors import ConfigError

_TABLE = re.compile(r"\s*\[(?!\[)([^\]]+)\]")
_ARRAY = re.compile(r"\s*\[\[([^\]]+)\]\]")
_KEY = re.compile(r"""\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*=""")
_PART = re.compile(r"([^.\[\]]+)|\[(\d+)\]")

Path = tuple[str | int, ...]


def path_of(text: str) -> Path:
    """A path as msgspec writes it, such as ``$.fault[2].kind``, in its parts."""
    return tuple(int(number) if number else name for name, number in _PART.findall(text.removeprefix("$")))


def line_of(text: str, path: Path) -> int | None:
    """The line, counted from 1, of a key; or of the nearest table that it is in; None where there is neither.

    Args:
        text: of the file.
        path: keys, and numbers counted from 0 into arrays of tables.
    """
    lines = _lines(text)
    return next((lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in lines), None)


def with_text_at(text: str, path: Path, value: str) -> str:
    """A file with another text as a key's value.

    Args:
        text: of the file.
        path: of a key that has a text on its own line.
        value: instead of it; without quotation marks and backslashes.

    Raises:
        ConfigError: the key does not stand on a line of its own.
    """
    number, lines = _lines(text).get(path), text.splitlines(keepends=True)
    found = number is not None and _KEY.match(lines[number - 1])
    if number is None or not found:
        raise ConfigError(f"{'.'.join(map(str, path))}: expected this key on a line of its own, and it is on none")
    ending = "\n" if lines[number - 1].endswith("\n") else ""
    lines[number - 1] = f'{found[0]} "{value}"{ending}'
    return "".join(lines)


def _lines(text: str) -> dict[Path, int]:
    """The line of each key and table."""
    lines: dict[Path, int] = {}
    here: Path = ()
    counts: dict[Path, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if found := _ARRAY.match(line):
            name = _resolved(_names(found[1]), counts)
            here = (*name, counts.get(name, -1) + 1)
            counts[name] = here[-1] if isinstance(here[-1], int) else 0
            lines.setdefault(name, number)
            lines[here] = number
        elif found := _TABLE.match(line):
            here = _resolved(_names(found[1]), counts)
            lines.setdefault(here, number)
        elif found := _KEY.match(line):
            lines.setdefault((*here, *_names(found[1])), number)
    return lines


def _names(text: str) -> Path:
    """The parts of a dotted key."""
    return tuple(part.strip().strip("\"'") for part in text.split("."))


def _resolved(name: Path, counts: dict[Path, int]) -> Path:
    """A table's name, with the number of the array's table that it is in."""
    result: Path = ()
    for part in name[:-1]:
        result = (*result, part)
        if result in counts:
            result = (*result, counts[result])
    return (*result, name[-1])
