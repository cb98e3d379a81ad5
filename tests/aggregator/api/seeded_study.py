"""A study with history, put into its database: an open and a masked task, devices, rounds, updates, models, entries."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import msgspec
from sqlalchemy import Connection, insert

from aggregator.accounts.account_store import Accounts, Actor
from aggregator.accounts.roles import ROLES, Role, Scope
from aggregator.adapters.open_blobs import open_blobs
from aggregator.audit.log import AuditEvent, append
from aggregator.secure_terms import terms_of
from aggregator.store import schema
from aggregator.store.aggregator_store import AggregatorStore
from aggregator.store.database import Database
from aggregator.task_file import read_task
from fl_protocol.messages import encode
from tests.aggregator.operator_desk import TRAINING
from tests.fl_protocol.examples import secure_manifest, secure_terms

NOW_S, DAY_S = 1_800_000_000.0, 86_400.0
OPEN, MASKED = "watch", "masked"
LENGTH = 8711
SECURE_TASK = (
    TRAINING.replace('name = "watch"', 'name = "masked"').replace('engine = "open"\n', "")
    + """
[secure]
l2_norm_clip = 1.0
noise_multiplier = 3.0

[device_privacy]
epsilon = 6.0
delta = 1e-5
"""
)
LOCAL = Actor("local:root")


@dataclass
class SeededStudy:
    """See the module docstring.

    Args:
        url: of an empty database.
        devices: registered names `w-00000` and so on; every tenth has an enrolment of owner `owner-0`.
        rounds: closed rounds of each task; the newest of the open one is open.
        arrived: updates in each.
        masked_rounds: rounds of the masked task; `rounds` if not given.
    """

    url: str
    devices: int = 30
    rounds: int = 12
    arrived: int = 5
    masked_rounds: int | None = None
    tokens: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        blobs = open_blobs("memory://seeded")
        self.store = AggregatorStore(Database(self.url, blobs=blobs), blobs)
        self.accounts = Accounts(self.store.database)
        self._add_devices()
        for name, spec, count in (
            (OPEN, TRAINING, self.rounds),
            (MASKED, SECURE_TASK, self.rounds if self.masked_rounds is None else self.masked_rounds),
        ):
            self._add_task(name, spec, count)
        with self.store.database.transaction() as connection:
            for number in range(self.rounds):
                detail = {"outcome": "committed", "count": self.arrived}
                append(connection, AuditEvent(NOW_S, "aggregator", "round.closed", f"{OPEN}/{number + 1}", detail))
        for role in ROLES:
            self.tokens[role] = self.add_account(role, role)

    def add_account(self, name: str, role: Role, **options: Any) -> str:
        """An account and its token."""
        self.accounts.create(name, role, now_s=NOW_S, actor=LOCAL)
        return self.add_token(name, **options)

    def add_token(self, name: str, *, scopes: list[Scope] | None = None, life_s: float = DAY_S) -> str:
        _, made = self.accounts.add_token(
            name, scopes=scopes, expires_s=NOW_S + life_s, now_s=NOW_S, entropy=os.urandom, actor=LOCAL
        )
        return made.text

    def add_task(self, name: str, count: int, more: str = "") -> None:
        """One more open task with so many rounds, and more tables in its file."""
        self._add_task(name, TRAINING.replace('name = "watch"', f'name = "{name}"') + more, count)

    def add_enrolled(self, name: str, state: str) -> None:
        """One more device, enrolled, with one name."""
        with self.store.database.transaction() as connection:
            connection.execute(insert(schema.devices).values(device=name, public_key=bytes(32), added_s=NOW_S))
            _enrol(connection, [name], state)

    def _add_devices(self) -> None:
        """Registered names, some of them with an enrolment."""
        names = [f"w-{number:05}" for number in range(self.devices)]
        with self.store.database.transaction() as connection:
            connection.execute(
                insert(schema.devices), [{"device": name, "public_key": bytes(32), "added_s": NOW_S} for name in names]
            )
            _enrol(connection, names[::10], "quarantined")

    def _add_task(self, name: str, spec: str, count: int) -> None:
        """A task with its rounds, updates, and a model for each."""
        manifest = _manifest(spec, name) if name == MASKED else None
        task = {
            "task": name, "spec": spec, "bundle": "", "graph_digest": bytes(32), "phase": "paused", "number": count,
            "committed": count, "version": count, "pausing": False, "failures": 0, "reason": "an operator asked",
            "probability": 0.5, "created_s": NOW_S,
        }  # fmt: skip
        with self.store.database.transaction() as connection:
            connection.execute(insert(schema.tasks).values(**task))
            connection.execute(insert(schema.models), [_model(name, version) for version in range(count + 1)])
            connection.execute(insert(schema.model_tags).values(task=name, tag="released", version=count // 2))
        for number in range(1, count + 1):
            with self.store.database.transaction() as connection:
                row = _round(name, number, None if manifest is None else encode(manifest(number)))
                connection.execute(insert(schema.rounds).values(**row))
                connection.execute(insert(schema.updates), [self._update(name, number, n) for n in range(self.arrived)])

    def _update(self, task: str, number: int, index: int) -> dict[str, Any]:
        device = (number * 7 + index) % self.devices
        return {
            "task": task, "update_id": number.to_bytes(8, "big") + index.to_bytes(8, "big"), "round": number,
            "counted_in": number, "device": f"w-{device:05}", "sealed_digest": bytes(32), "accepted_s": NOW_S,
            "bytes_up": 35_000,
        }  # fmt: skip


def _manifest(spec: str, name: str) -> Any:
    """Manifests of a masked task's rounds."""
    config = read_task(spec, name)
    assert config.secure is not None
    terms = terms_of(config, config.secure, LENGTH, helpers=secure_terms().helpers)

    def of(number: int) -> Any:
        about = {"secure": terms, "round": number, "num_parameters": LENGTH, "goal": 3, "minimum_cohort": 2}
        return secure_manifest(**about, opened_s=NOW_S + 100 * number, deadline_s=NOW_S + 100 * number + 60)

    return of


def _round(task: str, number: int, manifest: bytes | None) -> dict[str, Any]:
    opened_s = NOW_S + 100 * number
    return {
        "task": task, "number": number, "outcome": "committed", "reason": "", "opened_s": opened_s,
        "deadline_s": opened_s + 60, "closed_s": opened_s + 30, "kem": "x25519", "manifest": manifest,
        "asked_s": None if manifest is None else opened_s + 30, "version": number - 1, "model_digest": bytes(32),
        "update_length": LENGTH, "probability": 0.5, "late": 0, "metrics": _metrics(),
    }  # fmt: skip


def _model(task: str, version: int) -> dict[str, Any]:
    return {
        "task": task, "version": version, "parent": version - 1 if version else None, "round": version or None,
        "origin": "round" if version else "initial", "digest": bytes(32), "params": "params-x", "population": 0,
        "created_s": NOW_S + version, "metrics": _metrics(),
    }  # fmt: skip


def _metrics() -> str:
    found = {"validation_loss": 0.31, "validation_accuracy": 0.87, "update_norm": 0.5, "seconds": 31.2, "bytes_up": 9e6}
    return msgspec.json.encode(found).decode()


def _enrol(connection: Connection, names: list[str], state: str) -> None:
    """Give names an enrolment each."""
    enrolment = {
        "task": OPEN, "owner": "owner-0", "renewal_key": bytes(32), "state": state, "reason": "", "enrolled_s": NOW_S,
        "changed_s": NOW_S, "lasts_until_s": NOW_S, "request_digest": bytes(32), "answer": b"",
    }  # fmt: skip
    periods = [{"device": name, "not_before_s": NOW_S, "not_after_s": NOW_S + DAY_S} for name in names]
    connection.execute(insert(schema.device_periods), periods)
    connection.execute(insert(schema.enrolments), [{**enrolment, "enrolment": f"e-{name}"} for name in names])
    rows = [
        {"device": name, "enrolment": f"e-{name}", "serial": name.encode().hex(), "not_before_s": 0.0,
         "not_after_s": NOW_S + DAY_S}
        for name in names
    ]  # fmt: skip
    connection.execute(insert(schema.enrolment_names), rows)
