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


def test_a_study_with_nothing_in_it_says_what_to_do(serve: Serve) -> None:
    dashboard = serve(is_empty=True)
    visitor = dashboard.visitor(dashboard.study.tokens["admin"])
    visitor.sees("nobody coordinates")
    for path, words in (
        ("/", "No task yet"),
        ("/fleet", "No device yet"),
        ("/fleet/w-00001", "No such device"),
        ("/curves", "No task yet"),
        ("/models", "No task yet"),
        ("/curves/other", "No such task"),
        ("/models/other", "No such task"),
        ("/refusals", "Nothing was refused"),
        ("/audit?actor=nobody", "No such entry"),
    ):
        visitor.go(path)
        visitor.sees(words)


def test_a_token_for_little_sees_little(dashboard: Dashboard) -> None:
    visitor = dashboard.visitor(dashboard.study.add_token("viewer-ann", scopes=["devices:read"]))
    visitor.sees("Not for this token")
    assert visitor.page.get_by_role("navigation", name="Pages").inner_text().split() == ["Fleet"]
    visitor.go("/audit")
    visitor.sees("This page needs audit:read")
    assert "device.quarantined" not in visitor.text


def test_a_database_that_is_away_is_said_so_and_comes_back(serve: Serve) -> None:
    dashboard = serve()
    visitor, late = (dashboard.visitor(dashboard.study.tokens[who]) for who in ("admin", "viewer"))
    visitor.sees("11 of 16 updates")
    dashboard.study.put_away("access_tokens")
    dashboard.study.put_away("tasks")
    visitor.sees("The database does not answer.")
    visitor.sees("11 of 16 updates")
    late.page.goto(f"{dashboard.url}/dashboard/fleet")
    late.sees("This page tries again every five seconds")
    dashboard.study.bring_back("access_tokens")
    dashboard.study.bring_back("tasks")
    dashboard.study.arrive("watch", 2, first=11)
    visitor.sees("13 of 16 updates")
    expect(visitor.page.get_by_text("The database does not answer.")).to_be_hidden()
    late.sees("40 registered names")
    dashboard.process.kill()
    visitor.page.get_by_text("Connection lost").wait_for()


def test_nothing_is_cut_off_on_a_phone(dashboard: Dashboard) -> None:
    for scheme in ("light", "dark"):
        options = {"viewport": {"width": 390, "height": 844}, "color_scheme": scheme}
        visitor = dashboard.visitor(dashboard.study.tokens["admin"], **options)
        for path in ("/", "/fleet", "/fleet/w-00000", "/curves/watch", "/refusals", "/models/watch", "/audit"):
            visitor.go(path)
            assert visitor.page.evaluate("document.documentElement.scrollWidth") == 390, path
        colour = visitor.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (colour == "rgb(246, 247, 249)") == (scheme == "light")


def test_curves_go_on_with_the_rounds(dashboard: Dashboard) -> None:
    visitor = dashboard.visitor(dashboard.study.tokens["viewer"])
    visitor.go("/curves/watch")
    visitor.sees("% on the validation set")
    assert visitor.page.locator("canvas").count() == 5
    visitor.sees("An estimate: updates that counted, times 3.2 J as configured. Nothing is measured.")
    dashboard.study.close_round("watch", accuracy=0.8642)
    visitor.sees("86.4% on the validation set")
