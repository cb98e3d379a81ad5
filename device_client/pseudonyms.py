"""The names a device goes by on the wire: per study a row of pseudonyms, one after the other, which share nothing.

Each has its own signing key and its own P-256 TLS key, made here and never handed out, and is used for one period that
is the same for every device of the study (`fl_protocol.enrolment`). A period's certificate is valid a day longer on
both sides, only so that an update can still be delivered under the name that it was sealed for. Names whose time is
over are
forgotten with their keys: who takes the device later cannot show which updates were its own by them.

What the operator answers is believed only as far as it is checked: signed by the pinned aggregator, each certificate
for a key that this device holds, in the chain of the CA that came with it, and saying nothing but the pseudonym.

Decisions follow from the stored state and the time given; the only I/O is the `Store` port.
"""

from __future__ import annotations

import datetime
import hashlib
from dataclasses import dataclass, field
from typing import Literal

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from device_client.errors import StoreError
from device_client.issued_certificates import check_periods, checked_period
from device_client.ports import Store
from device_client.tls_keys import SoftwareTlsKeys, TlsKeys
from fl_protocol.client_certificates import key_info, load_certificate
from fl_protocol.enrolment import (
    MAX_PSEUDONYMS,
    Period,
    PseudonymAnswer,
    PseudonymRequest,
    answer_signature_is_valid,
    decode_file,
    encode_file,
    pseudonym_id,
    signed_entry,
)
from fl_protocol.errors import LocalMisuseError, ProtocolError
from fl_protocol.integer_noise import Entropy
from fl_protocol.secagg.credentials import credential_of
from fl_protocol.secagg.messages import DeviceCredentialMsg
from fl_protocol.signing import public_key_hex

DEFAULT_COUNT = 12
_LAST_DATE_S = 253_402_300_799.0
"""The end of the year 9999: a clock may be wrong beyond what a date can show."""


@dataclass(frozen=True)
class Pseudonym:
    """One name with all that belongs to it.

    Args:
        id: on the wire; also the MQTT client id and the certificate's common name.
        period: when new work is done under it.
        signing_key: signs update headers.
        certificate: PEM.
        tls_key: private key of the certificate, PEM; of a TPM's, what only that TPM can use.
        ca: certificate of the CA that the broker's certificate comes from, PEM.
    """

    id: str
    period: Period
    signing_key: Ed25519PrivateKey = field(repr=False)
    certificate: bytes = field(repr=False)
    tls_key: bytes = field(repr=False)
    ca: bytes = field(repr=False)

    @property
    def not_before_s(self) -> float:
        """When the broker begins to accept its certificate, Unix seconds."""
        return self.period.not_before_s

    @property
    def not_after_s(self) -> float:
        """When the broker ceases to accept its certificate, Unix seconds."""
        return self.period.not_after_s

    @property
    def credential(self) -> DeviceCredentialMsg:
        """By which the helpers of a secure round know it."""
        return credential_of(self.signing_key.public_key(), self.certificate)

    def is_valid(self, now_s: float) -> bool:
        """Whether the broker accepts it now: pending updates can be delivered."""
        return self.period.is_valid_at(now_s)


@dataclass(frozen=True)
class NoPseudonym:
    """Why there is no name to go by now, and in words what to do."""

    reason: Literal["none", "not_admitted", "not_yet_valid", "expired"]
    words: str


class _Prepared(msgspec.Struct, frozen=True):
    """A pseudonym that the operator was asked for, as stored; keys: 32 raw bytes, and PEM."""

    id: str
    signing_key: bytes
    tls_key: bytes
    csr: str


class _Installed(msgspec.Struct, frozen=True):
    """A pseudonym with its certificate, as stored."""

    id: str
    signing_key: bytes
    tls_key: bytes
    certificate: bytes
    ca: bytes
    begins_s: int
    ends_s: int

    def pseudonym(self) -> Pseudonym:
        """As it is used."""
        key = Ed25519PrivateKey.from_private_bytes(self.signing_key)
        period = Period(self.begins_s, self.ends_s)
        return Pseudonym(self.id, period, key, self.certificate, self.tls_key, self.ca)


class _Row(msgspec.Struct, frozen=True):
    """All that is stored for a study."""

    prepared: tuple[_Prepared, ...] = ()
    installed: tuple[_Installed, ...] = ()


class Pseudonyms:
    """The pseudonyms of one study on this device.

    Args:
        store: holds them, encrypted.
        tenant: the study's.
        task: the study's.
        tls_keys: where TLS keys are made and used.

    Raises:
        StoreError: from every method that reads or writes.
    """

    def __init__(
        self,
        store: Store,
        *,
        tenant: str,
        task: str,
        tls_keys: TlsKeys = SoftwareTlsKeys(),  # noqa: B008 - has no state
    ) -> None:
        self._store, self._tenant, self._task, self._tls_keys = store, tenant, task, tls_keys
        self._study = f"{tenant}/{task}"
        # A hash, because a store's names take neither two slashes nor every name of a task.
        self._blob = f"pseudonyms/{hashlib.sha256(self._study.encode()).hexdigest()[:32]}"
        raw = store.read(self._blob)
        try:
            self._row = _Row() if raw is None else msgspec.msgpack.decode(raw, type=_Row)
        except msgspec.DecodeError as error:
            raise StoreError(
                f"the pseudonyms of {self._study} cannot be read; erase this study and make new ones"
            ) from error
        self._installed = [one.pseudonym() for one in self._row.installed]

    def prepare(self, *, count: int = DEFAULT_COUNT, entropy: Entropy, anew: bool = False) -> bytes:
        """Make names and keys, keep them, and return the request for the operator.

        A request that was not answered yet is returned again, so that its file may be lost.

        Args:
            count: how many, 1 to 64: with periods of 30 days, so many months.
            entropy: source of the keys.
            anew: forget the request that was not answered yet, and its keys.

        Raises:
            LocalMisuseError: `count` is out of range.
            KeyStoreError: no key can be made.
        """
        if not 1 <= count <= MAX_PSEUDONYMS:
            raise LocalMisuseError(f"count: expected 1 to {MAX_PSEUDONYMS} pseudonyms, got {count}")
        if anew or not self._row.prepared:
            made = tuple(self._make(entropy) for _ in range(count))
            self._keep(_Row(prepared=made, installed=self._row.installed))
        entries = tuple(
            signed_entry(
                tenant=self._tenant,
                task=self._task,
                pseudonym=one.id,
                csr=one.csr,
                key=Ed25519PrivateKey.from_private_bytes(one.signing_key),
            )
            for one in self._row.prepared
        )
        return encode_file(
            PseudonymRequest(
                format="covey-pseudonym-request-1", tenant=self._tenant, task=self._task, pseudonyms=entries
            )
        )

    def install(
        self, answer: bytes, *, aggregator_key: Ed25519PublicKey, replaces: bool = False
    ) -> tuple[Pseudonym, ...]:
        """Check the operator's answer and take its certificates; all of them, or none.

        Args:
            answer: the answer file.
            aggregator_key: the aggregator that this device is pinned to.
            replaces: forget what is installed for the same time: it belongs to an enrolment that is over.

        Returns:
            The new pseudonyms, in the order of their periods.

        Raises:
            StoreError: there is no request that an answer could belong to.
            ProtocolError: the answer is malformed, another's, or says something that is not so.
        """
        if not self._row.prepared:
            raise StoreError(
                f"{self._study} has no open request: its answer was installed before, or no request was made here"
            )
        decoded = decode_file(answer, PseudonymAnswer)
        self._check_answer(decoded, aggregator_key)
        certificates = {one.id: one.certificate.encode() for one in decoded.certificates}
        ca = load_certificate(decoded.ca.encode(), "the CA")
        new = sorted(
            (_issued(one, certificates[one.id], ca) for one in self._row.prepared), key=lambda one: one.begins_s
        )
        check_periods(Period(one.begins_s, one.ends_s) for one in new)
        stays = [one for one in self._row.installed if not replaces or one.ends_s <= new[0].begins_s]
        self._keep(_Row(installed=(*stays, *new)))
        return tuple(self._installed[-len(new) :])

    def current(self, now_s: float) -> Pseudonym | NoPseudonym:
        """The pseudonym for new work at this time; never two for one period, however often it is asked.

        Args:
            now_s: Unix seconds; if the device's clock is wrong, so is the answer, and the words say what the clock
                says.
        """
        for one in self._installed:  # of two for one period the one installed first
            if one.period.is_used_at(now_s):
                return one
        return self._nothing(now_s)

    def get(self, pseudonym: str) -> Pseudonym | None:
        """A pseudonym by its id, for an update that was sealed for it; None once it is forgotten."""
        return next((one for one in self._installed if one.id == pseudonym), None)

    def installed(self) -> tuple[Pseudonym, ...]:
        """All that were not forgotten yet, in the order of their periods."""
        return tuple(sorted(self._installed, key=lambda one: one.period.begins_s))

    def describe(self, now_s: float) -> list[str]:
        """One line for each pseudonym, and one on an open request, for the wearer to read."""
        lines = [
            f"{self._study}  {one.id}  {_period_text(one.period)}  {_state(one, now_s)}" for one in self.installed()
        ]
        if self.waiting:
            lines.append(f"{self._study}  {self.waiting} more asked for; the operator's answer is not installed yet")
        return lines or [f"{self._study}  none"]

    @property
    def waiting(self) -> int:
        """How many were asked for and not answered yet."""
        return len(self._row.prepared)

    def next_change_s(self, now_s: float) -> float | None:
        """When `current` gives another answer than at `now_s`, Unix seconds; None if never again."""
        now = self.current(now_s)
        if isinstance(now, Pseudonym):
            return now.period.ends_s
        return min((one.period.begins_s for one in self._installed if one.period.begins_s > now_s), default=None)

    def lasts_until_s(self) -> float | None:
        """When the last of them ends; by then others must have been asked for."""
        return max((one.period.ends_s for one in self._installed), default=None)

    def forget_expired(self, now_s: float) -> tuple[str, ...]:
        """Delete the names and keys whose certificates have ended; their ids.

        Nothing is deleted while no pseudonym is current: then the clock may be wrong, and a clock ten years ahead must
        not cost the device every name it has. Call it when the broker has accepted a connection under the current one,
        which shows that the broker's clock agrees.

        Args:
            now_s: Unix seconds.
        """
        if isinstance(self.current(now_s), NoPseudonym):
            return ()
        ended = tuple(one.id for one in self._installed if one.not_after_s < now_s)
        if ended:
            left = tuple(one for one in self._row.installed if one.id not in ended)
            self._keep(_Row(prepared=self._row.prepared, installed=left))
        return ended

    def tls_key(self, one: Pseudonym) -> ec.EllipticCurvePrivateKey:
        """The TLS key of a name, to sign with. Raises KeyStoreError."""
        return self._tls_keys.load(one.tls_key)

    def erase(self) -> None:
        """Delete all names and keys of this study."""
        self._store.delete(self._blob)
        self._row, self._installed = _Row(), []

    def _make(self, entropy: Entropy) -> _Prepared:
        """A new name and its keys."""
        signing_key, tls = entropy(32), self._tls_keys.make(entropy)
        public = Ed25519PrivateKey.from_private_bytes(signing_key).public_key().public_bytes_raw()
        info = key_info(tls.key.public_key())
        name = pseudonym_id(tenant=self._tenant, task=self._task, signing_key=public, tls_key=info)
        return _Prepared(name, signing_key, tls.stored, _certificate_request(name, tls.key))

    def _check_answer(self, answer: PseudonymAnswer, aggregator_key: Ed25519PublicKey) -> None:
        """Whether the answer is the pinned aggregator's, to this request."""
        there = f"{answer.tenant}/{answer.task}"
        if there != self._study:
            raise ProtocolError(f"the answer: expected one for {self._study}, got one for {there}")
        pinned = public_key_hex(aggregator_key)
        if answer.aggregator_key != pinned:
            raise ProtocolError(
                f"the answer is from the aggregator {answer.aggregator_key[:16]}..., this device is pinned to "
                f"{pinned[:16]}...; ask the study's operator which is right"
            )
        # Security: the CA in it decides which broker this device trusts.
        if not answer_signature_is_valid(answer, aggregator_key):
            raise ProtocolError("the answer was changed: the aggregator's signature does not fit; fetch it again")
        asked, answered = [one.id for one in self._row.prepared], [one.id for one in answer.certificates]
        if sorted(asked) != sorted(answered):
            raise ProtocolError(
                f"the answer: expected certificates for the {len(asked)} pseudonyms of the open request, got "
                f"{len(answered)} of which {len(set(asked) & set(answered))} were asked for; is it to an older request?"
            )

    def _nothing(self, now_s: float) -> NoPseudonym:
        """Why no pseudonym is current."""
        clock = f"this device's clock says {date_text(now_s)}"
        ahead = [one.period.begins_s for one in self._installed if one.period.begins_s > now_s]
        if ahead:
            return NoPseudonym(
                "not_yet_valid",
                f"{self._study}: the next pseudonym is for {date_text(min(ahead))} and later, and {clock}; "
                "if the clock is wrong, set it, if not, wait",
            )
        request = "make a request with covey-device pseudonyms request and hand it to the study's operator"
        install = "install the operator's answer to the open request with covey-device pseudonyms install"
        if self._installed:
            ended = max(one.period.ends_s for one in self._installed)
            return NoPseudonym(
                "expired",
                f"{self._study}: the last pseudonym ended on {date_text(ended)}, and {clock}; if the clock is wrong, "
                f"set it, if not, {install if self._row.prepared else request}",
            )
        if self._row.prepared:
            return NoPseudonym("not_admitted", f"{self._study}: no pseudonym has a certificate yet; {install}")
        return NoPseudonym("none", f"{self._study}: this device has no pseudonyms; {request}")

    def _keep(self, row: _Row) -> None:
        """Durably replace everything."""
        self._store.write(self._blob, msgspec.msgpack.encode(row))
        self._row, self._installed = row, [one.pseudonym() for one in row.installed]


def date_text(at_s: float) -> str:
    """Unix seconds as a day in UTC, such as 2026-11-22; clocks beyond what a date can show are shown at its edge."""
    whole = min(max(at_s, 0.0), _LAST_DATE_S)
    return datetime.datetime.fromtimestamp(whole, datetime.timezone.utc).strftime("%Y-%m-%d")


def _period_text(period: Period) -> str:
    """A period in words."""
    return f"{date_text(period.begins_s)} to {date_text(period.ends_s)}"


def _state(one: Pseudonym, now_s: float) -> str:
    """What a pseudonym is for at this time."""
    if now_s < one.period.begins_s:
        return "later"
    if now_s < one.period.ends_s:
        return "in use"
    return "for pending updates only" if one.is_valid(now_s) else "over"


def _certificate_request(name: str, key: ec.EllipticCurvePrivateKey) -> str:
    """PKCS #10 in PEM: the name, the key, nothing else."""
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.PEM)
        .decode()
    )


def _issued(asked: _Prepared, pem: bytes, ca: x509.Certificate) -> _Installed:
    """A pseudonym with the certificate that was issued for it, checked."""
    key = key_info(x509.load_pem_x509_csr(asked.csr.encode()).public_key())
    period = checked_period(pem, pseudonym=asked.id, public_key=key, ca=ca)
    return _Installed(
        id=asked.id,
        signing_key=asked.signing_key,
        tls_key=asked.tls_key,
        certificate=pem,
        ca=ca.public_bytes(Encoding.PEM),
        begins_s=period.begins_s,
        ends_s=period.ends_s,
    )
