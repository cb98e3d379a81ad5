"""Checks of the machine: its clock, memory, random numbers, and whether secrets in memory can reach a disk.

Sources: proc_meminfo(5), proc_swaps(5), proc_pid_limits(5), core(5), getrandom(2), the kernel's documentation of
zram (``backing_dev``) and cgroup v2 (``memory.swap.max``), systemd-timesyncd.service(8) and timedatectl(1).
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from device_client.checks.findings import Result, ok, problem, size_text, warning
from device_client.ledger.times import CLOCK_TOLERANCE_S
from device_client.pseudonyms import date_text

TIMEDATECTL_TIMEOUT_S = 3.0
_YEAR_S = 365.25 * 86_400.0
_LONGEST_LIFE_S = 10 * _YEAR_S


def check_clock(now_s: float, *, seen: Mapping[str, float], synchronised: bool | None, has_own_clock: bool) -> Result:
    """Whether the clock can be right.

    Args:
        now_s: what it says, Unix seconds.
        seen: times that were past when they were noted, by what noted them.
        synchronised: whether the system sets it from the network; None where nothing tells.
        has_own_clock: whether it goes on while the power is off.
    """
    says = f"the clock says {date_text(now_s)}"
    wrong = "set it: sudo timedatectl set-ntp true, with a network that lets NTP through"
    for what, at_s in seen.items():
        if now_s < at_s - CLOCK_TOLERANCE_S:
            return problem(f"{says}, but {what} is of {date_text(at_s)}, which is later", wrong)
    if seen and now_s > max(seen.values()) + _LONGEST_LIFE_S:
        latest = date_text(max(seen.values()))
        return problem(f"{says}, more than ten years after anything else here ({latest})", wrong)
    battery = "" if has_own_clock else "; this machine has no clock that goes on while it is off"
    if synchronised is False:
        return warning(f"{says}, and nothing has set it from the network since the start{battery}", wrong)
    known = "set from the network" if synchronised else "whether the network sets it cannot be told"
    return ok(f"{says}, {known}{battery}")


def clock_is_synchronised(marker: Path = Path("/run/systemd/timesync/synchronized")) -> bool | None:
    """Whether the system has set its clock from the network since it started; None where nothing tells."""
    if marker.exists():
        return True
    program = shutil.which("timedatectl")
    if program is None:
        return None
    command = [program, "show", "--property=NTPSynchronized", "--value"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEDATECTL_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return {b"yes": True, b"no": False}.get(done.stdout.strip())


def check_entropy(draw: Callable[[int, int], bytes] = os.getrandom) -> Result:
    """Whether the kernel's generator has been seeded; `draw` is getrandom(2)."""
    try:
        draw(32, os.GRND_NONBLOCK)
    except BlockingIOError:
        return problem(
            "the system has not gathered enough randomness yet to make keys and noise",
            "wait a minute, then look again; if it stays so, enable the hardware generator (/dev/hwrng)",
        )
    return ok("the system's random generator is seeded")


def check_memory(available_bytes: int, *, program_bytes: int, records_bytes: int, daemon_bytes: int = 0) -> Result:
    """Whether training fits into memory.

    Args:
        available_bytes: what the kernel says can be had without swapping.
        program_bytes: the program with its model, as it took here.
        records_bytes: all recordings that may be kept.
        daemon_bytes: what a running daemon has already.
    """
    needed = program_bytes + records_bytes
    text = (
        f"{size_text(available_bytes)} available; about {size_text(needed)} needed: {size_text(program_bytes)} for "
        f"program and model, {size_text(records_bytes)} when all recordings are there that may be kept"
    )
    if available_bytes + daemon_bytes >= needed:
        return ok(text)
    return warning(text, "lower records.maximum_count, or end other programs")


def available_memory_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """MemAvailable. Raises OSError, also when there is no such line."""
    return _kilobytes(meminfo, "MemAvailable:")


def resident_bytes(process: Path) -> int:
    """VmRSS of a process (``/proc/PID``). Raises OSError."""
    return _kilobytes(process / "status", "VmRSS:")


def check_swap(
    swaps: Path = Path("/proc/swaps"), *, blocks: Path = Path("/sys/block"), swap_limit: Path | None = None
) -> Result:
    """Whether memory with keys and recordings can be written to a disk in clear.

    Args:
        swaps: the kernel's list.
        blocks: where the kernel shows block devices.
        swap_limit: ``memory.swap.max`` of the running daemon's control group, if it has one.
    """
    used = [line.split()[0] for line in swaps.read_text().splitlines()[1:] if line.strip()]
    if not used:
        return ok("there is no swap")
    if swap_limit is not None and _text(swap_limit) == "0":
        return ok("the daemon may not be swapped out")
    clear = [name for name in used if not _stays_secret(name, blocks)]
    if not clear:
        return ok(f"swap stays in memory or is encrypted: {', '.join(used)}")
    return warning(
        f"the store key and recordings in memory may be written in clear to the swap {', '.join(clear)}",
        "encrypt it, switch it off (sudo swapoff -a), or let the unit's MemorySwapMax=0 work: docs/raspberry-pi.md",
    )


def check_core_dumps(core_limit: str) -> Result:
    """Whether a crash would write keys and recordings to a disk; `core_limit` is the soft limit, ``0`` for none."""
    if core_limit == "0":
        return ok("a crash leaves no core file")
    return warning(
        f"a crash may leave a core file ({core_limit} bytes) with the store key and recordings",
        "run it from the unit, which has LimitCORE=0, or after ulimit -c 0",
    )


def core_limit_of(process: Path | None) -> str:
    """The soft limit on core files of a process (``/proc/PID``), of this one for None. Raises OSError."""
    if process is None:
        soft, _ = resource.getrlimit(resource.RLIMIT_CORE)
        return "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
    for line in (process / "limits").read_text().splitlines():
        if line.startswith("Max core file size"):
            return line.removeprefix("Max core file size").split()[0]
    raise OSError(f"{process / 'limits'} does not tell the limit on core files")


def swap_limit_of(process: Path, cgroups: Path = Path("/sys/fs/cgroup")) -> Path | None:
    """``memory.swap.max`` of a process's control group (cgroup v2), if the memory controller is on."""
    lines = (_text(process / "cgroup") or "").splitlines()
    group = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), None)
    if group is None:
        return None
    found = cgroups / group.lstrip("/") / "memory.swap.max"
    return found if found.exists() else None


def _stays_secret(name: str, blocks: Path) -> bool:
    """Whether a swap is compressed memory that is never written out, or encrypted."""
    block = blocks / Path(name).name
    if block.name.startswith("zram"):
        return (_text(block / "backing_dev") or "none") == "none"
    return (_text(block / "dm" / "uuid") or "").startswith("CRYPT-")


def _kilobytes(path: Path, field: str) -> int:
    """A line such as ``MemAvailable:  123 kB``, in bytes. Raises OSError."""
    for line in path.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"{path} has no line {field}")


def _text(path: Path) -> str | None:
    """A file's text, None where it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return None
