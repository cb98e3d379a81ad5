"""The README's example runs, and the commands and files it names exist."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_python_example_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(example, "README.md", "exec"), {})  # noqa: S102 - our own text
    assert re.fullmatch(r"3 updates combined, parameters moved by \d+\.\d\d\n", out.getvalue())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


def test_benchmarks_and_make_targets_named_in_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text()
    for name in set(re.findall(r"python -m benchmarks\.(\w+)", text)):
        places = ROOT / "benchmarks" / f"{name}.py", ROOT / "benchmarks" / name / "__main__.py"
        assert any(place.exists() for place in places), name
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make (\w+)", text)):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_rooms_and_files_named_in_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"`((?:\w+/)+[\w.]+)`", text):
        assert (ROOT / path).exists(), path
