"""The log of what became of the updates that left, for ``covey-device sent``; in the clear, one JSON object a line."""

from __future__ import annotations

import msgspec

from device_client.ports import Store

LOG_NAME = "deliveries.jsonl"


class _Entry(msgspec.Struct, frozen=True):
    """One line."""

    at_s: float
    update_id: str
    outcome: str


def record_outcome(store: Store, update_id: bytes, outcome: str, *, now_s: float) -> None:
    """Durably note that an update was ``delivered``, ``refused`` or has ``expired``; a second line does no harm.

    Raises:
        StoreError: the disk does not take it.
    """
    store.append_log(LOG_NAME, msgspec.json.encode(_Entry(now_s, update_id.hex(), outcome)))


def outcomes(store: Store) -> dict[str, str]:
    """By update id in hexadecimal, what became of it. Raises StoreError."""
    found = {}
    for line in store.read_log(LOG_NAME).splitlines():
        try:
            entry = msgspec.json.decode(line, type=_Entry)
        except msgspec.DecodeError:  # a line torn by a power cut
            continue
        found[entry.update_id] = entry.outcome
    return found
