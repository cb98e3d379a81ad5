"""Who may release a version of a model: k of the people with accounts, if its task says so (``[release] approvals``).

A version is released by putting the tag `released` on it, which takes it from any other. Where a task asks for
approvals, as many different accounts have to have agreed to this version with these very parameters: an approval names
their digest, so that it stands for nothing else, whatever a restored backup or another round makes of the number.
Approvals of accounts that were disabled since do not count. A command on the aggregator's machine has no account: it
can release what was approved, and approve nothing. Everything here is part of a transaction, with its audit entry.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from sqlalchemy import ColumnElement, Connection, delete, insert, select

from aggregator.accounts.account_store import Actor
from aggregator.audit.log import append
from aggregator.errors import AggregatorError
from aggregator.in_force import config_of
from aggregator.store import schema

RELEASED = "released"
"""The tag of what was released."""
ReleaseCode = Literal["pruned", "no_approvals_asked", "already_approved", "not_approved_by_you", "not_approved"]
_APPROVALS, _MODELS, _TAGS, _ACCOUNTS = schema.approvals, schema.models.c, schema.model_tags, schema.accounts.c


class ReleaseError(AggregatorError):
    """Something is not approved or released.

    Args:
        code: for programs.
        detail: one sentence.
    """

    def __init__(self, code: ReleaseCode, detail: str) -> None:
        super().__init__(detail)
        self.code: ReleaseCode = code


class Approvals(msgspec.Struct, frozen=True, kw_only=True):
    """Who agreed that a version may be released.

    Args:
        needed: how many accounts have to agree; 0 for none.
        accounts: that did, those that were disabled left out, in order.
    """

    needed: int
    accounts: list[str]

    @property
    def missing(self) -> int:
        """How many more have to agree."""
        return max(0, self.needed - len(self.accounts))


def approvals_of(connection: Connection, task: str, version: int) -> Approvals:
    """Who has agreed to a version as it is now. The task and the version must exist."""
    query = (
        select(_APPROVALS.c.account)
        .join(schema.accounts, _APPROVALS.c.account == _ACCOUNTS.account)
        .where(_this(task, version), _APPROVALS.c.digest == _digest(connection, task, version))
        .where(_ACCOUNTS.disabled_s.is_(None))
        .order_by(_APPROVALS.c.account)
    )
    return Approvals(needed=_needed(connection, task), accounts=list(connection.execute(query).scalars()))


def approved_versions(connection: Connection, task: str) -> tuple[int, dict[int, list[str]]]:
    """How many accounts a task asks for, and who has agreed to which version, as in `approvals_of`."""
    query = (
        select(_APPROVALS.c.version, _APPROVALS.c.account)
        .join(schema.accounts, _APPROVALS.c.account == _ACCOUNTS.account)
        .join(schema.models, (_APPROVALS.c.task == _MODELS.task) & (_APPROVALS.c.version == _MODELS.version))
        .where(_APPROVALS.c.task == task, _APPROVALS.c.digest == _MODELS.digest, _ACCOUNTS.disabled_s.is_(None))
        .order_by(_APPROVALS.c.version, _APPROVALS.c.account)
    )
    found: dict[int, list[str]] = {}
    for row in connection.execute(query):
        found.setdefault(row.version, []).append(row.account)
    return _needed(connection, task), found


def approve(connection: Connection, task: str, version: int, *, who: Actor, now_s: float) -> None:
    """An account agrees that a version may be released.

    Args:
        connection: with the transaction, which has the task to itself.
        task: that exists.
        version: that exists.
        who: the account.
        now_s: Unix seconds.

    Raises:
        ReleaseError: the task asks for no approvals, or this account has agreed before.
    """
    found = approvals_of(connection, task, version)
    if not found.needed:
        raise ReleaseError("no_approvals_asked", f"task {task} asks for no approvals; release the version as it is")
    if who.name in found.accounts:
        raise ReleaseError("already_approved", f"{who.name} has approved version {version} of {task} already")
    digest = _digest(connection, task, version)
    # One of other parameters under this number, if there is one, stands for nothing any more.
    connection.execute(delete(_APPROVALS).where(_this(task, version), _APPROVALS.c.account == who.name))
    row = {"task": task, "version": version, "account": who.name, "approved_s": now_s, "digest": digest}
    connection.execute(insert(_APPROVALS).values(row))
    append(connection, who.told("model.approved", task, now_s, version=version, model=digest.hex()))


def withdraw(connection: Connection, task: str, version: int, *, who: Actor, now_s: float) -> None:
    """An account takes its approval back; what was released with it stays released. Raises ReleaseError."""
    if who.name not in approvals_of(connection, task, version).accounts:
        raise ReleaseError("not_approved_by_you", f"{who.name} has not approved version {version} of {task}")
    connection.execute(delete(_APPROVALS).where(_this(task, version), _APPROVALS.c.account == who.name))
    append(connection, who.told("model.approval_withdrawn", task, now_s, version=version))


def tag(connection: Connection, task: str, name: str, version: int, *, who: Actor, now_s: float) -> None:
    """Put a tag on a version, and take it from any other; `released` only with the approvals that the task asks for.

    Args:
        connection: with the transaction, which has the task to itself.
        task: that exists.
        name: of the tag.
        version: that exists.
        who: decides it.
        now_s: Unix seconds.

    Raises:
        ReleaseError: the version was pruned, or approvals are missing.
    """
    query = select(_MODELS.params).where(_MODELS.task == task, _MODELS.version == version)
    if connection.execute(query).scalar_one() is None:
        raise ReleaseError("pruned", f"the parameters of version {version} were pruned; choose another version")
    detail: dict[str, str | int] = {"tag": name, "version": version}
    if name == RELEASED:
        found = approvals_of(connection, task, version)
        if found.missing:
            by = ", ".join(found.accounts) or "nobody yet"
            raise ReleaseError(
                "not_approved",
                f"version {version} of {task} needs {found.needed} approvals to be released, and was approved by {by}; "
                f"{found.missing} more account(s) have to approve it",
            )
        detail["approved_by"] = " ".join(found.accounts)
    connection.execute(delete(_TAGS).where(_TAGS.c.task == task, _TAGS.c.tag == name))
    connection.execute(insert(_TAGS).values(task=task, tag=name, version=version))
    detail["model"] = _digest(connection, task, version).hex()
    append(connection, who.told("model.released" if name == RELEASED else "model.tagged", task, now_s, **detail))


def _needed(connection: Connection, task: str) -> int:
    """How many approvals a task asks for."""
    spec = connection.execute(select(schema.tasks.c.spec).where(schema.tasks.c.task == task)).scalar_one()
    return config_of(spec, task).release.approvals if spec else 0


def _digest(connection: Connection, task: str, version: int) -> bytes:
    """Of a version's parameters."""
    query = select(_MODELS.digest).where(_MODELS.task == task, _MODELS.version == version)
    return bytes(connection.execute(query).scalar_one())


def _this(task: str, version: int) -> ColumnElement[bool]:
    """The approvals of one version."""
    return (_APPROVALS.c.task == task) & (_APPROVALS.c.version == version)
