"""The database's file, and urls that cannot be opened."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
import pytest

from aggregator.errors import DatabaseError
from aggregator.store import AggregatorStore


def test_only_its_owner_can_read_the_database_and_its_log(tmp_path: Path) -> None:
    store = AggregatorStore(f"sqlite:///{tmp_path / 'aggregator.db'}", "watch")
    store.create_task(bytes(32), np.zeros(7, np.float32))
    files = sorted(tmp_path.iterdir())
    assert {path.name for path in files} >= {"aggregator.db", "aggregator.db-wal"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("oracle://study", "driver is not installed"),
        ("nosuch://study", "cannot be opened"),
        ("sqlite:////proc/nowhere/aggregator.db", "cannot be opened"),
    ],
)
def test_a_url_that_cannot_be_opened_is_one_sentence(url: str, words: str) -> None:
    with pytest.raises(DatabaseError, match=words):
        AggregatorStore(url, "watch")
