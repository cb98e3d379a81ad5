"""A study that shows everything a page can, in an SQLite file of its own, with its times around the present."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import delete, func, insert, select, text, update

from aggregator.accounts.account_store import Accounts, Actor
from aggregator.accounts.roles import ROLES
from aggregator.adapters.open_blobs import open_blobs
from aggregator.audit.checkpoint_rows import Checkpoints
from aggregator.audit.checkpoints import cosign, cosigner_name, origin_of
from aggregator.audit.log import AuditEvent, append
from aggregator.shards import ALL_SHARDS
from aggregator.store import schema
from aggregator.store.aggregator_store import AggregatorStore
from aggregator.store.database import Database
from aggregator.store.leases import COORDINATOR
from tests.aggregator.api.seeded_study import MASKED, OPEN, SeededStudy

AGGREGATOR, HELPER = (Ed25519PrivateKey.from_private_bytes(bytes([one]) * 32) for one in (5, 6))
ROOT_ACTOR = Actor("local:root")
DAY_S = 86_400.0
ARRIVED = 11
"""Updates in the open round at first."""
OWNERS = ("anna", "st-mary", "uni-lab")
_BUDGETS = ("epsilon = 6.0", "epsilon = 8.0")
REFUSED = (
    ("round_closed", 212), ("second_update", 58), ("unknown_device", 31), ("quarantined", 17), ("bad_signature", 9),
    ("throttled", 4),
)  # fmt: skip


class ShownStudy:
    """See the module docstring.

    Args:
        folder: for the database, configuration and key.
        devices: registered names; all but every tenth are enrolled.
        rounds: closed ones of each task.
        arrived: updates in each.
        is_empty: nothing but accounts.
    """

    def __init__(
        self, folder: Path, *, devices: int = 40, rounds: int = 24, arrived: int = 5, is_empty: bool = False
    ) -> None:
        self.folder, self.now_s = folder, time.time()
        url = f"sqlite:///{folder / 'study.db'}"
        if not is_empty:
            SeededStudy(
                url, devices=devices, rounds=rounds, arrived=arrived, masked_rounds=min(rounds, 30)
            ).store.close()
        blobs = open_blobs("memory://shown")
        self.store = AggregatorStore(Database(url, blobs=blobs), blobs)
        if not is_empty:
            self._bring_up_to_date(devices, rounds)
        self.accounts = Accounts(self.store.database)
        self.tokens = {role: self._account(f"{role}-ann", role) for role in ROLES}
        self.tokens["second"] = self._account("maria", "operator")
        if not is_empty:
            self._checkpoint()
        self.config = folder / "aggregator.toml"
        self.config.write_text(_CONFIG)
        (folder / "signing.key").write_bytes(AGGREGATOR.private_bytes_raw())
        (folder / "signing.key").chmod(0o600)

    def add_token(self, account: str, *, scopes: list[Any] | None = None, life_s: float = DAY_S) -> str:
        """One more token."""
        now_s = time.time()
        _, made = self.accounts.add_token(
            account, scopes=scopes, expires_s=now_s + life_s, now_s=now_s, entropy=os.urandom, actor=ROOT_ACTOR
        )
        return made.text

    def revoke(self, token: str) -> None:
        """Revoke an access token, by its text."""
        self.accounts.revoke(token.split("_")[1], now_s=time.time(), actor=ROOT_ACTOR)

    def arrive(self, task: str, count: int, *, first: int = 0) -> None:
        """Updates for the open round, in one transaction."""
        with self.store.database.transaction() as connection:
            number = connection.execute(select(schema.tasks.c.number).where(schema.tasks.c.task == task)).scalar_one()
            rows = [_update(task, number, index) for index in range(first, first + count)]
            connection.execute(insert(schema.updates), rows)
            partials = schema.partials.c
            here = update(schema.partials).where(partials.task == task, partials.counted_in == number)
            connection.execute(here.values(count=partials.count + count))

    def put_away(self, table: str) -> None:
        """Have the database fail where this table is read."""
        with self.store.database.transaction() as connection:
            connection.execute(text(f"ALTER TABLE {table} RENAME TO away_{table}"))

    def bring_back(self, table: str) -> None:
        """Have it answer again."""
        with self.store.database.transaction() as connection:
            connection.execute(text(f"ALTER TABLE away_{table} RENAME TO {table}"))

    def close_round(self, task: str, *, accuracy: float) -> None:
        """Commit the open round, with a model of this accuracy; and open the next one."""
        with self.store.database.transaction() as connection:
            tasks, rounds = schema.tasks.c, schema.rounds.c
            number = connection.execute(select(tasks.number).where(tasks.task == task)).scalar_one()
            row = {"outcome": "committed", "closed_s": time.time(), "secret": None}
            metrics = msgspec.json.encode({**_metrics(number, number), "validation_accuracy": accuracy}).decode()
            here = update(schema.rounds).where(rounds.task == task, rounds.number == number)
            connection.execute(here.values(**row, metrics=metrics))
            forward = {"committed": tasks.committed + 1, "number": number + 1}
            connection.execute(update(schema.tasks).where(tasks.task == task).values(**forward))
            self._open_round(connection, task, number + 1)

    def tell(self, action: str, subject: str, *, actor: str = "local:root", **detail: Any) -> None:
        """An entry of the audit log."""
        with self.store.database.transaction() as connection:
            append(connection, AuditEvent(time.time(), actor, action, subject, detail))

    def _account(self, name: str, role: Any) -> str:
        self.accounts.create(name, role, now_s=self.now_s, actor=ROOT_ACTOR)
        return self.add_token(name)

    def _bring_up_to_date(self, devices: int, rounds: int) -> None:
        """Times around the present, curves as of a training, an open round, and processes."""
        with self.store.database.transaction() as connection:
            for table in _MADE_ANEW:
                connection.execute(delete(table))
            last = connection.execute(select(func.max(schema.rounds.c.closed_s))).scalar_one()
            shift_s = self.now_s - 40.0 - last
            for table, columns in _TIMES:
                connection.execute(update(table).values(**{one: table.c[one] + shift_s for one in columns}))
            for number in range(1, rounds + 1):
                metrics = msgspec.json.encode(_metrics(number, rounds)).decode()
                for table, key in ((schema.rounds, "number"), (schema.models, "version")):
                    connection.execute(update(table).where(table.c[key] == number).values(metrics=metrics))
            spec = func.replace(func.replace(schema.tasks.c.spec, "rounds = 3", f"rounds = {2 * rounds}"), *_BUDGETS)
            connection.execute(update(schema.tasks).values(spec=spec))
            connection.execute(update(schema.model_tags).values(version=max(1, rounds - 4)))
            self._open_round(connection, OPEN, rounds + 1)
            refused = [
                {"task": "" if one == "unknown_device" else OPEN, "reason": one, "times": n} for one, n in REFUSED
            ]
            connection.execute(insert(schema.refusals), refused)
            self._processes(connection)
            _enrol(connection, devices, self.now_s)
            self._write_log(connection, rounds)

    def _write_log(self, connection: Any, rounds: int) -> None:
        """The log of a study that has gone on for a while."""
        began_s = self.now_s - 100.0 * rounds - 3600
        events = [AuditEvent(began_s, "local:root", "task.created", one, {"kind": "train"}) for one in (OPEN, MASKED)]
        for number in range(1, rounds + 1):
            detail = {"outcome": "committed", "count": 16}
            at_s = self.now_s - 40.0 - 100.0 * (rounds - number)
            events.append(AuditEvent(at_s, "aggregator", "round.closed", f"{OPEN}/{number}", detail))
        detail = {"owner": "anna", "task": OPEN, "before": "active", "reason": "sends the same update again and again"}
        events.append(AuditEvent(self.now_s - 900, "maria", "device.quarantined", "e-00003", detail))
        events.append(
            AuditEvent(
                self.now_s - 300, "operator-ann", "model.tagged", OPEN, {"tag": "released", "version": rounds - 4}
            )
        )
        for event in sorted(events, key=lambda one: one.at_s):
            append(connection, event)

    def _open_round(self, connection: Any, task: str, number: int) -> None:
        where = schema.tasks.c.task == task
        spec = connection.execute(select(schema.tasks.c.spec).where(where)).scalar_one()
        spec = spec.replace("goal = 3", "goal = 16")
        now = {"phase": "open", "number": number, "reason": "", "spec": spec}
        connection.execute(update(schema.tasks).where(where).values(**now))
        row = {
            "task": task, "number": number, "outcome": "open", "reason": "", "opened_s": self.now_s - 30,
            "deadline_s": self.now_s + 3600, "kem": "x25519", "secret": bytes(32), "manifest": b"m",
            "version": number - 1, "model_digest": bytes(32), "update_length": 8711, "probability": 0.5, "late": 0,
            "metrics": "{}",
        }  # fmt: skip
        connection.execute(insert(schema.rounds).values(**row))
        connection.execute(insert(schema.updates), [_update(task, number, index) for index in range(ARRIVED)])
        sums = {
            "task": task,
            "counted_in": number,
            "round": number,
            "worker": "worker-1",
            "blob": "b",
            "count": ARRIVED,
        }
        connection.execute(insert(schema.partials).values(**sums))

    def _processes(self, connection: Any) -> None:
        """A coordinator and a worker, whose leases last for a day."""
        row = {"started_s": self.now_s - DAY_S, "seen_s": self.now_s, "state": "running", "detail": ""}
        connection.execute(insert(schema.workers), [{**row, "worker": one} for one in ("aggregator", "worker-1")])
        leases = [{"name": COORDINATOR, "worker": "aggregator", "until_s": self.now_s + DAY_S}]
        leases += [
            {"name": name, "worker": ("aggregator", "worker-1")[index % 2], "until_s": self.now_s + DAY_S}
            for index, name in enumerate(ALL_SHARDS)
        ]
        connection.execute(insert(schema.leases), leases)

    def _checkpoint(self) -> None:
        """A checkpoint that a helper has co-signed, and entries after it."""
        checkpoints = Checkpoints(self.store.database, origin_of("clinic"))
        note = checkpoints.make(AGGREGATOR, now_s=self.now_s - 60)
        assert note is not None
        one = cosign(note.checkpoint, cosigner_name("patients", "helper-a"), HELPER, at_s=self.now_s - 55)
        checkpoints.add_cosignature(note.checkpoint.size, "helper-a", one)
        self.tell("device.quarantined", "e-00008", actor="maria", owner="uni-lab", reason="worn by two people")


_MADE_ANEW = (
    schema.accounts, schema.access_tokens, schema.audit_entries, schema.audit_nodes, schema.enrolments,
    schema.enrolment_names, schema.device_periods,
)  # fmt: skip
_TIMES = (
    (schema.rounds, ("opened_s", "deadline_s", "closed_s", "asked_s")),
    (schema.models, ("created_s",)),
    (schema.devices, ("added_s",)),
    (schema.updates, ("accepted_s",)),
    (schema.tasks, ("created_s",)),
)
_CONFIG = """
helpers = [{ name = "helper-a", operator = "patients", key = "KEY" }]

[aggregator]
tenant = "clinic"
database = "study.db"
signing_key = "signing.key"

[broker]
host = "127.0.0.1"
port = 1883

[api]
port = 0
dashboard = true
joules_per_update = 3.2
aggregator_key = "AGG"
requests_a_minute = 100000
address_requests_a_minute = 100000
""".replace("KEY", HELPER.public_key().public_bytes_raw().hex()).replace(
    "AGG", AGGREGATOR.public_key().public_bytes_raw().hex()
)


def _metrics(number: int, rounds: int) -> dict[str, float]:
    """A round of a training that learns, with the unrest of noise."""
    unrest = math.sin(number * 12.9898) * 43758.5453 % 1 - 0.5
    done = 1 - math.exp(-5 * number / rounds)
    return {
        "validation_loss": round(1.95 - 1.4 * done + 0.05 * unrest, 4),
        "validation_accuracy": round(0.14 + 0.7 * done + 0.03 * unrest, 4),
        "mean_update_norm": 0.4, "seconds": 31.2, "bytes_up": 560_000 + int(60_000 * unrest), "arrived": 16,
    }  # fmt: skip


def _update(task: str, number: int, index: int) -> dict[str, Any]:
    return {
        "task": task, "update_id": number.to_bytes(8, "big") + index.to_bytes(8, "big"), "round": number,
        "counted_in": number, "device": f"w-{index:05}", "sealed_digest": bytes(32), "accepted_s": time.time(),
        "bytes_up": 35_000,
    }  # fmt: skip


def _enrol(connection: Any, devices: int, now_s: float) -> None:
    """Enrolments `e-00000` and so on, with a name each; every tenth name was registered by hand."""
    ends_s = now_s + 30 * DAY_S
    enrolments, names = [], []
    for index in range(devices):
        if index % 10 == 9:
            continue
        state = {3: "quarantined", 8: "quarantined", 16: "revoked"}.get(index % 20, "active")
        enrolments.append(
            {
                "enrolment": f"e-{index:05}", "task": OPEN, "owner": OWNERS[index % 3], "renewal_key": bytes(32),
                "state": state, "reason": "" if state == "active" else "worn by two people",
                "enrolled_s": now_s - 5 * DAY_S,
                "changed_s": now_s - 900, "lasts_until_s": ends_s, "request_digest": bytes(32), "answer": b"",
            }
        )  # fmt: skip
        period = {"device": f"w-{index:05}", "not_before_s": now_s - 5 * DAY_S, "not_after_s": ends_s}
        names.append({**period, "enrolment": f"e-{index:05}", "serial": f"{index:x}"})
    connection.execute(insert(schema.enrolments), enrolments)
    connection.execute(insert(schema.enrolment_names), names)
    periods = [{key: one[key] for key in ("device", "not_before_s", "not_after_s")} for one in names]
    connection.execute(insert(schema.device_periods), periods)
