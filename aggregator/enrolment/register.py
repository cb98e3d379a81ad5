"""Owners, tokens and enrolments in the database. Every function is part of the caller's transaction.

A token is good for one enrolment, for one task, until it expires or is withdrawn; its owner may have so many enrolments
at a time. With `lock`, what is read stays as it is until the transaction ends; so of two requests with one token, or
for the last place of a quota, one comes second and finds it gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from sqlalchemy import Connection, Select, case, func, insert, select, update

from aggregator.errors import AggregatorError
from aggregator.store import schema

State = Literal["active", "quarantined", "revoked"]


class TokenRecord(NamedTuple):
    """A token as it is kept; times in Unix seconds."""

    owner: str
    task: str
    expires_s: float
    withdrawn_s: float | None
    used_s: float | None


class EnrolmentRecord(NamedTuple):
    """An enrolment; `answer` is an encoded `EnrolmentAnswerMsg`, the last that was granted."""

    enrolment: str
    task: str
    owner: str
    renewal_key: bytes
    state: State
    reason: str
    enrolled_s: float
    changed_s: float
    lasts_until_s: float
    request_digest: bytes
    answer: bytes


_TOKENS, _OWNERS, _ENROLMENTS = schema.enrolment_tokens, schema.owners, schema.enrolments
_TOKEN_COLUMNS = [_TOKENS.c[name] for name in TokenRecord._fields]
_COLUMNS = [_ENROLMENTS.c[name] for name in EnrolmentRecord._fields]


def set_quota(connection: Connection, owner: str, quota: int, *, now_s: float) -> None:
    """Say how many enrolments an owner may have at a time."""
    changed = connection.execute(update(_OWNERS).where(_OWNERS.c.owner == owner).values(quota=quota))
    if not changed.rowcount:
        connection.execute(insert(_OWNERS).values(owner=owner, quota=quota, created_s=now_s))


def add_tokens(
    connection: Connection, digests: Iterable[bytes], *, owner: str, task: str, now_s: float, expires_s: float
) -> None:
    """Take up tokens by the digests of their secrets. Raises AggregatorError: there is no such owner."""
    if quota_of(connection, owner) is None:
        raise AggregatorError(f"owner {owner} has no quota yet; name one with --quota")
    rows = [
        {"digest": digest, "owner": owner, "task": task, "created_s": now_s, "expires_s": expires_s}
        for digest in digests
    ]
    connection.execute(insert(_TOKENS), rows)


def withdraw_tokens(connection: Connection, *, owner: str, now_s: float) -> int:
    """Make all unused tokens of an owner worthless; how many there were."""
    unused = (_TOKENS.c.owner == owner) & _TOKENS.c.used_s.is_(None) & _TOKENS.c.withdrawn_s.is_(None)
    return connection.execute(update(_TOKENS).where(unused).values(withdrawn_s=now_s)).rowcount


class TokenCounts(NamedTuple):
    """An owner's tokens for a study: how many are open, used, expired unused, and withdrawn."""

    owner: str
    task: str
    open: int
    used: int
    expired: int
    withdrawn: int


def token_counts(connection: Connection, *, now_s: float) -> list[TokenCounts]:
    """Of every owner and study."""
    columns = _TOKENS.c
    is_used, is_withdrawn = columns.used_s.is_not(None), columns.withdrawn_s.is_not(None)
    is_unused, is_over = ~is_used & ~is_withdrawn, columns.expires_s <= now_s
    counted = [
        func.sum(case((condition, 1), else_=0))
        for condition in (is_unused & ~is_over, is_used, is_unused & is_over, is_withdrawn)
    ]
    query = select(columns.owner, columns.task, *counted).group_by(columns.owner, columns.task)
    return [
        TokenCounts(owner, task, *map(int, counts))
        for owner, task, *counts in connection.execute(query.order_by(columns.owner, columns.task))
    ]


def find_token(connection: Connection, digest: bytes, *, lock: bool) -> TokenRecord | None:
    """A token."""
    row = connection.execute(_locked(select(*_TOKEN_COLUMNS).where(_TOKENS.c.digest == digest), lock)).one_or_none()
    return None if row is None else TokenRecord(*row)


def use_token(connection: Connection, digest: bytes, *, enrolment: str, now_s: float) -> None:
    """Note what a token was used for."""
    used = update(_TOKENS).where(_TOKENS.c.digest == digest).values(used_s=now_s, enrolment=enrolment)
    connection.execute(used)


def quota_of(connection: Connection, owner: str, *, lock: bool = False) -> int | None:
    """How many enrolments an owner may have; None for an unknown one."""
    return connection.execute(_locked(select(_OWNERS.c.quota).where(_OWNERS.c.owner == owner), lock)).scalar()


def count_enrolments(connection: Connection, owner: str, *, now_s: float) -> int:
    """An owner's enrolments that have names left and were not revoked."""
    counted = (
        (_ENROLMENTS.c.owner == owner) & (_ENROLMENTS.c.state != "revoked") & (_ENROLMENTS.c.lasts_until_s > now_s)
    )
    return connection.execute(select(func.count()).select_from(_ENROLMENTS).where(counted)).scalar_one()


def find_enrolment(connection: Connection, enrolment: str, *, lock: bool) -> EnrolmentRecord | None:
    """An enrolment."""
    found = select(*_COLUMNS).where(_ENROLMENTS.c.enrolment == enrolment)
    row = connection.execute(_locked(found, lock)).one_or_none()
    return None if row is None else EnrolmentRecord(*row)


def add_enrolment(connection: Connection, record: EnrolmentRecord) -> None:
    """Take up an enrolment."""
    connection.execute(insert(_ENROLMENTS).values(record._asdict()))


def renew_enrolment(connection: Connection, record: EnrolmentRecord) -> None:
    """Note that an enrolment has names for longer, and what it was answered."""
    changed = ("lasts_until_s", "request_digest", "answer", "changed_s")
    values = {name: getattr(record, name) for name in changed}
    connection.execute(update(_ENROLMENTS).where(_ENROLMENTS.c.enrolment == record.enrolment).values(values))


class CertifiedName(NamedTuple):
    """A pseudonym, the serial number of its certificate in hexadecimal, and when that is valid (Unix seconds)."""

    device: str
    serial: str
    not_before_s: float
    not_after_s: float


def add_names(connection: Connection, enrolment: str, names: Sequence[CertifiedName]) -> None:
    """Note which pseudonyms are an enrolment's."""
    rows = [{"enrolment": enrolment, **one._asdict()} for one in names]
    connection.execute(insert(schema.enrolment_names), rows)


def names_of(connection: Connection, enrolment: str) -> list[CertifiedName]:
    """An enrolment's pseudonyms, the first to end first."""
    names = schema.enrolment_names.c
    columns = [names[name] for name in CertifiedName._fields]
    found = select(*columns).where(names.enrolment == enrolment).order_by(names.not_after_s, names.device)
    return [CertifiedName(*row) for row in connection.execute(found)]


def _locked(query: Select[Any], lock: bool) -> Select[Any]:
    """A query whose rows nobody else changes until the transaction ends; SQLite locks all that is written anyway."""
    return query.with_for_update() if lock else query
