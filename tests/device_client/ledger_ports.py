"""What ledgers stand on in tests: a counter in memory, a log on a (virtual) disk; and how they are filled."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from device_client.errors import StoreError
from device_client.ledger import LOG_NAME, Budget, PrivacyLedger
from device_client.ledger.chain import Counter, LogStore
from fl_protocol.durable import Disk, append_durably
from fl_protocol.messages import TrainingPlanMsg
from tests.device_client.ports import TASK as TASK_NAME
from tests.device_client.ports import TENANT, MemoryStore, make_plan

TASK, OTHER = f"{TENANT}/{TASK_NAME}", "other/steps"
BUDGET = Budget(3.0, 1e-5)
DAY_S = 86_400.0
START_S = 1_800_000_000.0

Open = Callable[[LogStore, Counter, Budget], PrivacyLedger]


@dataclass
class MemoryCounter:
    """`device_client.ledger.Counter` in memory.

    Args:
        data: what it was advanced to.
        full: refuse, as a disk does that fails.
        advances: how often it was advanced.
    """

    data: bytes | None = None
    full: bool = False
    advances: int = 0

    def read(self) -> bytes | None:
        return self.data

    def advance(self, data: bytes) -> None:
        assert len(data) <= 128
        if self.full:
            raise StoreError("the counter cannot be written (Read-only file system)")
        self.data, self.advances = data, self.advances + 1

    def after_restart(self) -> MemoryCounter:
        return MemoryCounter(self.data)


class DiskLog:
    """`device_client.ledger.LogStore` on a disk, in a folder of its own."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        if disk.size(_path(LOG_NAME)) is not None:
            disk.sync(_path(LOG_NAME))
            disk.sync_folder("ledger")

    def read_log(self, name: str) -> bytes:
        return self.disk.read(_path(name)) or b""

    def append_log(self, name: str, line: bytes) -> None:
        with refusals():
            append_durably(self.disk, _path(name), line + b"\n")

    def truncate_log(self, name: str, length: int) -> None:
        with refusals():
            self.disk.truncate(_path(name), length)
            self.disk.sync(_path(name))


def _path(name: str) -> str:
    """Apart from the counter's folder, so that making one durable does nothing for the other."""
    return f"ledger/{name}"


@contextmanager
def refusals() -> Iterator[None]:
    """Disks raise OSError, stores StoreError."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"cannot be written ({error.strerror})") from error


def reserve(
    ledger: PrivacyLedger,
    round_number: int,
    *,
    task: str = TASK,
    plan: TrainingPlanMsg | None = None,
    now_s: float | None = None,
    latest_s: float = math.inf,
    earliest_s: float = -math.inf,
) -> float:
    return ledger.reserve(
        task=task,
        round_number=round_number,
        plan=plan if plan is not None else make_plan(),
        now_s=now_s if now_s is not None else START_S + round_number,
        latest_s=latest_s,
        earliest_s=earliest_s,
    )


def filled(rounds: int = 4) -> tuple[MemoryStore, MemoryCounter]:
    """A ledger's disks after some rounds."""
    store, counter = MemoryStore(), MemoryCounter()
    ledger = PrivacyLedger(store, counter, BUDGET)
    for number in range(1, rounds + 1):
        reserve(ledger, number)
    return store.after_restart(), counter.after_restart()


def opened(budget: Budget = BUDGET) -> PrivacyLedger:
    """A fresh ledger in memory."""
    return PrivacyLedger(MemoryStore(), MemoryCounter(), budget)
