"""How soon the dashboard shows its numbers, and how far it is behind, with 10,000 devices and 500 rounds of history.

    first_paint_s    from the click to the first paint with something on it; `numbers_s`: to the moment when arrivals
                     of the open round are on the page; nothing cached; medians. In turn with a bare NiceGUI page of one
                     label, served by a process of its own (`bare_paint_s`).
    live_update_s    from the commit of updates in the database to their number on an open page: median and largest

Chromium is headless, on the same machine; the server is the real command over SQLite, in a process of its own.

    python -m benchmarks.operations --only dashboard --json
"""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, BrowserContext, sync_playwright

from benchmarks.timing import cpu_name
from tests.browser.conftest import CHROMIUM
from tests.browser.shown_study import ARRIVED, ShownStudy
from tests.browser.visits import Dashboard, served_dashboard

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = "of 16 updates"
PAGES = {
    "live": ("/", NUMBERS),
    "fleet": ("/fleet", "registered names"),
    "device": ("/fleet/w-00050", "Updates that count"),
    "curves": ("/curves/watch", "on the validation set"),
    "refusals": ("/refusals", "since the study began"),
    "models": ("/models/watch", "Rounds train version"),
    "audit": ("/audit", "entries"),
}
_WATCH = """(words) => {
    const look = () => {
        if (window.__seen_s || !document.body || !document.body.innerText.includes(words)) return;
        requestAnimationFrame(() => setTimeout(() => { window.__seen_s ??= performance.now() / 1000; }));
    };
    new MutationObserver(look).observe(document, {subtree: true, childList: true, characterData: true});
}"""
_FOLLOW = """() => {
    window.__changes = [];
    const bigs = () => [...document.querySelectorAll('.cv-big')].map(one => one.innerText).join('|');
    let last = bigs();
    new MutationObserver(() => {
        const now = bigs();
        if (now !== last) { last = now; window.__changes.push([Date.now() / 1000, now]); }
    }).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""


def measure(devices: int, rounds: int, *, updates: int, repeats: int, changes: int) -> dict[str, Any]:
    """Seconds, as JSON.

    Args:
        devices: registered names.
        rounds: closed ones of each task.
        updates: in each.
        repeats: of each page, in turn.
        changes: commits that are waited for.
    """
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        study = ShownStudy(Path(folder), devices=devices, rounds=rounds, arrived=updates)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        with served_dashboard(study, browser) as dashboard, _bare() as bare:
            painted = _paints(dashboard, bare, repeats)
            behind = _behind(dashboard, changes)
        browser.close()
        study.store.close()
    return {
        "first_paint_s": painted["live"][0],
        "numbers_s": painted["live"][1],
        "bare_paint_s": painted["bare"][0],
        "live_update_s": round(statistics.median(behind), 3),
        "live_update_most_s": round(max(behind), 3),
        "dashboard_pages": {name: {"first_paint_s": one[0], "content_s": one[1]} for name, one in painted.items()},
        "dashboard_devices": devices,
        "dashboard_rounds": rounds,
        "dashboard_repeats": repeats,
        "dashboard_changes": changes,
        "cpu": cpu_name(),
    }


def _paints(dashboard: Dashboard, bare: str, repeats: int) -> dict[str, tuple[float, float]]:
    """Median seconds to the first paint and to the content of each page, nothing cached, pages in turn."""
    visitor = dashboard.visitor(dashboard.study.tokens["admin"])
    cookies = visitor.page.context.cookies()
    visitor.page.context.close()
    dashboard.contexts.clear()
    where = {name: (f"{dashboard.url}/dashboard{path}", words) for name, (path, words) in PAGES.items()}
    where["bare"] = (bare, NUMBERS)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in where}
    for turn in range(repeats + 1):
        for name, (url, words) in where.items():
            found = _paint(dashboard.browser, cookies, url, words)
            if turn:  # in the first one the server imports and reads what it then keeps
                taken[name].append(found)
    return {
        name: (round(statistics.median(one for one, _ in of), 3), round(statistics.median(one for _, one in of), 3))
        for name, of in taken.items()
    }


def _paint(browser: Browser, cookies: Any, url: str, words: str) -> tuple[float, float]:
    """One page in a browser that knows nothing but who is signed in."""
    with _context(browser, cookies) as context:
        page = context.new_page()
        page.add_init_script(f"({_WATCH})({words!r})")
        page.goto(url, wait_until="commit")
        page.wait_for_function("() => window.__seen_s && performance.getEntriesByName('first-contentful-paint').length")
        found = page.evaluate(
            "[performance.getEntriesByName('first-contentful-paint')[0].startTime / 1000, window.__seen_s]"
        )
        return float(found[0]), float(found[1])


def _behind(dashboard: Dashboard, changes: int) -> list[float]:
    """Seconds from a commit to the page, at moments that have nothing to do with when the server looks."""
    visitor, chance = dashboard.visitor(dashboard.study.tokens["admin"]), random.Random(1)  # noqa: S311 - not a key
    visitor.sees(f"{ARRIVED} {NUMBERS}")
    visitor.page.evaluate(_FOLLOW)
    taken = []
    for number in range(changes):
        time.sleep(chance.random())
        dashboard.study.arrive("watch", 1, first=ARRIVED + number)
        committed_s, words = time.time(), f"{ARRIVED + number + 1} {NUMBERS}"
        found = visitor.page.wait_for_function(
            "words => (window.__changes.find(one => one[1].includes(words)) ?? [0])[0]", arg=words
        )
        taken.append(float(found.json_value()) - committed_s)
    return taken


@contextlib.contextmanager
def _context(browser: Browser, cookies: Any) -> Iterator[BrowserContext]:
    """A browser's window without a cache."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.add_cookies(cookies)
    try:
        yield context
    finally:
        context.close()


@contextlib.contextmanager
def _bare() -> Iterator[str]:
    """Where a NiceGUI page of one label is served."""
    command = [sys.executable, "-m", "benchmarks.operations.bare_page"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None  # noqa: S101 - for the type
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()  # it would wait for browsers to go
