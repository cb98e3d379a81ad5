"""How long lists of the HTTP API take, with 10,000 devices and 500 rounds of history in each of two tasks.

The server is the real one, on loopback, in a process of its own, over SQLite; each list is asked for its first page, a
page in the middle, and with filters where it has some, one request after the other on one connection. The time is from
the request to the last byte of the answer; `api_p99_ms` is the largest p99 of all lists. What costs once in a while
is told beside it: the first request of a token (a slow hash), and accounting a task's privacy anew.

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
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.command import parser
from benchmarks.timing import cpu_name
from tests.aggregator.api.seeded_study import OPEN, SeededStudy
from tests.aggregator.api.served import Desk, served

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
    print(
        f"largest p99: {result['api_p99_ms']} ms; a token's first request {result['first_of_token_ms']} ms, later ones"
    )
    print(f"{result['later_of_token_ms']} ms; accounting privacy anew {result['privacy_anew_ms']} ms; {result['cpu']}")


def measure(devices: int, rounds: int, *, updates: int, repeats: int) -> dict[str, Any]:
    """Milliseconds for each list, as JSON."""
    with tempfile.TemporaryDirectory() as folder, _server(Path(folder), devices, rounds, updates) as (port, token):
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        first_ms = _asked(client, token, "/v1/whoami")[0]
        anew_ms = _asked(client, token, "/v1/privacy")[0]
        later_ms = [_asked(client, token, "/v1/whoami")[0] for _ in range(repeats)]
        found = {name: _list(client, token, path, repeats) for name, path in LISTS.items()}
        client.close()
    return {
        "api_p99_ms": max(one["p99_ms"] for one in found.values()),
        "first_of_token_ms": round(first_ms, 2),
        "later_of_token_ms": round(float(np.median(later_ms)), 2),
        "privacy_anew_ms": round(anew_ms, 1),
        "devices": devices,
        "rounds": rounds,
        "updates_a_round": updates,
        "repeats": repeats,
        "lists": found,
        "cpu": cpu_name(),
    }


def _list(client: http.client.HTTPConnection, token: str, path: str, repeats: int) -> dict[str, Any]:
    """One list, over and over; the first time is left out."""
    size = _asked(client, token, path)[1]
    taken = [_asked(client, token, path)[0] for _ in range(repeats)]
    median, p99 = (round(float(np.percentile(taken, share)), 2) for share in (50, 99))
    return {"median_ms": median, "p99_ms": p99, "bytes": size}


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
def _server(folder: Path, devices: int, rounds: int, updates: int) -> Iterator[tuple[int, str]]:
    """A served study in a process of its own: its port, and an admin's token."""
    here, there = multiprocessing.Pipe()
    start = multiprocessing.get_context("spawn")
    process = start.Process(target=_serve, args=(there, folder, devices, rounds, updates))
    process.start()
    try:
        yield here.recv()
    finally:
        here.send(None)
        process.join()


def _serve(told: Connection, folder: Path, devices: int, rounds: int, updates: int) -> None:
    """The process."""
    study = SeededStudy(f"sqlite:///{folder / 'study.db'}", devices=devices, rounds=rounds, arrived=updates)
    with served(Desk(study)) as server:
        told.send((server.port, study.tokens["admin"]))
        told.recv()
    study.store.close()


if __name__ == "__main__":
    main()
