"""Which devices are there, and why they rest, as they last said and the broker handed on.

Hearsay: a presence is not signed, so nothing that is promised hangs on it. One row a name that is registered; what
others say is counted and forgotten. Many are written in one transaction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import msgspec
from sqlalchemy import Connection, and_, case, delete, func, insert, or_, select, update

from aggregator.store import schema
from aggregator.store.database import Database
from fl_protocol.messages import PresenceMsg, PresenceReason

MOST_AT_ONCE = 1000
"""Names in one transaction."""
REASONS: tuple[PresenceReason, ...] = tuple(sorted(reason for reason in get_args(PresenceReason) if reason))
UNHEARD = "unheard"
_PRESENCE, _DEVICES, _PERIODS = schema.presence.c, schema.devices.c, schema.device_periods.c
_NAMES, _ENROLMENTS = schema.enrolment_names.c, schema.enrolments.c


class FleetCounts(msgspec.Struct, frozen=True, kw_only=True):
    """How many devices are in which state; a device with an enrolment counts once, whatever its names.

    Args:
        active: that may take part: enrolled and neither put aside nor thrown out, or registered by hand.
        quarantined, revoked: enrolled ones.
        online, offline, unheard: of the active ones, as they last said. One that the broker tells nothing about, or
            whose name has just changed, is unheard.
        reasons: of those online, what keeps them from training, for each reason; those that may train, or do not say,
            are in none.
    """

    active: int
    quarantined: int
    revoked: int
    online: int
    offline: int
    unheard: int
    reasons: dict[str, int]


class PresenceRow(NamedTuple):
    """What a name last said of itself.

    Args:
        state: online or offline; unheard after it was online and the broker did not know it any more.
        since_s: when state or reason last changed, Unix seconds, as far as it was heard.
        seen_s: when it was last heard of; the broker tells of everybody again at each connection.
    """

    device: str
    state: Literal["online", "offline", "unheard"]
    reason: PresenceReason
    software: str
    since_s: float
    seen_s: float


class PresenceBook:
    """See the module docstring. Raises DatabaseError throughout."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def write(self, heard: Mapping[str, PresenceMsg | None], *, now_s: float) -> int:
        """Note what names say of themselves, in one transaction; how many names nobody registered.

        Args:
            heard: by name, at most `MOST_AT_ONCE`; None for a presence that was taken away.
            now_s: Unix seconds.
        """
        with self._database.transaction() as connection:
            query = select(_DEVICES.device, *schema.presence.c).select_from(
                schema.devices.outerjoin(schema.presence, _DEVICES.device == _PRESENCE.device)
            )
            known = {row[0]: row[1:] for row in connection.execute(query.where(_DEVICES.device.in_(list(heard))))}
            gone = [name for name, message in heard.items() if message is None and name in known]
            if gone:
                connection.execute(delete(schema.presence).where(_PRESENCE.device.in_(gone)))
            said = {name: message for name, message in heard.items() if message is not None and name in known}
            rows = [_row(name, message, known[name], now_s) for name, message in said.items()]
            _put(connection, rows, there={name for name, row in known.items() if row[0] is not None})
        return len(heard) - len(known)

    def forget_unheard(self, *, since_s: float, now_s: float) -> int:
        """Note who was online and is not known to the broker any more: not heard of since; how many they are.

        Args:
            since_s: when the broker began to tell of everybody, Unix seconds.
            now_s: Unix seconds.
        """
        lost = (_PRESENCE.state == "online") & (_PRESENCE.seen_s < since_s)
        with self._database.transaction() as connection:
            connection.execute(delete(schema.presence).where(_PRESENCE.device.not_in(select(_DEVICES.device))))
            changed = update(schema.presence).where(lost).values(state=UNHEARD, reason="", since_s=now_s)
            return connection.execute(changed).rowcount


def presence_of(connection: Connection, device: str) -> PresenceRow | None:
    """What a name last said of itself; None if nothing is known."""
    row = connection.execute(select(schema.presence).where(_PRESENCE.device == device)).one_or_none()
    return None if row is None else PresenceRow(*row)


def counts(connection: Connection, *, now_s: float) -> FleetCounts:
    """How many devices are in which state."""
    by_state = dict.fromkeys(("active", "quarantined", "revoked"), 0)
    lasts = or_(_ENROLMENTS.state != "active", _ENROLMENTS.lasts_until_s > now_s)
    enrolled = select(_ENROLMENTS.state, func.count()).where(lasts).group_by(_ENROLMENTS.state)
    by_state.update((state, count) for state, count in connection.execute(enrolled))
    active = by_state["active"] + connection.execute(_registered_by_hand(now_s)).scalar_one()
    states, reasons = {"online": 0, "offline": 0}, dict.fromkeys(REASONS, 0)
    for state, reason, count in connection.execute(_heard(now_s)):
        states[state] += count
        if reason:
            reasons[reason] += count
    return FleetCounts(
        active=active,
        quarantined=by_state["quarantined"],
        revoked=by_state["revoked"],
        **states,
        unheard=max(0, active - states["online"] - states["offline"]),
        reasons={str(reason): count for reason, count in reasons.items()},
    )


def _in_time(now_s: float) -> Any:
    """Whether a name is valid now; one without dates always is."""
    return or_(_PERIODS.device.is_(None), and_(_PERIODS.not_before_s <= now_s, _PERIODS.not_after_s >= now_s))


def _registered_by_hand(now_s: float) -> Any:
    """How many names without an enrolment are valid now."""
    tables = schema.devices.outerjoin(schema.device_periods, _DEVICES.device == _PERIODS.device)
    without = ~select(_NAMES.device).where(_NAMES.device == _DEVICES.device).exists()
    return select(func.count()).select_from(tables).where(without, _in_time(now_s))


def _heard(now_s: float) -> Any:
    """State and reason of the active devices that were heard, with how many they are. Online under any name counts."""
    tables = (
        schema.presence.join(schema.devices, _DEVICES.device == _PRESENCE.device)
        .outerjoin(schema.device_periods, _DEVICES.device == _PERIODS.device)
        .outerjoin(schema.enrolment_names, _DEVICES.device == _NAMES.device)
        .outerjoin(schema.enrolments, _NAMES.enrolment == _ENROLMENTS.enrolment)
    )
    is_active = func.coalesce(_ENROLMENTS.state, "active") == "active"
    is_online = _PRESENCE.state == "online"
    one = (
        select(
            func.max(case((is_online, "online"), else_="offline")).label("state"),  # the later word of the two
            func.max(case((is_online, _PRESENCE.reason), else_="")).label("reason"),
        )
        .select_from(tables)
        .where(_PRESENCE.state != UNHEARD, is_active, _in_time(now_s))
        .group_by(func.coalesce(_NAMES.enrolment, _DEVICES.device))
        .subquery()
    )
    return select(one.c.state, one.c.reason, func.count()).group_by(one.c.state, one.c.reason)


def _row(name: str, message: PresenceMsg, before: Any, now_s: float) -> dict[str, Any]:
    """What is written for a name."""
    _, state, reason, _, since_s, _ = before
    same = (state, reason) == (message.state, message.reason)
    return {
        "device": name,
        "state": message.state,
        "reason": message.reason,
        "software": message.software,
        "since_s": since_s if same else now_s,
        "seen_s": now_s,
    }


def _put(connection: Connection, rows: list[dict[str, Any]], *, there: set[str]) -> None:
    """Replace rows, those of names that have one and those of others."""
    fresh = [row for row in rows if row["device"] not in there]
    known = [row["device"] for row in rows if row["device"] in there]
    if known:
        connection.execute(delete(schema.presence).where(_PRESENCE.device.in_(known)))
        fresh = rows
    if fresh:
        connection.execute(insert(schema.presence), fresh)
