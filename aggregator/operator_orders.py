"""Orders to the coordinator: an operator's command leaves one in the database, and waits a little for what comes of it.

The command and the coordinator may be on different machines; whether anybody coordinates is told by the lease.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from aggregator.overview import coordinator_of
from aggregator.store.aggregator_store import AggregatorStore
from aggregator.store.tasks import OrderName

PATIENCE_S = 5.0
LOOK_EVERY_S = 0.1
DONE = "done"
"""Outcome of an order that was carried out; any other is why it was not."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What came of an order: it was done, refused, or is left for later; and why, for people."""

    order: int
    task: str
    name: OrderName
    state: Literal["done", "refused", "left"]
    reason: str = ""


def give_order(
    store: AggregatorStore,
    task: str,
    name: OrderName,
    *,
    argument: str = "",
    actor: str,
    now_s: Callable[[], float],
    monotonic_s: Callable[[], float],
    sleep: Callable[[float], None],
) -> Answer:
    """Leave an order, and wait up to `PATIENCE_S` for the coordinator's answer; not at all if nobody coordinates.

    Args:
        store: the database.
        task: that it is for; it must exist.
        name: of the order.
        argument: why a task is aborted, or the version to go back to.
        actor: who gives it, as the audit log names them.
        now_s: Unix seconds.
        monotonic_s: seconds that no clock setting moves.
        sleep: waits for so many seconds.

    Raises:
        DatabaseError: there is no such task, or the database fails.
    """
    store.tasks.get(task)
    order = store.tasks.ask(task, name, argument=argument, now_s=now_s(), actor=actor)
    return answer_to(store, order, task, name, now_s=now_s, monotonic_s=monotonic_s, sleep=sleep)


def answer_to(
    store: AggregatorStore,
    order: int,
    task: str,
    name: OrderName,
    *,
    now_s: Callable[[], float],
    monotonic_s: Callable[[], float],
    sleep: Callable[[float], None],
    patience_s: float = PATIENCE_S,
) -> Answer:
    """What comes of an order that was left, waited for as long as `patience_s`. Raises DatabaseError."""
    coordinator = coordinator_of(store.leases.all(), now_s=now_s())
    if coordinator is None:
        why = "left for the coordinator, which is not running: it is carried out once covey-aggregator run is started"
        return Answer(order=order, task=task, name=name, state="left", reason=why)
    ends_s = monotonic_s() + patience_s
    while True:
        found = next(one for one in store.tasks.orders(task) if one.id == order)
        if found.done_s is not None:
            is_done = found.outcome == DONE
            reason = "" if is_done else found.outcome
            return Answer(order=order, task=task, name=name, state="done" if is_done else "refused", reason=reason)
        if monotonic_s() >= ends_s:
            break
        sleep(LOOK_EVERY_S)
    why = (
        f"left for the coordinator, {coordinator}, which has not answered yet: it may be combining a round, or be "
        f"without its broker; see covey-aggregator task show {task}"
    )
    return Answer(order=order, task=task, name=name, state="left", reason=why)
