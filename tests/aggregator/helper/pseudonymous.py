"""Devices that go by pseudonyms, and what they send in a secure round; honest ones, and what an attacker makes up."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregator.certificates import KeyPair, certify, make_ca
from fl_protocol.client_certificates import key_info
from fl_protocol.enrolment import Period, periods_from, pseudonym_id
from fl_protocol.secagg.credentials import credential_of
from fl_protocol.secagg.messages import DeviceCredentialMsg, UnmaskEntryMsg
from fl_protocol.secagg.parties import SecureRound, Sender, entry_for
from tests.aggregator.helper.helper_desk import HELPER, NOW_S, TASK, TENANT
from tests.fl_protocol.secagg.rounds import body_of, update_id

CA, STRANGERS_CA = (make_ca(name, now_s=0.0) for name in ("covey clinic", "covey clinic"))
PERIOD, NEXT_PERIOD = periods_from(NOW_S, period_days=5, count=2)


@dataclass(frozen=True)
class Named:
    """A pseudonym with its signing key, and what it shows of itself."""

    name: str
    signing_key: Ed25519PrivateKey
    credential: DeviceCredentialMsg | None

    def signed_by(self, other: Ed25519PrivateKey) -> Named:
        """The same name and certificate with another signing key, as somebody would show them who saw them."""
        assert self.credential is not None
        changed = DeviceCredentialMsg(
            signing_key=other.public_key().public_bytes_raw(), certificate=self.credential.certificate
        )
        return Named(self.name, other, changed)

    def renamed(self, name: str) -> Named:
        """The same keys and certificate under another name."""
        return replace(self, name=name)

    def entry(self, terms: SecureRound, helper: str = HELPER) -> UnmaskEntryMsg:
        """What a helper is told of its update."""
        sender = Sender(self.name, update_id(self.name), self.signing_key, self.credential)
        return entry_for(terms, body_of(terms, self.name, sender=sender), helper)


def signing_key(seed: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"signing {seed}".encode()).digest())


def tls_key(seed: str) -> ec.EllipticCurvePrivateKey:
    number = int.from_bytes(hashlib.sha256(f"TLS {seed}".encode()).digest()[:31], "big")
    return ec.derive_private_key(number + 1, ec.SECP256R1())


def name_of(signing: Ed25519PrivateKey, tls: ec.EllipticCurvePrivateKey, *, tenant: str, task: str) -> str:
    public = signing.public_key().public_bytes_raw()
    return pseudonym_id(tenant=tenant, task=task, signing_key=public, tls_key=key_info(tls.public_key()))


def admitted(seed: str, *, ca: KeyPair = CA, period: Period = PERIOD, tenant: str = TENANT, task: str = TASK) -> Named:
    """A pseudonym that a CA has certified."""
    signing, tls = signing_key(seed), tls_key(seed)
    name = name_of(signing, tls, tenant=tenant, task=task)
    validity = {"not_before_s": period.not_before_s, "not_after_s": period.not_after_s}
    certificate = certify(ca, name, tls.public_key(), **validity)
    return Named(name, signing, credential_of(signing.public_key(), certificate))


def several(seeds: Iterable[str], **how: object) -> list[Named]:
    return [admitted(seed, **how) for seed in seeds]  # type: ignore[arg-type]
