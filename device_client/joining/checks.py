"""Checks of what a device joins by, each with a named outcome: the claim before anything is sent, and what was granted.

A broker, a thief of the claim's key, or whoever changed a file on the way may have made either. Pure.
"""

from __future__ import annotations

from typing import Literal

from cryptography.hazmat.primitives.serialization import Encoding

from device_client.errors import DeviceError
from device_client.joining.records import ClientOutcome
from device_client.pseudonyms import date_text
from fl_protocol.client_certificates import load_certificate
from fl_protocol.enrolment import Period, PseudonymAnswer, decode_file
from fl_protocol.errors import ProtocolError
from fl_protocol.joining import Claim, Token, check_claim

ClockOutcome = Literal["clock_behind", "claim_ended"]


class NotTakenError(DeviceError):
    """What was granted is not taken; `outcome` names why, the text says it in words."""

    def __init__(self, outcome: ClientOutcome, words: str) -> None:
        super().__init__(words)
        self.outcome = outcome


class UnusableClaimError(DeviceError):
    """A claim cannot be used by this device's clock; `outcome` names why."""

    def __init__(self, outcome: ClockOutcome, words: str) -> None:
        super().__init__(words)
        self.outcome = outcome


def check_before_asking(claim: Claim, token: Token, *, now_s: float) -> None:
    """Whether a claim is the token's, and valid by this device's clock; before anything is sent.

    Args:
        claim: untrusted.
        token: that came over a trusted way.
        now_s: Unix seconds, by a clock that may be years off.

    Raises:
        ProtocolError: the claim is another study's, or was changed.
        UnusableClaimError: the clock is behind, or the claim has ended.
    """
    check_claim(claim, token)
    for what, pem in (("the study's CA", claim.ca), ("the claim", claim.certificate)):
        certificate = load_certificate(pem.encode(), what)
        begins_s = certificate.not_valid_before_utc.timestamp()
        ends_s = certificate.not_valid_after_utc.timestamp()
        if now_s < begins_s:
            raise UnusableClaimError(
                "clock_behind",
                f"{what} is valid from {date_text(begins_s)}, and this device's clock says {date_text(now_s)}: "
                "set the clock, then run this again",
            )
        if now_s > ends_s:
            raise UnusableClaimError(
                "claim_ended",
                f"{what} ended on {date_text(ends_s)}, and this device's clock says {date_text(now_s)}: if the clock "
                "is wrong, set it; if not, ask the study's operator for a new claim.json and token",
            )


def check_grant(names: bytes, claim: Claim, *, is_renewal: bool) -> PseudonymAnswer:
    """Whether a grant's pseudonyms are what the token vouched for.

    Args:
        names: of an answer that the aggregator signed.
        claim: that was checked against the token.
        is_renewal: whether the device belongs to the study already. Then another CA is taken, as from an answer file:
            a study's CA ends one day, and the aggregator has signed for the next.

    Raises:
        NotTakenError: they are not; nothing is installed.
    """
    try:
        answer = decode_file(names, PseudonymAnswer)
    except ProtocolError as error:
        raise NotTakenError("not_installed", f"what the study granted cannot be read: {error}") from error
    there, here = f"{answer.tenant}/{answer.task}", f"{claim.tenant}/{claim.task}"
    if there != here:
        raise NotTakenError("wrong_study", f"asked for {here}, and what was granted is for {there}: tell its operator")
    if answer.aggregator_key != claim.aggregator_key:
        raise NotTakenError(
            "wrong_aggregator",
            f"what was granted is from the aggregator {answer.aggregator_key[:16]}..., and the token vouches for "
            f"{claim.aggregator_key[:16]}...: tell the operator of {here}",
        )
    # Security: the broker's certificate is believed because this CA made it, and it is the one the token vouches for.
    if not is_renewal and _der(answer.ca, "the CA that came with the grant") != _der(claim.ca, "the claim's CA"):
        raise NotTakenError(
            "wrong_issuer",
            f"what was granted comes from another CA than the one that the token vouches for: tell the operator of "
            f"{here}",
        )
    return answer


def clock_words(periods: list[Period], now_s: float) -> tuple[Literal["not_yet_valid", "expired"], str] | None:
    """What is wrong with this device's clock, if names that were granted just now are not for now by it.

    Args:
        periods: of the names, in order; not empty.
        now_s: Unix seconds.
    """
    first, last = periods[0], periods[-1]
    clock = f"this device's clock says {date_text(now_s)}: set the clock; the names are kept"
    if now_s < first.not_before_s:
        return "not_yet_valid", f"the names begin on {date_text(first.begins_s)}, and {clock}"
    if now_s > last.not_after_s:
        return "expired", f"the names end on {date_text(last.ends_s)}, and {clock}"
    return None


def _der(pem: str, what: str) -> bytes:
    """A certificate's bytes. Raises NotTakenError."""
    try:
        return load_certificate(pem.encode(), what).public_bytes(Encoding.DER)
    except ProtocolError as error:
        raise NotTakenError("wrong_issuer", f"{what} cannot be read: {error}") from error
