"""How many devices the desk enrols in a second, and how long a revoked one stays connected: two real mosquittos, the
real commands and the desk's process, all on this machine.
"""

from __future__ import annotations

import re
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.hazmat.primitives.asymmetric import ec

from aggregator.assembly import AggregatorFiles
from aggregator.certificates import certify, make_ca
from aggregator.enrolment.revocation import change_state
from benchmarks.process_tree import PROC, parse_stat
from fl_protocol.joining import EnrolmentAnswerMsg
from fl_protocol.transport import Disconnected
from tests.contracts.brokers import await_event
from tests.system.clinic import Clinic, Watch, running_clinic

NAMES = 12
"""Pseudonyms of a device, as many as it asks for by default."""
AT_ONCE = 32
Told = Callable[[str, int, int], None]


def identities(*, devices: int, revocations: int, requests_a_minute: int, told: Told) -> dict[str, Any]:
    """Both measurements.

    Args:
        devices: that are enrolled, each with `NAMES` names, over a connection of its own.
        revocations: how many times one is revoked.
        requests_a_minute: that the desk takes; whoever is told "busy" comes again when told to.
        told: of progress: what, how many are done, of how many.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        running_clinic(Path(folder), requests_a_minute=requests_a_minute) as clinic,
    ):
        return {**_enrolment(clinic, devices, told), **_revocation(clinic, revocations, told)}


def _enrolment(clinic: Clinic, devices: int, told: Told) -> dict[str, Any]:
    """Requests are made before; the time is from the first connection to the last answer."""
    tokens = clinic.tokens(devices)
    watches = [Watch(clinic) for _ in tokens]
    requests = []
    for watch, token in zip(watches, tokens, strict=True):
        requests.append(watch.prepared(token, count=NAMES))
        told("requests", len(requests), devices)
    outcomes: Counter[str] = Counter()
    took_s: list[float] = []
    lock = threading.Lock()

    def ask(watch: Watch, signed: bytes) -> None:
        begun_s = time.perf_counter()
        while (answer := _answer(watch, signed)) is None or answer.outcome == "busy":
            with lock:
                outcomes["no answer in 20 s" if answer is None else "busy"] += 1
            time.sleep(0.0 if answer is None else answer.retry_after_s)
        with lock:
            took_s.append(time.perf_counter() - begun_s)
            outcomes[answer.outcome] += 1
            told("enrolled", len(took_s), devices)

    before, begun_s = _desk(clinic), time.perf_counter()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(ask, watches, requests))
    seconds, after = time.perf_counter() - begun_s, _desk(clinic)
    return {
        "enrol_per_s": devices / seconds,
        "enrol_outcomes": dict(outcomes),
        "enrol_seconds": seconds,
        "enrol_p50_s": statistics.median(took_s),
        "enrol_p99_s": sorted(took_s)[int(0.99 * (len(took_s) - 1))],
        "desk_cpu_s": after.cpu_s - before.cpu_s,
        "desk_mb_before": before.high_water_mb,
        "desk_mb_most": after.high_water_mb,
        "database_mb": sum(one.stat().st_size for one in clinic.folder.glob("aggregator.db*")) / 2**20,
        "certificates_alone_per_s": _certificates_alone(),
    }


def _answer(watch: Watch, signed: bytes) -> EnrolmentAnswerMsg | None:
    """The desk's answer; None for none in time, after which a device asks again, with the same bytes."""
    try:
        return watch.ask_with(signed)
    except AssertionError:
        return None


class _Desk(NamedTuple):
    """What the desk's process has taken so far: processor time, and the most resident memory, MB of 2^20 bytes."""

    cpu_s: float
    high_water_mb: float


def _desk(clinic: Clinic) -> _Desk:
    process = PROC / str(clinic.desk_pid)
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", (process / "status").read_text())
    return _Desk(parse_stat((process / "stat").read_text()).cpu_s, int(peak) / 1024)


def _certificates_alone() -> float:
    """Devices in a second whose certificates are made, and nothing else is done."""
    ca, now_s = make_ca("bare", now_s=time.time()), time.time()
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    times = []
    for _ in range(20):
        begun_s = time.perf_counter()
        for number in range(NAMES):
            certify(ca, f"p{number:032x}", key, not_before_s=now_s, not_after_s=now_s + 86_400)
        times.append(time.perf_counter() - begun_s)
    return 1 / statistics.median(times)


def _revocation(clinic: Clinic, count: int, told: Told) -> dict[str, Any]:
    """From the operator's change in the database to the end of the device's connection."""
    files = AggregatorFiles.load(clinic.folder / "aggregator.toml")
    store, took_s = files.open_store(create=False), []
    try:
        for number in range(count):
            watch = Watch(clinic)
            line = clinic.device(watch.join())
            begun_s = time.perf_counter()
            with store.database.transaction() as connection:
                change_state(
                    connection,
                    watch.enrolment,
                    "revoked",
                    reason="benchmark",
                    actor="local:benchmark",
                    now_s=time.time(),
                )
            await_event(line, Disconnected)
            took_s.append(time.perf_counter() - begun_s)
            told("revoked", number + 1, count)
    finally:
        store.close()
    return {"revoke_s": max(took_s), "revoke_median_s": statistics.median(took_s), "revocations": count}
