"""Every page of the dashboard, at its path."""

from __future__ import annotations

from fastapi import Request
from nicegui import ui

from aggregator.dashboard.frame import Parts, framed
from aggregator.dashboard.live_page import live_page


def add_pages(parts: Parts) -> None:
    """Register them with NiceGUI, once in a process."""

    @ui.page("/")
    async def live(request: Request) -> None:
        await parts.live.fresh()
        with framed(parts, request, at="", title="Live") as visit:
            if visit is not None:
                live_page(visit)
