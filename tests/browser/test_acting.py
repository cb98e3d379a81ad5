"""Buttons: who sees and who may press them, what two operators do at once, and what was changed since one looked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from playwright.sync_api import expect
from sqlalchemy import update

from aggregator.store import schema
from tests.aggregator.api.seeded_study import MASKED
from tests.browser.visits import Dashboard, Visitor

Serve = Callable[..., Dashboard]
SHOWN_TO_ALL = ("aggregator.dashboard.device_page", 'not visit.session.may("devices:write")', "False")
MARKUP = '<img src=x onerror="document.title=1"><script>document.title=1</script>'


def press(visitor: Visitor, label: str, reason: str = "worn by two people") -> str:
    """Press a button, confirm, and read what came of it."""
    visitor.page.get_by_role("button", name=label).first.click()
    return confirm(visitor, label.partition(":")[0], reason)


def confirm(visitor: Visitor, verb: str, reason: str = "") -> str:
    dialog = visitor.page.get_by_role("dialog")
    if reason:
        dialog.get_by_label("Reason").fill(reason)
    dialog.get_by_role("button", name=verb).click()
    dialog.get_by_role("button", name="Look again").wait_for()
    return dialog.get_by_role("alert").inner_text()


def state_of(dashboard: Dashboard, device: str) -> str:
    visitor = dashboard.visitor(dashboard.study.tokens["viewer"])
    visitor.go(f"/fleet/{device}")
    return visitor.page.locator("dd .cv-chip").inner_text()


def at(dashboard: Dashboard, who: str, path: str) -> Visitor:
    visitor = dashboard.visitor(dashboard.study.tokens[who])
    visitor.go(path)
    return visitor


def check_roles(dashboard: Dashboard) -> None:
    """A viewer's button, if there were one, does nothing."""
    outcome = press(at(dashboard, "viewer", "/fleet/w-00020"), "Quarantine")
    assert "may not do this" in outcome, outcome
    assert state_of(dashboard, "w-00020") == "active"


def check_stale(dashboard: Dashboard) -> None:
    """What was decided on a page that is not true any more is not done."""
    one, other = (at(dashboard, who, "/fleet/w-00021") for who in ("operator", "second"))
    assert press(other, "Quarantine", "worn by <b>two</b>") == "Done: w-00021 is quarantined."
    outcome = press(one, "Revoke", "lost")
    assert "Changed since you looked: maria did device.quarantined" in outcome, outcome
    assert "worn by <b>two</b>" in outcome
    assert state_of(dashboard, "w-00021") == "quarantined"


def check_text(dashboard: Dashboard) -> None:
    """Text from outside is nowhere markup."""
    visitor = at(dashboard, "operator", "/fleet/w-00022")
    press(visitor, "Quarantine", MARKUP)
    dashboard.study.tell("account.created", MARKUP, detail=MARKUP)
    for path in ("/fleet/w-00022", "/audit"):
        visitor.go(path)
        assert visitor.page.locator("img[src=x]").count() == 0, path
        visitor.sees(MARKUP)


def test_buttons_are_there_for_those_who_may(dashboard: Dashboard) -> None:
    for who, count in (("viewer", 0), ("operator", 2)):
        visitor = at(dashboard, who, "/fleet/w-00020")
        expect(visitor.page.locator("#content button")).to_have_count(count)
        visitor.go("/models/watch")
        assert (visitor.page.get_by_role("button", name="Release").count() > 0) == bool(count)


def test_the_second_of_two_operators_is_told_who_was_first(dashboard: Dashboard) -> None:
    one, other = (at(dashboard, who, "/fleet/w-00024") for who in ("operator", "second"))
    assert press(one, "Quarantine", "odd updates") == "Done: w-00024 is quarantined."
    outcome = press(other, "Quarantine", "I saw it too")
    assert outcome.startswith("Done already: e-00024 is quarantined already (odd updates)"), outcome
    assert "operator-ann did device.quarantined" in outcome
    other.page.get_by_role("button", name="Look again").click()
    other.sees("odd updates")


def test_a_release_and_a_rollback_are_those_of_the_api(dashboard: Dashboard) -> None:
    one, other = (at(dashboard, who, "/models/watch") for who in ("operator", "second"))
    one.page.get_by_role("button", name="Release: version 22", exact=True).click()
    assert confirm(one, "Release") == "Done: version 22 is released."
    other.page.get_by_role("button", name="Roll back: to version 19", exact=True).click()
    outcome = confirm(other, "Roll back")
    assert outcome.startswith("Changed since you looked: operator-ann did model.released"), outcome
    other.page.get_by_role("button", name="Look again").click()
    other.page.get_by_role("button", name="Roll back: to version 19", exact=True).click()
    assert confirm(other, "Roll back").startswith("Asked, as order ")
    other.go("/audit?action=order.rollback")
    entry = other.page.locator("tbody tr").first.inner_text()
    assert "maria" in entry
    assert "argument 19" in entry


def test_a_version_that_needs_two_is_released_by_two(dashboard: Dashboard) -> None:
    tasks = schema.tasks
    with dashboard.study.store.database.transaction() as connection:
        asks = tasks.c.spec + "\n[release]\napprovals = 2\n"
        connection.execute(update(tasks).where(tasks.c.task == MASKED).values(spec=asks))
    one, other = (at(dashboard, who, f"/models/{MASKED}") for who in ("operator", "second"))
    expect(one.page.get_by_role("button", name="Release: version 19", exact=True)).to_have_count(0)
    one.page.get_by_role("button", name="Approve: version 19", exact=True).click()
    assert confirm(one, "Approve") == "Done: version 19 is approved by you."
    other.page.get_by_role("button", name="Approve: version 19", exact=True).click()
    assert confirm(other, "Approve").startswith("Changed since you looked: operator-ann did model.approved")
    other.page.get_by_role("button", name="Look again").click()
    other.sees("1 of 2 approved: operator-ann")
    other.page.get_by_role("button", name="Approve: version 19", exact=True).click()
    assert confirm(other, "Approve") == "Done: version 19 is approved by you."
    one.go(f"/models/{MASKED}")
    one.sees("2 of 2")
    one.page.get_by_role("button", name="Release: version 19", exact=True).click()
    assert confirm(one, "Release") == "Done: version 19 is released."


def test_a_stale_page_changes_nothing(dashboard: Dashboard) -> None:
    check_stale(dashboard)


def test_text_stays_text(dashboard: Dashboard) -> None:
    check_text(dashboard)


def test_the_keyboard_is_enough(dashboard: Dashboard) -> None:
    visitor = at(dashboard, "operator", "/fleet/w-00025")
    keyboard = visitor.page.keyboard
    button = visitor.page.get_by_role("button", name="Quarantine")
    for _ in range(20):
        keyboard.press("Tab")
        if button.evaluate("one => one === document.activeElement"):
            break
    assert button.evaluate("one => getComputedStyle(one).outlineStyle") == "solid"
    keyboard.press("Enter")
    expect(visitor.page.get_by_label("Reason")).to_be_focused()
    keyboard.press("Escape")
    expect(visitor.page.get_by_role("dialog")).to_have_count(0)
    expect(button).to_be_focused()
    keyboard.press("Enter")
    expect(visitor.page.get_by_label("Reason")).to_be_focused()
    keyboard.press("Enter")
    visitor.sees("Say why")
    keyboard.type("worn by two people")
    keyboard.press("Enter")
    visitor.sees("Done: w-00025 is quarantined.")
    visitor.go("/models/watch")
    visitor.page.get_by_role("button", name="Release: version 21", exact=True).focus()
    keyboard.press("Enter")
    expect(visitor.page.get_by_role("dialog").get_by_role("button", name="Release")).to_be_focused()


def test_a_button_that_is_there_by_mistake_still_asks_for_the_role(serve: Serve) -> None:
    check_roles(serve(SHOWN_TO_ALL))


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        (
            [
                SHOWN_TO_ALL,
                ("aggregator.api.guard", "if needed not in {ANYONE, *identity.scopes}:", "if False:"),
            ],
            check_roles,
        ),
        ([("aggregator.api.devices", "fresh(expected, device_etag(before))", "device_etag(before)")], check_stale),
        (
            [
                (
                    "aggregator.dashboard.tags",
                    "made = TextElement(tag=tag, text=content)",
                    """made = TextElement(tag=tag, text=content)
    if '<img' in content:
        made = TextElement(tag=tag, text='')
        made.props['innerHTML'] = content""",
                )
            ],
            check_text,
        ),
    ],
)
def test_a_button_or_a_text_that_is_not_checked_is_caught(
    serve: Serve, changes: list[tuple[str, str, str]], check: Callable[[Dashboard], None]
) -> None:
    dashboard = serve(*changes)
    with pytest.raises(AssertionError):
        check(dashboard)
