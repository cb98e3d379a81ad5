"""The fleet: how many devices are in which state, and a list of names that is chosen from in the database."""

from __future__ import annotations

from fastapi import Request
from nicegui.elements.mixins.text_element import TextElement

from aggregator.api.answers import Device, DevicePage
from aggregator.dashboard.frame import Visit, empty
from aggregator.dashboard.gate import ROOT
from aggregator.dashboard.live_state import LiveState
from aggregator.dashboard.tables import Cell, Choice, chooser, onwards, table
from aggregator.dashboard.tags import attribute, box, count, moment, text

STATES = (("", "any"), ("active", "active"), ("quarantined", "quarantined"), ("revoked", "revoked"))
PATH = f"{ROOT}/fleet"
REASONS = {
    "charger": "not on the charger",
    "battery": "battery too low",
    "idle": "in use",
    "network": "no network that it may use",
    "temperature": "too hot or too cold",
    "hours": "outside its wearer's hours",
}
"""What devices say of themselves, in words; hearsay, and only where wearers agreed to tell."""


async def fleet_page(visit: Visit, request: Request) -> None:
    """Make the page."""
    _counts(visit)
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


def _counts(visit: Visit) -> None:
    """How many there are, kept up."""
    with box("section", "cv-panel", aria_label="The fleet by state"):
        total = text("p", "", "cv-big")
        with box("dl", "cv-facts cv-states"):
            numbers = {state: _number(state) for state, _ in STATES if state}
            for state in ("online", "offline", "unheard"):
                numbers[state] = _number(state, leads=False)
    with box("section", aria_label="Why devices are not training"):
        text("h2", "Why devices that are online are not training")
        none = text("p", "None of them says that anything keeps it from training.", "cv-quiet")
        with box("ul", "cv-reasons cv-columns"):
            reasons = {reason: _Reason(words) for reason, words in REASONS.items()}

    def show(state: LiveState) -> None:
        if state.overview is None:
            return
        fleet, names = state.overview.fleet, state.overview.devices
        total.set_text(f"{count(fleet.active)} active devices, {count(names)} registered names")
        for name, element in numbers.items():
            element.set_text(count(getattr(fleet, name)))
        none.set_visibility(not any(fleet.reasons.values()))
        for reason, shown in reasons.items():
            shown.show(fleet.reasons.get(reason, 0), of=fleet.online)

    visit.shows(show)


class _Reason:
    """A reason for not training, with how many give it.

    Args:
        words: for people.
    """

    def __init__(self, words: str) -> None:
        with box("li") as self._line:
            with box("p", "cv-line"):
                text("span", words)
                self._number = text("span", "", "cv-number")
            self._bar = box("progress", "cv-bar", max="1", aria_label=f"{words}: share of those online")

    def show(self, times: int, *, of: int) -> None:
        """Show how many, unless there are none."""
        self._line.set_visibility(bool(times))
        self._number.set_text(count(times))
        attribute(self._bar, "value", f"{times / max(1, of):.4f}")


def _number(state: str, *, leads: bool = True) -> TextElement:
    """A state and how many are in it; it may lead to them."""
    with box("div"):
        with box("dt"):
            if leads:
                text("a", state, href=f"{PATH}?state={state}")
            else:
                text("span", state)
        return text("dd", "", "cv-number")
