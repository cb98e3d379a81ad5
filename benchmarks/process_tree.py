"""Memory and processor time of a process and everything it started, as Linux counts them in /proc.

Three measures of memory, since processes share pages. RSS counts a shared page in each process. PSS divides it by the
number of processes that have it (proc_pid_smaps(5)), so a tree's sum counts it once at most. The high-water mark is the
kernel's own, so it misses no peak between two looks; RSS and PSS peaks are those of the looks, ten a second.

Processor time is that of the living plus what they collected from children that ended (``cutime``, ``cstime`` of
proc_pid_stat(5)), so a process that lived between two looks is counted. A process whose parent never waits for it is
not; neither of the programs measured here leaves one.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

PROC = Path("/proc")
LOOK_EVERY_S = 0.1
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Stat:
    """What one line of /proc/PID/stat says that is used here; `cpu_s` includes children it waited for."""

    parent: int
    cpu_s: float


@dataclass(frozen=True)
class Memory:
    """Resident memory in MB of 2^20 bytes: now, at its highest, and with shared pages divided among their users."""

    rss_mb: float = 0.0
    high_water_mb: float = 0.0
    pss_mb: float = 0.0

    def __add__(self, other: Memory) -> Memory:
        return Memory(self.rss_mb + other.rss_mb, self.high_water_mb + other.high_water_mb, self.pss_mb + other.pss_mb)

    def highest(self, other: Memory) -> Memory:
        """The larger of each measure."""
        return Memory(
            max(self.rss_mb, other.rss_mb),
            max(self.high_water_mb, other.high_water_mb),
            max(self.pss_mb, other.pss_mb),
        )


def parse_stat(line: str) -> Stat:
    """Read a line of /proc/PID/stat; the name in it may hold spaces and brackets."""
    fields = line[line.rindex(")") + 2 :].split()
    return Stat(parent=int(fields[1]), cpu_s=sum(map(int, fields[11:15])) / _TICKS_PER_S)


def family(root: int, parents: Mapping[int, int]) -> list[int]:
    """`root` and all that descend from it, given each process's parent."""
    members = [root]
    for member in members:
        members += [process for process, parent in parents.items() if parent == member]
    return members


def processes(root: int) -> dict[int, Stat]:
    """The living processes of a tree."""
    stats = {}
    for entry in PROC.iterdir():
        if entry.name.isdecimal() and (line := _read(entry / "stat")):
            stats[int(entry.name)] = parse_stat(line)
    parents = {process: stat.parent for process, stat in stats.items()}
    return {process: stats[process] for process in family(root, parents) if process in stats}


def cpu_s(root: int) -> float:
    """Processor seconds that a tree has used, in user and kernel mode."""
    return sum(stat.cpu_s for stat in processes(root).values())


def memory(root: int) -> Memory:
    """What a tree has now: the sum over its processes."""
    return sum((_memory_of(process) for process in processes(root)), Memory())


def kilobytes(text: str, key: str) -> int:
    """A value of /proc/PID/status or smaps_rollup; 0 where the process has ended and the kernel says nothing."""
    lines = (line.split() for line in text.splitlines() if line.startswith(f"{key}:"))
    return next((int(fields[1]) for fields in lines), 0)


class MemoryWatch:
    """Looks at a tree ten times a second, as a context manager."""

    def __init__(self, root: int, *, every_s: float = LOOK_EVERY_S) -> None:
        self._root, self._every_s = root, every_s
        self._looks: list[Memory] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def peak(self) -> Memory:
        """The highest of each measure's sum over the tree, at any look."""
        return peak(self._looks)

    def _run(self) -> None:
        while True:
            self._looks.append(memory(self._root))
            if self._stop.wait(self._every_s):
                self._looks.append(memory(self._root))
                return


def peak(looks: Iterable[Memory]) -> Memory:
    """The highest of each measure."""
    highest = Memory()
    for look in looks:
        highest = highest.highest(look)
    return highest


@dataclass(frozen=True)
class CpuMeter:
    """Processor time of a tree since the meter was made."""

    root: int
    at_s: float
    before_s: float

    @classmethod
    def start(cls, root: int) -> CpuMeter:
        """Begin now."""
        return cls(root, time.monotonic(), cpu_s(root))

    def used_s(self) -> float:
        """Processor seconds since."""
        return cpu_s(self.root) - self.before_s


def _memory_of(process: int) -> Memory:
    """One process's; nothing where it has just ended."""
    status, rollup = _read(PROC / str(process) / "status"), _read(PROC / str(process) / "smaps_rollup")
    return Memory(kilobytes(status, "VmRSS") / 1024, kilobytes(status, "VmHWM") / 1024, kilobytes(rollup, "Pss") / 1024)


def _read(path: Path) -> str:
    """A file of /proc, or nothing: processes end between listing and reading."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
