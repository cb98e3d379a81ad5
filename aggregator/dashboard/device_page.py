"""One device: its state, owner, names and updates, what was done to it, and what its operator may do."""

from __future__ import annotations

from aggregator.api.answers import AuditPage, Device, DeviceDetail, StateBody
from aggregator.api_client import ApiProblemError
from aggregator.dashboard.confirmation import Confirmation, newest_entry, told_by
from aggregator.dashboard.fleet_page import PATH
from aggregator.dashboard.frame import Visit, empty
from aggregator.dashboard.tables import table
from aggregator.dashboard.tags import box, moment, size, text
from aggregator.enrolment.register import names_of

_ACTIONS = {
    "quarantine": ("Quarantine", "Its updates are refused, and it keeps them. It can be restored."),
    "restore": ("Restore", "Its updates are taken again."),
    "revoke": ("Revoke", "It is thrown out for good, under all its names, and its connection is ended."),
}
_POSSIBLE = {"active": ("quarantine", "revoke"), "quarantined": ("restore", "revoke"), "revoked": ()}


async def device_page(visit: Visit, device: str) -> None:
    """Make the page."""
    text("a", "All devices", href=PATH)
    try:
        found = await visit.get(f"/v1/devices/{device}", DeviceDetail)
    except ApiProblemError as error:
        if error.status not in {404, 422}:
            raise
        empty("No such device", f"Nothing is registered under the name {device}; it may have been removed.")
        return
    _facts(found.device)
    _buttons(visit, found)
    if found.device.enrolment is not None:
        _names(visit, found.device.enrolment)
        await _history(visit, found.device.enrolment)
    with box("section"):
        text("h2", "Updates that count")
        if found.counted:
            rows = [(one.task, str(one.round), moment(one.accepted_s), size(one.bytes_up)) for one in found.counted]
            table("Updates that count", ("Task", "Round", "Accepted", "Size"), rows)
        else:
            text("p", "None in the last 50 rounds of any task, under this name.", "cv-quiet")


def _facts(one: Device) -> None:
    """What is known about it."""
    with box("section", "cv-panel"), box("dl", "cv-facts"):
        for label, value in (
            ("Owner", one.owner or "registered by hand"),
            ("Added", moment(one.added_s)),
            ("Valid from", moment(one.not_before_s)),
            ("Valid until", moment(one.not_after_s) if one.not_after_s is not None else "for good"),
            ("Enrolment", one.enrolment or "–"),
            ("Public key", f"{one.public_key[:16]}…"),
        ):
            with box("div"):
                text("dt", label)
                text("dd", value)
        with box("div"):
            text("dt", "State")
            with box("dd"):
                text("span", one.state, "cv-chip", data_state=one.state)


def _buttons(visit: Visit, seen: DeviceDetail) -> None:
    """What may be done to it."""
    one = seen.device
    if one.enrolment is None or not visit.session.may("devices:write") or not _POSSIBLE.get(one.state):
        return
    subject, confirmation = one.enrolment, Confirmation(visit)

    async def explain() -> str:
        return told_by(await newest_entry(visit, subject), now_s=visit.parts.services.now_s())

    def button(action: str) -> None:
        label, words = _ACTIONS[action]

        async def act(reason: str) -> str:
            path, body = f"/v1/devices/{one.device}/{action}", StateBody(reason=reason)
            done = await visit.ask("POST", path, Device, body=body, etag=seen.etag)
            return f"Done: {done.device} is {done.state}."

        confirmation.button(
            label,
            about=one.device,
            title=f"{label} {one.device}?",
            words=words,
            act=act,
            explain=explain,
            with_reason=True,
        )

    with box("section", "cv-buttons"):
        for action in _POSSIBLE[one.state]:
            button(action)


def _names(visit: Visit, enrolment: str) -> None:
    """All names of the device, one after the other."""
    with visit.parts.services.store.database.reading() as connection:
        names = names_of(connection, enrolment)
    with box("section"):
        text("h2", f"Names ({len(names)})")
        rows = [(one.device, moment(one.not_before_s), moment(one.not_after_s)) for one in names]
        table("Names of this device", ("Name", "Valid from", "Valid until"), rows)


async def _history(visit: Visit, enrolment: str) -> None:
    """What was done to it, where its user may read the log."""
    if not visit.session.may("audit:read"):
        return
    found = await visit.get("/v1/audit", AuditPage, query={"subject": enrolment, "limit": 20})
    with box("section"):
        text("h2", "What was done")
        if not found.items:
            text("p", "Nothing that the audit log knows of.", "cv-quiet")
            return
        rows = [(moment(one.at_s), one.actor, one.action, str(one.detail.get("reason", ""))) for one in found.items]
        table("What was done", ("When", "Who", "What", "Reason"), rows)
