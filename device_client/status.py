"""What a device is doing and why, as data and in words: the answer to "why is it not training?"."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec

from device_client.study_runner import StudyRunner
from device_client.training import Evaluation
from fl_protocol.terminal import visible

if TYPE_CHECKING:
    from device_client.device import Device


class Measured(msgspec.Struct, frozen=True):
    """How a model does on the held-out records; it never leaves the device. A loss that is not finite is None."""

    model: str
    round: int
    correct: int
    count: int
    mean_loss: float | None


class StudyStatus(msgspec.Struct, frozen=True):
    """One study.

    Args:
        study: ``tenant/task``.
        running: whether the wearer granted it and it has a name on the wire.
        connected: whether its broker is there.
        doing: what it does, or why it does nothing, in words.
        refused: why its newest manifest was refused; empty if it was not.
        problem: what went wrong last; empty if nothing did.
        device: its present name on the wire.
        round: newest round seen.
        pending: updates that wait for their receipts.
        spent_epsilon: of this study in this period; None for no bound.
        measured: the newest measurements.
        enrolment: what it is enrolled as, until when it has names, and when they are renewed; empty where it was not
            joined by enrolment.
    """

    study: str
    running: bool
    connected: bool
    doing: str
    refused: str
    problem: str
    device: str
    round: int
    pending: int
    spent_epsilon: float | None
    measured: tuple[Measured, ...] = ()
    enrolment: str = ""


class StreamStatus(msgspec.Struct, frozen=True):
    """One stream of records."""

    stream: str
    records: int
    held_out: int


class Status(msgspec.Struct, frozen=True):
    """A device.

    Args:
        may_train: whether the conditions allow it.
        blocked: why not, in words.
        spent_epsilon: in this period, over all studies, at `delta`; None for no bound.
        at_least: whether lines of the ledger may be missing, so that figures are lower bounds.
        budget_epsilon: that the wearer allows; None for no limit.
        spent_epsilon_ever: over all periods.
        outbox_bytes: held for updates on their way.
    """

    may_train: bool
    blocked: tuple[str, ...]
    spent_epsilon: float | None
    at_least: bool
    budget_epsilon: float | None
    delta: float
    spent_epsilon_ever: float | None
    outbox_bytes: int
    studies: tuple[StudyStatus, ...]
    streams: tuple[StreamStatus, ...]


def status_of(device: Device) -> Status:
    """The present status; reads the board if the last reading is old."""
    blocked, ledger, budget = device.readiness.look(), device.ledger, device.ledger.budget
    now_s = device.now_s()
    runners = {runner.study: runner for runner in device.studies.running}
    still = device.studies.standing_still
    studies = []
    for study in device.config.studies:
        runner, spent = runners.get(study.study), _finite(ledger.spent_at(now_s, study.study))
        enrolment = device.renewals[study.study].describe() if study.study in device.renewals else ""
        if runner is not None:
            studies.append(_running(runner, spent, enrolment))
        else:
            doing = still.get(study.study) or device.consent_problem(study.study) or "the daemon does not run"
            waiting = len(device.outbox.of(study.study))
            studies.append(
                StudyStatus(
                    study=study.study,
                    running=False,
                    connected=False,
                    doing=doing,
                    refused="",
                    problem="",
                    device="",
                    round=0,
                    pending=waiting,
                    spent_epsilon=spent,
                    enrolment=enrolment,
                )
            )
    return Status(
        may_train=not blocked,
        blocked=blocked,
        spent_epsilon=_finite(ledger.spent_at(now_s)),
        at_least=bool(ledger.acceptances),
        budget_epsilon=_finite(budget.epsilon),
        delta=budget.delta,
        spent_epsilon_ever=_finite(ledger.spent_epsilon_ever),
        outbox_bytes=device.outbox.size_bytes,
        studies=tuple(studies),
        streams=tuple(
            StreamStatus(name, len(stream), stream.held_out_count) for name, stream in sorted(device.streams.items())
        ),
    )


def status_text(status: Status) -> list[str]:
    """The status in lines for a terminal."""
    limit = "no limit" if status.budget_epsilon is None else f"{status.budget_epsilon:g}"
    lines = ["may train: yes" if status.may_train else "may train: no"]
    lines += [f"  {reason}" for reason in status.blocked]
    for study in status.studies:
        lines.append(f"{study.study}: {study.doing}")
        if study.device:
            online = "connected" if study.connected else "not connected"
            lines.append(f"  as {study.device}, {online}, {study.pending} update(s) waiting for a receipt")
        if study.enrolment:
            lines.append(f"  {study.enrolment}")
        if study.refused:
            lines.append(f"  refused: {study.refused}")
        if study.problem:
            lines.append(f"  last problem: {study.problem}")
        lines += [
            f"  {one.model} model of round {one.round}: {one.correct} of {one.count} held-out records right, "
            f"mean loss {_number(one.mean_loss, 3)}"
            for one in study.measured
        ]
        lines.append(f"  epsilon spent on it: {_number(study.spent_epsilon, 4)}")
    least = "at least " if status.at_least else ""
    spent = f"{least}{_number(status.spent_epsilon, 4)}"
    lines.append(f"privacy: epsilon {spent} of {limit} at delta {status.delta:g} in this period")
    lines += [f"records {one.stream}: {one.records}, {one.held_out} of them held out" for one in status.streams]
    return [visible(line) for line in lines]


def _running(runner: StudyRunner, spent_epsilon: float | None, enrolment: str) -> StudyStatus:
    """A study that runs."""
    view = runner.session.view()
    return StudyStatus(
        study=runner.study,
        running=True,
        connected=view.connected,
        doing=view.doing,
        refused=view.refused,
        problem=runner.last_problem,
        device=runner.participant.device,
        round=view.round,
        pending=view.pending,
        spent_epsilon=spent_epsilon,
        measured=tuple(
            _measured(name, runner.measured_round, found) for name, found in sorted(runner.measured.items())
        ),
        enrolment=enrolment,
    )


def _measured(model: str, round_number: int, found: Evaluation) -> Measured:
    return Measured(model, round_number, found.correct, found.count, _finite(found.loss_sum / max(1, found.count)))


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def _number(value: float | None, digits: int) -> str:
    return "without bound" if value is None else f"{value:.{digits}f}"
