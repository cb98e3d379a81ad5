"""How the whole service stands, from its database alone: tasks, workers, and what an operator should look at.

It is as true as the database: a process that is alive and cannot reach it is shown by when it was last heard of.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from aggregator.in_force import config_of
from aggregator.rounds import Phase
from aggregator.shards import ALL_SHARDS, LEASE_S, Lease
from aggregator.store.aggregator_store import AggregatorStore
from aggregator.store.leases import COORDINATOR, STOPPED, WorkerRecord
from aggregator.store.presence import FleetCounts, counts
from aggregator.store.rounds import LiveRound
from aggregator.store.tasks import StoredTask
from aggregator.worker import NOT_CONNECTED

LATE_S = 30.0
"""A round whose deadline passed this long ago should have been closed."""
FORGOTTEN_S = 86_400.0
"""A worker that was not heard of for longer was taken away on purpose."""
_OVER = {Phase.FINISHED.value, Phase.ABORTED.value}


class TaskOverview(msgspec.Struct, frozen=True, kw_only=True):
    """One task.

    Args:
        kind: train, evaluate or statistics; empty for a task that has no file yet.
        round: the newest round's number.
        committed, rounds: committed rounds, and how many are wanted.
        arrived, goal: updates in the open round, and how many close it.
        deadline_s: Unix seconds; none while no round is open.
        version: of the model in force.
        probability: participation probability of the next round.
        failures: rounds in a row that could not be combined or were rejected.
        reason: why it is paused or aborted.
        is_secure: whether its updates are masked.
    """

    name: str
    kind: str
    phase: str
    round: int
    committed: int
    rounds: int
    arrived: int
    goal: int
    deadline_s: float | None
    version: int
    probability: float
    pausing: bool
    failures: int
    reason: str
    created_s: float
    is_secure: bool = False


class WorkerOverview(msgspec.Struct, frozen=True, kw_only=True):
    """One process, as it last said of itself; `shards` are those that it has leased now."""

    name: str
    state: Literal["alive", "gone", "stopped"]
    coordinates: bool
    shards: int
    started_s: float
    seen_s: float
    detail: str


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """See the module docstring.

    Args:
        tenant: name on the wire.
        at_s: Unix seconds.
        devices: registered names; a device with pseudonyms has several.
        fleet: devices by state, and why they are not training, as they say.
        refused: updates refused so far, by reason.
        degraded: what does not work as it should, a sentence each.
    """

    tenant: str
    at_s: float
    tasks: list[TaskOverview]
    workers: list[WorkerOverview]
    devices: int
    fleet: FleetCounts
    refused: dict[str, int]
    degraded: list[str]


def overview(store: AggregatorStore, *, tenant: str, now_s: float) -> Overview:
    """Look at everything.

    Args:
        store: the database.
        tenant: name on the wire.
        now_s: Unix seconds.

    Raises:
        DatabaseError: it cannot be read.
    """
    tasks = [task_overview(task) for task in store.tasks.all()]
    leases = [lease for lease in store.leases.all() if lease.until_s > now_s]
    workers = [_worker(worker, leases, now_s) for worker in store.leases.workers()]
    workers = [worker for worker in workers if worker.state == "alive" or now_s - worker.seen_s < FORGOTTEN_S]
    return Overview(
        tenant=tenant,
        at_s=now_s,
        tasks=tasks,
        workers=workers,
        devices=store.devices.count(),
        fleet=fleet_counts(store, now_s=now_s),
        refused=store.refusals(""),
        degraded=[
            *_problems_of_nobody(tasks, leases, now_s),
            *_problems_of_workers(workers, now_s),
            *_problems_of_tasks(tasks, now_s),
            *_problems_of_beginning(tasks, leases, now_s),
            *_problems_of_helpers(tasks, store.rounds.live()),
        ],
    )


def fleet_counts(store: AggregatorStore, *, now_s: float) -> FleetCounts:
    """How many devices are in which state. Raises DatabaseError."""
    with store.database.reading() as connection:
        return counts(connection, now_s=now_s)


def task_overview(task: StoredTask) -> TaskOverview:
    """How a task stands."""
    config, state = (config_of(task.spec, task.name) if task.spec else None), task.state
    return TaskOverview(
        name=task.name,
        kind=config.kind if config is not None else "",
        phase=state.phase.value,
        round=state.number,
        committed=state.committed,
        rounds=config.rounds if config is not None else 0,
        arrived=state.arrived,
        goal=config.goal if config is not None else 0,
        deadline_s=state.deadline_s or None,
        version=state.version,
        probability=task.probability,
        pausing=state.pausing,
        failures=state.failures,
        reason=state.reason,
        created_s=task.created_s,
        is_secure=config is not None and config.secure is not None,
    )


def coordinator_of(leases: Iterable[Lease], *, now_s: float) -> str | None:
    """Who runs the rounds now; None when nobody does."""
    return next((lease.worker for lease in leases if lease.name == COORDINATOR and lease.until_s > now_s), None)


def _worker(worker: WorkerRecord, leases: list[Lease], now_s: float) -> WorkerOverview:
    """How a process stands."""
    mine = {lease.name for lease in leases if lease.worker == worker.worker}
    is_alive = bool(mine) or now_s - worker.seen_s < LEASE_S
    return WorkerOverview(
        name=worker.worker,
        state="stopped" if worker.state == STOPPED else "alive" if is_alive else "gone",
        coordinates=COORDINATOR in mine,
        shards=len(mine & set(ALL_SHARDS)),
        started_s=worker.started_s,
        seen_s=worker.seen_s,
        detail=worker.detail,
    )


def _problems_of_nobody(tasks: list[TaskOverview], leases: list[Lease], now_s: float) -> list[str]:
    """What nobody does; nothing is left to do once every task is over."""
    if tasks and all(task.phase in _OVER for task in tasks):
        return []
    problems = []
    if coordinator_of(leases, now_s=now_s) is None:
        problems.append("nobody coordinates: no round opens or closes until covey-aggregator run is started")
    unserved = set(ALL_SHARDS) - {lease.name for lease in leases}
    if unserved:
        problems.append(
            f"the uploads of {len(unserved)} of {len(ALL_SHARDS)} shards are taken by nobody; devices keep their "
            "updates and send them again"
        )
    return problems


def _problems_of_workers(workers: list[WorkerOverview], now_s: float) -> list[str]:
    """What is wrong with processes that were there."""
    problems = []
    for worker in workers:
        silent_s = now_s - worker.seen_s
        if worker.state == "gone":
            problems.append(
                f"{worker.name} was last heard of {silent_s:.0f} s ago: it was killed, or cannot reach the database"
            )
        elif worker.state == "alive" and worker.detail == NOT_CONNECTED:
            problems.append(f"{worker.name} is not connected to the broker")
    return problems


def _problems_of_beginning(tasks: list[TaskOverview], leases: list[Lease], now_s: float) -> list[str]:
    """Tasks that a coordinator should have begun."""
    if coordinator_of(leases, now_s=now_s) is None:
        return []
    return [
        f"task {task.name} was created {now_s - task.created_s:.0f} s ago and has not begun: the coordinator cannot "
        "reach its broker, or cannot run the task (task_unusable in its journal says why)"
        for task in tasks
        if task.phase == Phase.IDLE.value and task.kind and now_s > task.created_s + LATE_S
    ]


def _problems_of_helpers(tasks: list[TaskOverview], live: list[LiveRound]) -> list[str]:
    """Secure rounds that no device can see yet."""
    return [
        f"round {task.round} of {task.name} cannot begin: keys of its helpers have not come; are they running? "
        "(waiting_for_helpers in the coordinator's journal says which)"
        for task in tasks
        if task.is_secure
        and task.phase == Phase.OPEN.value
        and any((one.task, one.number, one.manifest) == (task.name, task.round, None) for one in live)
    ]


def _problems_of_tasks(tasks: list[TaskOverview], now_s: float) -> list[str]:
    """What is wrong with tasks."""
    problems = []
    for task in tasks:
        if not task.kind:
            problems.append(
                f"task {task.name} is from before tasks had files; give it one with covey-aggregator task create"
            )
        if task.deadline_s is not None and now_s > task.deadline_s + LATE_S:
            problems.append(f"round {task.round} of {task.name} should have closed {now_s - task.deadline_s:.0f} s ago")
        if task.failures:
            problems.append(
                f"the last {task.failures} round(s) of {task.name} came to nothing; see task show {task.name}"
            )
    return problems
