"""What the privacy ledger's durability costs: a thousand reservations, beside the bare writes and fsyncs they need.

A reservation is a line appended to the log and synced, then a slot of the counter overwritten and synced, with the
device's own store and counter, a budget by periods and a share for the study. The bare primitive does the same writes
with the same sizes on open files, and nothing else. Each takes turns in a fresh folder; a figure is the median over
turns. Twice: with one plan throughout, as a study has it, and with another plan in every round, the worst case.

Opening is replaying the log of 10,000 reservations, the costs of its plans not known yet.

The folder must be on a real disk, not in memory: the kind of file system is printed.

    python -m benchmarks.ledger
    python -m benchmarks.ledger --json
    python -m benchmarks.ledger --folder /media/card
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.command import parser
from benchmarks.timing import Lengths, alternate, cpu_name, timed
from device_client.accounting import _step_rdp
from device_client.adapters.counter_file import CounterFile
from device_client.adapters.encrypted_files import EncryptedFiles
from device_client.ledger import LOG_NAME, Budget, PrivacyLedger
from device_client.ledger.lines import _rdp
from fl_protocol.adapters.files import SystemDisk
from fl_protocol.messages import TrainingPlanMsg

KEY = bytes(range(32))
TASK = "clinic/watch"
BUDGET = Budget(1e6, 1e-5, period_s=30 * 86_400.0, per_task={TASK: 9e5})
RESERVATIONS, LONG = 1_000, 10_000
SLOT_BYTES, SLOT_DISTANCE_BYTES = 166, 4096
Plans = Callable[[int], TrainingPlanMsg]


def main() -> None:
    """Measure, and print."""
    command = parser("ledger", __doc__)
    command.add_argument("--repeats", type=int, default=7, help="turns, at least 5 (default 7)")
    command.add_argument("--folder", type=Path, default=Path(), help="a folder on the disk to measure (default: this)")
    arguments = command.parse_args()
    if arguments.repeats < 5:
        command.error("--repeats: at least 5, or the median says little")
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix=".ledger-benchmark-") as folder:
        result = measure(Path(folder), repeats=arguments.repeats)
    if arguments.json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return
    for key, value in result.items():
        print(f"{key:<28}{value:.3f}" if isinstance(value, float) else f"{key:<28}{value}")


def measure(folder: Path, *, repeats: int) -> dict[str, Any]:
    """All figures."""
    line_bytes = one_line_bytes(folder)
    fill(folder / "long", repeated, LONG, synced=False)
    fill(folder / "long-distinct", distinct, LONG, synced=False)
    ms = alternate(
        {
            "bare": timed(lambda: bare(folder, line_bytes)),
            "ledger": timed(lambda: fresh(folder, repeated)),
            "distinct": timed(lambda: fresh(folder, distinct)),
            "open": timed(lambda: replay(folder / "long")),
            "open_distinct": timed(lambda: replay(folder / "long-distinct")),
        },
        Lengths(repeats, 1),
    )
    seconds = {name: statistics.median(times) / 1000 for name, times in ms.items()}
    return {
        "ledger_s_per_1000": seconds["ledger"],
        "ledger_s_per_1000_distinct_plans": seconds["distinct"],
        "bare_s_per_1000": seconds["bare"],
        "ledger_over_bare": seconds["ledger"] / seconds["bare"],
        "open_10000_s": seconds["open"],
        "open_10000_distinct_plans_s": seconds["open_distinct"],
        "worst_ledger_s_per_1000": max(ms["ledger"]) / 1000,
        "worst_bare_s_per_1000": max(ms["bare"]) / 1000,
        "line_bytes": line_bytes,
        "repeats": repeats,
        "file_system": file_system(folder),
        "cpu": cpu_name(),
    }


def repeated(number: int) -> TrainingPlanMsg:
    """One plan throughout."""
    del number
    return plan(noise_multiplier=2.0)


def distinct(number: int) -> TrainingPlanMsg:
    """A plan for each round."""
    return plan(noise_multiplier=2.0 + number / 1000)


def plan(*, noise_multiplier: float) -> TrainingPlanMsg:
    """Sampled steps, whose cost is the dearest to compute."""
    return TrainingPlanMsg(
        sampling_rate=0.1,
        local_steps=10,
        learning_rate=0.1,
        l2_norm_clip=1.0,
        noise_multiplier=noise_multiplier,
        expected_batch_size=20.0,
    )


def fresh(folder: Path, plans: Plans) -> None:
    """A ledger in a folder of its own, filled."""
    with tempfile.TemporaryDirectory(dir=folder) as here:
        fill(Path(here), plans, RESERVATIONS)


class _Unsynced(SystemDisk):
    """For filling what is only read afterwards."""

    def sync(self, name: str) -> None:
        """Nothing."""


def fill(folder: Path, plans: Plans, rounds: int, *, synced: bool = True) -> None:
    """Reserve as many rounds; the plans' costs are not known before."""
    forget_costs()
    store_folder = folder / "store"
    store_folder.mkdir(parents=True)
    disk = SystemDisk if synced else _Unsynced
    store = EncryptedFiles(disk(store_folder), KEY)
    ledger = PrivacyLedger(store, CounterFile(disk(folder), "counter", KEY), BUDGET)
    for number in range(1, rounds + 1):
        now_s = 1.8e9 + 3600.0 * number
        ledger.reserve(task=TASK, round_number=number, plan=plans(number), now_s=now_s, latest_s=now_s + 600)
    store.close()


def replay(folder: Path) -> None:
    """Open what `fill` left."""
    forget_costs()
    store = EncryptedFiles(SystemDisk(folder / "store"), KEY)
    ledger = PrivacyLedger(store, CounterFile(SystemDisk(folder), "counter", KEY), BUDGET)
    if len(ledger.reservations) != LONG:
        raise AssertionError(f"expected {LONG} reservations, got {len(ledger.reservations)}")
    store.close()


def forget_costs() -> None:
    """As a process that has just started."""
    _step_rdp.cache_clear()
    _rdp.cache_clear()


def bare(folder: Path, line_bytes: int) -> None:
    """The same writes and fsyncs on open files, and nothing else."""
    with tempfile.TemporaryDirectory(dir=folder) as here:
        log = os.open(Path(here) / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        counter = os.open(Path(here) / "counter", os.O_WRONLY | os.O_CREAT)
        try:
            os.pwrite(counter, bytes(2 * SLOT_DISTANCE_BYTES), 0)
            os.fsync(counter)
            line, slot = b"x" * line_bytes, b"y" * SLOT_BYTES
            for number in range(RESERVATIONS):
                os.write(log, line)
                os.fsync(log)
                os.pwrite(counter, slot, SLOT_DISTANCE_BYTES * (number % 2))
                os.fsync(counter)
        finally:
            os.close(log)
            os.close(counter)


def one_line_bytes(folder: Path) -> int:
    """How long a line of the log is."""
    with tempfile.TemporaryDirectory(dir=folder) as here:
        fill(Path(here), repeated, 100)
        return (Path(here) / "store" / LOG_NAME).stat().st_size // 100


def file_system(folder: Path) -> str:
    """The kind that a folder is on, as Linux names it."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return "unknown"
    parents = {str(parent) for parent in (folder.resolve(), *folder.resolve().parents)}
    on = [(len(where), kind) for where, kind in mounts if where in parents]
    return max(on, default=(0, "unknown"))[1]


if __name__ == "__main__":
    main()
