"""How long lists of the HTTP API take, with 10,000 devices and 500 rounds of history in each of two tasks.

The server is the real one, on loopback, in a process of its own, over SQLite; each list is asked for its first page, a
page in the middle, and with filters where it has some, one request after the other on one connection. The time is from
the request to the last byte of the answer; `api_p99_ms` is the largest p99 of all lists. Beside it rounds of 1,000
real updates are ingested into the same database (`ingest_beside`), each over ten seconds, and only requests that fall
into one are counted; `api_alone_p99_ms` is the same without them. What costs once in a while is told too: the first
request of a token (a slow hash), and accounting a task's privacy anew.

    python -m benchmarks.operations.api_lists
    python -m benchmarks.operations.api_lists --json
"""

from __future__ import annotations

import contextlib
import http.client
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np

from aggregator.record_privacy import load_accounting
from benchmarks.command import parser
from benchmarks.operations.ingest_beside import ingesting
from benchmarks.timing import cpu_name
from tests.aggregator.api.seeded_study import OPEN, SeededStudy
from tests.aggregator.api.served import Desk, served

_NEXT_ROUND_S = 60.0
LISTS = {
    "overview": "/v1/overview",
    "tasks": "/v1/tasks",
    "task": f"/v1/tasks/{OPEN}",
    "rounds": f"/v1/tasks/{OPEN}/rounds",
    "rounds, older": f"/v1/tasks/{OPEN}/rounds?cursor=250",
    "rounds, 200 a page": f"/v1/tasks/{OPEN}/rounds?limit=200",
    "orders": f"/v1/tasks/{OPEN}/orders",
    "models": f"/v1/tasks/{OPEN}/models",
    "models, older": f"/v1/tasks/{OPEN}/models?cursor=250",
    "models, 200 a page": f"/v1/tasks/{OPEN}/models?limit=200",
    "devices": "/v1/devices",
    "devices, middle": "/v1/devices?cursor=w-05000",
    "devices, 200 a page": "/v1/devices?limit=200",
    "devices, quarantined": "/v1/devices?state=quarantined",
    "devices, last of an owner": "/v1/devices?owner=owner-0&cursor=w-09900&prefix=w-09",
    "a device": "/v1/devices/w-05000",
    "privacy": "/v1/privacy",
    "audit": "/v1/audit",
    "audit, one action": "/v1/audit?action=round.closed&cursor=300",
    "accounts": "/v1/accounts",
    "tokens": "/v1/accounts/admin/tokens",
}


def main() -> None:
    """Measure, and print."""
    command = parser("operations.api_lists", __doc__)
    command.add_argument("--devices", type=int, default=10_000, help="default 10,000")
    command.add_argument("--rounds", type=int, default=500, help="of each task (default 500)")
    command.add_argument("--updates", type=int, default=1000, help="in each round (default 1,000)")
    command.add_argument("--repeats", type=int, default=300, help="requests for each list (default 300)")
    arguments = command.parse_args()
    if arguments.repeats < 100:
        command.error("--repeats: at least 100, or there is no 99th percentile")
    result = measure(arguments.devices, arguments.rounds, updates=arguments.updates, repeats=arguments.repeats)
    if arguments.json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return
    for name, found in result["lists"].items():
        print(
            f"{name:26} median {found['median_ms']:7.2f} ms   p99 {found['p99_ms']:7.2f} ms   {found['bytes']:7} bytes"
        )
    print(f"largest p99: {result['api_p99_ms']} ms, without ingest {result['api_alone_p99_ms']} ms; {result['cpu']}")
    print(f"a token's first request {result['first_of_token_ms']} ms, later ones {result['later_of_token_ms']} ms")
    print(f"accounting privacy anew {result['privacy_anew_ms']} ms")


def measure(
    devices: int, rounds: int, *, updates: int, repeats: int, ingested: int = 1000, spread_s: float = 10.0
) -> dict[str, Any]:
    """Milliseconds for each list, as JSON.

    Args:
        devices: registered names.
        rounds: of each of two tasks.
        updates: in each of those rounds.
        repeats: requests for each list, with and without ingest.
        ingested: updates of each round that is ingested meanwhile.
        spread_s: over how many seconds these are sent.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        ingesting(Path(folder) / "load", updates=ingested, spread_s=spread_s) as (beside, database, came),
        _server(f"sqlite:///{database}", devices, rounds, updates) as (port, token),
    ):
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        first_ms = _asked(client, token, "/v1/whoami")[0]
        anew_ms = _asked(client, token, "/v1/privacy")[0]
        later_ms = [_asked(client, token, "/v1/whoami")[0] for _ in range(repeats)]
        alone = _lists(client, token, repeats)
        beside.begin()
        found = _lists(client, token, repeats, during=beside.ingests)
        client.close()
    return {
        "api_p99_ms": max(one["p99_ms"] for one in found.values()),
        "api_alone_p99_ms": max(one["p99_ms"] for one in alone.values()),
        "first_of_token_ms": round(first_ms, 2),
        "later_of_token_ms": round(float(np.median(later_ms)), 2),
        "privacy_anew_ms": round(anew_ms, 1),
        "devices": devices,
        "rounds": rounds,
        "updates_a_round": updates,
        "repeats": repeats,
        "ingested": came,
        "lists": found,
        "lists_alone": alone,
        "cpu": cpu_name(),
    }


def _lists(
    client: http.client.HTTPConnection, token: str, repeats: int, *, during: Event | None = None
) -> dict[str, dict[str, Any]]:
    """All lists in turns, over and over, the first time left out; only while `during` is set if it is given."""
    sizes = {name: _asked(client, token, path)[1] for name, path in LISTS.items()}
    taken: dict[str, list[float]] = {name: [] for name in LISTS}
    while min(map(len, taken.values())) < repeats:
        for name, path in LISTS.items():
            if during is not None and not during.wait(_NEXT_ROUND_S):
                raise RuntimeError(f"no update was ingested for {_NEXT_ROUND_S:g} s")
            took_ms = _asked(client, token, path)[0]
            if during is None or during.is_set():
                taken[name].append(took_ms)
    return {
        name: {
            "median_ms": round(float(np.median(times)), 2),
            "p99_ms": round(float(np.percentile(times, 99)), 2),
            "bytes": sizes[name],
        }
        for name, times in taken.items()
    }


def _asked(client: http.client.HTTPConnection, token: str, path: str) -> tuple[float, int]:
    """Milliseconds and bytes of one request."""
    began_s = time.perf_counter()
    client.request("GET", path, headers={"Authorization": f"Bearer {token}"})
    response = client.getresponse()
    data = response.read()
    taken_ms = (time.perf_counter() - began_s) * 1e3
    if response.status != 200:
        raise RuntimeError(f"{path}: {response.status} {data[:200]!r}")
    return taken_ms, len(data)


@contextlib.contextmanager
def _server(url: str, devices: int, rounds: int, updates: int) -> Iterator[tuple[int, str]]:
    """A served study in a process of its own: its port, and an admin's token."""
    here, there = multiprocessing.Pipe()
    start = multiprocessing.get_context("spawn")
    process = start.Process(target=_serve, args=(there, url, devices, rounds, updates))
    process.start()
    try:
        yield here.recv()
    finally:
        here.send(None)
        process.join()


def _serve(told: Connection, url: str, devices: int, rounds: int, updates: int) -> None:
    """The process."""
    load_accounting()  # as `aggregator.api.serving` does
    study = SeededStudy(url, devices=devices, rounds=rounds, arrived=updates)
    with served(Desk(study)) as server:
        told.send((server.port, study.tokens["admin"]))
        told.recv()
    study.store.close()


if __name__ == "__main__":
    main()
