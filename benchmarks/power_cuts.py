"""Power cuts at random moments of a device's weeks, as many as wanted; the tests do the same with two thousand.

Each week is one real device over a virtual flash, with an aggregator that answers late or never and clocks that come up
wrong (`tests.system.power_cuts`). Printed is how many cuts there were, at what, and every promise that was broken, with
the week that shows it again. Run it from a checkout, since it takes the tests' devices.

    python -m benchmarks.power_cuts
    python -m benchmarks.power_cuts --cuts 2000 --first-week 5000 --json
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from itertools import count
from typing import Any

from benchmarks.command import parser
from tests.system.power_cuts.variants import VARIANTS
from tests.system.power_cuts.week import Cuts, Week

CUTS_PER_WEEK = 25


def main() -> None:
    """Cut, and print."""
    command = parser("power_cuts", __doc__)
    command.add_argument("--cuts", type=int, default=20_000, help="how many (default 20000, about ten minutes)")
    command.add_argument("--first-week", type=int, default=10_000, help="number of the first week (default 10000)")
    arguments = command.parse_args()
    result = measure(arguments.cuts, first_week=arguments.first_week)
    if arguments.json:
        json.dump(result, sys.stdout, indent=2)
        print()
    else:
        for key, value in result.items():
            print(f"{key}: {value}")
    if result["broken_promises"]:
        sys.exit(1)


def measure(cuts: int, *, first_week: int) -> dict[str, Any]:
    """Live through weeks of all variants until there were enough cuts.

    Args:
        cuts: how many at least.
        first_week: its number; the following ones have the following numbers.
    """
    kinds, seen, outcomes, broken, weeks = Counter[str](), Counter[str](), Counter[str](), list[str](), 0
    began_s = time.monotonic()
    for number in count(first_week):
        for variant in VARIANTS.values():
            week = Week(number, variant, cuts=Cuts(CUTS_PER_WEEK)).run()
            kinds, seen, outcomes, weeks = (
                kinds + week.kinds,
                seen + week.witness.seen,
                outcomes + week.outcomes,
                weeks + 1,
            )
            if week.witness.faults:
                broken.append(week.summary())
        if sum(kinds.values()) >= cuts:
            break
    return {
        "power_cuts": sum(kinds.values()),
        "weeks": weeks,
        "broken_promises": broken,
        "seconds": round(time.monotonic() - began_s, 1),
        "cut_at": dict(kinds.most_common()),
        "process_or_power": dict(outcomes),
        "seen": dict(seen.most_common()),
    }


if __name__ == "__main__":
    main()
