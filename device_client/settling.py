"""After a start: what the outbox holds is held against the ledger, which knows what may have left the device. Pure.

A power cut can fall between sealing and the ledger's line about it, which is then written now. An old copy of the
store, or a ledger that a person accepted as it stood, can hold what must not be used again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from device_client.errors import LedgerError
from device_client.events import PendingUpdate
from device_client.ledger import PrivacyLedger
from device_client.outbox import Outbox, Work


def unusable(
    outbox: Outbox, ledger: PrivacyLedger, studies: Iterable[str], *, now_s: float
) -> Iterator[tuple[Work | PendingUpdate, str]]:
    """Note the releases that were sealed but not noted; give each entry that must not be used, and why, in words.

    The caller gives an entry up before it asks for the next.

    Raises:
        StoreError: the disk does not take a release's line, or an entry cannot be read.
    """
    for pending in list(outbox):
        try:
            ledger.record_release(pending, now_s=now_s)
        except LedgerError as error:  # its charge or its bytes are not those that the ledger knows: it is not sent
            yield pending, str(error)
    for study in studies:
        while (work := outbox.work(study)) and (reason := _may_have_been_released(work, ledger)):
            yield work, reason


def _may_have_been_released(work: Work, ledger: PrivacyLedger) -> str:
    """Why work must not be gone on with, in words; empty if it may."""
    round_number = work.decoded_manifest().round
    # Security: an old copy of the store holds the work of an update that was sent since. The ledger knows that; or it
    # is an old copy itself that a person accepted, and the lines that would say so are missing.
    if ledger.was_released(work.study, round_number):
        return "its update was released before"
    if ledger.was_accepted_since_charge(work.study, round_number):
        return "its update may have been released before the ledger was accepted as it stood"
    return ""
