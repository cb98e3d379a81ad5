"""How a helper comes to know a device that goes by a pseudonym, without a list of devices: by what the device brings.

The name in a contribution is a hash of the device's two public keys, and the certificate in its credential binds the
name to the second of them. So a CA that a helper trusts has admitted exactly this pair of keys under this name, for one
period. A name that somebody makes up has no such certificate. Pure; no clock: the reader asks whether the period fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding

from fl_protocol.client_certificates import key_info, load_certificate, period_under
from fl_protocol.ed25519_keys import public_key_from_bytes
from fl_protocol.enrolment import Period, pseudonym_id
from fl_protocol.errors import ProtocolError
from fl_protocol.secagg.messages import DeviceCredentialMsg


@dataclass(frozen=True)
class CertifiedDevice:
    """A pseudonym that a CA has admitted.

    Args:
        signing_key: that its contributions are signed with.
        period: that its name is for.
    """

    signing_key: Ed25519PublicKey
    period: Period


def credential_of(signing_key: Ed25519PublicKey, certificate: bytes) -> DeviceCredentialMsg:
    """What a device brings; runs at the device.

    Args:
        signing_key: of its pseudonym.
        certificate: of its pseudonym, PEM.

    Raises:
        ProtocolError: it is not one certificate in PEM.
    """
    der = load_certificate(certificate, "the pseudonym's certificate").public_bytes(Encoding.DER)
    return DeviceCredentialMsg(signing_key=signing_key.public_bytes_raw(), certificate=der)


def certified_device(
    credential: DeviceCredentialMsg, *, tenant: str, task: str, device: str, cas: Sequence[x509.Certificate]
) -> CertifiedDevice:
    """Who a credential is of; runs at a helper.

    Args:
        credential: untrusted.
        tenant: of the round.
        task: of the round.
        device: the name in the contribution.
        cas: that the helper has pinned for the study.

    Raises:
        ProtocolError: it is no certificate of these CAs for this name, or the name does not follow from its keys.
    """
    try:
        certificate = x509.load_der_x509_certificate(credential.certificate)
        tls_key = key_info(certificate.public_key())
        signing_key = public_key_from_bytes(credential.signing_key)
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise ProtocolError(f"the credential of {device}: expected a certificate in DER and a key; {error}") from error
    named = pseudonym_id(tenant=tenant, task=task, signing_key=credential.signing_key, tls_key=tls_key)
    # Security: or whoever holds one certificate could put any signing key, and a study's name into any other study.
    if named != device:
        raise ProtocolError(
            f"the credential of {device}: its keys are those of {named} in {tenant}/{task}; it is another device's, or "
            "another study's"
        )
    return CertifiedDevice(signing_key, period_under(certificate, device, cas=cas))
