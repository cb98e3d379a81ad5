"""A task's model versions for people and scripts, with the privacy that was spent on them at most."""

from __future__ import annotations

from typing import Any

import msgspec

from aggregator.lineage_privacy import DELTA, Lineage, lineage_of
from aggregator.store.aggregator_store import AggregatorStore
from aggregator.store.models import ModelRecord
from fl_protocol.errors import LocalMisuseError
from fl_protocol.topics import checked_name


class ModelReport(msgspec.Struct, frozen=True, kw_only=True):
    """One version.

    Args:
        parent: the version it came from.
        round: the round that made it.
        origin: initial, round, average or rollback.
        digest: SHA-256 of its parameters, hex.
        kept: whether its parameters are still there.
        record_epsilon: what it has cost one record of a device that took part in all rounds behind it, at most, at
            `delta`; None where that cannot be told. Infinite (null in JSON too) without noise.
        privacy: the same in words, or why it cannot be told.
    """

    version: int
    parent: int | None
    round: int | None
    origin: str
    digest: str
    created_s: float
    tags: tuple[str, ...]
    kept: bool
    metrics: dict[str, Any]
    record_epsilon: float | None
    delta: float
    privacy: str


def model_reports(store: AggregatorStore, task: str) -> list[ModelReport]:
    """Every version of a task, oldest first. Raises DatabaseError, also when there is no such task."""
    lineage = lineage_of(store, task)
    return [model_of(record, lineage) for record in store.models.records(task)]


def model_report(store: AggregatorStore, task: str, version: int) -> ModelReport:
    """One version of a task. Raises DatabaseError, also when there is none."""
    return model_of(store.models.record(task, version), lineage_of(store, task))


def version_of(store: AggregatorStore, task: str, name: str) -> int:
    """The version that a number or a tag names. Raises DatabaseError, also when there is none."""
    store.tasks.get(task)
    if name.isdecimal():
        return store.models.record(task, int(name)).version
    return store.models.tagged(task, name)


def checked_tag(tag: str) -> str:
    """The tag itself, if it is one and cannot be taken for a version. Raises LocalMisuseError."""
    if tag.isdecimal():
        raise LocalMisuseError(f"tag: expected a word such as released, got {tag!r}, which is a version's number")
    return checked_name(tag, "tag")


def model_of(record: ModelRecord, lineage: Lineage) -> ModelReport:
    """One version."""
    epsilon, privacy = lineage.spent(record.version)
    return ModelReport(
        version=record.version,
        parent=record.parent,
        round=record.round,
        origin=record.origin,
        digest=record.digest.hex(),
        created_s=record.created_s,
        tags=record.tags,
        kept=record.params is not None,
        metrics=record.metrics,
        record_epsilon=epsilon,
        delta=DELTA,
        privacy=privacy,
    )
