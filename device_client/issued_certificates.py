"""Checks of the certificates that a study's operator issued for this device's pseudonyms.

They are the operator's claims: each must be for a key that this device holds, hold under the CA that came with it,
name the pseudonym and nobody else (`fl_protocol.client_certificates`), and have dates that every device of the study
has too (`fl_protocol.enrolment`). Pure: bytes in, a `ProtocolError` or nothing out.
"""

from __future__ import annotations

from collections.abc import Iterable

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

from fl_protocol.client_certificates import key_info, load_certificate, period_under
from fl_protocol.enrolment import DAY_S, Period
from fl_protocol.errors import ProtocolError


def checked_period(pem: bytes, *, pseudonym: str, public_key: bytes, ca: x509.Certificate) -> Period:
    """The period of a certificate that was issued for this key under the name `pseudonym`.

    Args:
        pem: untrusted.
        pseudonym: this device's.
        public_key: this device's, as DER SubjectPublicKeyInfo.
        ca: from an answer whose signature was checked.

    Raises:
        ProtocolError: it is not what was asked for.
    """
    what = f"the certificate of {pseudonym}"
    certificate = load_certificate(pem, what)
    try:
        issued_for = key_info(certificate.public_key())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ProtocolError(f"{what}: expected a P-256 key; {error}") from error
    if issued_for != public_key:
        raise ProtocolError(f"{what} is for another key than this device's")
    # At no present time: most are for later, and this device's clock may be wrong.
    return period_under(certificate, pseudonym, cas=[ca])


def check_periods(periods: Iterable[Period]) -> None:
    """Whether periods, in order, follow each other on the grid that all devices of a study have.

    Args:
        periods: one for each pseudonym.

    Raises:
        ProtocolError: they do not.
    """
    before: Period | None = None
    for one in periods:
        length_s = one.ends_s - one.begins_s
        # Security: dates that only this device has would tie its pseudonyms together.
        if not 2 * DAY_S <= length_s <= 366 * DAY_S or one.begins_s % length_s:
            raise ProtocolError(f"the answer: expected periods of 2 to 366 days on the grid of the study, got {one}")
        if before is not None and (one.begins_s, length_s) != (before.ends_s, before.ends_s - before.begins_s):
            raise ProtocolError(f"the answer: expected periods that follow each other, got {before}, then {one}")
        before = one
