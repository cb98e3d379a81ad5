"""How many devices the desk enrols in a second, and how long a revoked one stays connected: two real mosquittos, the
real commands and the desk's process, all on this machine.
"""

from __future__ import annotations

import heapq
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from aggregator.assembly import AggregatorFiles
from aggregator.certificates import certify, make_ca
from aggregator.enrolment.revocation import change_state
from benchmarks.process_tree import cpu_s, memory
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
        requests_a_minute: that the desk takes; who is told to wait waits and asks again, as devices do.
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
    before_s = cpu_s(clinic.desk_pid)
    begun_s = time.perf_counter()
    outcomes, took_s = _ask_all(list(zip(watches, requests, strict=True)), told)
    seconds, desk_s = time.perf_counter() - begun_s, cpu_s(clinic.desk_pid) - before_s
    return {
        "enrol_devices": devices,
        "desk_cpu_s": desk_s,
        "desk_peak_mb": memory(clinic.desk_pid).high_water_mb,
        "enrol_per_s": devices / seconds,
        "enrol_outcomes": dict(outcomes),
        "enrol_seconds": seconds,
        "enrol_p50_s": statistics.median(took_s),
        "enrol_p99_s": sorted(took_s)[int(0.99 * (len(took_s) - 1))],
        "certificates_alone_per_s": _certificates_alone(),
    }


def _ask_all(asked: list[tuple[Watch, bytes]], told: Told) -> tuple[Counter[str], list[float]]:
    """Ask for all of them, `AT_ONCE` at a time; who is told that the desk is busy comes again when it was told to.

    Returns:
        How often each outcome came, and how long each asking took.
    """
    outcomes: Counter[str] = Counter()
    took_s: list[float] = []
    waiting = [(0.0, number) for number in range(len(asked))]
    lock = threading.Condition()

    def next_one() -> int | None:
        with lock:
            while waiting and waiting[0][0] > time.perf_counter():
                lock.wait(waiting[0][0] - time.perf_counter())
            return heapq.heappop(waiting)[1] if waiting else None

    def ask() -> None:
        while (number := next_one()) is not None:
            begun_s = time.perf_counter()
            watch, signed = asked[number]
            answer = watch.ask_with(signed)
            with lock:
                took_s.append(time.perf_counter() - begun_s)
                outcomes[answer.outcome] += 1
                if answer.outcome == "busy":
                    heapq.heappush(waiting, (time.perf_counter() + answer.retry_after_s, number))
                lock.notify_all()
                told("enrolled", outcomes["enrolled"], len(asked))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for thread in [pool.submit(ask) for _ in range(AT_ONCE)]:
            thread.result()
    return outcomes, took_s


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
