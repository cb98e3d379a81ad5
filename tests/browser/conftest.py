"""Chromium, one for all tests of a process; and a study that is served."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.browser.shown_study import ShownStudy
from tests.browser.visits import Change, Dashboard, served_dashboard

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    if not Path(CHROMIUM).exists():
        if os.environ.get("COVEY_TESTS_NEED_CHROMIUM"):
            pytest.fail(
                "chromium is not installed, and COVEY_TESTS_NEED_CHROMIUM asks for it: apt-get install chromium"
            )
        pytest.skip("chromium is not installed: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def dashboard(chromium: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    """The command over a whole study, served once for the tests of a file."""
    study = ShownStudy(tmp_path_factory.mktemp("study"))
    with served_dashboard(study, chromium) as served:
        yield served
    study.store.close()


@pytest.fixture
def serve(chromium: Browser, tmp_path: Path) -> Iterator[Callable[..., Dashboard]]:
    """Serves a study, with changes that break the program on purpose."""
    opened: list[tuple[ShownStudy, object]] = []

    def start(*changes: Change, **options: object) -> Dashboard:
        study = ShownStudy(tmp_path, **options)  # type: ignore[arg-type]
        context = served_dashboard(study, chromium, changes)
        opened.append((study, context))
        return context.__enter__()

    yield start
    for study, context in opened:
        context.__exit__(None, None, None)  # type: ignore[attr-defined]
        study.store.close()
