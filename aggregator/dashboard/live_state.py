"""What all pages show of the study as it is now: read once for all of them, a few times a second, while anybody looks.

A reading is the API's own overview (one to three milliseconds with 10,000 devices and 500 rounds); pages are told of
each, and of a database that does not answer. When the audit log has grown, every session's token is asked after again,
since whoever revokes a token or disables an account writes there in the same transaction.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from fastapi.concurrency import run_in_threadpool

from aggregator.accounts.verification import RejectedTokenError
from aggregator.api.guard import ApiServices
from aggregator.audit.log import log_size
from aggregator.dashboard.sessions import Session, Sessions
from aggregator.errors import AggregatorError
from aggregator.overview import Overview, overview

LOOK_EVERY_S = 0.25
ASK_AFTER_S = 30.0
"""Tokens are asked after at least this often."""


@dataclass(frozen=True)
class LiveState:
    """The study at one moment.

    Args:
        at_s: when it was read, Unix seconds.
        overview: None before the first reading that succeeded.
        entries: of the audit log.
        refusals: so far, by task and reason.
        trouble: why nothing newer could be read; empty if it could.
    """

    at_s: float
    overview: Overview | None = None
    entries: int = 0
    refusals: dict[str, dict[str, int]] = field(default_factory=dict)
    trouble: str = ""


class _Looker(NamedTuple):
    """A page that is open."""

    session: Session
    shows: Callable[[LiveState], None]
    ends: Callable[[str], None]


class LiveStudy:
    """See the module docstring. Used on the event loop alone.

    Args:
        services: of the API.
        sessions: who is signed in.
        leave: ends the connections of a session's pages.
    """

    def __init__(self, services: ApiServices, sessions: Sessions, leave: Callable[[Session], object]) -> None:
        self._services, self._sessions, self._leave = services, sessions, leave
        self._lookers: dict[str, _Looker] = {}
        self._asked: tuple[int, float] = (-1, 0.0)
        self._reading = asyncio.Lock()
        self._read_s = -LOOK_EVERY_S
        self.now = LiveState(services.now_s())

    def look(
        self, page: str, session: Session, shows: Callable[[LiveState], None], ends: Callable[[str], None]
    ) -> None:
        """Tell a page of every reading, and of why its session is over.

        Args:
            page: its id.
            session: that it was made for.
            shows: is told of readings.
            ends: is told once why the session is over.
        """
        self._lookers[page] = _Looker(session, shows, ends)

    def leave(self, page: str) -> None:
        """A page is closed."""
        self._lookers.pop(page, None)

    async def fresh(self) -> LiveState:
        """The study now: as it was read just now, or read anew."""
        async with self._reading:
            if self._services.monotonic_s() - self._read_s >= LOOK_EVERY_S:
                self.now = await run_in_threadpool(self._read)
                self._read_s = self._services.monotonic_s()
            return self.now

    async def run(self) -> None:
        """Read and tell until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if not self._lookers:
                continue
            found = await self.fresh()
            await self._end_sessions(found)
            for looker in list(self._lookers.values()):
                looker.shows(found)

    def _read(self) -> LiveState:
        """One reading; the last one with the reason where the database does not answer."""
        services, now_s = self._services, self._services.now_s()
        try:
            found = overview(services.store, tenant=services.tenant, now_s=now_s)
            refusals = services.store.refusals_by_task()
            with services.store.database.reading() as connection:
                entries = log_size(connection)
        except AggregatorError:
            why = "The database does not answer. What you see is as it last was; orders wait until it is back."
            return replace(self.now, trouble=why)
        return LiveState(now_s, found, entries, refusals)

    async def _end_sessions(self, found: LiveState) -> None:
        """End those whose time is over, and those whose token does not hold any more."""
        entries, asked_s = self._asked
        lookers = list(self._lookers.items())
        is_due = found.entries != entries or self._services.monotonic_s() - asked_s >= ASK_AFTER_S
        over: dict[str, str] = {}
        for session in {one.session for _, one in lookers}:
            if not self._sessions.holds(session):
                over[session.key] = "over"
            elif is_due and not found.trouble and (why := await run_in_threadpool(self._why_over, session)):
                over[session.key] = why
                self._sessions.end(session)
        if is_due and not found.trouble:
            self._asked = (found.entries, self._services.monotonic_s())
        for page, looker in lookers:
            if looker.session.key in over:
                self.leave(page)
                looker.ends(over[looker.session.key])
        for session in {one.session for _, one in lookers if one.session.key in over}:
            self._leave(session)

    def _why_over(self, session: Session) -> str:
        """Why a session's token does not hold any more; empty if it does, or if nobody can tell just now."""
        try:
            self._services.verifier.verify(session.secret, address=session.address)
        except RejectedTokenError as error:
            return error.code
        except AggregatorError:
            return ""
        return ""
