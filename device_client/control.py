"""What people ask of a device, and its answers: one function a question, over a running device or a stopped one.

The same questions go through the control socket of a running daemon (JSON, one object a line, owner only) or straight
to the store when none runs. Answers are data; `device_client.cli` puts them into words.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from device_client.deliveries_log import outcomes
from device_client.device import Device
from device_client.errors import LedgerError, StoreError
from fl_protocol.errors import ConfigError, CoveyError

Short = Annotated[str, Meta(max_length=256)]
Kind = Literal["configuration", "store", "other"]


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is asked.

    Args:
        ask: one of `QUESTIONS`.
        study: which study it is about, where it is about one.
    """

    ask: Short
    study: Short = ""


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is answered: a value, or one sentence about what is wrong, and whose doing that is."""

    value: Any = None
    error: str = ""
    kind: Kind = "other"


def answer(device: Device, payload: bytes) -> bytes:
    """Answer one question; never raises for what a person can ask."""
    try:
        question = msgspec.json.decode(payload, type=Question)
        if question.ask not in QUESTIONS:
            raise ConfigError(f"question {question.ask!r}: expected one of {', '.join(QUESTIONS)}")
        found = Answer(value=QUESTIONS[question.ask](device, question.study))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        found = Answer(error=f'expected a question such as {{"ask": "status"}} ({error})', kind="configuration")
    except CoveyError as error:
        found = Answer(error=" ".join(str(error).split()), kind=_kind_of(error))
    return msgspec.json.encode(found)


def _kind_of(error: CoveyError) -> Kind:
    """What an error is about."""
    if isinstance(error, ConfigError):
        return "configuration"
    return "store" if isinstance(error, StoreError | LedgerError) else "other"


def _status(device: Device, _study: str) -> Any:
    return msgspec.to_builtins(device.status())


def _ledger(device: Device, _study: str) -> Any:
    """The budget, what was spent of it, and every line."""
    ledger, budget = device.ledger, device.ledger.budget
    charges, now_s = ledger.reservations, device.now_s()
    newest = next((charge for charge in reversed(charges) if charge.purpose == "update"), None)
    last = math.inf if newest is None else ledger.remaining_participations(newest.rdp(), now_s=now_s)
    return {
        "epsilon": None if math.isinf(budget.epsilon) else budget.epsilon,
        "delta": budget.delta,
        "period_days": None if budget.period_s is None else budget.period_s / 86_400,
        "period_ends_s": _finite(ledger.period_ends_s),
        "spent_epsilon": _finite(ledger.spent_at(now_s)),
        "at_least": bool(ledger.acceptances),
        "spent_epsilon_ever": _finite(ledger.spent_epsilon_ever),
        "order": ledger.order,
        "left_like_the_last": _finite(last),
        "studies": {study.study: _finite(ledger.spent_at(now_s, study.study)) for study in device.config.studies},
        "lines": [msgspec.to_builtins(line) for line in charges],
    }


def _sent(device: Device, _study: str) -> Any:
    """Every update that left, or was about to: when, to whom, how large, for what epsilon, and what became of it."""
    found = outcomes(device.store)
    waiting = {pending.update_id.hex() for pending in device.outbox}
    return [
        {
            **msgspec.to_builtins(release),
            "outcome": found.get(release.update_id, "waiting" if release.update_id in waiting else "dropped"),
        }
        for release in device.ledger.releases
    ]


def _consents(device: Device, _study: str) -> Any:
    """Every configured study: what it would do, and whether that is granted."""
    return [
        {
            "study": study.study,
            "terms": device.terms(study.study),
            "problem": device.consent_problem(study.study),
            "granted_s": consent.granted_s if (consent := device.consents.of(study.study)) else None,
            "withdrawn_s": consent.withdrawn_s if consent else None,
        }
        for study in device.config.studies
    ]


def _grant(device: Device, study: str) -> Any:
    name = device.study_config(study).study
    device.grant(name)
    return {"study": name, "terms": device.terms(name)}


def _withdraw(device: Device, study: str) -> Any:
    name = device.study_config(study).study
    return {"study": name, "dropped": device.withdraw(name)}


def _erase(device: Device, _study: str) -> Any:
    device.erase_data()
    return {}


QUESTIONS: dict[str, Callable[[Device, str], Any]] = {
    "status": _status,
    "ledger": _ledger,
    "sent": _sent,
    "consent list": _consents,
    "consent grant": _grant,
    "consent withdraw": _withdraw,
    "erase data": _erase,
}


def _finite(value: float | None) -> float | None:
    """JSON has no infinity."""
    return value if value is not None and math.isfinite(value) else None
