"""Tells webhooks what the audit log says, each at its own pace: in order, at least once, over any crash.

What a webhook has been told is one number in the database, moved after it has taken an event. So nothing is lost with a
process that is killed, and an event whose answer was lost comes again under the same id. One that is refused is tried
again, less and less often, for three days; then it is given up, and the journal says so. A new webhook begins with what
happens from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec
from sqlalchemy import Connection, delete, insert, select, update

from aggregator.alerts.events import WebhookEvent, body_of, event_of
from aggregator.alerts.signature import headers_of
from aggregator.audit.entries import AuditEntry, decode_entry
from aggregator.audit.log import log_size, stored_entries
from aggregator.store import schema
from aggregator.store.database import Database

FIRST_RETRY_S = 5.0
LONGEST_RETRY_S = 3600.0
GIVEN_UP_AFTER_S = 3 * 86_400.0
MOST_READ = 500
"""Entries that are looked through in one step."""
_TABLE = schema.webhooks


Post = Callable[[bytes, dict[str, str]], str]
"""Posts a body with headers; returns why it was not taken, empty if it was."""


class Note(Protocol):
    """Writes to the journal."""

    def __call__(self, event: str, /, **fields: Any) -> None:
        """An event with its fields."""


class Webhook(NamedTuple):
    """A receiver.

    Args:
        name: of the operator's choice.
        events: that it is told of.
        key: shared secret.
        post: how it is reached.
    """

    name: str
    events: frozenset[WebhookEvent]
    key: bytes
    post: Post


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """How far a webhook is.

    Args:
        position: number of the entry that it is told of next.
        waiting: entries from there on; few of them may concern it.
        delivered: events that it has taken.
        delivered_s: when it took the last, Unix seconds.
        failures: attempts in a row that failed.
        failing_s: since when.
        due_s: when it is tried again, Unix seconds.
        problem: why the last attempt failed; empty after one that did not.
    """

    name: str
    position: int
    waiting: int
    delivered: int
    delivered_s: float | None
    failures: int
    failing_s: float | None
    due_s: float
    problem: str


class Webhooks:
    """See the module docstring. Raises DatabaseError.

    Args:
        database: with the log.
        tenant: the study's name on the wire.
        hooks: that are configured; what the database knows of others is forgotten.
        note: writes to the journal.
        now_s: Unix seconds.
    """

    def __init__(
        self,
        database: Database,
        *,
        tenant: str,
        hooks: Sequence[Webhook],
        note: Note,
        now_s: Callable[[], float],
    ) -> None:
        self._database, self._tenant, self._hooks = database, tenant, hooks
        self._note, self._now_s = note, now_s

    def begin(self) -> None:
        """Note where new webhooks begin, and forget those that are configured no more."""
        names = [hook.name for hook in self._hooks]
        with self._database.transaction() as connection:
            connection.execute(delete(_TABLE).where(_TABLE.c.webhook.not_in(names)))
            known = set(connection.execute(select(_TABLE.c.webhook)).scalars())
            for name in names:
                if name not in known:
                    connection.execute(insert(_TABLE).values(_fresh(name, log_size(connection))))

    def step(self) -> bool:
        """Tell each webhook that is due of one event at most; whether there may be more to tell at once."""
        more = [self._tell(hook) for hook in self._hooks]
        return any(more)

    def _tell(self, hook: Webhook) -> bool:
        """Tell one webhook; whether it may be told more at once."""
        now_s = self._now_s()
        with self._database.reading() as connection:
            row = connection.execute(select(_TABLE).where(_TABLE.c.webhook == hook.name)).one_or_none()
            if row is None or (row.due_s > now_s and row.due_s - now_s <= LONGEST_RETRY_S):
                return False
            entries = _entries(connection, row.position)
        if not entries:
            return False
        for entry in entries:
            event = event_of(entry)
            if event is not None and event in hook.events:
                return self._deliver(hook, row, entry, event)
        self._move(hook.name, position=entries[-1].number + 1)
        return len(entries) == MOST_READ

    def _deliver(self, hook: Webhook, row: Any, entry: AuditEntry, event: WebhookEvent) -> bool:
        """Post one event, outside of any transaction; whether it was taken."""
        told = body_of(entry, event, tenant=self._tenant)
        body = msgspec.json.encode(told)
        problem = hook.post(body, headers_of(told.id, body, key=hook.key, now_s=self._now_s()))
        now_s, about = self._now_s(), {"webhook": hook.name, "id": told.id, "told": event}
        if not problem:
            self._move(hook.name, position=entry.number + 1, delivered=row.delivered + 1, delivered_s=now_s)
            self._note("webhook_delivered", **about)
            return True
        since_s = row.failing_s if row.failing_s is not None else now_s
        if now_s - since_s > GIVEN_UP_AFTER_S:
            self._move(hook.name, position=entry.number + 1, problem=problem)
            self._note("webhook_given_up", reason=problem, **about)
            return True
        wait_s = min(LONGEST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(row.failures, 20))
        failed = {"failures": row.failures + 1, "failing_s": since_s, "due_s": now_s + wait_s, "problem": problem[:500]}
        self._write(hook.name, failed)
        self._note("webhook_failed", reason=problem, again_in_s=round(wait_s), **about)
        return False

    def _move(self, name: str, **values: Any) -> None:
        """It is told of what comes next."""
        self._write(name, {"failures": 0, "failing_s": None, "due_s": 0.0, "problem": "", **values})

    def _write(self, name: str, values: dict[str, Any]) -> None:
        with self._database.transaction() as connection:
            connection.execute(update(_TABLE).where(_TABLE.c.webhook == name).values(values))


def standings(connection: Connection) -> list[Standing]:
    """How far each webhook is, by name."""
    size = log_size(connection)
    return [
        Standing(
            name=row.webhook,
            position=row.position,
            waiting=max(0, size - row.position),
            delivered=row.delivered,
            delivered_s=row.delivered_s,
            failures=row.failures,
            failing_s=row.failing_s,
            due_s=row.due_s,
            problem=row.problem,
        )
        for row in connection.execute(select(_TABLE).order_by(_TABLE.c.webhook))
    ]


def _entries(connection: Connection, position: int) -> list[AuditEntry]:
    """The next entries, in their order."""
    end = position + MOST_READ
    return [decode_entry(one.entry) for one in stored_entries(connection, begin=position, end=end)]


def _fresh(name: str, position: int) -> dict[str, Any]:
    return {
        "webhook": name, "position": position, "delivered": 0, "delivered_s": None, "failures": 0, "failing_s": None,
        "due_s": 0.0, "problem": "",
    }  # fmt: skip
