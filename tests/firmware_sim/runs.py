"""Event logs of runs that never were, for what is drawn from logs: distinctive numbers, every kind of event."""

from __future__ import annotations

from typing import Any

from firmware_sim.observation import Observation
from firmware_sim.settings import AGGREGATOR, TASK, DemoSettings

Event = dict[str, Any]
SETTINGS = DemoSettings(held_out=(9, 10), rounds=2, epsilon=3.0)
TRAINING = [wrist.device_id for wrist in SETTINGS.training_wrists]
HELD_OUT = [wrist.device_id for wrist in SETTINGS.held_out_wrists]


def opened(number: int, *, digest: str, version: int, at_s: float = 100.0) -> Event:
    return {
        "event": "round_opened",
        "task": TASK,
        "at_s": at_s,
        "round": number,
        "goal": 16,
        "deadline_s": at_s + 20,
        "version": version,
        "model_digest": digest,
    }


def accepted(number: int, device: str, *, size: int = 3000, at_s: float = 101.0) -> Event:
    return {"event": "update_accepted", "at_s": at_s, "task": TASK, "round": number, "device": device, "bytes": size}


def committed(
    number: int, *, digest: str, version: int, arrived: int = 16, bytes_up: int = 48_000, **more: Any
) -> Event:
    return {
        "event": "round_committed",
        "task": TASK,
        "at_s": 102.0,
        "round": number,
        "version": version,
        "model_digest": digest,
        "arrived": arrived,
        "bytes_up": bytes_up,
        "seconds": 1.25,
        "mean_update_norm": 0.625,
        **more,
    }


def aborted(number: int, reason: str) -> Event:
    return {
        "event": "round_aborted",
        "at_s": 102.0,
        "task": TASK,
        "round": number,
        "outcome": "aborted",
        "reason": reason,
    }


def finished(*, digest: str, version: int, at_s: float = 110.0) -> Event:
    return {"event": "task_finished", "at_s": at_s, "task": TASK, "version": version, "model_digest": digest}


def loaded(*, number: int, phase: str, committed: int) -> Event:
    return {
        "event": "task_loaded",
        "at_s": 103.0,
        "task": TASK,
        "round": number,
        "phase": phase,
        "committed": committed,
    }


def unmasking(number: int, *, arrived: int = 16, at_s: float = 101.5) -> Event:
    return {
        "event": "round_unmasking",
        "task": TASK,
        "at_s": at_s,
        "round": number,
        "arrived": arrived,
        "until_s": at_s + 60,
    }


def helper_key(name: str, operator: str) -> Event:
    return {"event": "helper_key", "at_s": 100.0, "helper": name, "operator": operator, "not_after_s": 1e6}


def evaluated(digest: str, *, correct: int, count: int = 100, loss_sum: float = 50.0, **more: Any) -> Event:
    return {
        "event": "evaluated",
        "at_s": 103.0,
        "round": 1,
        "status": "open",
        "model_digest": digest,
        "loss_sum": loss_sum,
        "correct": correct,
        "count": count,
        **more,
    }


def trained(number: int, epsilon: float | None) -> Event:
    return {"event": "trained", "at_s": 101.0, "round": number, "seconds": 0.1, "epsilon": epsilon}


def feed(observation: Observation, *events: tuple[str, Event]) -> Observation:
    for source, event in events:
        observation.take(source, event)
    return observation


def whole_run(settings: DemoSettings = SETTINGS) -> list[tuple[str, Event]]:
    """Two committed rounds and the finished model, measured by all four held-out wrists."""
    noisy = settings.epsilon is not None
    events: list[tuple[str, Event]] = []
    events += [(AGGREGATOR, helper_key(name, operator)) for name, operator in settings.operators.items()]
    for number, before, after in ((1, "d0", "d1"), (2, "d1", "d2")):
        events.append((AGGREGATOR, opened(number, digest=before, version=number - 1)))
        for index, device in enumerate(TRAINING):
            events.append((device, trained(number, number + index / 100 if noisy else None)))
            events.append((device, {"event": "model_received", "at_s": 101.0, "round": number, "bytes": 1512}))
            events.append((AGGREGATOR, accepted(number, device)))
        if settings.engine == "secure":
            events.append((AGGREGATOR, unmasking(number, at_s=101.5 + number / 10)))
        events.append((AGGREGATOR, committed(number, digest=after, version=number)))
    events += [(name, evaluated("d1", correct=50 + index, round=2)) for index, name in enumerate(HELD_OUT)]
    events.append((AGGREGATOR, finished(digest="d3", version=3)))
    events += [
        (name, evaluated("d3", correct=70 + 3 * index, loss_sum=30.0, round=2, status="finished"))
        for index, name in enumerate(HELD_OUT)
    ]
    return events
