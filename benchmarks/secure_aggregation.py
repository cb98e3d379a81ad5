"""Secure aggregation: whether sums are exact, and what it costs a device, a helper and the aggregator.

For each number of devices n and length d every device sends its update, masked for three helpers with hybrid keys; some
never arrive. ``exact``: whether the unmasked sum equals the sum of the same integers in every case. All noise is zero
here: it is part of the integers and changes no time.

    device_ms                   masks and sealing of one update: three keystreams, three hybrid HPKE seals, packing,
                                digests, a signature
    device_whole_ms             the same with clipping and rounding before
    device_upload_ms            the same with the update's own seal and signature after
    helper_over_primitives      a helper's time for a round over the keystreams and additions of the same masks alone
    helper_over_all_primitives  the same over these and one signature verified and one seed opened for each update
    aggregator_over_primitives  the aggregator's, for checking, adding up and unmasking, over SHA-256 of the masked
                                vectors and their additions alone
    aggregator_over_all_primitives  the same over these and one signature verified for each update

Those at the top are of rounds of 100 devices (or of the most there are). Beside it one client of Flower's SecAgg+, in
the same process and in turns (`benchmarks.peers.flower_secagg`), in an environment that is made once below .peers:

    flower_over_covey_client_time    Flower's client over ``device_whole_ms``; 50 devices, d = 100,000, shares for all
    flower15_over_covey_client_time  the same; 100 devices, d = 9,000, 15 shares
    bytes_over_flower                the sealed update over what Flower's client sends in all; 50 devices, d = 100,000

Medians of repeats, in turns. Everything is one thread's processor time, which is the wall clock's on a quiet machine.

    python -m benchmarks.secure_aggregation
    python -m benchmarks.secure_aggregation --json
    python -m benchmarks.secure_aggregation --devices 20 --lengths 9000 --no-flower
"""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.command import parser
from benchmarks.peers import environments
from benchmarks.secure_case import (
    HELPERS,
    Case,
    bare_masks,
    bare_openings,
    bare_sums,
    bare_verifications,
    case_of,
    device_steps,
    update_id,
)
from benchmarks.timing import Lengths, Step, alternate, cpu_name, milliseconds, timed
from fl_protocol.secagg.messages import MaskSumMsg, SecureBodyMsg, UnmaskEntryMsg
from fl_protocol.secagg.parties import entry_for, masked_vector, sum_of_masks, unmask

DEVICES, LENGTHS = (20, 50, 100, 1000), (9_000, 100_000, 1_000_000)
DROPOUTS = (0.0, 0.25, 0.5)
PREFERRED_DEVICES = 100
FULL, FIFTEEN = (50, 100_000, 50), (100, 9_000, 15)
"""Devices, numbers and shares of the two comparisons with Flower that have keys of their own."""
OVER = (
    "helper_over_primitives",
    "helper_over_all_primitives",
    "aggregator_over_primitives",
    "aggregator_over_all_primitives",
)


def main() -> None:
    """Measure, and print."""
    command = parser("secure_aggregation", __doc__)
    command.add_argument("--devices", type=int, nargs="+", default=list(DEVICES), help="numbers of devices")
    command.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="numbers in an update")
    command.add_argument("--repeats", type=int, default=5, help="of what is timed for one device (default 5)")
    command.add_argument("--no-flower", action="store_true", help="only covey")
    arguments = command.parse_args()
    # Flower first: an environment that cannot be made is known at once.
    flower = ([], "not asked for") if arguments.no_flower else beside_flower(repeats=arguments.repeats)
    ours = measure(arguments.devices, arguments.lengths, repeats=arguments.repeats)
    result = report(ours, *flower)
    if arguments.json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return
    for row in [*result.pop("rounds"), *result.pop("device"), *result.pop("flower")]:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    for key, value in result.items():
        print(f"{key:<33}{value}")


def report(ours: Mapping[str, Any], flower: Sequence[Mapping[str, Any]], no_flower: str | None) -> dict[str, Any]:
    """Headlines first, then everything."""
    cases = {(row["n"], row["d"], row["shares"]): row for row in flower}
    full, fifteen = cases.get(FULL), cases.get(FIFTEEN)
    count = headline_devices(row["n"] for row in ours["rounds"])
    chosen = [row for row in ours["rounds"] if row["n"] == count]
    device_ms = {row["d"]: row["device_ms"] for row in ours["device"] if row["n"] == count}
    return {
        "exact": all(row["exact"] for row in ours["rounds"]),
        "device_ms_100k": device_ms.get(100_000),
        "device_ms_1m": device_ms.get(1_000_000),
        "flower_over_covey_client_time": full and full["flower_over_covey"],
        "flower15_over_covey_client_time": fifteen and fifteen["flower_over_covey"],
        "bytes_over_flower": full and full["bytes_over_flower"],
        **{name: {str(row["d"]): row[name] for row in chosen} for name in OVER},
        "headline_devices": count,
        "device": ours["device"],
        "rounds": ours["rounds"],
        "flower": list(flower),
        "no_flower": no_flower,
        "repeats": ours["repeats"],
        "cpu": cpu_name(),
    }


def beside_flower(*, repeats: int) -> tuple[list[dict[str, Any]], str | None]:
    """What `benchmarks.peers.flower_secagg` found in its environment, or why there is nothing."""
    try:
        python = environments.prepare("flower_secagg")
    except environments.PeerMissingError as error:
        return [], str(error)
    return in_flowers_python(python, repeats=repeats), None


def in_flowers_python(
    python: Path, *, repeats: int, cases: Sequence[tuple[int, int, int]] = ()
) -> list[dict[str, Any]]:
    """The rows of `benchmarks.peers.flower_secagg`, for its own cases or others (clients, numbers, shares)."""
    command = [str(python), "-m", "benchmarks.peers.flower_secagg", "--repeats", str(repeats)]
    for case in cases:
        command += ["--case", *map(str, case)]
    done = subprocess.run(
        command, cwd=environments.REPOSITORY, env=environments.isolated(), stdout=subprocess.PIPE, check=True, text=True
    )
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def measure(devices: Sequence[int], lengths: Sequence[int], *, repeats: int) -> dict[str, Any]:
    """Our own figures."""
    rounds = []
    for count in devices:
        for length in lengths:
            say(f"{count} devices, {length} numbers")
            rounds.append(whole_round(case_of(count, length), count, repeats=repeats))
    device = []
    for count in sorted({headline_devices(devices), max(devices)}):
        for length in lengths:
            say(f"one device of {count}, {length} numbers")
            device.append({"n": count, "d": length} | one_device(case_of(count, length), repeats=repeats))
    return {"rounds": rounds, "device": device, "repeats": repeats}


def headline_devices(devices: Iterable[int]) -> int:
    """Of how many devices the figures at the top are."""
    return PREFERRED_DEVICES if PREFERRED_DEVICES in (found := list(devices)) else max(found)


def whole_round(case: Case, count: int, *, repeats: int) -> dict[str, Any]:
    """A round for each share of devices that never arrive; what parties took beside their primitives."""
    names = [f"watch-{index}" for index in range(count)]
    integers = np.zeros(case.length, np.int64)
    # Few of them, so that they are no longer than a clipped update is.
    integers[:1000] = np.random.default_rng(count).integers(-6, 7, min(1000, case.length))
    total, expected, entries = case.terms.masks.zeros(), np.zeros(case.length, np.int64), []
    other, times, exact = case.terms.masks.zeros(), [], True
    # Whoever arrives when half drop out arrives when fewer do, too; so one pass serves all.
    ends = {max(2, round(count * (1 - share))) for share in DROPOUTS}
    for index, name in enumerate(names, start=1):
        mine = np.roll(integers, index)
        body = case.body(name, mine)
        times.append(_adding_times(case, body, name, total, other))
        expected += mine
        entries.append({helper: entry_for(case.terms, body, helper) for helper in HELPERS})
        if index in ends:
            exact = exact and _is_exact(case, names[:index], entries, total, expected)
    adding_ms, sums_ms, verifying_ms = (count * statistics.median(column) for column in zip(*times, strict=True))
    sums, (helper_ms, masks_ms, openings_ms) = _helper_times(case, names, entries, repeats=repeats)
    ids = [update_id(name) for name in names]
    unmask_ms = [_spent_ms(lambda: unmask(case.terms, total, sums, update_ids=ids)) for _ in range(repeats)]
    aggregator_ms = adding_ms + statistics.median(unmask_ms)
    return {
        "n": count,
        "d": case.length,
        "bits": case.terms.fixed_point.bits,
        "exact": exact,
        "body_bytes": _bytes(body),
        "helper_ms": round(helper_ms, 2),
        "helper_over_primitives": round(helper_ms / masks_ms, 2),
        "helper_over_all_primitives": round(helper_ms / (masks_ms + openings_ms + verifying_ms), 2),
        "aggregator_ms": round(aggregator_ms, 2),
        "unmask_ms": round(statistics.median(unmask_ms), 2),
        "aggregator_over_primitives": round(aggregator_ms / sums_ms, 2),
        "aggregator_over_all_primitives": round(aggregator_ms / (sums_ms + verifying_ms), 2),
    }


def _adding_times(case: Case, body: SecureBodyMsg, name: str, total: Any, other: Any) -> tuple[float, float, float]:
    """Milliseconds of the aggregator for an update, of hash and addition alone, and of a signature alone."""
    key, entry = case.device_key.public_key(), entry_for(case.terms, body, HELPERS[0])
    words = masked_vector(case.terms, body, device=name, update_id=update_id(name), device_key=key)
    words = words.astype(total.dtype, copy=False)

    def count_it() -> None:
        masked = masked_vector(case.terms, body, device=name, update_id=update_id(name), device_key=key)
        total.__iadd__(masked.astype(total.dtype, copy=False))

    return (
        _spent_ms(count_it),
        _spent_ms(lambda: bare_sums(body, words, other)),
        _spent_ms(lambda: bare_verifications(case, entry, 1)),
    )


def _is_exact(
    case: Case, names: list[str], entries: list[dict[str, UnmaskEntryMsg]], total: Any, expected: NDArray[np.int64]
) -> bool:
    """Whether the sum of those that have arrived so far is the sum of their integers."""
    sums = [_answer(case, names, entries, helper) for helper in HELPERS]
    found = unmask(case.terms, total, sums, update_ids=[update_id(name) for name in names])
    return bool(np.array_equal(found, expected * case.terms.fixed_point.step))


def _answer(case: Case, names: list[str], entries: list[dict[str, UnmaskEntryMsg]], helper: str) -> MaskSumMsg:
    """A helper's sum of masks."""
    keys = dict.fromkeys(names, case.device_key.public_key())
    listed = [one[helper] for one in entries]
    return sum_of_masks(case.terms, listed, helper=helper, key=case.helper_keys[helper], device_keys=keys)


def _helper_times(
    case: Case, names: list[str], entries: list[dict[str, UnmaskEntryMsg]], *, repeats: int
) -> tuple[list[MaskSumMsg], list[float]]:
    """Every helper's sum; the median milliseconds of one, of its keystreams alone, and of its openings alone."""
    found: dict[str, MaskSumMsg] = {}

    def answer(helper: str) -> None:
        found[helper] = _answer(case, names, entries, helper)

    times = []
    for index in range(max(repeats, len(HELPERS))):
        helper = HELPERS[index % len(HELPERS)]
        times.append(
            (
                _spent_ms(functools.partial(answer, helper)),
                _spent_ms(lambda: bare_masks(case, len(names))),
                _spent_ms(lambda: bare_openings(case, entries[0][HELPERS[0]], names[0], len(names))),
            )
        )
    return list(found.values()), [statistics.median(column) for column in zip(*times, strict=True)]


def one_device(case: Case, *, repeats: int) -> dict[str, float]:
    """What one device takes, in turns with the bare keystreams."""
    steps = device_steps(case) | {"bare_ms": lambda: bare_masks(case, len(HELPERS))}
    calls = min(100, max(5, 2_000_000 // case.length))
    found = alternate({name: timed(step, time.process_time) for name, step in steps.items()}, Lengths(repeats, calls))
    return {"bits": case.terms.fixed_point.bits} | {
        name: round(statistics.median(times), 3) for name, times in found.items()
    }


def _spent_ms(step: Step) -> float:
    """Milliseconds of this process's processor time."""
    return milliseconds(step, time.process_time)


def _bytes(body: SecureBodyMsg) -> int:
    """What an update takes inside its seal, but for names and lengths of fields."""
    signed = body.contribution
    return len(signed.contribution) + len(signed.signature) + sum(map(len, body.seeds)) + len(body.masked)


def say(text: str) -> None:
    """Where a long measurement is."""
    print(f"secure_aggregation: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
