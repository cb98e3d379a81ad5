"""How helpers are told which devices were thrown out (docs/protocol.md, section 19).

aggregator  -> helper       `RevokedDevicesMsg`, signed: names whose updates are to be in no sum any more
helper      -> aggregator   `RevocationsKeptMsg`, signed: they are in its store

Names are added to what a helper keeps, and never taken back: a device that was thrown out joins again, if ever, under
other keys, and so under other names. A message that is repeated, or comes after a later one, therefore does no harm.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from fl_protocol.message_base import Digest, Msg, Name

MOST_REVOKED = 256
"""Names in one message; more follow in further messages."""
LONGEST_NOTICE_BYTES = 32 * 1024


class RevokedDevicesMsg(Msg, frozen=True):
    """Devices that were thrown out.

    Args:
        helper: who is told.
        devices: names on the wire, whose certificates are valid when they are told.
    """

    tenant: Name
    helper: Name
    devices: Annotated[tuple[Name, ...], Meta(min_length=1, max_length=MOST_REVOKED)]


class RevocationsKeptMsg(Msg, frozen=True):
    """A helper has made durable what it was told.

    Args:
        request_digest: SHA-256 of the signed `RevokedDevicesMsg`.
    """

    tenant: Name
    helper: Name
    request_digest: Digest
