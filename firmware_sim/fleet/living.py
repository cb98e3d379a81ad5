"""A device that is awake: its daemon, made from its record, and the SimPy process that lets it take its turns."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import simpy

from device_client.device import Device
from device_client.errors import StoreError
from firmware_sim.fleet.record import DeviceRecord, packed
from firmware_sim.fleet.surroundings import Ending, Surroundings
from firmware_sim.hand_over import HandOver
from firmware_sim.lasting_flash import LastingFlash

LONGEST_NAP_S = 3600.0
"""How long at most a resident daemon takes no turn."""
RECORDED_EVERY_S = 3600.0
"""How often what was recorded meanwhile is stored on a device that is awake; one that wakes up has it at once."""
_SHORTEST_NAP_S = 1e-3
_WORTH_AN_EVENT_S = 0.01
"""Writing that takes less is added to the next: a flash of 50 MB/s takes a pageful in a tenth of a millisecond."""


class FleetBell:
    """`device_client.ports.Bell` of a device whose process waits in virtual time.

    Args:
        environment: of the shard.
    """

    def __init__(self, environment: simpy.Environment) -> None:
        self._environment = environment
        self._rung: simpy.Event | None = None
        self._is_rung = False
        self.wants_to_wait = False

    def ring(self) -> None:
        """End the wait; a ring before it counts."""
        self._is_rung = True
        if self._rung is not None and not self._rung.triggered:
            self._rung.succeed()

    def wait(self, timeout_s: float) -> None:
        """Note that the daemon has nothing to do; the process that lets it take its turns does the waiting."""
        del timeout_s
        self.wants_to_wait = True

    def until(self, time_s: float) -> Generator[simpy.Event, Any, None]:
        """Let virtual time pass until a ring, at most until `time_s` of the shard's time."""
        self.wants_to_wait = False
        if not self._is_rung:
            self._rung = self._environment.event()
            wait_s = max(_SHORTEST_NAP_S, time_s - self._environment.now)
            yield self._rung | self._environment.timeout(wait_s)
            self._rung = None
        self._is_rung = False


@dataclass
class Living:
    """One device that is awake.

    Args:
        record: what it was made from, and is put back into.
        device: the daemon.
        flash, counter: what it writes to.
        bell: what it waits on.
        take_compute_s: how long what it has computed since the last call takes.
        surroundings: what it is in.
        record_until: stores what its wearer has recorded until a time, seconds of the shard's time.
        count_awake: told of every turn.
        hand_over: what the device hands over in memory.
    """

    record: DeviceRecord
    device: Device
    flash: LastingFlash
    counter: LastingFlash
    bell: FleetBell
    take_compute_s: Callable[[], float]
    surroundings: Surroundings
    record_until: Callable[[float], None]
    count_awake: Callable[[], None]
    hand_over: HandOver
    turns: int = 0
    _written_pages: int = field(default=0, init=False)
    _writing_s: float = field(default=0.0, init=False)

    def life(self, environment: simpy.Environment) -> Generator[simpy.Event, Any, Ending]:
        """Take turns until something ends the daemon; each takes as long as what it computes."""
        recorded_s = -math.inf
        while True:
            if environment.now >= recorded_s + RECORDED_EVERY_S:
                recorded_s = environment.now
                self.record_until(environment.now)
            self.device.step()
            self.turns += 1
            self.count_awake()
            self.hand_over.forget_all_but(self.device.outbox)
            compute_s = self.take_compute_s()
            self.record.compute_s += compute_s
            if busy_s := compute_s + self._take_writing_s():
                yield environment.timeout(busy_s)
            self.surroundings.settle()
            ending = self.surroundings.ending(is_done=self.is_done, has_heard=self.has_heard)
            if ending is not None:
                return ending
            # A turn after which nothing is left to do is followed by one that finds that out, and then waits.
            if self.bell.wants_to_wait or all(runner.work is None for runner in self.device.studies.running):
                quiet_s = self._quiet_until_s(environment.now)
                if quiet_s > environment.now:
                    yield from self.bell.until(quiet_s)

    def _take_writing_s(self) -> float:
        """How long what was written to flash since the last call takes, once that is worth an event."""
        pages = self.flash.page_writes + self.counter.page_writes
        self._writing_s += self.surroundings.write_s(pages - self._written_pages)
        self._written_pages = pages
        if self._writing_s < _WORTH_AN_EVENT_S:
            return 0.0
        writing_s, self._writing_s = self._writing_s, 0.0
        return writing_s

    def is_done(self) -> bool:
        """Whether nothing is left to do but to wait for another round."""
        runners = self.device.studies.running
        return all(
            runner.work is None and runner.session.is_settled and not runner.session.wants_to_train
            for runner in runners
        )

    def has_heard(self) -> bool:
        """Whether every study has told what there is to do."""
        return all(runner.session.has_heard for runner in self.device.studies.running)

    def sleep(self) -> None:
        """End the daemon, and put everything into the record."""
        with contextlib.suppress(StoreError):  # a flash that takes nothing keeps what it had
            self.device.close()
        self.abandon()

    def abandon(self) -> None:
        """Put into the record what a daemon leaves that is killed."""
        for runner in self.device.studies.running:
            runner.transport.close()
        self.record.flash, self.record.counter = packed(self.flash.image()), packed(self.counter.image())
        self.record.page_writes += self.flash.page_writes + self.counter.page_writes
        self.record.spent_epsilon = self.device.ledger.spent_epsilon

    def _quiet_until_s(self, now_s: float) -> float:
        """Until when every turn would do nothing, seconds of the shard's time."""
        quiet_s = self.device.daemon.quiet_until_s()
        if quiet_s < math.inf:
            quiet_s = self.surroundings.shard_s(quiet_s)
        return min(quiet_s, self.surroundings.next_change_s(), now_s + LONGEST_NAP_S)
