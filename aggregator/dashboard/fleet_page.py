"""The fleet: how many devices are in which state, and a list of names that is chosen from in the database."""

from __future__ import annotations

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from nicegui import background_tasks
from nicegui.elements.mixins.text_element import TextElement

from aggregator.api.answers import Device, DevicePage
from aggregator.dashboard.fleet_book import FleetBook
from aggregator.dashboard.frame import Visit, empty
from aggregator.dashboard.gate import ROOT
from aggregator.dashboard.live_state import LiveState
from aggregator.dashboard.tables import Cell, Choice, chooser, onwards, table
from aggregator.dashboard.tags import box, count, moment, text
from aggregator.errors import DatabaseError

STATES = (("", "any"), ("active", "active"), ("quarantined", "quarantined"), ("revoked", "revoked"))
PATH = f"{ROOT}/fleet"


async def fleet_page(visit: Visit, request: Request, book: FleetBook) -> None:
    """Make the page."""
    await _counts(visit, book)
    asked = request.query_params
    state = asked.get("state", "")
    choices = (
        Choice("prefix", "Name begins with", asked.get("prefix", "").strip().lower()),
        Choice("owner", "Owner", asked.get("owner", "").strip()),
        Choice("state", "State", state if (state, state) in STATES else "", STATES),
    )
    chooser(PATH, choices)
    query: dict[str, str | int | None] = {one.name: one.value for one in choices}
    cursor = asked.get("cursor")
    found = await visit.get("/v1/devices", DevicePage, query={**query, "cursor": cursor, "limit": 25})
    if not found.items:
        if any(one.value for one in choices) or cursor:
            empty("No such device", "No registered name is as chosen above.")
        else:
            how = "covey-aggregator enroll-token create --count 10 --owner NAME --config aggregator.toml"
            empty("No device yet", "Devices join by themselves with a token.", how)
        return
    with box("section"):
        table(
            "Registered names", ("Name", "State", "Owner", "Valid until", "Added"), [_row(one) for one in found.items]
        )
        onwards(PATH, choices, cursor=found.next, is_first=cursor is None)


def _row(one: Device) -> tuple[str | Cell, ...]:
    return (
        Cell(one.device, href=f"{PATH}/{one.device}"),
        Cell(one.state, state=one.state),
        one.owner or "–",
        moment(one.not_after_s) if one.not_after_s is not None else "for good",
        moment(one.added_s),
    )


async def _counts(visit: Visit, book: FleetBook) -> None:
    """How many there are, kept up."""
    with box("section", "cv-panel"):
        total = text("p", "", "cv-big")
        text("p", "A device with pseudonyms has several names.", "cv-quiet")
        with box("dl", "cv-facts cv-states"):
            numbers = {state: _number(state) for state, _ in STATES if state}

    async def renew() -> None:
        try:
            states = await run_in_threadpool(book.states)
        except DatabaseError:  # the banner says so
            return
        total.set_text(f"{count(sum(states.values()))} registered names")
        for state, element in numbers.items():
            element.set_text(count(states.get(state, 0)))

    def show(state: LiveState) -> None:
        if not state.trouble:
            background_tasks.create(renew())

    await renew()
    visit.shows(show)


def _number(state: str) -> TextElement:
    """A state and how many are in it, which leads to them."""
    with box("div"):
        with box("dt"):
            text("a", state, href=f"{PATH}?state={state}")
        return text("dd", "", "cv-number")
