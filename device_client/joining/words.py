"""A refusal in words for the wearer: what happened, and what to do."""

from __future__ import annotations

from device_client.joining.records import Refusal
from device_client.pseudonyms import date_text

_WHAT_TO_DO: dict[str, str] = {
    "unknown_token": "copy all of the token, or ask the study's operator for another one",
    "expired_token": "ask the study's operator for another one, then run covey-device enroll again",
    "used_token": "ask the study's operator for another one, and tell them that this one was used",
    "withdrawn_token": "ask the study's operator for another one, then run covey-device enroll again",
    "quota_exhausted": "tell the study's operator, then run covey-device enroll again with the same token",
    "not_enrolled": "ask the study's operator for a token, and run covey-device enroll",
    "revoked": "recordings, ledger and what waits to be sent are kept; ask the study's operator",
    "refused": "tell the study's operator",
    "busy": "wait, it is asked for again",
    "too_early": "wait, it is asked for again",
    "wrong_aggregator": "nothing was installed",
    "wrong_study": "nothing was installed",
    "wrong_issuer": "nothing was installed",
    "not_installed": "nothing was installed; tell the study's operator",
}
_WHAT_HAPPENED: dict[str, str] = {
    "revoked": "the study's operator has taken this device out of the study",
    "not_enrolled": "the study does not know this device's enrolment",
}


def refusal_words(study: str, refusal: Refusal) -> str:
    """One sentence about a refusal.

    Args:
        study: ``tenant/task``.
        refusal: of the desk's, or of the device's own.
    """
    happened = _WHAT_HAPPENED.get(refusal.outcome)
    detail = " ".join(refusal.detail.split()).rstrip(".;")
    what = f"{happened} ({detail})" if happened and detail else happened or detail or refusal.outcome
    return f"{study}: {what}; {_WHAT_TO_DO[refusal.outcome]} ({refusal.outcome}, {date_text(refusal.at_s)})"
