"""Checks of who the device is on the wire: its certificates, and how long its pseudonyms last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import NameOID

from device_client.checks.findings import Result, ok, problem, warning
from device_client.config import StudyConfig
from device_client.errors import DeviceError
from device_client.joining.records import RENEWED_PERIODS, JoiningState
from device_client.joining.words import refusal_words
from device_client.pseudonyms import NoPseudonym, Pseudonyms, date_text
from fl_protocol.client_certificates import key_info

WARN_BEFORE_S = 14 * 86_400.0
_Parsed = TypeVar("_Parsed")


def check_enrolment(state: JoiningState, names: Pseudonyms, *, now_s: float) -> Result:
    """Whether a study that was joined by enrolment renews its names.

    Args:
        state: of the enrolment.
        names: of the study.
        now_s: Unix seconds.
    """
    if state.refusal is not None:
        return problem(refusal_words(state.study, state.refusal))
    member, last_s = state.membership, names.lasts_until_s()
    if member is None:
        return warning("the request to join was not answered yet", "run covey-device enroll again; it goes on")
    row = names.installed()
    period_s = row[-1].period.ends_s - row[-1].period.begins_s if row else 0
    due_s = (last_s or 0.0) - RENEWED_PERIODS * period_s
    until = f"enrolled as {member.enrolment}, names until {date_text(last_s or 0.0)}"
    if now_s < due_s:
        return ok(f"{until}; the daemon renews them from {date_text(due_s)} on")
    advice = "let covey-device run where it reaches the study's broker, or where it joined"
    return warning(f"{until}; renewal has been due since {date_text(due_s)}", advice)


def check_told_publishers(state: JoiningState, study: StudyConfig) -> Result | None:
    """What to say where the study's last answer names other publishers than are pinned; None where it does not.

    Args:
        state: of the enrolment; a renewal brings what the study says by then, and changes no configuration.
        study: as it is configured.
    """
    if state.membership is None or state.membership.pins.publisher_pins == study.publisher_pins:
        return None
    return warning(
        f"the study now says that models are vouched for by {state.membership.pins.publisher_pins.words}; this device "
        f"keeps to what is pinned here, {study.publisher_pins.words}",
        "find out over another way which is right; only an edit of the configuration changes what is pinned",
    )


def check_pseudonyms(names: Pseudonyms, *, now_s: float, are_renewed: bool = False) -> Result:
    """Whether there is a name to go by, and for how long.

    Args:
        names: of the study.
        now_s: Unix seconds.
        are_renewed: whether the daemon asks for further ones by itself.
    """
    current, last_s = names.current(now_s), names.lasts_until_s()
    if isinstance(current, NoPseudonym):
        return problem(current.words)
    later = sum(one.period.begins_s > now_s for one in names.installed())
    text = f"goes by {current.id} until {date_text(current.period.ends_s)}, and has {later} more names"
    if last_s is not None and last_s - now_s < WARN_BEFORE_S and not names.waiting and not are_renewed:
        return warning(
            f"{text}, the last until {date_text(last_s)}",
            "make a request with covey-device pseudonyms request and hand it to the study's operator",
        )
    return ok(f"{text}, the last until {date_text(last_s or now_s)}")


@dataclass(frozen=True)
class Papers:
    """What a device shows a broker; PEM.

    Args:
        ca: of the CA that the broker's certificate comes from.
        certificate: this device's.
        key: private key of it.
    """

    ca: bytes
    certificate: bytes
    key: bytes = field(repr=False)


def public_half(key: bytes) -> PublicKeyTypes:
    """Of a private key in PEM without a password. Raises ValueError, TypeError."""
    return load_pem_private_key(key, None).public_key()


def check_certificate(
    papers: Papers,
    *,
    name: str,
    now_s: float,
    is_replaced: bool = False,
    public_half: Callable[[bytes], PublicKeyTypes] = public_half,
) -> Result:
    """Whether a client certificate can be used now.

    Args:
        papers: the certificate, with what belongs to it.
        name: on the wire, which the certificate has to be for.
        now_s: Unix seconds.
        is_replaced: whether another one takes over by itself when it ends.
        public_half: of its key, which is tried where it is a TPM's.

    Raises:
        DeviceError: one of them is not PEM of its kind; as KeyStoreError, the TPM cannot use its key.
    """
    own = _parsed("certificate", x509.load_pem_x509_certificate, papers.certificate)
    private = _parsed("key", public_half, papers.key)
    roots = _parsed("ca", x509.load_pem_x509_certificates, papers.ca)
    if key_info(own.public_key()) != key_info(private):
        return problem("the certificate is for another key", "put the certificate beside the key it was made for")
    names = [attribute.value for attribute in own.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if names != [name]:
        return problem(
            f"the certificate is for {', '.join(map(str, names)) or 'nobody'}, this device goes by {name}",
            "ask the operator for one with this name as its common name",
        )
    dated = (("certificate", own), *(("CA's certificate", root) for root in roots))
    found = (_dates(what, one, now_s, may_end=is_replaced and one is own) for what, one in dated)
    days = (own.not_valid_after_utc.timestamp() - now_s) / 86_400
    fine = ok(f"the certificate is for {name} and its key, and valid for {days:.0f} days more")
    return next((result for result in found if result is not None), fine)


def _dates(what: str, certificate: x509.Certificate, now_s: float, *, may_end: bool) -> Result | None:
    """What is wrong with a certificate's dates; None if nothing is."""
    begins_s, ends_s = certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
    if now_s < begins_s:
        says = f"the clock says {date_text(now_s)}"
        return problem(f"the {what} is valid from {date_text(begins_s)}, and {says}", "set the clock, or wait")
    if now_s > ends_s:
        says = f"the clock says {date_text(now_s)}"
        return problem(f"the {what} ended on {date_text(ends_s)}, and {says}", "ask the operator for a new one")
    if ends_s - now_s < WARN_BEFORE_S and not may_end:
        return warning(f"the {what} ends in {(ends_s - now_s) / 86_400:.0f} days", "ask the operator for a new one")
    return None


def _parsed(what: str, parse: Callable[[bytes], _Parsed], data: bytes) -> _Parsed:
    """What is in a PEM file. Raises DeviceError."""
    try:
        return parse(data)
    except (ValueError, TypeError) as error:  # TypeError: a key with a password
        raise DeviceError(f"broker.{what}: expected PEM without a password ({error})") from error
