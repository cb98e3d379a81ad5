"""Throwing a device out, and taking it back: the state of its enrolment, and what follows from it in the database.

A quarantined device stays connected and is refused; it can be restored. A revoked one is out for good: its certificates
go on the list that the broker looks at, and it joins again, if ever, with another token and under other keys. Every
function is part of the caller's transaction; what the broker has to be told is `aggregator.enrolment.enforcement`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from sqlalchemy import Connection, insert, select, update

from aggregator.audit.log import AuditEvent, append
from aggregator.certificates import RevocationList
from aggregator.enrolment.register import EnrolmentRecord, State, find_enrolment, names_of
from aggregator.errors import AggregatorError
from aggregator.store import schema

_REVOKED = schema.revoked_certificates
_ACTIONS: dict[State, str] = {
    "active": "device.restored",
    "quarantined": "device.quarantined",
    "revoked": "device.revoked",
}


_REVOKED_SINCE = "on the broker's list of revoked certificates when a backup of before was restored"


class StateError(AggregatorError):
    """A device cannot be put into that state.

    Args:
        code: why, for programs.
        text: why, for people.
    """

    def __init__(self, code: Literal["not_enrolled", "same_state", "revoked"], text: str) -> None:
        super().__init__(text)
        self.code: Literal["not_enrolled", "same_state", "revoked"] = code


class RevokedCertificate(NamedTuple):
    """A certificate that is not to be accepted; times in Unix seconds."""

    serial: str
    device: str
    revoked_s: float
    not_before_s: float
    not_after_s: float


def enrolment_of(connection: Connection, name: str, *, lock: bool) -> EnrolmentRecord:
    """An enrolment by its own name, or by any of its pseudonyms.

    Raises:
        StateError: there is none.
    """
    names = schema.enrolment_names.c
    owner = connection.execute(select(names.enrolment).where(names.device == name)).scalar()
    found = find_enrolment(connection, owner or name, lock=lock)
    if found is None:
        raise StateError(
            "not_enrolled",
            f"{name} is no enrolled device; see covey-aggregator device list, and device remove for one that was "
            "registered by hand",
        )
    return found


def change_state(
    connection: Connection, name: str, state: State, *, reason: str, actor: str, now_s: float, token: str = ""
) -> EnrolmentRecord:
    """Put an enrolment into another state.

    Args:
        connection: with the transaction.
        name: of the enrolment, or of one of its pseudonyms.
        state: the new one.
        reason: for the operator and the device.
        actor: who does it, for the log.
        now_s: Unix seconds.
        token: public id of the access token that they have used, for the log.

    Returns:
        The enrolment as it was.

    Raises:
        StateError: there is none, it is in that state already, or it was revoked.
    """
    before = enrolment_of(connection, name, lock=True)
    if before.state == "revoked":
        raise StateError(
            "revoked",
            f"{before.enrolment} was revoked ({before.reason or 'no reason was given'}), which is for good; the device "
            "can join again with a new token",
        )
    if before.state == state:
        why = before.reason or "no reason was given"
        raise StateError("same_state", f"{before.enrolment} is {state} already ({why})")
    table = schema.enrolments
    changes = {"state": state, "reason": reason, "changed_s": now_s}
    connection.execute(update(table).where(table.c.enrolment == before.enrolment).values(changes))
    if state == "revoked":
        _list_certificates(connection, before.enrolment, now_s)
    detail = {"owner": before.owner, "task": before.task, "before": before.state, "reason": reason}
    used = {"token": token} if token else {}
    append(connection, AuditEvent(now_s, actor, _ACTIONS[state], before.enrolment, {**detail, **used}))
    return before


def revoked_certificates(connection: Connection, *, now_s: float) -> list[RevokedCertificate]:
    """What a CRL lists: those whose own time is not over, in the order of their serial numbers."""
    columns = [_REVOKED.c[name] for name in RevokedCertificate._fields]
    query = select(*columns).where(_REVOKED.c.not_after_s >= now_s).order_by(_REVOKED.c.serial)
    return [RevokedCertificate(*row) for row in connection.execute(query)]


def not_enforced(connection: Connection) -> list[RevokedCertificate]:
    """Those that the broker was not told of yet."""
    columns = [_REVOKED.c[name] for name in RevokedCertificate._fields]
    query = select(*columns).where(_REVOKED.c.enforced_s.is_(None)).order_by(_REVOKED.c.revoked_s, _REVOKED.c.serial)
    return [RevokedCertificate(*row) for row in connection.execute(query)]


def note_enforced(connection: Connection, serials: Iterable[str], *, now_s: float) -> None:
    """Note since when the broker lets them in no more."""
    connection.execute(update(_REVOKED).where(_REVOKED.c.serial.in_(list(serials))).values(enforced_s=now_s))


class RevokedAgain(NamedTuple):
    """How many devices were thrown out again, and how many certificates are listed whose device nobody knows."""

    devices: int
    certificates: int


def revoke_again(connection: Connection, listed: RevocationList, *, actor: str, now_s: float) -> RevokedAgain:
    """Throw out whom a list of a later time has, which this database does not know; part of the caller's transaction.

    A certificate on it whose device is not known either (it joined later) is listed all the same.

    Args:
        connection: with the transaction.
        listed: verified.
        actor: who does it, for the log.
        now_s: Unix seconds.

    Returns:
        What was not known.
    """
    serials = {f"{serial:x}": at_s for serial, at_s in listed.revoked.items()}
    names = schema.enrolment_names.c
    owners = {row.serial: row.enrolment for row in connection.execute(select(names.serial, names.enrolment))}
    devices = 0
    for enrolment in sorted({owners[serial] for serial in serials if serial in owners}):
        if enrolment_of(connection, enrolment, lock=True).state != "revoked":
            change_state(connection, enrolment, "revoked", reason=_REVOKED_SINCE, actor=actor, now_s=now_s)
            devices += 1
    known = set(connection.execute(select(_REVOKED.c.serial)).scalars())
    unknown = sorted(serials.keys() - known)
    for serial in unknown:
        # Without a name nobody is to be disconnected or told of; and nobody knows when it ends by itself.
        times = {"revoked_s": serials[serial], "not_before_s": listed.ends_s, "not_after_s": listed.ends_s}
        connection.execute(insert(_REVOKED).values(serial=serial, device="", **times))
        append(connection, AuditEvent(now_s, actor, "certificate.revoked", serial, {"reason": _REVOKED_SINCE}))
    return RevokedAgain(devices, len(unknown))


def _list_certificates(connection: Connection, enrolment: str, now_s: float) -> None:
    """Have the certificates of all names, of those to come too, refused."""
    rows = [
        {**one._asdict(), "revoked_s": now_s} for one in names_of(connection, enrolment) if one.not_after_s >= now_s
    ]
    if rows:
        connection.execute(insert(_REVOKED), rows)
