"""The audit log: what was done, by whom, and how far it is proved."""

from __future__ import annotations

from fastapi import Request

from aggregator.api.answers import AuditPage, AuditState
from aggregator.api_client import ApiProblemError
from aggregator.audit.entries import AuditEntry
from aggregator.dashboard.frame import Visit, empty
from aggregator.dashboard.gate import ROOT
from aggregator.dashboard.live_state import LiveState
from aggregator.dashboard.tables import Choice, chooser, onwards, table
from aggregator.dashboard.tags import box, count, moment, text

PATH = f"{ROOT}/audit"


async def audit_page(visit: Visit, request: Request) -> None:
    """Make the page."""
    proof = _Proof(visit)
    proof.show(await visit.get("/v1/audit/state", AuditState))
    asked = request.query_params
    choices = tuple(
        Choice(name, label, asked.get(name, "").strip())
        for name, label in (("actor", "Who"), ("action", "What"), ("subject", "On what"))
    )
    chooser(PATH, choices)
    query: dict[str, str | int | None] = {one.name: one.value for one in choices}
    cursor = asked.get("cursor")
    found = await visit.get("/v1/audit", AuditPage, query={**query, "cursor": cursor, "limit": 25})
    if not found.items:
        empty("No such entry", "Nothing in the log is as chosen above.")
        return
    with box("section"):
        rows = [_row(one) for one in found.items]
        table("Entries of the audit log", ("Entry", "When", "Who", "What", "On", "Detail"), rows)
        onwards(PATH, choices, cursor=found.next, is_first=cursor is None)
    visit.shows(proof.keep_up)


def _row(one: AuditEntry) -> tuple[str, ...]:
    detail = ", ".join(f"{name} {value}" for name, value in one.detail.items())
    return str(one.number), moment(one.at_s), one.actor, one.action, one.subject, detail


class _Proof:
    """How far the log is proved, and the button that verifies all of it.

    Args:
        visit: whose page it is.
    """

    def __init__(self, visit: Visit) -> None:
        self._visit = visit
        self._is_verifying = False
        with box("section", "cv-panel", aria_label="How far the log is proved", aria_live="polite"):
            self._size = text("p", "", "cv-big")
            self._checkpoint, self._cosigned, self._found = text("p"), text("p"), text("p", "", "cv-good")
            self._button = text("button", "Verify the whole log", "cv-button", type="button")
            self._button.on("click", self._verify)

    def show(self, state: AuditState) -> None:
        """Show how far it is proved."""
        self._size.set_text(f"{count(state.entries)} entries")
        if state.checkpoint is None:
            self._checkpoint.set_text(
                "No checkpoint yet: the chain alone holds the entries. A coordinator signs one a round."
            )
        else:
            after = state.entries - state.checkpoint
            last = "entry" if after == 1 else count(after)
            rest = "all of them" if not after else f"all but the last {last}, held by the chain alone"
            self._checkpoint.set_text(f"Under the aggregator's newest checkpoint: {rest}.")
        self._cosigned.set_text(_cosigned(state))
        self._found.set_text(_found(state))
        is_wrong = state.verified is not None and bool(state.verified.outcome)
        self._found.classes(add="cv-wrong" if is_wrong else "", remove="" if is_wrong else "cv-wrong")
        self._is_verifying = state.verifying is not None
        self._button.set_visibility(state.can_verify and not self._is_verifying)

    def keep_up(self, _state: LiveState) -> None:
        """Ask how far a verification is, while one runs."""
        if self._is_verifying:
            self.show(self._visit.parts.services.audit.state())

    async def _verify(self) -> None:
        try:
            self.show(await self._visit.ask("POST", "/v1/audit/verify", AuditState))
        except ApiProblemError as error:
            self._found.set_text(f"Not verified: {error.problem.detail}.")


def _cosigned(state: AuditState) -> str:
    """Who has co-signed the newest checkpoint."""
    if not state.helpers:
        return "No helper is configured to co-sign: whoever has the signing key could write all of it anew."
    by = {one.helper: one.at_s for one in state.cosigned}
    words = [f"co-signed by {name} on {moment(by[name])}" if name in by else f"not by {name}" for name in state.helpers]
    return f"It is {', '.join(words)}." if state.checkpoint is not None else ""


def _found(state: AuditState) -> str:
    """What the last verification has found."""
    if state.verifying is not None:
        return f"Verifying: {count(state.verifying)} of {count(state.entries)} entries"
    found = state.verified
    if found is None:
        return (
            ""
            if state.can_verify
            else "covey-aggregator audit verify checks all of it; this process does not know the key."
        )
    if found.outcome:
        return f"DOES NOT HOLD ({found.outcome}): {found.detail}. Verified {moment(found.ended_s)}."
    return f"Verified {moment(found.ended_s)}: all {count(found.entries)} entries and every checkpoint hold."
