"""The live page: what is committed in the database is on it soon, whatever is wrong is said, and text stays text."""

from __future__ import annotations

from collections.abc import Callable

from playwright.sync_api import expect

from tests.browser.visits import Dashboard

Serve = Callable[..., Dashboard]


def test_updates_that_arrive_are_on_every_open_page(dashboard: Dashboard) -> None:
    visitors = [dashboard.visitor(dashboard.study.tokens[role]) for role in ("viewer", "admin")]
    for visitor in visitors:
        visitor.sees("11 of 16 updates")
    dashboard.study.arrive("watch", 3, first=11)
    for visitor in visitors:
        visitor.sees("14 of 16 updates")
        expect(visitor.page.get_by_label("Updates of watch")).to_have_attribute("value", "0.8750")
