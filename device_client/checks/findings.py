"""What a check finds, and how checks are run: one that fails itself is a finding too, never a traceback."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import msgspec

from fl_protocol.errors import CoveyError

Verdict = Literal["ok", "warning", "problem"]
AS_ITS_USER = "run this as the user that the daemon runs as: sudo -u"
"""What to do where this user may not look."""


@dataclass(frozen=True)
class Result:
    """What one check found.

    Args:
        verdict: ``problem`` when the device cannot do its work, ``warning`` when a person should know.
        found: one sentence.
        advice: what to do about it; empty when it is ok.
    """

    verdict: Verdict
    found: str
    advice: str = ""


class Finding(msgspec.Struct, frozen=True):
    """A check with its result, as ``doctor --json`` prints it.

    Args:
        check: name of the check.
        study: that it is about, ``tenant/task``; empty where it is about the device.
        verdict, found, advice: as in `Result`.
    """

    check: str
    study: str
    verdict: Verdict
    found: str
    advice: str


@dataclass(frozen=True)
class Check:
    """A named check; `run` raises CoveyError or OSError where it cannot look."""

    name: str
    run: Callable[[], Result]
    study: str = ""


def ok(found: str) -> Result:
    """Nothing to do."""
    return Result("ok", found)


def warning(found: str, advice: str) -> Result:
    """Works, but a person should know."""
    return Result("warning", found, advice)


def problem(found: str, advice: str = "") -> Result:
    """Does not work."""
    return Result("problem", found, advice)


def examine(checks: Iterable[Check]) -> Iterator[Finding]:
    """Run checks one after another, handing out each finding as soon as it is there."""
    for check in checks:
        try:
            result = check.run()
        except CoveyError as error:
            result = problem(str(error))
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            advice = AS_ITS_USER if isinstance(error, PermissionError) else ""
            result = problem(f"{place}{error.strerror or error}", advice)
        yield Finding(check.name, check.study, result.verdict, result.found, result.advice)


def size_text(num_bytes: float) -> str:
    """Bytes for people, in decimal units."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
