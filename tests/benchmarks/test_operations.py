"""A tiny run of benchmarks/operations: every figure is there, and what is timed is a log that holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from aggregator.audit.export import verify_database
from aggregator.store.database import Database
from benchmarks.operations.audit_log import KEYS, fill, held, measure


def test_a_tiny_run_has_every_figure() -> None:
    found = measure(2300)
    assert found["audit_entries"] == 2300
    for name in ("append", "export", "verify", "verify_file"):
        assert found[f"audit_{name}_per_s"] > 0
    assert found["audit_verify_per_s"] < found["bare_sha256_per_s"]
    assert found["audit_checkpoint_ms"] > 0 < found["audit_prove_ms"]


def test_what_is_timed_is_a_whole_log_with_its_checkpoints(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'log.db'}")
    fill(database, 2300)
    found = verify_database(database, KEYS)
    held(found, 2300)
    assert (found.checkpoints, found.cosigned) == (2, {"helper": 2000})
    with pytest.raises(RuntimeError, match="expected 2400 entries"):
        held(found, 2400)
    database.close()
