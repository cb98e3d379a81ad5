"""How benchmarks time steps: in turns, block by block, so that a slow moment of the machine hits all."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Step = Callable[[], Any]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Lengths:
    """How many blocks are counted, and how many calls each has."""

    blocks: int
    calls: int


_Name = TypeVar("_Name", bound=Hashable)


def timed(step: Step, clock: Clock = time.perf_counter) -> Callable[[int], list[float]]:
    """Something that runs a step so many times and gives the milliseconds of each."""

    def run(calls: int) -> list[float]:
        return [milliseconds(step, clock) for _ in range(calls)]

    return run


def alternate(kinds: Mapping[_Name, Callable[[int], list[float]]], lengths: Lengths) -> dict[_Name, list[float]]:
    """The median milliseconds of every block of each kind, in turns, after a block each to warm up."""
    times: dict[_Name, list[float]] = {name: [] for name in kinds}
    for block in range(lengths.blocks + 1):
        for name, run in kinds.items():
            median = statistics.median(run(lengths.calls))
            if block:
                times[name].append(median)
    return times


def milliseconds(step: Step, clock: Clock = time.perf_counter) -> float:
    """How long one call takes; with `time.process_time` as the clock, how long processors work for it."""
    start = clock()
    step()
    return 1000 * (clock() - start)


def cpu_name() -> str:
    """The processor, as Linux names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
