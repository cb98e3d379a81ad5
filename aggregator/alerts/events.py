"""Which entries of the audit log a webhook is told of, and in what words. Pure.

The log is the one source: an event that is not durable there is not told, and one that is can be told after any crash.
"""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

from aggregator.audit.entries import AuditEntry, Detail

WebhookEvent = Literal[
    "round.aborted",
    "model.rolled_back",
    "model.released",
    "task.paused",
    "task.aborted",
    "task.finished",
    "budget.80",
    "budget.100",
    "fleet.dropout",
    "device.revoked",
    "database.restored",
]
EVENTS: tuple[WebhookEvent, ...] = get_args(WebhookEvent)
BUDGET_80, DROPOUT, HALTED = "privacy.budget_80", "fleet.dropout", "privacy.halted"
"""Actions of entries."""
_AS_THEY_ARE: dict[str, WebhookEvent] = {
    "model.rolled_back": "model.rolled_back",
    "model.released": "model.released",
    "task.paused": "task.paused",
    "task.aborted": "task.aborted",
    "task.finished": "task.finished",
    BUDGET_80: "budget.80",
    HALTED: "budget.100",
    DROPOUT: "fleet.dropout",
    "device.revoked": "device.revoked",
    "database.restored": "database.restored",
}
# Security: what leaves the house is listed here; whatever an entry may come to hold besides does not go along.
_TOLD = {"outcome", "reason", "count", "expected", "version", "to", "epsilon", "budget", "against"}


class WebhookBody(msgspec.Struct, frozen=True, kw_only=True):
    """What is posted, as JSON.

    Args:
        id: the same at every attempt: the study's name and the entry's number.
        event: what happened.
        at_s: when, Unix seconds.
        tenant: the study's name on the wire.
        subject: a task, or TASK/ROUND; empty for what is about a device or the study. Never a device's name.
        detail: numbers and reasons.
        entry: number in the audit log.
    """

    id: str
    event: str
    at_s: float
    tenant: str
    subject: str
    detail: dict[str, Detail]
    entry: int


def event_of(entry: AuditEntry) -> WebhookEvent | None:
    """What an entry is for a webhook; None for what webhooks are not told of."""
    if entry.action == "round.closed":
        return "round.aborted" if entry.detail.get("outcome") != "committed" else None
    return _AS_THEY_ARE.get(entry.action)


def body_of(entry: AuditEntry, event: WebhookEvent, *, tenant: str) -> WebhookBody:
    """What is posted for an entry."""
    return WebhookBody(
        id=f"{tenant}-{entry.number}",
        event=event,
        at_s=entry.at_s,
        tenant=tenant,
        subject="" if event == "device.revoked" else entry.subject,
        detail={name: value for name, value in entry.detail.items() if name in _TOLD},
        entry=entry.number,
    )
