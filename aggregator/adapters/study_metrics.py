"""How the study stands as metrics, read from the database when Prometheus asks; on prometheus-client.

`aggregator.adapters.prometheus` counts what one process does; here is what all of them together have come to. As there,
no name of a device becomes a label.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from aggregator.alerts.alarms import budget_share
from aggregator.alerts.webhooks import standings
from aggregator.api.answers import AuditState
from aggregator.errors import DatabaseError
from aggregator.overview import Overview, overview
from aggregator.store.aggregator_store import AggregatorStore

NAMES = {
    "covey_database_up": "1 while the database can be read; the others below are missing otherwise.",
    "covey_devices": "Devices by state, each once; online, offline and unheard are of the active ones.",
    "covey_devices_waiting": "Devices that are there and do not train, by what they say keeps them.",
    "covey_round_arrived": "Updates in the open round.",
    "covey_round_goal": "Updates that close it.",
    "covey_round_left_seconds": "Until its deadline; below zero it should have closed.",
    "covey_rounds_committed": "Committed rounds of a task.",
    "covey_problems": "What does not work as it should: lines that begin with degraded in covey-aggregator status.",
    "covey_budget_epsilon": "What a task's rounds have cost a device, at the delta of its device-level budget.",
    "covey_budget_epsilon_limit": "The budget's epsilon.",
    "covey_audit_entries": "Entries of the audit log.",
    "covey_audit_checkpoint_entries": "Entries under its newest signed checkpoint.",
    "covey_audit_cosigned": "1 if a helper has co-signed the newest checkpoint.",
    "covey_webhook_failures": "Attempts in a row that a webhook has refused; 0: well.",
    "covey_webhook_behind": "Entries of the audit log that a webhook has still to be told of.",
}
"""Every metric of this module and its help."""
_Values = Iterable[tuple[str, tuple[tuple[str, str], ...], float]]


class StudyMetrics(Collector):
    """See the module docstring; each scrape reads the database once.

    Args:
        store: the database.
        tenant: name on the wire.
        audit: tells how far the audit log is proved.
        now_s: Unix seconds.
    """

    def __init__(
        self,
        store: AggregatorStore,
        *,
        tenant: str,
        audit: Callable[[], AuditState],
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._tenant, self._audit, self._now_s = store, tenant, audit, now_s

    def describe(self) -> list[GaugeMetricFamily]:
        """The names alone: a registry asks for them before there may be a database."""
        return [GaugeMetricFamily(name, text) for name, text in NAMES.items()]

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """What is scraped."""
        found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
        try:
            for name, labels, value in self._values():
                found.setdefault(name, {})[labels] = value
            found["covey_database_up"] = {(): 1.0}
        except DatabaseError:
            found = {"covey_database_up": {(): 0.0}}
        for name, values in found.items():
            family = GaugeMetricFamily(name, NAMES[name], labels=[label for label, _ in next(iter(values))])
            for labels, value in values.items():
                family.add_metric([text for _, text in labels], value)
            yield family

    def _values(self) -> Iterator[tuple[str, tuple[tuple[str, str], ...], float]]:
        """Name, labels and value of each sample. Raises DatabaseError."""
        stands = overview(self._store, tenant=self._tenant, now_s=self._now_s())
        yield from _of_study(stands)
        for task in stands.tasks:
            share = budget_share(self._store, task.name) if task.is_secure else None
            if share is not None:
                yield "covey_budget_epsilon", (("task", task.name),), float(share["epsilon"])
                yield "covey_budget_epsilon_limit", (("task", task.name),), float(share["budget"])
        audit = self._audit()
        yield "covey_audit_entries", (), audit.entries
        yield "covey_audit_checkpoint_entries", (), audit.checkpoint or 0
        signed = {one.helper for one in audit.cosigned}
        for helper in audit.helpers:
            yield "covey_audit_cosigned", (("helper", helper),), float(helper in signed)
        with self._store.database.reading() as connection:
            hooks = standings(connection)
        for hook in hooks:
            yield "covey_webhook_failures", (("webhook", hook.name),), hook.failures
            yield "covey_webhook_behind", (("webhook", hook.name),), hook.waiting


def _of_study(stands: Overview) -> _Values:
    """Fleet, rounds and problems."""
    fleet = stands.fleet
    for state in ("active", "quarantined", "revoked", "online", "offline", "unheard"):
        yield "covey_devices", (("state", state),), getattr(fleet, state)
    for reason, count in fleet.reasons.items():
        yield "covey_devices_waiting", (("reason", reason),), count
    yield "covey_problems", (), len(stands.degraded)
    for task in stands.tasks:
        label = (("task", task.name),)
        yield "covey_rounds_committed", label, task.committed
        if task.deadline_s is not None:
            yield "covey_round_arrived", label, task.arrived
            yield "covey_round_goal", label, task.goal
            yield "covey_round_left_seconds", label, task.deadline_s - stands.at_s
