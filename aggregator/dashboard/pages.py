"""Every page of the dashboard, at its path."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import Request
from nicegui import ui

from aggregator.api_client import ApiProblemError
from aggregator.dashboard.audit_page import audit_page
from aggregator.dashboard.curves_page import curves_page
from aggregator.dashboard.device_page import device_page
from aggregator.dashboard.fleet_book import FleetBook
from aggregator.dashboard.fleet_page import fleet_page
from aggregator.dashboard.frame import Parts, Visit, empty, framed
from aggregator.dashboard.gate import ROOT
from aggregator.dashboard.history import HistoryBook
from aggregator.dashboard.live_page import live_page
from aggregator.dashboard.models_page import models_page
from aggregator.dashboard.refusals_page import refusals_page
from aggregator.dashboard.tags import box, text
from aggregator.errors import DatabaseError

Make = Callable[[Visit], Awaitable[None]]


def add_pages(parts: Parts) -> None:
    """Register them with NiceGUI, once in a process."""
    book, fleet_book = HistoryBook(parts.services), FleetBook(parts.services)

    async def show(request: Request, at: str, title: str, make: Make) -> None:
        await parts.live.fresh()
        with framed(parts, request, at=at, title=title) as visit:
            if visit is None:
                return
            try:
                await make(visit)
            except ApiProblemError as error:
                empty("Not just now", f"{error.problem.detail}.")
            except DatabaseError:
                empty("Not just now", "The database does not answer; load this page again in a while.")

    async def of_a_task(request: Request, at: str, title: str, make: Make, task: str) -> None:
        found = parts.live.now.overview
        names = [one.name for one in found.tasks] if found is not None else []

        async def chosen(visit: Visit) -> None:
            _tasks(names, at, task or (names[0] if names else ""))
            if names or task:
                await make(visit)

        await show(request, at, title, chosen)

    @ui.page("/")
    async def live(request: Request) -> None:
        await show(request, "", "Live", _at_once(live_page))

    @ui.page("/fleet")
    async def fleet(request: Request) -> None:
        await show(request, "fleet", "Fleet", lambda visit: fleet_page(visit, request, fleet_book))

    @ui.page("/fleet/{device}")
    async def one_device(request: Request, device: str) -> None:
        await show(request, "fleet", device, lambda visit: device_page(visit, device))

    @ui.page("/refusals")
    async def refusals(request: Request) -> None:
        await show(request, "refusals", "Refused updates", _at_once(refusals_page))

    @ui.page("/audit")
    async def audit(request: Request) -> None:
        await show(request, "audit", "Audit log", lambda visit: audit_page(visit, request))

    def first() -> str:
        found = parts.live.now.overview
        return found.tasks[0].name if found is not None and found.tasks else ""

    @ui.page("/curves")
    async def curves(request: Request) -> None:
        await parts.live.fresh()
        await curves_of(request, first())

    @ui.page("/curves/{task}")
    async def curves_of(request: Request, task: str) -> None:
        await of_a_task(request, "curves", "Curves", lambda visit: curves_page(visit, book, task), task)

    @ui.page("/models")
    async def models(request: Request) -> None:
        await parts.live.fresh()
        await models_of(request, first())

    @ui.page("/models/{task}")
    async def models_of(request: Request, task: str) -> None:
        await of_a_task(request, "models", "Models", lambda visit: models_page(visit, request, task), task)


def _at_once(make: Callable[[Visit], None]) -> Make:
    """A page that waits for nothing."""

    async def made(visit: Visit) -> None:
        make(visit)

    return made


def _tasks(names: list[str], at: str, task: str) -> None:
    """Which task it is about, and the others."""
    if not names:
        empty("No task yet", "There is nothing to show before a task.", "covey-aggregator task create exercises.toml")
        return
    with box("nav", "cv-nav cv-tasks", aria_label="Tasks"):
        for name in names:
            here = {"aria_current": "page"} if name == task else {}
            text("a", name, href=f"{ROOT}/{at}/{name}", **here)
