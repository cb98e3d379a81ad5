"""docs/security.md names the tests that hold what it says; they are there."""

from __future__ import annotations

import re

from tests.aggregator.operator_desk import ROOT

_FILE_AND_NAMES = re.compile(r"`(tests/[\w/]+\.py)`: ((?:`\w+`(?:, )?)+)")


def named(text: str) -> list[tuple[str, str]]:
    """(file, test or check) for each that a text names."""
    return [(file, name) for file, names in _FILE_AND_NAMES.findall(text) for name in re.findall(r"`(\w+)`", names)]


def missing(text: str) -> list[tuple[str, str]]:
    """Those that are not there."""
    return [(file, name) for file, name in named(text) if f"def {name}(" not in (ROOT / file).read_text()]


def test_the_tests_that_the_page_names_are_there() -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    assert len(named(page)) >= 20
    assert missing(page) == []


def test_a_name_that_is_nowhere_is_caught() -> None:
    file = "tests/aggregator/enrolment/test_desk.py"
    assert missing(f"`{file}`: `check_a_token_expires`, `check_nothing`") == [(file, "check_nothing")]
