"""What is left out on the newest releases exists, and is never all that a file has to say there."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.once import MANY_PROCESSES, SEARCHES, runs_once

ROOT = Path(__file__).parents[2]
FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py"))


def functions(file: str) -> set[str]:
    """The tests in a file, those in classes too."""
    nodes = ast.walk(ast.parse((ROOT / file).read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test")}


def left_out_whole(files: Iterable[str]) -> list[str]:
    """Files with tests of which none is run on the newest releases."""
    return [file for file in files if (found := functions(file)) and all(runs_once(file, name) for name in found)]


@pytest.mark.parametrize("file", sorted({*SEARCHES, *MANY_PROCESSES}))
def test_what_is_left_out_is_there(file: str) -> None:
    named = {*SEARCHES.get(file, ()), *MANY_PROCESSES.get(file, ())}
    assert named <= functions(file), f"tests/once.py names tests of {file} that there are not"


def test_no_file_is_left_out_whole() -> None:
    assert len(FILES) > 200
    assert left_out_whole(FILES) == []


def test_a_file_that_is_left_out_whole_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "test_copies.py").write_text("def test_a_copy_that_lies_is_caught(): ...\n")
    assert left_out_whole([str(tmp_path / "test_copies.py")])


def test_a_test_that_is_named_like_one_on_a_broken_copy_and_has_no_mark_is_noticed(
    request: pytest.FixtureRequest,
) -> None:
    assert request.node.get_closest_marker("once"), "this test itself is named so"


def test_other_tests_have_no_mark(request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("once") is None
