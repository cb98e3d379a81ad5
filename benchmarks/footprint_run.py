"""What a device is asked to do in benchmarks/device_footprint.py, and what is noted of it, whoever made it.

A run is: connect; stay connected for `idle_s` while nothing is to be done; then take part in `rounds` rounds within
``rounds * period_s``, the rest of it waiting for more. Whatever the device costs in that time is divided by the rounds,
so that polling, heartbeats and keep-alives count, over the same time for everyone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.counting_proxy import CountingProxy
from benchmarks.process_tree import CpuMeter, Memory, MemoryWatch, processes

LOOK_EVERY_S = 0.005


class FootprintError(Exception):
    """A run did not get as far as it should; one sentence."""


@dataclass(frozen=True)
class Schedule:
    """How long a device is idle, how many rounds follow, and how much time belongs to each."""

    idle_s: float
    rounds: int
    period_s: float

    @property
    def rounds_within_s(self) -> float:
        """Time for all rounds."""
        return self.rounds * self.period_s


@dataclass(frozen=True)
class Phases:
    """What both phases cost, apart from how long the start took."""

    processes_idle: int
    idle: Memory
    idle_cpu_s_per_minute: float
    idle_bytes_per_minute: float
    training: Memory
    cpu_s_per_round: float
    up_bytes_per_round: float
    down_bytes_per_round: float
    rounds_took_s: float


@dataclass(frozen=True)
class Run:
    """One run of one device."""

    cold_start_s: float
    phases: Phases
    train_s_per_round: float | None = None


def watch_phases(
    root: int, proxy: CountingProxy, schedule: Schedule, *, start_rounds: Callable[[], Callable[[], bool]]
) -> Phases:
    """Follow a connected device through both phases.

    Args:
        root: its process.
        proxy: what it is connected through.
        schedule: how long each phase is.
        start_rounds: begins the rounds and returns a question: are they over?

    Raises:
        FootprintError: the rounds took longer than they had.
    """
    cpu, before = CpuMeter.start(root), proxy.traffic()
    with MemoryWatch(root) as watch:
        time.sleep(schedule.idle_s)
    per_minute = 60 / (time.monotonic() - cpu.at_s)
    idle_traffic = proxy.traffic() - before
    idle, idle_cpu_s, members = watch.peak(), cpu.used_s(), len(processes(root))
    cpu, before = CpuMeter.start(root), proxy.traffic()
    with MemoryWatch(root) as watch:
        rounds_took_s = _wait_out(schedule, start_rounds())
    traffic = proxy.traffic() - before
    return Phases(
        processes_idle=members,
        idle=idle,
        idle_cpu_s_per_minute=idle_cpu_s * per_minute,
        idle_bytes_per_minute=(idle_traffic.up_bytes + idle_traffic.down_bytes) * per_minute,
        training=watch.peak(),
        cpu_s_per_round=cpu.used_s() / schedule.rounds,
        up_bytes_per_round=traffic.up_bytes / schedule.rounds,
        down_bytes_per_round=traffic.down_bytes / schedule.rounds,
        rounds_took_s=rounds_took_s,
    )


def wait_for(happened: Callable[[], bool], *, within_s: float, what: str) -> float:
    """Ask until it happened; how long it took, seconds. Raises FootprintError."""
    started_s = time.monotonic()
    while not happened():
        if time.monotonic() > started_s + within_s:
            raise FootprintError(f"{what} did not happen within {within_s:g} s")
        time.sleep(LOOK_EVERY_S)
    return time.monotonic() - started_s


def summary(runs: Sequence[Run]) -> dict[str, float | None]:
    """Medians over runs, rounded as far as they repeat."""
    trained = [run.train_s_per_round for run in runs if run.train_s_per_round is not None]

    def median(value: Callable[[Run], float], digits: int) -> float:
        return round(statistics.median(map(value, runs)), digits)

    return {
        "cold_start_s": median(lambda run: run.cold_start_s, 3),
        "processes_idle": median(lambda run: run.phases.processes_idle, 0),
        "idle_rss_mb": median(lambda run: run.phases.idle.rss_mb, 1),
        "idle_pss_mb": median(lambda run: run.phases.idle.pss_mb, 1),
        "peak_high_water_mb": median(lambda run: run.phases.training.high_water_mb, 1),
        "peak_pss_mb": median(lambda run: run.phases.training.pss_mb, 1),
        "idle_cpu_s_per_minute": median(lambda run: run.phases.idle_cpu_s_per_minute, 3),
        "cpu_s_per_round": median(lambda run: run.phases.cpu_s_per_round, 3),
        "idle_bytes_per_minute": median(lambda run: run.phases.idle_bytes_per_minute, 0),
        "up_bytes_per_round": median(lambda run: run.phases.up_bytes_per_round, 0),
        "down_bytes_per_round": median(lambda run: run.phases.down_bytes_per_round, 0),
        "rounds_took_s": median(lambda run: run.phases.rounds_took_s, 2),
        "train_s_per_round": round(statistics.median(trained), 4) if trained else None,
    }


def _wait_out(schedule: Schedule, over: Callable[[], bool]) -> float:
    """Wait until the rounds are over, then until their time is; how long they took."""
    started_s = time.monotonic()
    took_s = wait_for(over, within_s=schedule.rounds_within_s, what=f"the end of {schedule.rounds} rounds")
    time.sleep(max(0.0, started_s + schedule.rounds_within_s - time.monotonic()))
    return took_s
