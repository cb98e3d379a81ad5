"""What a helper makes of the names of devices that were thrown out (docs/protocol.md, section 19).

Kept before it is acknowledged, and never taken back by who asks: an aggregator whose database was put back to an
earlier day, or one of its processes that has not heard yet, gets no sum with such a device in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from aggregator.helper.answering import IgnoredError, Study
from aggregator.helper.key_ring import Helper
from aggregator.helper.revoked_devices import RevokedDevices
from fl_protocol.adapters.journal import Journal
from fl_protocol.errors import ProtocolError
from fl_protocol.messages import SignedMsg, decode
from fl_protocol.revocation_messages import LONGEST_NOTICE_BYTES, RevocationsKeptMsg, RevokedDevicesMsg
from fl_protocol.secagg.errors import UnmaskRefusal, UnmaskRefusedError
from fl_protocol.signing import sign, verify

_MOST_NAMED = 3


def named_revocations(data: bytes) -> RevokedDevicesMsg | None:
    """What a signed message says, if that is who was thrown out; nothing is verified."""
    if len(data) > LONGEST_NOTICE_BYTES:
        return None
    try:
        return decode(decode(data, SignedMsg).payload, RevokedDevicesMsg)
    except ProtocolError:
        return None


class Revocations:
    """Takes names, and holds lists against them; one at a time, which whoever calls sees to.

    Args:
        helper: who is told.
        kept: where names are made durable.
        journal: where events are told.
        now_s: Unix seconds.
    """

    def __init__(self, helper: Helper, *, kept: RevokedDevices, journal: Journal, now_s: Callable[[], float]) -> None:
        self._helper, self._kept, self._journal, self._now_s = helper, kept, journal, now_s

    def answer(self, study: Study, data: bytes) -> bytes:
        """A signed `RevocationsKeptMsg`; what it is about is in the store.

        Args:
            study: the one that it came for.
            data: the signed `RevokedDevicesMsg`, untrusted.

        Raises:
            IgnoredError: the pinned aggregator has not signed it, or tells another helper or another study's.
            DatabaseError: the store fails; nothing may be said.
        """
        try:
            told = verify(data, RevokedDevicesMsg, study.aggregator)
        except ProtocolError as error:
            raise IgnoredError(f"the revocations for {study.tenant}: {error}") from error
        if (told.tenant, told.helper) != (study.tenant, self._helper.name):
            raise IgnoredError(f"the revocations for {study.tenant} tell {told.helper} about {told.tenant}")
        new = self._kept.add(study.tenant, told.devices, now_s=self._now_s())
        if new:
            self._journal.write("devices_revoked", at_s=self._now_s(), tenant=study.tenant, devices=new)
        digest = hashlib.sha256(data).digest()
        answer = RevocationsKeptMsg(tenant=study.tenant, helper=self._helper.name, request_digest=digest)
        return sign(answer, self._helper.identity)

    def check(self, tenant: str, devices: tuple[str, ...]) -> None:
        """Raise UnmaskRefusedError where a list names a device that was thrown out."""
        found = self._kept.among(tenant, devices)
        if found:
            named = ", ".join(found[:_MOST_NAMED]) + (
                f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
            )
            raise UnmaskRefusedError(
                UnmaskRefusal.REVOKED_DEVICE,
                f"the list names {named}, thrown out as this helper was told; where the aggregator's database was "
                "restored, revoke again with covey-aggregator device revoke",
            )
