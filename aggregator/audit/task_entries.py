"""What the audit log holds of a task's rounds: from one transition of the round table to entries, in its transaction.

Of a round it holds how many updates were added up and a digest of their ids, which anybody who has the list can check;
never a name, nor anything that was computed from fewer than the minimum cohort.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection

from aggregator.audit.entries import AuditEvent, Detail
from aggregator.audit.log import append, has_entry
from aggregator.round_events import (
    AbortRound,
    AnnounceTask,
    AskHelpers,
    CommitRound,
    FinishTask,
    OpenRound,
    ResumeAsked,
    RollBack,
    RoundAction,
    RoundEvent,
)
from aggregator.round_state import Phase, RoundState
from aggregator.store.aggregator_store import AggregatorStore
from aggregator.store.models import PreparedModel
from fl_protocol.messages import RoundManifestMsg
from fl_protocol.secagg.parties import included_digest
from fl_protocol.secagg.terms import manifest_digest

AGGREGATOR = "aggregator"
PUBLISHED = "round.published"


@dataclass(frozen=True)
class Transition:
    """What happened to a task.

    Args:
        before: where it stood.
        after: where it stands.
        event: what happened.
        actions: that were carried out.
        models: that were added.
        order: id of the operator's order that the event is, if it is one.
        halted: why the task's budget lets no round go on; empty if it does.
    """

    before: RoundState
    after: RoundState
    event: RoundEvent | None
    actions: Sequence[RoundAction]
    models: Sequence[PreparedModel]
    order: int | None = None
    halted: str = ""


def record(connection: Connection, store: AggregatorStore, task: str, what: Transition, *, now_s: float) -> None:
    """Add the entries of a transition, at the end of its transaction.

    Args:
        connection: with the transaction.
        store: the database.
        task: name.
        what: happened.
        now_s: Unix seconds.
    """
    ordered: dict[str, Detail] = {} if what.order is None else {"order": what.order}
    for action, subject, detail in _entries(connection, store, task, what):
        append(connection, AuditEvent(now_s, AGGREGATOR, action, subject, {**detail, **ordered}))


def record_manifest(connection: Connection, manifest: RoundManifestMsg) -> None:
    """Add what an open round's manifest is, before any device can see it; a round has one such entry."""
    subject = f"{manifest.task}/{manifest.round}"
    if not has_entry(connection, PUBLISHED, subject):
        detail = {"engine": manifest.engine, "manifest": manifest_digest(manifest).hex()}
        append(connection, AuditEvent(manifest.opened_s, AGGREGATOR, PUBLISHED, subject, detail))


_Told = tuple[str, str, dict[str, Detail]]


def _entries(connection: Connection, store: AggregatorStore, task: str, what: Transition) -> Iterator[_Told]:
    """Action, subject and detail of each."""
    if isinstance(what.event, ResumeAsked) and what.after.phase is not Phase.PAUSED:
        yield "task.resumed", task, {}
    for action in what.actions:
        match action:
            case OpenRound():
                digest = store.models.digest(connection, task, what.after.version).hex()
                detail: dict[str, Detail] = {"version": what.after.version, "model": digest}
                yield "round.opened", f"{task}/{action.number}", {**detail, "deadline_s": action.deadline_s}
            case AskHelpers():
                yield "round.unmasking", f"{task}/{action.number}", {"count": what.before.arrived}
            case CommitRound():
                yield (
                    "round.closed",
                    f"{task}/{action.number}",
                    _committed(connection, store, task, action.number, what),
                )
            case AbortRound():
                given_up: dict[str, Detail] = {
                    "outcome": action.outcome,
                    "reason": action.reason,
                    "count": what.before.arrived,
                }
                yield "round.closed", f"{task}/{action.number}", given_up
            case FinishTask():
                yield "task.finished", task, _model(what.models[-1:])
            case RollBack():
                yield "model.rolled_back", task, {"to": action.version, **_model(what.models[-1:])}
            case AnnounceTask():
                yield from _standing(task, what)


def _committed(
    connection: Connection, store: AggregatorStore, task: str, number: int, what: Transition
) -> dict[str, Detail]:
    """A round that made what comes next."""
    ids = store.updates.counted_ids(connection, task, number)
    detail: dict[str, Detail] = {"outcome": "committed", "count": len(ids), "included": included_digest(ids).hex()}
    return {**detail, **_model(what.models[:1])}


def _standing(task: str, what: Transition) -> Iterable[_Told]:
    """A task that goes on no more."""
    if what.halted and what.after.reason == what.halted:
        yield "privacy.halted", task, {"reason": what.halted}
    elif what.after.phase in {Phase.PAUSED, Phase.ABORTED} and what.after.phase is not what.before.phase:
        yield f"task.{what.after.phase.value}", task, {"reason": what.after.reason}


def _model(models: Sequence[PreparedModel]) -> dict[str, Detail]:
    """Which version came of it, if one did."""
    return {"version": int(models[0].row["version"]), "model": models[0].digest.hex()} if models else {}
