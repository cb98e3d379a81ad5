"""Covey's simulator beside Flower's and Apple's: client-rounds per second, memory, growth; a week of 100,000 devices.

All run the job of docs/simulation-benchmarks.md, each in a process tree of its own, in turns, so that a slow moment of
the machine hits all; a rate is the median over the turns of the median round. Starting does not count on any side. pfl
runs with one and with two processes, and the faster counts. A ratio is the rate of ours over theirs; of memory, the
proportional memory of our whole tree over theirs, both at their highest.

The week is a scenario of its own (``--scenario``), run by ``covey-fleet run`` with another number of devices, and with
a goal and a minimum cohort in the same proportion to it; its seconds are all of it, from the beginning to the report.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import process_tree
from benchmarks.command import parser
from benchmarks.peers.client import PeerError
from benchmarks.peers.environments import PeerMissingError
from benchmarks.peers.simulation_job import Job
from benchmarks.simulation_covey import CoveyJob
from benchmarks.simulation_peers import PEERS, Bounds, Result, make_job, medians, run_command, run_job
from benchmarks.simulation_plot import plot
from benchmarks.timing import cpu_name

SCENARIO = Path("firmware_sim/scenarios/mass-rollout.toml")
CLIENTS, QUICK_CLIENTS = (100, 300, 1000), (20, 40)
DEVICES, QUICK_DEVICES, LONG_DEVICES = (1_000, 3_000, 10_000), (100, 200), 100_000
WEEK_WITHIN_S = 7200.0
OURS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "real": (("covey", "on"),),
    "noop": (("covey", "on"), ("covey_off", "off")),
    "million": (("covey_off", "off"),),
}
"""Which of ours runs each kind of job, and how its wire is set."""
_SCALED = ("devices", "goal", "minimum_cohort")


def compared(kind: str, clients: int, *, rounds: int, repeats: int, peers: Sequence[str] = tuple(PEERS)) -> list[dict]:  # type: ignore[type-arg]
    """One record for each simulator that did a job; one that failed says why, and is not asked again.

    Args:
        kind: ``real``, ``noop`` or ``million``.
        clients: how many.
        rounds: timed ones of every run.
        repeats: runs of each.
        peers: names in `PEERS`.
    """
    job = make_job(kind, clients, rounds)
    contenders = [(name, replace(job, workers=2), wire) for name, wire in OURS[kind]]
    contenders += [(peer, replace(job, workers=workers), "") for peer in peers for workers in _workers(peer)]
    runs: dict[int, list[Result]] = {number: [] for number in range(len(contenders))}
    failures: dict[int, str] = {}
    for _ in range(repeats):
        for number, (name, mine, wire) in enumerate(contenders):
            if number in failures:
                continue
            try:
                runs[number].append(_run(name, mine, wire))
            except (PeerError, PeerMissingError) as error:
                failures[number] = str(error)
            said = failures.get(number) or f"{runs[number][-1].client_rounds_per_s:.1f}/s"
            print(f"simulation: {kind} {clients} {name} {mine.workers}: {said}", file=sys.stderr)
    return [
        {"simulator": name, "kind": kind, "clients": clients, "workers": mine.workers, **medians(runs[number])}
        | ({"failure": failures[number]} if number in failures else {})
        for number, (name, mine, _) in enumerate(contenders)
    ]


def ratios(records: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The numbers that the issue asks for, from the records of one number of clients; None where a run is missing.

    Args:
        records: as `compared` gives them.
    """

    def best(kind: str, simulator: str, key: str = "client_rounds_per_s") -> float | None:
        found = [one for one in records if (one["kind"], one["simulator"]) == (kind, simulator) and one.get(key)]
        return max(found, key=lambda one: one["client_rounds_per_s"])[key] if found else None

    def over(ours: float | None, theirs: float | None) -> float | None:
        return ours / theirs if ours is not None and theirs else None

    return {
        "real_over_flower": over(best("real", "covey"), best("real", "flower_simulation")),
        "real_over_pfl": over(best("real", "covey"), best("real", "pfl")),
        "noop_over_flower": over(best("noop", "covey"), best("noop", "flower_simulation")),
        "noop_over_pfl": over(best("noop", "covey_off"), best("noop", "pfl")),
        "noop_off_over_flower": over(best("noop", "covey_off"), best("noop", "flower_simulation")),
        "million_over_flower": over(best("million", "covey_off"), best("million", "flower_simulation")),
        "million_over_pfl": over(best("million", "covey_off"), best("million", "pfl")),
        "rss_over_flower": over(
            best("million", "covey_off", "peak_pss_mb"), best("million", "flower_simulation", "peak_pss_mb")
        ),
    }


def week(scenario: Path, devices: int) -> dict[str, Any]:
    """Run a scenario to its end with so many devices: seconds, processor seconds, peak memory, daemons started.

    Args:
        scenario: its file.
        devices: instead of the file's.

    Raises:
        PeerError: it failed or took too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        changed = Path(folder) / "week.toml"
        changed.write_text(with_devices(scenario.read_text(encoding="utf-8"), devices), encoding="utf-8")
        command = [sys.executable, "-c", "from firmware_sim.cli import main; main()", "run", str(changed)]
        command += ["--shards", "2"]
        began_s = time.perf_counter()
        with (
            subprocess.Popen(
                [*command, "--out", f"{folder}/run"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            ) as process,
            process_tree.MemoryWatch(process.pid, every_s=1.0) as watch,
        ):
            try:
                said = process.communicate(timeout=WEEK_WITHIN_S)[1]
            except subprocess.TimeoutExpired:
                process.terminate()
                raise PeerError(f"A week of {devices} devices took more than {WEEK_WITHIN_S:g} s.") from None
        seconds = time.perf_counter() - began_s
        if process.returncode:
            raise PeerError(f"A week of {devices} devices failed: {said.decode(errors='replace')[-300:]}")
    peak = watch.peak()
    return {"devices": devices, "seconds": seconds, "peak_pss_mb": peak.pss_mb, "peak_rss_mb": peak.rss_mb}


def with_devices(text: str, devices: int) -> str:
    """A scenario's text with so many devices, and as large a share of them in a round.

    Args:
        text: has the keys ``devices``, ``goal`` and ``minimum_cohort`` on lines of their own.
        devices: instead of the text's.
    """
    fields = {key: int(found[1]) for key in _SCALED if (found := re.search(rf"(?m)^{key} = (\d+)$", text))}
    for key, value in fields.items():
        scaled = max(2, round(value * devices / fields["devices"]))
        text = re.sub(rf"(?m)^{key} = \d+$", f"{key} = {scaled}", text)
    return text


def _workers(peer: str) -> tuple[int, ...]:
    """With how many processes a peer is tried."""
    return (1, 2) if peer == "pfl" else (2,)


def _run(name: str, job: Job, wire: str) -> Result:
    """One run. Raises PeerError, PeerMissingError."""
    if not wire:
        return run_job(name, job)
    command = [sys.executable, "-m", "benchmarks.simulation_covey", CoveyJob(job, wire).text()]
    return run_command(name, command, job, bounds=Bounds())


def _options() -> argparse.ArgumentParser:
    """The command line."""
    options = parser("simulation", __doc__)
    options.add_argument("--quick", action="store_true", help="few clients, one run each, no week: that all works")
    options.add_argument("--long", action="store_true", help=f"the week with {LONG_DEVICES:,} devices too")
    options.add_argument("--no-week", action="store_true", help="leave the week out")
    options.add_argument("--only-week", action="store_true", help="leave all but the week out")
    options.add_argument("--plot", type=Path, metavar="PNG", help="draw growth and weeks")
    options.add_argument("--kind", action="append", choices=OURS, help="only this one (may be repeated)")
    options.add_argument(
        "--clients", type=int, action="append", help="may be repeated; 100, 300 and 1,000 unless given"
    )
    options.add_argument("--repeats", type=int, default=3, help="runs of each")
    options.add_argument("--rounds", type=int, default=5, help="timed rounds of each run")
    options.add_argument("--scenario", type=Path, default=SCENARIO, help="of the week")
    return options


def main() -> None:
    """The command line."""
    given = _options().parse_args()
    clients = given.clients or (QUICK_CLIENTS if given.quick else CLIENTS)
    rounds, repeats = (2, 1) if given.quick else (given.rounds, given.repeats)
    load = os.getloadavg()[0]
    records = [
        record
        for count in clients
        for kind in ([] if given.only_week else given.kind or OURS)
        for record in compared(kind, count, rounds=rounds, repeats=repeats)
    ]
    counts = QUICK_DEVICES if given.quick else (*DEVICES, *((LONG_DEVICES,) if given.long else ()))
    weeks = [] if given.no_week else [week(given.scenario, count) for count in counts]
    hundred_k = next((one["seconds"] for one in weeks if one["devices"] == LONG_DEVICES), None)
    result = {
        "processor": cpu_name(),
        "cores": os.cpu_count(),
        "load_before": load,
        "load_after": os.getloadavg()[0],
        **ratios([one for one in records if one["clients"] == clients[0]]),
        "hundred_k_week_s": hundred_k,
        "growth": records,
        "weeks": weeks,
    }
    if given.plot:
        plot(result, given.plot)
    print(json.dumps(result, indent=1 if given.json else None))


if __name__ == "__main__":
    main()
