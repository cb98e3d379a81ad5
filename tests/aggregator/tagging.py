"""Puts a tag on a version as somebody on the machine does."""

from __future__ import annotations

from aggregator import releases
from aggregator.accounts.account_store import Actor
from aggregator.store.aggregator_store import AggregatorStore


def tag(store: AggregatorStore, task: str, name: str, version: int) -> None:
    """In a transaction of its own."""
    with store.database.transaction() as connection:
        releases.tag(connection, task, name, version, who=Actor("local:root"), now_s=1.0)
