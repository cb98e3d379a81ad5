"""What operating a study costs, each beside the bare primitive where there is one.

    audit_verify_per_s   entries of the audit log verified in a second, of a million (`audit_log`)
    api_p99_ms           the slowest list of the HTTP API, with 10,000 devices and 500 rounds, while rounds of 1,000
                         updates are ingested beside it (`api_lists`)
    enrol_per_s          devices that the desk enrols in a second, over two real mosquittos (`identities`)
    revoke_s             from a revocation to the end of the device's connection, the longest of some
    first_paint_s        the dashboard in headless Chromium, with 10,000 devices and 500 rounds (`dashboard`)
    live_update_s        from a commit in the database to the number on an open page

python -m benchmarks.operations
python -m benchmarks.operations --only identities --devices 5000 --json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks.command import parser
from benchmarks.operations import api_lists, audit_log
from benchmarks.operations.identities import identities

PARTS = ("audit_log", "api_lists", "identities", "dashboard")


def main() -> None:
    """Measure, and print."""
    command = parser("operations", __doc__)
    command.add_argument("--only", choices=PARTS, action="append", help="this part; repeatable (default: all)")
    command.add_argument("--entries", type=int, default=1_000_000, help="of the audit log (default 1000000)")
    command.add_argument("--devices", type=int, default=200, help="that are enrolled (default 200)")
    command.add_argument("--requests-a-minute", type=int, default=3000, help="that the desk takes (default 3000)")
    command.add_argument("--revocations", type=int, default=10, help="(default 10)")
    arguments = command.parse_args()
    if min(arguments.entries, arguments.devices, arguments.revocations, arguments.requests_a_minute) < 1:
        command.error("--entries, --devices, --revocations, --requests-a-minute: at least 1")
    with Progress(console=Console(stderr=True)) as bar:
        tasks: dict[str, Any] = {}

        def told(what: str, done: int, count: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=count)
            bar.update(tasks[what], completed=done)

        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "audit_log": lambda: audit_log.measure(arguments.entries),
            "api_lists": lambda: api_lists.measure(10_000, 500, updates=1000, repeats=300),
            "dashboard": _dashboard,
            "identities": lambda: identities(
                devices=arguments.devices,
                revocations=arguments.revocations,
                requests_a_minute=arguments.requests_a_minute,
                told=told,
            ),
        }
        result: dict[str, Any] = {}
        for name in arguments.only or PARTS:
            result |= parts[name]()
    if arguments.json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return
    for key, value in result.items():
        print(f"{key:<28}{value}")


def _dashboard() -> dict[str, Any]:
    from benchmarks.operations import dashboard  # noqa: PLC0415 - the others need no browser

    return dashboard.measure(10_000, 500, updates=1000, repeats=7, changes=30)


if __name__ == "__main__":
    main()
