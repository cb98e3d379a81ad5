"""The served dashboard as a process, and people who visit it with a browser."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from playwright.sync_api import Browser, BrowserContext, Page

from tests.browser.shown_study import ShownStudy

ROOT = Path(__file__).resolve().parents[2]
Change = tuple[str, str, str]
"""A module, what stands in it, and what is to stand there instead."""
WITHIN_S = 60.0


@dataclass
class Dashboard:
    """Where a study is shown.

    Args:
        study: that is shown.
        port: on loopback.
        browser: Chromium.
        process: that serves it.
    """

    study: ShownStudy
    port: int
    browser: Browser
    process: subprocess.Popen[bytes]
    contexts: list[BrowserContext] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def visitor(self, token: str | None = None, **options: Any) -> Visitor:
        """Somebody with a browser of their own, signed in with a token if given."""
        context = self.browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        context.set_default_timeout(20_000)
        self.contexts.append(context)
        visitor = Visitor(self, context.new_page())
        if token is not None:
            visitor.sign_in(token)
        return visitor


@dataclass
class Visitor:
    """Somebody who looks at a page, and what the browser told about it."""

    dashboard: Dashboard
    page: Page
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("request", lambda one: self.requests.append(one.url))
        self.page.on("websocket", lambda one: self.requests.append(one.url))
        self.page.on("pageerror", lambda one: self.complaints.append(str(one)))
        self.page.on("console", lambda one: self.complaints.append(one.text) if one.type == "error" else None)

    def go(self, path: str = "/") -> None:
        """Open a page, and wait for its socket."""
        self.page.goto(f"{self.dashboard.url}/dashboard{path}")
        if "/sign-in" not in self.page.url:
            self.page.wait_for_function("() => window.did_handshake === true")

    def sign_in(self, token: str) -> None:
        self.go()
        self.page.fill("#token", token)
        self.page.keyboard.press("Enter")
        self.page.wait_for_function("() => window.did_handshake === true")

    def sees(self, text: str) -> None:
        """Wait for a text. Raises TimeoutError of Playwright."""
        self.page.get_by_text(text).first.wait_for()

    @property
    def text(self) -> str:
        return self.page.inner_text("body")


@contextmanager
def served_dashboard(study: ShownStudy, browser: Browser, changes: Sequence[Change] = ()) -> Iterator[Dashboard]:
    """`covey-aggregator api` over a study, until left."""
    command = [sys.executable, "-m", "aggregator.cli"]
    if changes:
        command = [sys.executable, "-m", "tests.browser.broken_program", json.dumps(list(changes))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, "api", "--config", str(study.config)], cwd=study.folder, env=environment, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    started = msgspec.json.decode(process.stdout.readline())
    dashboard = Dashboard(study, int(started["api"].rpartition(":")[2]), browser, process)
    try:
        _wait(dashboard)
        yield dashboard
    finally:
        for context in dashboard.contexts:
            context.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(WITHIN_S) in {0, -signal.SIGKILL}


def _wait(dashboard: Dashboard) -> None:
    """Until the process answers."""
    ends_s = time.monotonic() + WITHIN_S
    while True:
        try:
            urllib.request.urlopen(f"{dashboard.url}/healthz", timeout=10).close()  # noqa: S310 - loopback
        except OSError:
            assert time.monotonic() < ends_s
            time.sleep(0.05)
        else:
            return
