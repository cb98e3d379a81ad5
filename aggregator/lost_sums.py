"""Sums that helpers were asked for between a backup and its restore: they have cost devices privacy, and no row tells.

A task with a budget at device level may go on only with all of them in its account; one without tells too small a
figure until somebody has said. Nobody but a helper knows how many they were (``covey-helper audit``); at most there was
one for each round that was opened. Each becomes an aborted round that says so, above the backup's rounds, and costs
what a round with the fewest updates would have cost (`aggregator.device_budget`).
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, func, insert, select

from aggregator.assembly import open_task_bundle
from aggregator.errors import DatabaseError
from aggregator.in_force import config_of
from aggregator.store import schema
from aggregator.store.blobs import Blobs
from aggregator.task_file import TaskConfig
from fl_protocol.errors import ConfigError, LocalMisuseError

MOST = 100_000
"""Lost sums of a task; more than any budget has room for. To account for so many takes some ten seconds."""
MOST_INFERRED = 10_000
"""Rounds that are taken for sums where nobody has said how many there were."""
_AT_ONCE = 500
_OVER = frozenset({"finished", "aborted"})


@dataclass(frozen=True)
class LostSums:
    """How many there were.

    Args:
        number: of each task that is not in `of`; None if nobody has said.
        of: by task.
    """

    number: int | None = None
    of: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def parse(cls, texts: Sequence[str]) -> LostSums:
        """From ``12`` or ``TASK=12``, at most once each. Raises LocalMisuseError."""
        found: dict[str, int] = {}
        for text in texts:
            task, equals, number = text.rpartition("=")
            is_number = number.isascii() and number.isdecimal() and len(number) <= len(str(MOST))
            if not is_number or int(number) > MOST or task in found or (equals and not task):
                raise LocalMisuseError(
                    f"sums lost: expected a number up to {MOST}, or TASK=NUMBER, each task once; got {text[:80]!r}"
                )
            found[task] = int(number)
        return cls(found.pop("", None), found)

    def of_task(self, row: Mapping[str, Any], *, after_round: int | None) -> int | None:
        """Of a task that is restored; None if nobody has said, of one that has an account and no budget.

        Args:
            row: the task's, as the backup has it.
            after_round: the newest round that devices may have seen, if somebody knows: no more than these were opened.

        Raises:
            DatabaseError: it has a budget, and nobody has said.
        """
        task, config = row["task"], _readable(row["spec"], row["task"])
        if row["phase"] in _OVER:
            return 0
        if after_round is not None and after_round < row["number"]:
            raise DatabaseError(
                f"--after-round is for all tasks, and {task} had had round {row['number']} already when the backup was "
                f"made, so devices may have seen more than {after_round}; name the newest round of any task"
            )
        if config is None or config.secure is None:
            return 0
        said = self.of.get(task, self.number)
        if said is not None or config.device_privacy is None:
            return said
        is_open = row["phase"] == "open"
        inferred = MOST_INFERRED + 1 if after_round is None else after_round - int(row["number"]) + is_open
        if inferred > MOST_INFERRED:
            raise DatabaseError(
                f"task {task} has a budget at device level, and no backup knows which sums were asked for after it; "
                f"count the rounds from {row['number'] + (not is_open)} on in covey-helper audit --task {task}, of a "
                "helper whose store is older than the backup (of several, the largest number), and restore with "
                f"--sums-lost {task}=NUMBER; or with --after-round NEWEST, which takes every round since for one, up "
                f"to {MOST_INFERRED} of them"
            )
        return inferred

    def check_names(self, tasks: Container[str], counted: Container[str]) -> None:
        """Raise DatabaseError if a number was said for a task that the backup has not, or that has no lost sums.

        Args:
            tasks: of the backup.
            counted: those whose sums are counted.
        """
        for task, number in sorted(self.of.items()):
            if task not in tasks or (number and task not in counted):
                raise DatabaseError(
                    f"--sums-lost {task}={number}: expected a task of the backup that has the engine secure and was "
                    "not over, and there is none of that name"
                )


UNSAID = LostSums()


def _readable(spec: str, task: str) -> TaskConfig | None:
    """A task's file; None of one that cannot be read, which opens no round."""
    try:
        return config_of(spec, task) if spec else None
    except ConfigError:
        return None


def insert_lost(
    connection: Connection,
    blobs: Blobs,
    task: Mapping[str, Any],
    count: int,
    *,
    reason: str,
    since_s: float,
    now_s: float,
) -> None:
    """Add rounds for a task's lost sums, numbered after the backup's last.

    Args:
        connection: of the transaction that restores; the task's rounds are in it.
        blobs: with the task's bundle under its new name.
        task: its row, with the number of its last round in the backup.
        count: how many.
        reason: for people.
        since_s: when the backup was made, or before that the round opened that was open then; Unix seconds.
        now_s: Unix seconds; devices were in every one between the two.

    Raises:
        DatabaseError, BundleError: the task's bundle cannot be read.
    """
    if not count:
        return
    name, rounds = task["task"], schema.rounds.c
    config = config_of(task["spec"], name)
    length = config.update_length(len(open_task_bundle(blobs, task["bundle"], config).shared_params))
    digest = select(schema.models.c.digest).where(
        schema.models.c.task == name, schema.models.c.version == task["version"]
    )
    last = int(connection.execute(select(func.max(rounds.number)).where(rounds.task == name)).scalar() or 0)
    row = {
        "task": name,
        "outcome": "aborted",
        "reason": reason,
        "opened_s": since_s,
        "deadline_s": now_s,
        "closed_s": now_s,
        "asked_s": now_s,
        "kem": "",
        "version": task["version"],
        "model_digest": connection.execute(digest).scalar_one(),
        "update_length": length,
        "probability": task["probability"],
        "late": 0,
        "metrics": "{}",
    }
    numbers = range(max(last, task["number"]) + 1, max(last, task["number"]) + 1 + count)
    for begin in range(0, count, _AT_ONCE):
        some = numbers[begin : begin + _AT_ONCE]
        connection.execute(insert(schema.rounds), [{**row, "number": number} for number in some])
