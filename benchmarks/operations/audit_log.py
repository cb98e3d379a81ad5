"""The audit log at the size of years: how fast entries are added, proved and verified, beside bare SHA-256.

Entries are added by what the aggregator adds them with, a hundred to a transaction, with a checkpoint after each
thousand, co-signed by one helper. Then the log is verified as `covey-aggregator audit verify` does it: out of the
database, and from an export. `bare_sha256_per_s` is SHA-256 over the same entries' bytes and nothing else, read before
and not timed. Memory is the growth of this process' largest resident set while the database is verified.
"""

from __future__ import annotations

import hashlib
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregator.audit.checkpoint_rows import Checkpoints
from aggregator.audit.checkpoints import cosign
from aggregator.audit.entry_proofs import prove_entry
from aggregator.audit.export import export_log, verify_database, verify_file
from aggregator.audit.log import AuditEvent, append, stored_entries
from aggregator.audit.verification import LogKeys, Verified
from aggregator.store.database import Database
from benchmarks.timing import cpu_name

ORIGIN, NOW_S = "covey/benchmark", 1_800_000_000.0
AGGREGATOR, HELPER = (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (1, 2))
KEYS = LogKeys(ORIGIN, AGGREGATOR.public_key(), {"helper": HELPER.public_key()})
A_TRANSACTION, A_CHECKPOINT = 100, 1000


def measure(entries: int) -> dict[str, Any]:
    """All figures; per second unless the name says otherwise."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        database = Database(f"sqlite:///{folder / 'log.db'}")
        append_s = seconds(lambda: fill(database, entries))
        checkpoints = Checkpoints(database, ORIGIN)
        checkpoint_s = seconds(lambda: checkpoint(checkpoints))
        proof_s = seconds(lambda: prove_entry(database, entries // 3))
        before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        verify_s = seconds(lambda: held(verify_database(database, KEYS), entries))
        grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb
        export = folder / "log.jsonl"
        with export.open("wb") as file:
            export_s = seconds(lambda: export_log(database, ORIGIN, file))
        file_s = seconds(lambda: held(verify_file(export, KEYS), entries))
        bare_s, num_bytes = bare_sha256(database)
        database.close()
    return {
        "audit_entries": entries,
        "audit_entry_bytes": round(num_bytes / entries),
        "audit_append_per_s": round(entries / append_s),
        "audit_checkpoint_ms": round(1000 * checkpoint_s, 1),
        "audit_prove_ms": round(1000 * proof_s, 1),
        "audit_export_per_s": round(entries / export_s),
        "audit_verify_per_s": round(entries / verify_s),
        "audit_verify_file_per_s": round(entries / file_s),
        "audit_verify_s": round(verify_s, 2),
        "audit_verify_grown_mb": round(grown_kb / 1024, 1),
        "bare_sha256_per_s": round(entries / bare_s),
        "cpu": cpu_name(),
    }


def fill(database: Database, entries: int) -> None:
    """Add entries as rounds do, with checkpoints in between."""
    checkpoints = Checkpoints(database, ORIGIN)
    for begin in range(0, entries, A_TRANSACTION):
        if begin % A_CHECKPOINT == 0:
            checkpoint(checkpoints)
        with database.transaction() as connection:
            for number in range(begin, min(begin + A_TRANSACTION, entries)):
                append(connection, event(number))


def event(number: int) -> AuditEvent:
    """An entry as a closed round has it."""
    digest = hashlib.sha256(number.to_bytes(8, "big")).hexdigest()
    detail = {"outcome": "committed", "count": 120, "included": digest, "version": number, "model": digest}
    return AuditEvent(NOW_S + number, "aggregator", "round.closed", f"exercises/{number}", detail)


def checkpoint(checkpoints: Checkpoints) -> None:
    """A checkpoint of what is new, with a helper's co-signature."""
    note = checkpoints.make(AGGREGATOR, now_s=NOW_S)
    if note is not None:
        one = cosign(note.checkpoint, "operator/helper", HELPER, at_s=NOW_S)
        checkpoints.add_cosignature(note.checkpoint.size, "helper", one)


def held(found: Verified, entries: int) -> None:
    """Raise RuntimeError unless a whole log was verified and holds."""
    if found.fault is not None or found.entries != entries:
        raise RuntimeError(f"expected {entries} entries that hold, got {found}")


def bare_sha256(database: Database) -> tuple[float, int]:
    """Seconds of SHA-256 over all entries, each by itself, and how many bytes they have."""
    total_s, num_bytes, some = 0.0, 0, list[bytes]()
    with database.reading() as connection:
        for row in stored_entries(connection):
            some.append(row.entry)
            num_bytes += len(row.entry)
            if len(some) == 10_000:
                total_s, some = total_s + _hashed_s(some), []
    return total_s + _hashed_s(some), num_bytes


def _hashed_s(some: list[bytes]) -> float:
    """Seconds of hashing."""
    begun_s = time.perf_counter()
    for data in some:
        hashlib.sha256(data).digest()
    return time.perf_counter() - begun_s


def seconds(step: Callable[[], object]) -> float:
    """How long one call takes."""
    begun_s = time.perf_counter()
    step()
    return time.perf_counter() - begun_s
