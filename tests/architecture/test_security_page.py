"""Each outcome that docs/security.md promises names a test that exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def rows(page: str) -> list[tuple[str, str, str]]:
    """Input, outcome and test of each row of the table."""
    table = page.split("| input | outcome | test |", 1)[1].split("\n\n", 1)[0]
    found = [tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in table.strip().splitlines()[1:]]
    assert all(len(cells) == 3 for cells in found), found
    return found  # type: ignore[return-value]


def runs(path: Path, name: str) -> bool:
    """Whether a test of this name is in a file, or a check that a test of it runs."""
    if not path.exists():
        return False
    tree = ast.parse(path.read_text())
    defined = {one.name for one in tree.body if isinstance(one, ast.FunctionDef)}
    used = {one.id for one in ast.walk(tree) if isinstance(one, ast.Name)}
    return name in defined and (name.startswith("test_") or (name.startswith("check_") and name in used))


def unfounded(page: str) -> list[str]:
    """Rows whose outcome or test is missing."""
    wrong = []
    for what, outcome, test in rows(page):
        found = NAMED.fullmatch(test)
        if not what or not outcome or found is None or not runs(ROOT / found[1], found[2]):
            wrong.append(what)
    return wrong


PAGE = (ROOT / "docs" / "security.md").read_text()


def test_every_input_has_an_outcome_and_a_test_that_exists() -> None:
    assert unfounded(PAGE) == []
    assert len(rows(PAGE)) > 20


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("::check_a_token_expires`", "::check_a_token_expires_not`"),
        ("test_desk.py::check_a_quota_holds`", "test_desks.py::check_a_quota_holds`"),
        ("| `used_token` |", "|  |"),
        ("`tests/aggregator/enrolment/test_desk.py::check_a_guessed_token_is_none`", "to be written"),
    ],
)
def test_a_row_without_one_is_caught(right: str, wrong: str) -> None:
    assert right in PAGE
    assert unfounded(PAGE.replace(right, wrong, 1)) != []
