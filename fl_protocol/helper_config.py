"""The helpers of secure aggregation that a configuration file pins, for devices and aggregators."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from fl_protocol.errors import LocalMisuseError
from fl_protocol.message_base import Name
from fl_protocol.secagg.terms import HelperIdentity
from fl_protocol.signing import public_key_from_hex


class HelperPin(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """One helper.

    Args:
        name: on the wire.
        operator: who runs it; helpers of one operator count as one.
        key: its Ed25519 identity, 64 hex digits, as ``covey-helper init`` prints it.
    """

    name: Name
    operator: Name
    key: str

    def __post_init__(self) -> None:
        try:
            public_key_from_hex(self.key)
        except LocalMisuseError as error:
            raise ValueError(f"helper {self.name}: key: {error}") from error

    @property
    def identity(self) -> HelperIdentity:
        """As it is pinned."""
        return HelperIdentity(self.name, self.operator, public_key_from_hex(self.key))


def pinned(pins: Iterable[HelperPin]) -> dict[str, HelperIdentity]:
    """All of them by name. Raises ValueError: a name or a key is given twice."""
    found: dict[str, HelperIdentity] = {}
    keys = set()
    for pin in pins:
        # Security: one identity under two names would be one helper that counts as two.
        if pin.name in found or pin.key.strip().lower() in keys:
            raise ValueError(f"helper {pin.name}: expected each name and each key once")
        keys.add(pin.key.strip().lower())
        found[pin.name] = pin.identity
    return found
