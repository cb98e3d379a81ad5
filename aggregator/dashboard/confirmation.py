"""What stands between a button and what it does: one more question, and then what came of it, by name."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from nicegui import ui
from nicegui.elements.mixins.text_element import TextElement

from aggregator.api.answers import AuditPage
from aggregator.api_client import ApiProblemError
from aggregator.audit.entries import AuditEntry
from aggregator.dashboard.frame import Visit
from aggregator.dashboard.tags import attribute, box, span, text

Act = Callable[[str], Awaitable[str]]
"""Does it, told a reason; says what was done. Raises ApiProblemError."""
Explain = Callable[[], Awaitable[str]]
"""Says what has changed since the page was made."""
_DONE_ALREADY = {"same_state", "revoked", "already_asked", "already_released", "already_approved"}


class Confirmation:
    """The dialog of a page: Tab stays in it, Enter in the reason confirms, Escape leaves everything as it is.

    Args:
        visit: the page that it is on.
    """

    def __init__(self, visit: Visit) -> None:
        self._visit = visit
        self._act: Act | None = None
        self._explain: Explain | None = None
        with ui.dialog() as self._dialog, box("div", "cv-card cv-dialog", role="document"):
            self._dialog.props["aria-labelledby"] = "confirmation"
            self._title = text("h2", id="confirmation")
            self._words = text("p")
            self._reason = ui.input("Reason, for the log and the device").classes("cv-reason")
            self._reason.props("outlined maxlength=500").on("keydown.enter", self._confirm)
            self._told = text("p", "", "cv-told", role="alert")
            with box("div", "cv-buttons"):
                self._leave = text("button", "Cancel", "cv-button", type="button")
                self._leave.on("click", self._close)
                self._yes = text("button", "", "cv-button cv-primary", type="button")
                self._yes.on("click", self._confirm)
        self._is_over = False

    def button(
        self, label: str, *, about: str, title: str, words: str, act: Act, explain: Explain, with_reason: bool = False
    ) -> TextElement:
        """A button that asks before it acts.

        Args:
            label: on it, and on the button that confirms.
            about: what it is about, for those who do not see where it stands.
            title: of the question.
            words: what will happen.
            act: does it.
            explain: what has changed since the page was made.
            with_reason: whether a reason has to be given.
        """
        made = text("button", label, "cv-button", type="button", aria_label=f"{label}: {about}")

        def ask() -> None:
            self._act, self._explain, self._is_over = act, explain, False
            for element, what in ((self._title, title), (self._words, words), (self._yes, label), (self._told, "")):
                element.set_text(what)
            self._reason.set_visibility(with_reason)
            self._reason.props(add="autofocus" if with_reason else "", remove="" if with_reason else "autofocus")
            attribute(self._yes, "data-autofocus", None if with_reason else "")
            self._reason.set_value("" if with_reason else "-")
            self._yes.set_visibility(True)
            self._leave.set_text("Cancel")
            self._dialog.open()

        made.on("click", ask)
        return made

    def _close(self) -> None:
        self._dialog.close()
        if self._is_over:
            self._visit.client.run_javascript("window.location.reload()")

    async def _confirm(self) -> None:
        """Do it, once."""
        act, explain, reason = self._act, self._explain, str(self._reason.value or "").strip()
        if act is None or explain is None:
            return
        if not reason:
            self._told.set_text("Say why: the reason stands in the audit log.")
            return
        self._act = None
        try:
            outcome = await act(reason)
        except ApiProblemError as error:
            if error.status == 422:
                self._act = act
                self._told.set_text(f"Not done: {error.problem.detail}.")
                return
            outcome = await outcome_of(error, explain)
        self._is_over = True
        self._told.set_text(outcome)
        self._reason.set_visibility(False)
        self._yes.set_visibility(False)
        self._leave.set_text("Look again")


async def outcome_of(error: ApiProblemError, explain: Explain) -> str:
    """What came of something that was not done, by name."""
    detail = error.problem.detail
    if error.status == 412:
        return f"Changed since you looked: {await explain()}. Nothing was done; look again."
    if error.problem.code in _DONE_ALREADY:
        return f"Done already: {detail}; {await explain()}."
    if error.status == 401:
        return f"Your session is over: {detail}."
    return f"Not done: {detail}."


async def newest_entry(visit: Visit, subject: str) -> AuditEntry | None:
    """The newest entry of the audit log about something; None if there is none, or it is not for this user."""
    if not visit.session.may("audit:read"):
        return None
    try:
        found = await visit.get("/v1/audit", AuditPage, query={"subject": subject, "limit": 1})
    except ApiProblemError:
        return None
    return found.items[0] if found.items else None


def told_by(entry: AuditEntry | None, *, now_s: float) -> str:
    """Who did what, for somebody who came second."""
    if entry is None:
        return "somebody else was quicker"
    reason = entry.detail.get("reason", "")
    words = f"{entry.actor} did {entry.action} {span(now_s - entry.at_s)} ago"
    return f"{words} ({reason})" if reason else words
