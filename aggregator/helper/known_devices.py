"""Which devices of a list a helper knows: those in its own register, and pseudonyms that a pinned CA has certified.

Without this, whoever asks could put names of their own on a list and read one device's update as the rest of a sum.
What is remembered is what follows from a credential's bytes; whether its period fits is asked each time. Pure.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from aggregator.helper.answering import Question, Study
from fl_protocol.errors import ProtocolError
from fl_protocol.secagg.credentials import CertifiedDevice, certified_device
from fl_protocol.secagg.errors import UnmaskRefusal, UnmaskRefusedError
from fl_protocol.secagg.messages import DeviceCredentialMsg

MOST_REMEMBERED = 16_384
"""Credentials of a study that are not verified again; more than one list can hold."""


class KnownDevices:
    """The devices of one study, as its helper knows them.

    Args:
        study: with the CAs that are pinned for it.
        most: credentials that are remembered; the one not seen for longest gives way.
    """

    def __init__(self, study: Study, *, most: int = MOST_REMEMBERED) -> None:
        self._study, self._most = study, most
        self._remembered: OrderedDict[bytes, CertifiedDevice] = OrderedDict()

    def keys(
        self, question: Question, *, listed: Mapping[str, Ed25519PublicKey], now_s: float
    ) -> dict[str, Ed25519PublicKey]:
        """The signing keys of all devices of a list, by name.

        Args:
            question: its manifest was verified; the list was not.
            listed: of the helper's own register.
            now_s: Unix seconds.

        Raises:
            UnmaskRefusedError: UNSIGNED; a device is neither listed nor certified, or its certificate is for another
                time.
        """
        try:
            return {
                device: self._key(question, device, entry.credential, listed=listed, now_s=now_s)
                for device, entry in zip(question.devices, question.entries, strict=True)
            }
        except ProtocolError as error:
            raise UnmaskRefusedError(UnmaskRefusal.UNSIGNED, str(error)) from error

    def _key(
        self,
        question: Question,
        device: str,
        credential: DeviceCredentialMsg | None,
        *,
        listed: Mapping[str, Ed25519PublicKey],
        now_s: float,
    ) -> Ed25519PublicKey:
        """One device's key. Raises ProtocolError."""
        if self._study.allow_listed and device in listed:
            return listed[device]
        if credential is None or not self._study.cas:
            raise ProtocolError(self._unknown(device, credential))
        found = self._certified(question, device, credential)
        if not found.period.is_valid_at(now_s):
            raise ProtocolError(f"the certificate of {device} is for {found.period}, and its time is not now")
        # Security: at one moment of the round's, not whenever the certificate holds: around a change a device has two
        # that do, and would be two of a list. Of the periods that hold a moment each device has one.
        if not found.period.is_used_at(question.opened_s):
            raise ProtocolError(
                f"{device} is a name for {found.period}, and the round did not open then; a device has one name for "
                "each period"
            )
        return found.signing_key

    def _certified(self, question: Question, device: str, credential: DeviceCredentialMsg) -> CertifiedDevice:
        """Who a credential is of, remembered or verified. Raises ProtocolError."""
        task = question.terms.task
        said = msgspec.msgpack.encode([task, device, credential.signing_key, credential.certificate])
        digest = hashlib.sha256(said).digest()
        found = self._remembered.get(digest)
        if found is None:
            found = certified_device(
                credential, tenant=self._study.tenant, task=task, device=device, cas=self._study.cas
            )
            self._remembered[digest] = found
        self._remembered.move_to_end(digest)
        while len(self._remembered) > self._most:
            self._remembered.popitem(last=False)
        return found

    def _unknown(self, device: str, credential: DeviceCredentialMsg | None) -> str:
        """Why a device is not known, in words."""
        where = "is not among the devices listed here" if self._study.allow_listed else "goes by no pseudonym"
        if not self._study.cas:
            return f"{device} {where}" + (", and no CA is pinned for its certificate" if credential else "")
        return f"{device} {where}, and brings no certificate"
