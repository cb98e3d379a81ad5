"""A task's model versions: where each came from, what it has cost, and which one is released or in force."""

from __future__ import annotations

from fastapi import Request

from aggregator.api.answers import ModelDetail, ModelPage, OrderAnswer, RollbackBody
from aggregator.api_client import ApiProblemError
from aggregator.dashboard.confirmation import Confirmation, newest_entry, told_by
from aggregator.dashboard.frame import Visit, empty
from aggregator.dashboard.gate import ROOT
from aggregator.dashboard.tables import Cell, onwards, table
from aggregator.dashboard.tags import box, moment, text
from aggregator.model_report import ModelReport
from aggregator.releases import RELEASED

PATH = f"{ROOT}/models"
_COLUMNS = ("Version", "Came from", "Made", "Validation", "Privacy spent", "Tags")


async def models_page(visit: Visit, request: Request, task: str) -> None:
    """Make the page."""
    cursor = request.query_params.get("cursor")
    try:
        found = await visit.get(f"/v1/tasks/{task}/models", ModelPage, query={"cursor": cursor, "limit": 20})
    except ApiProblemError as error:
        if error.status not in {404, 422}:
            raise
        empty("No such task", f"There is no task {task}.")
        return
    lineage = _Lineage(visit, task, found)
    with box("section"):
        text(
            "p",
            f"Rounds train version {found.in_force}. A rollback makes a new version from an earlier one.",
            "cv-quiet",
        )
        columns = (*_COLUMNS, "Decide") if lineage.may else _COLUMNS
        table(f"Versions of {task}", columns, [lineage.row(one) for one in found.items])
        onwards(f"{PATH}/{task}", (), cursor=found.next, is_first=cursor is None)


class _Lineage:
    """The versions as they were when the page was made, and what may be decided about them.

    Args:
        visit: whose page it is.
        task: whose versions they are.
        seen: as they were.
    """

    def __init__(self, visit: Visit, task: str, seen: ModelPage) -> None:
        self._visit, self._task, self._seen = visit, task, seen
        self.may = visit.session.may("models:write")
        self._confirmation = Confirmation(visit) if self.may else None

    def row(self, one: ModelReport) -> tuple[str | Cell, ...]:
        """A version's line."""
        is_in_force = one.version == self._seen.in_force
        accuracy = one.metrics.get("validation_accuracy")
        cells: tuple[str | Cell, ...] = (
            Cell(f"{one.version}, in force" if is_in_force else str(one.version)),
            _origin(one),
            moment(one.created_s),
            f"{accuracy:.1%}" if isinstance(accuracy, float) else "–",
            f"ε ≤ {one.record_epsilon:.3g} at δ {one.delta:g}" if one.record_epsilon is not None else "cannot be told",
            Cell(makes=lambda: _tags(one)) if one.tags else "",
        )
        return (*cells, Cell(makes=lambda: self._buttons(one))) if self.may else cells

    def _buttons(self, one: ModelReport) -> None:
        """What may be decided about a version."""
        if not one.kept:
            text("span", "pruned", "cv-quiet")
            return
        if self._confirmation is None:
            return
        with box("div", "cv-buttons"):
            if self._seen.approvals_needed:
                self._approval(one.version, self._confirmation)
            if not self._missing(one.version) and RELEASED not in one.tags:
                self._confirmation.button(
                    "Release",
                    about=f"version {one.version}",
                    title=f"Release version {one.version} of {self._task}?",
                    words="It gets the tag released, which another version may lose; it is kept for good.",
                    act=lambda _reason: self._release(one.version),
                    explain=self._explain,
                )
            if one.version != self._seen.in_force:
                self._confirmation.button(
                    "Roll back",
                    about=f"to version {one.version}",
                    title=f"Roll {self._task} back to version {one.version}?",
                    words="The open round is given up: its devices have charged their budgets for nothing. Rounds go "
                    "on from a new version with these parameters.",
                    act=lambda _reason: self._roll_back(one.version),
                    explain=self._explain,
                )

    def _missing(self, version: int) -> int:
        """How many more accounts have to approve a version before it can be released."""
        return max(0, self._seen.approvals_needed - len(self._seen.approved.get(version, [])))

    def _approval(self, version: int, confirmation: Confirmation) -> None:
        """Who has approved a version so far, and this account's word on it."""
        by = self._seen.approved.get(version, [])
        text("span", f"{len(by)} of {self._seen.approvals_needed} approved" + (f": {', '.join(by)}" if by else ""))
        withdraws = self._visit.session.who.account in by
        confirmation.button(
            "Withdraw approval" if withdraws else "Approve",
            about=f"version {version}",
            title=f"{'Withdraw your approval of' if withdraws else 'Approve'} version {version} of {self._task}?",
            words=f"{self._seen.approvals_needed} accounts have to approve it before it can be released.",
            act=lambda _reason: self._approve(version, withdraws=withdraws),
            explain=self._explain,
        )

    async def _approve(self, version: int, *, withdraws: bool) -> str:
        path = f"/v1/tasks/{self._task}/models/{version}/approval"
        await self._visit.ask("DELETE" if withdraws else "POST", path, ModelDetail, etag=self._seen.etag)
        return f"Done: version {version} is {'approved by you no more' if withdraws else 'approved by you'}."

    async def _release(self, version: int) -> str:
        path = f"/v1/tasks/{self._task}/models/{version}/tags/{RELEASED}"
        await self._visit.ask("PUT", path, ModelDetail, etag=self._seen.etag)
        return f"Done: version {version} is released."

    async def _roll_back(self, version: int) -> str:
        path, body = f"/v1/tasks/{self._task}/rollback", RollbackBody(version=version)
        found = await self._visit.ask("POST", path, OrderAnswer, body=body, etag=self._seen.etag)
        if found.state == "done":
            return f"Done: {self._task} goes on from version {version}."
        return f"Asked, as order {found.order}: {found.reason}."

    async def _explain(self) -> str:
        """What has changed since the page was made, and by whom."""
        entry = await newest_entry(self._visit, self._task)
        words = [told_by(entry, now_s=self._visit.parts.services.now_s())]
        try:
            now = await self._visit.get(f"/v1/tasks/{self._task}/models", ModelPage, query={"limit": 1})
        except ApiProblemError:
            return words[0]
        if now.in_force != self._seen.in_force:
            words.insert(0, f"version {now.in_force} is in force now, it was {self._seen.in_force}")
        return "; ".join(words)


def _origin(one: ModelReport) -> str:
    """Where a version came from."""
    if one.origin == "round":
        return f"round {one.round}, from version {one.parent}"
    if one.origin == "rollback":
        return f"rollback to version {one.parent}"
    if one.origin == "average":
        return "average of the last versions"
    return "the beginning"


def _tags(one: ModelReport) -> None:
    """Its tags."""
    with box("div", "cv-buttons"):
        for tag in one.tags:
            text("span", tag, "cv-chip", data_state="active" if tag == RELEASED else "")
