"""One task's rounds: the transition table decides, one transaction carries it out, and only then is it published.

Everything that is promised to a device is committed first: a manifest follows the transaction that opened its round.
After a crash, or an error that leaves open whether a transaction became durable, the task is read from the database
again and published as it stands there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from sqlalchemy import Connection

from aggregator.announcer import Announcer
from aggregator.audit import task_entries
from aggregator.combination import adds_up, why_not_without
from aggregator.device_budget import TaskBudget
from aggregator.errors import BlobError, CombineError, ConflictError, LostModelError, RejectedModelError
from aggregator.helper_calls import HelperCalls
from aggregator.in_force import config_of
from aggregator.round_events import (
    AbortRound,
    AnnounceTask,
    Arrived,
    AskHelpers,
    CombineFailed,
    CommitRound,
    ExtendRound,
    FinishTask,
    OpenRound,
    PauseAsked,
    Reachable,
    ResumeAsked,
    RollBack,
    RoundAction,
    RoundEvent,
    StillMasked,
    Ticked,
    Unseen,
)
from aggregator.round_outcomes import RoundOutcome, RoundOutcomes
from aggregator.round_rows import RoundRows
from aggregator.rounds import Phase, RoundState, transition
from aggregator.store.aggregator_store import AggregatorStore
from aggregator.store.leases import COORDINATOR
from aggregator.store.models import NewModel, PreparedModel
from aggregator.store.tasks import StoredTask
from aggregator.task_file import TaskConfig
from aggregator.task_publisher import TaskPublisher
from aggregator.unmasking import Unmasking
from aggregator.validation import Judge
from fl_protocol.adapters.journal import Journal
from fl_protocol.bundle import ModelBundle

_RETRIES = (Reachable, Arrived, Ticked, StillMasked)
"""Events with which publishing, or asking helpers, is tried again after it failed."""
KEEP_VERSIONS = 50
"""Newest versions whose parameters are kept; older ones only if they are tagged, or the finished model's average."""


@dataclass(frozen=True)
class RunnerPorts:
    """What all tasks of a coordinator share.

    Args:
        tenant: name on the wire.
        store: the database.
        announcer: publishes.
        journal: where events are told.
        entropy: cryptographic source of bytes, for round keys.
        now_s: Unix seconds.
        worker: the coordinator's name, under which it has its lease.
        calls: to the helpers of secure rounds.
    """

    tenant: str
    store: AggregatorStore
    announcer: Announcer
    journal: Journal
    entropy: Callable[[int], bytes]
    now_s: Callable[[], float]
    worker: str
    calls: HelperCalls


@dataclass
class _Change:
    """What one transition will write, beside the state, and what to tell of it once it is durable."""

    models: list[NewModel] = field(default_factory=list)
    prepared: list[PreparedModel] = field(default_factory=list)
    notes: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    outcome: RoundOutcome | None = None
    event: RoundEvent | None = None


class TaskRunner:
    """See the module docstring.

    Args:
        stored: the task as the database has it.
        bundle: its model bundle.
        judge: of the operator's validation set, if there is one.
        ports: what it is run with.
    """

    def __init__(self, stored: StoredTask, *, bundle: ModelBundle, judge: Judge | None, ports: RunnerPorts) -> None:
        self.name = stored.name
        self.config: TaskConfig = config_of(stored.spec, stored.name)
        self._policy, self._ports = self.config.policy, ports
        num_parameters = len(bundle.shared_params)
        self._update_length = self.config.update_length(num_parameters)
        self._maker = RoundOutcomes(
            ports.store,
            ports.tenant,
            self.config,
            update_length=self._update_length,
            judge=judge,
            entropy=ports.entropy,
        )
        self._rows = RoundRows(ports.store, self.config, update_length=self._update_length, entropy=ports.entropy)
        self._budget = TaskBudget(ports.store, self.config, update_length=self._update_length)
        self._unmasking = Unmasking(self.name, ports.store, ports.calls)
        self._publisher = TaskPublisher(
            ports.store,
            ports.announcer,
            ports.tenant,
            self.config,
            graph_digest=bundle.graph_digest,
            num_parameters=num_parameters,
            update_length=self._update_length,
            calls=ports.calls,
        )
        self._halted = ""  # why the budget has no room for another round
        self._waits_for = ""  # helpers, without which the open round cannot be published
        self._state, self._probability = stored.state, stored.probability
        self._stale = True  # what the database says may be something else
        self._unpublished = True

    @property
    def state(self) -> RoundState:
        """Where the task stands."""
        return self._state

    def refresh(self) -> None:
        """Take over what the database says, and publish it. Raises DatabaseError."""
        self._stale = True
        self.look()
        self._publish()

    def look(self) -> None:
        """Take over what the database says, if that may be something else than `state`. Raises DatabaseError."""
        if not self._stale:
            return
        self._unpublished = True
        stored = self._ports.store.tasks.get(self.name)
        self._state, self._probability = stored.state, stored.probability
        if self._state.phase is Phase.OPEN:
            # A coordinator that died while it combined the round left it closing.
            with self._transaction() as connection:
                self._ports.store.rounds.mark(connection, self.name, self._state.number, "open")
        self._stale = False

    def count_arrivals(self) -> None:
        """Look how many updates the open round has. Raises DatabaseError."""
        if self._state.phase is Phase.OPEN:
            updates, number = self._ports.store.updates, self._state.number
            if adds_up(self.config) and (revoked := updates.revoked(self.name, number)):
                # At once: whoever else sends an update for it would do so for nothing.
                self.advance(CombineFailed(why_not_without(revoked)))
                return
            self.advance(Arrived(updates.arrived(self.name, number)))

    def due(self) -> RoundEvent:
        """What time brings: whether a closed round's helpers have answered, or only that it has passed."""
        if self._waits_for and self._state.pausing:
            return PauseAsked(at_once=True)  # nobody has seen the round that it would wait for
        return self._unmasking.event() if self._state.phase is Phase.UNMASKING else Ticked()

    def advance(self, event: RoundEvent, *, order: tuple[int, str] | None = None) -> None:
        """Let the round table decide, carry out what it says in one transaction, then publish.

        Args:
            event: what happened.
            order: id of the operator's order that the event is, and what to note about it.

        Raises:
            BlobError, LostModelError: nothing has changed; or it has, when the event is no order, and could not be
                published, which is tried again.
            DatabaseError: what happened is not known; the database is read before anything else.
        """
        self.look()
        # A model that is gone keeps nobody from pausing, aborting or rolling back, nor the clock from being set.
        if isinstance(event, ResumeAsked) or (self._unpublished and isinstance(event, _RETRIES)):
            self._publish()
        if self._waits_for and isinstance(event, Ticked):
            return  # a round that no device can see yet is not given up for want of updates
        now_s = self._ports.now_s()
        state, actions = self._next(event, now_s)
        if state == self._state and not actions and order is None:
            return
        if not actions and isinstance(event, Arrived):
            self._state = state  # which the database knows already
            return
        self._stale = True
        try:
            change = self._prepare(state, actions)
            change.event = event
        except CombineError as error:
            self._stale = False
            self.advance(CombineFailed(str(error), rejected=isinstance(error, RejectedModelError)), order=order)
            return
        self._commit(state, actions, change, order=order, now_s=now_s)
        self._stale = False
        for name, fields in change.notes:
            self._note(name, **fields)
        if not actions:
            return
        self._unpublished = True
        try:
            self._publish()
        except (BlobError, LostModelError) as error:
            if order is None:
                raise
            self._note("publish_failed", reason=str(error))  # the order is carried out all the same

    def _next(self, event: RoundEvent, now_s: float) -> tuple[RoundState, list[RoundAction]]:
        """What the round table says; no round opens, nor is asked for, that the budget has no room for."""
        state, actions = transition(self._state, event, now_s, policy=self._policy)
        for action in actions:
            match action:
                case OpenRound():
                    why = self._budget.why_not_another(action.number, opens_s=action.opened_s)
                # A round that took longer than planned, or had fewer updates, costs more than when it opened.
                case AskHelpers() if self._state.phase is Phase.OPEN:
                    why = self._budget.why_not_ask(action.number, asked_s=now_s, arrived=self._state.arrived)
                    event = CombineFailed(why) if why else event
                case _:
                    why = ""
            self._halted = why or self._halted
            if why:
                return transition(self._state, event, now_s, policy=replace(self._policy, halted=why))
        return state, actions

    def _publish(self) -> None:
        """Publish the task as it stands; a round that no manifest can be made for is given up."""
        try:
            self._publish_as_it_stands()
        except CombineError as error:
            self._waits_for = ""
            self.advance(CombineFailed(str(error)))

    def _publish_as_it_stands(self) -> None:
        """Publish; before the first round there is nothing to publish. Raises CombineError."""
        waited, self._waits_for = self._waits_for, ""
        if self._begins_anew():
            return
        if self._state.number:
            self._waits_for = self._publisher.publish(self._state, probability=self._probability)
        if self._state.phase is Phase.UNMASKING:
            self._unmasking.ask(self._state.number)
        else:
            self._unmasking.done()
        self._unpublished = bool(self._waits_for)
        if self._waits_for and self._waits_for != waited:
            self._note("waiting_for_helpers", round=self._state.number, reason=self._waits_for)

    def _begins_anew(self) -> bool:
        """Whether a round that waited for helpers was given its time again, and published with that.

        A device that saw it with a deadline in the past would leave it out for good.
        """
        before, deadline_s = self._state, self._ports.now_s() + self._policy.duration_s
        if self._publisher.can_be_seen_at_last(before, deadline_s=deadline_s):
            self.advance(Unseen())
        return self._state != before

    def _prepare(self, state: RoundState, actions: Iterable[RoundAction]) -> _Change:
        """Everything that takes time or may fail, before the transaction: it locks nothing. Raises CombineError."""
        change, version = _Change(), self._state.version
        for action in actions:
            match action:
                case CommitRound():
                    with self._transaction() as connection:
                        self._ports.store.rounds.mark(connection, self.name, action.number, "closing")
                    sums = self._unmasking.sums
                    change.outcome = self._maker.outcome(action.number, version=version, mask_sums=sums)
                    change.models += [change.outcome.model] if change.outcome.model is not None else []
                case FinishTask() if self._policy.makes_models:
                    change.models.append(self._maker.finished(state.version, after=change.models[-1:]))
                case RollBack():
                    change.models.append(self._maker.rolled_back(action.version, newest=version))
                case _:
                    pass
        change.prepared = [self._ports.store.models.prepare(model) for model in change.models]
        return change

    def _commit(
        self,
        state: RoundState,
        actions: Iterable[RoundAction],
        change: _Change,
        *,
        order: tuple[int, str] | None,
        now_s: float,
    ) -> None:
        """One transaction for all actions of a transition: a crash leaves the state before or after, never between."""
        store, unwanted = self._ports.store, []
        with self._transaction() as connection:
            for model in change.prepared:
                store.models.add(connection, self.name, model, now_s=now_s)
            if change.models:
                keep = max(KEEP_VERSIONS, self.config.server.average_last + 1)
                unwanted += store.models.prune(connection, self.name, keep_last=keep)
            for action in actions:
                self._do(connection, action, state, change, now_s)
            self._rows.erase_keys(connection, state, actions)
            store.tasks.save(connection, self.name, state, before=self._state, probability=self._probability)
            if order is not None:
                store.tasks.order_done(connection, order[0], outcome=order[1], now_s=now_s)
            order_id = order[0] if order is not None else None
            what = task_entries.Transition(
                self._state, state, change.event, list(actions), change.prepared, order_id, self._halted
            )
            task_entries.record(connection, store, self.name, what, now_s=now_s)
        self._state = state
        store.discard(unwanted)

    def _do(
        self, connection: Connection, action: RoundAction, state: RoundState, change: _Change, now_s: float
    ) -> None:
        """Write what one action is about, and note what to tell of it."""
        match action:
            case AskHelpers():
                self._ports.store.rounds.mark(connection, self.name, action.number, "closing")
                self._ports.store.rounds.extend(connection, self.name, action.number, action.until_s)
                # Security: noted before anybody is asked: from then on the sum may be known.
                self._ports.store.rounds.ask(
                    connection, self.name, action.number, opened_s=state.opened_s, asked_s=now_s
                )
                change.notes.append(
                    ("round_unmasking", {"round": action.number, "arrived": state.arrived, "until_s": action.until_s})
                )
            case CommitRound():
                self._confirm_combined(connection, action.number, change)
                change.notes.append(
                    ("round_committed", self._close_committed(connection, action.number, change, now_s))
                )
            case AbortRound():
                if isinstance(change.event, Ticked):  # out of time, neither by order nor for a failure
                    self._steer(connection, self._state.arrived, None)
                self._rows.close(
                    connection, action.number, outcome=action.outcome, reason=action.reason, metrics={}, now_s=now_s
                )
                about = {
                    "round": action.number,
                    "outcome": action.outcome,
                    "reason": action.reason,
                    "arrived": self._state.arrived,
                }
                change.notes.append(("round_aborted", about))
            case OpenRound():
                opened = self._rows.open(connection, action, version=state.version, probability=self._probability)
                change.notes.append(("round_opened", opened))
            case ExtendRound():
                if isinstance(change.event, Ticked):
                    self._steer(connection, self._state.arrived, None)
                self._ports.store.rounds.extend(connection, self.name, action.number, action.deadline_s)
                fields: dict[str, Any] = {"round": action.number, "deadline_s": action.deadline_s}
                change.notes.append(("round_extended", fields))
            case FinishTask():
                change.notes.append(("task_finished", _about(change.prepared[-1:])))
            case RollBack():
                fields = {**_about(change.prepared[-1:]), "rolled_back_to": action.version}
                change.notes.append(("model_rolled_back", fields))
            case AnnounceTask():
                change.notes.append((f"task_{state.phase.value}", {"reason": state.reason}))

    def _confirm_combined(self, connection: Connection, number: int, change: _Change) -> None:
        """Raise ConflictError unless what was combined is all that is receipted, and nothing can be added to it.

        A second coordinator of the same name has the same lease, and opens the round again that this one combines.
        """
        outcome = self._ports.store.rounds.outcome(connection, self.name, number)
        counted = self._ports.store.updates.counted(connection, self.name, number)
        combined = change.outcome.count if change.outcome is not None else 0
        left_out = change.outcome.left_out if change.outcome is not None else 0
        if outcome != "closing" or counted != combined + left_out:
            raise ConflictError(
                f"round {number} of task {self.name} was changed while it was combined ({combined} updates combined, "
                f"{counted} counted, {outcome}): another coordinator runs under the name {self._ports.worker}; stop one"
            )

    def _close_committed(self, connection: Connection, number: int, change: _Change, now_s: float) -> dict[str, Any]:
        """Close a round that was combined; what to tell of it."""
        outcome = change.outcome
        count, found = (outcome.count, outcome.metrics) if outcome is not None else (0, {})
        bytes_up = self._ports.store.updates.bytes_up(connection, self.name, number)
        seconds = round(now_s - self._state.opened_s, 3)
        self._steer(connection, count, seconds if count >= self._policy.goal else None)
        metrics = {"arrived": count, "bytes_up": bytes_up, "seconds": seconds, **found}
        self._rows.close(connection, number, outcome="committed", reason="", metrics=metrics, now_s=now_s)
        return {"round": number, **_about(change.prepared[:1]), **metrics}

    def _steer(self, connection: Connection, arrived: int, goal_after_s: float | None) -> None:
        """The participation probability from now on, from how many came; None: fewer than the goal by the deadline."""
        self._probability = self._rows.steered(
            connection, self._state.number, self._probability, arrived=arrived, goal_after_s=goal_after_s
        )

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        """One transaction, which fails if another coordinator has taken over."""
        store = self._ports.store
        with store.database.transaction() as connection:
            store.leases.confirm(connection, COORDINATOR, self._ports.worker)
            yield connection

    def _note(self, event: str, **fields: object) -> None:
        """Write to the journal."""
        self._ports.journal.write(event, at_s=self._ports.now_s(), task=self.name, **fields)


def _about(models: Sequence[PreparedModel]) -> dict[str, Any]:
    """Which version came of something, if one did."""
    return {"version": models[0].row["version"], "model_digest": models[0].digest.hex()} if models else {}
