"""The ledger on a disk that loses its power at any moment, or whose process is killed: no charge is lost, no alarm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

import msgspec
import pytest

from device_client.adapters.counter_file import CounterFile
from device_client.errors import LedgerError, StoreError
from device_client.ledger import Budget, Counter, LogStore, PrivacyLedger
from device_client.ledger.chain import CountedLog, read_log
from device_client.ledger.lines import digest_of
from firmware_sim.virtual_flash import PowerCut, PowerCutError, VirtualFlash
from tests.device_client.ledger_ports import TASK, DiskLog, Open, reserve

KEY = b"\x11" * 32
BUDGET = Budget(50.0, 1e-5)


def chance(seed: int) -> Random:
    """A simulation's, which repeats itself."""
    return Random(seed)  # noqa: S311


@dataclass(frozen=True)
class Parts:
    """What a ledger is built of on a disk."""

    ledger: Open = PrivacyLedger
    log: Callable[[VirtualFlash], LogStore] = DiskLog
    counter: Callable[[VirtualFlash], Counter] = lambda disk: CounterFile(disk, "counter", KEY)

    def open(self, disk: VirtualFlash) -> PrivacyLedger:
        disk.make_folder("ledger")
        disk.sync_folder()
        return self.ledger(self.log(disk), self.counter(disk), BUDGET)


class UnsyncedLog(DiskLog):
    """Broken: the line may still be in memory when it is trained for."""

    def append_log(self, name: str, line: bytes) -> None:
        self.disk.append(f"ledger/{name}", line + b"\n")


class UnsyncedCounter(CounterFile):
    """Broken: the counter may still be in memory, and fall back by more than a line."""

    def __init__(self, disk: VirtualFlash) -> None:
        super().__init__(disk, "counter", KEY)
        self.unsynced = disk

    def _overwrite(self, number: int, data: bytes) -> int:
        self.unsynced.write_at("counter", (number % 2) * 4096, self._seal(number, data))
        return number


class OneSlotCounter(CounterFile):
    """Broken: overwrites the only copy."""

    def __init__(self, disk: VirtualFlash) -> None:
        super().__init__(disk, "counter", KEY)

    def _overwrite(self, number: int, data: bytes) -> int:
        del number
        super()._overwrite(2, data)
        return 0


class CounterFirstLedger(PrivacyLedger):
    """Broken: counts a line before it is in the log."""

    def __init__(self, store: LogStore, counter: Counter, budget: Budget) -> None:
        super().__init__(store, counter, budget)
        self._log = CounterFirstLog(store, counter, read_log(store, counter))


class CounterFirstLog(CountedLog):
    """See `CounterFirstLedger`."""

    def _append(self, line: object) -> None:
        lines, head = self.lines, self.head
        data = msgspec.json.encode(line)
        self.lines, self.head = [*lines, line], digest_of(data)  # type: ignore[list-item]
        self.count()
        self.lines, self.head = lines, head
        super()._append(line)  # type: ignore[arg-type]


def live(parts: Parts, disk: VirtualFlash, released: list[int]) -> None:
    """A device that trains three rounds; each is released when its charge returns."""
    ledger = parts.open(disk)
    for _ in range(3):
        number = ledger.last_round(TASK) + 1
        reserve(ledger, number)
        released.append(number)


def survive(parts: Parts, *, at: int, moment: Literal["before", "during", "after"], seed: int) -> bool:
    """Whether the device's life was cut at that operation; a device that lives on has charged all it released."""
    released: list[int] = []
    disk = VirtualFlash(random=chance(seed))
    live(parts, disk, released)
    disk.power_cut = PowerCut(disk.operations + at, moment)
    try:
        live(parts, disk, released)
    except PowerCutError:
        pass
    else:
        return False
    after = disk.after_power_cut(chance(seed))
    ledger = parts.open(after)  # raises LedgerError if a mere power cut looks like tampering
    charged = [entry.round for entry in ledger.reservations]
    assert charged[: len(released)] == released
    assert len(charged) <= len(released) + 1
    live(parts, after, released)
    assert len(parts.open(after).reservations) == len(charged) + 3
    return True


def check_power_cuts(parts: Parts) -> int:
    """Every boundary of three rounds on a ledger that has some, and on a fresh one."""
    cuts = 0
    for seed in range(12):
        for moment in ("before", "during", "after"):
            at = 0
            while survive(parts, at=at, moment=moment, seed=seed):
                at += 1
            cuts += at
    return cuts


def test_a_power_cut_at_any_moment_loses_no_charge_and_never_looks_like_tampering() -> None:
    assert check_power_cuts(Parts()) > 400


@pytest.mark.parametrize("moment", ["before", "during", "after"])
@pytest.mark.parametrize("at", range(14))
def test_a_power_cut_in_the_first_reservation_leaves_a_ledger_that_works(
    moment: Literal["before", "during", "after"], at: int
) -> None:
    for seed in range(8):
        disk = VirtualFlash(random=chance(seed), power_cut=PowerCut(at, moment))
        released: list[int] = []
        with pytest.raises(PowerCutError):
            live(Parts(), disk, released)
        after = disk.after_power_cut(chance(seed))
        assert [entry.round for entry in Parts().open(after).reservations][: len(released)] == released
        live(Parts(), after, released)


class KilledError(BaseException):
    """The process ends; the system and what it has in memory live on."""


class Killing:
    """A disk whose process is killed before its n-th change; the disk itself does not hear of it."""

    def __init__(self, disk: VirtualFlash, at: int) -> None:
        self._disk, self._left = disk, at

    def __getattr__(self, name: str) -> Callable[..., object]:
        if name in ("append", "write", "write_at", "truncate", "sync", "rename", "sync_folder", "remove"):
            self._left -= 1
            if self._left < 0:
                raise KilledError
        result: Callable[..., object] = getattr(self._disk, name)
        return result


class ForgetfulCounter(CounterFile):
    """Broken: it takes what a killed process left in the system's memory for durable."""

    def __init__(self, disk: VirtualFlash) -> None:
        super().__init__(disk, "counter", KEY)
        self._is_durable = True


class ForgetfulLog(DiskLog):
    """Broken in the same way."""

    def __init__(self, disk: VirtualFlash) -> None:
        self.disk = disk


def check_killed_processes(parts: Parts) -> None:
    """A process is killed at any change, the next one loses its power at any of its own."""
    for killed_at in range(12):
        for cut_at in range(12):
            for seed in range(6):
                disk = VirtualFlash(random=chance(seed))
                released: list[int] = []
                live(parts, disk, released)
                with pytest.raises(KilledError):
                    live(parts, Killing(disk, killed_at), released)  # type: ignore[arg-type]
                disk.power_cut = PowerCut(disk.operations + cut_at, "during")
                with pytest.raises(PowerCutError):
                    live(parts, disk, released)
                charged = [entry.round for entry in parts.open(disk.after_power_cut(chance(seed))).reservations]
                assert set(released) <= set(charged)


def test_a_killed_process_and_then_a_power_cut_lose_no_charge_and_never_look_like_tampering() -> None:
    check_killed_processes(Parts())


@pytest.mark.parametrize("broken", [Parts(counter=ForgetfulCounter), Parts(log=ForgetfulLog)], ids=["counter", "log"])
def test_parts_that_take_a_killed_processs_memory_for_durable_are_caught(broken: Parts) -> None:
    with pytest.raises((AssertionError, LedgerError)):
        check_killed_processes(broken)


@pytest.mark.parametrize(
    "broken",
    [
        Parts(log=UnsyncedLog),
        Parts(counter=UnsyncedCounter),
        Parts(counter=OneSlotCounter),
        Parts(ledger=CounterFirstLedger),
    ],
    ids=["log not synced", "counter not synced", "counter in one slot", "counter before log"],
)
def test_parts_that_a_power_cut_breaks_are_caught(broken: Parts) -> None:
    with pytest.raises((AssertionError, LedgerError)):
        check_power_cuts(broken)


def test_a_full_and_a_read_only_disk_charge_nothing_that_is_released() -> None:
    disk = VirtualFlash()
    released: list[int] = []
    live(Parts(), disk, released)
    ledger = Parts().open(disk)
    disk.read_only = True
    with pytest.raises(StoreError):
        reserve(ledger, 4)
    disk.read_only, disk.capacity_bytes = False, 8192 + len(disk.read("ledger/ledger.jsonl") or b"") + 100
    with pytest.raises(StoreError):
        reserve(ledger, 4)
    assert [entry.round for entry in Parts().open(disk).reservations] == [1, 2, 3]
    disk.capacity_bytes = None
    reserve(ledger, 4)
    assert [entry.round for entry in Parts().open(disk).reservations] == [1, 2, 3, 4]
