"""Surroundings of virtual hardware: a profile's board with its wearer, radio, clock and flash, and what befalls it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import simpy

from device_client.eligibility import BATTERY_MARGIN_PERCENT, TEMPERATURE_MARGIN_CELSIUS
from firmware_sim.board.board_state import BoardState
from firmware_sim.board.virtual_board import VirtualBoard, first_state, sensor_offset_celsius
from firmware_sim.clock.real_time_clock import ClockModel, RealTimeClock
from firmware_sim.faults.kinds import Crash, Hang, Packets, RebootLoop, SlowLoris
from firmware_sim.faults.packets import FaultyTransport
from firmware_sim.faults.plan import Strike
from firmware_sim.faults.trickling_edge import TricklingEdge
from firmware_sim.firmware.watchdog import hang_end
from firmware_sim.fleet.device_firmware import DeviceFirmware
from firmware_sim.fleet.edge import ShardEdge
from firmware_sim.fleet.flash_fate import FlashFate, is_for_good
from firmware_sim.fleet.hardware_terms import HardwareTerms, job_starts
from firmware_sim.fleet.links import FleetRadio
from firmware_sim.fleet.record import DeviceRecord, Energy
from firmware_sim.fleet.surroundings import Ending, FleetClock
from firmware_sim.labelled_chance import key_of, uniform
from firmware_sim.lasting_flash import LastingFlash
from firmware_sim.profiles.hardware_profile import HardwareProfile, link_model
from firmware_sim.radio.radio import Radio
from firmware_sim.radio.transport import RadioUse
from firmware_sim.virtual_flash import PAGE_BYTES
from firmware_sim.wearer.situation import Wearing
from fl_protocol.errors import GraphError
from fl_protocol.transport import Transport

HEARD_WITHIN_S = 5.0
"""How long a job that has nothing to do waits for the study's manifest before it ends; with the manifest it ends at
once."""
BOOT_S = 20.0
"""From a reset until the daemon runs again."""
_SHORTEST_S = 1e-3


@dataclass
class HardwareSurroundings:
    """`firmware_sim.fleet.surroundings.Surroundings` of one device; see the module docstring.

    Args:
        record: the device's.
        environment: of its shard.
        profile: of its hardware.
        wearer: who carries it.
        terms: of the fleet.
    """

    record: DeviceRecord
    environment: simpy.Environment
    profile: HardwareProfile
    wearer: Wearing
    terms: HardwareTerms
    clock: RealTimeClock = field(init=False)
    board: VirtualBoard = field(init=False)

    def __post_init__(self) -> None:
        record, terms, profile = self.record, self.terms, self.profile
        self._true = FleetClock(self.environment, terms.began_s, utc_offset_s=self.wearer.utc_offset_s)
        self._started_s = self._settled_s = float(self.environment.now)
        self._schedule = terms.faults.faults_of(record.name, record.profile)
        offset = sensor_offset_celsius(profile, seed=terms.seed, index=record.index)
        self.board = VirtualBoard(
            profile, self.wearer, clock=self._true, state=self._board_state(), sensor_offset_celsius=offset
        )
        self.clock = self._make_clock()
        self._connections: list[tuple[FleetRadio, RadioUse]] = []
        rules = terms.eligibility
        floor, ceiling = rules.minimum_battery_percent, rules.maximum_temperature_celsius
        self._percents = (floor, floor + BATTERY_MARGIN_PERCENT)
        self._celsius = (ceiling, ceiling - TEMPERATURE_MARGIN_CELSIUS) if ceiling < math.inf else ()
        self._looked_s = self._started_s + HEARD_WITHIN_S
        self._job_starts = job_starts(record, profile, self.wearer, terms)
        self._firmware: DeviceFirmware | None = None
        self._energy_factor = 1.0
        self._flash_fate = self._fate_of(LastingFlash())

    def prepare(self, flash: LastingFlash) -> None:
        """Worn, damaged by what struck while it slept, full or read-only while that lasts."""
        self._flash_fate = self._fate_of(flash)
        now_s = self._true.now_s()
        self._flash_fate.damage(self._schedule.strikes(self.record.struck_until_s, now_s))
        self._flash_fate.tend(now_s)
        self.record.struck_until_s = now_s
        if self.terms.firmware is not None:
            self._firmware = DeviceFirmware(
                self.terms.firmware,
                self.record,
                now_s=self._started_s,
                watchdog_timeout_s=self.profile.watchdog_timeout_s,
            )
            self._energy_factor = self._firmware.energy_factor
        self._start_up()

    def connect(self, edge: ShardEdge, wake: Callable[[], None]) -> Transport:
        """Its radio, behind what befalls its network."""
        record, terms, schedule = self.record, self.terms, self._schedule
        links = {"home": link_model(self.profile.home), "away": link_model(self.profile.away)}
        on_mains = self.profile.battery is None
        radio = Radio(
            links,
            place=(lambda _time_s: "home") if on_mains else (lambda time_s: self.wearer.situation(time_s).place),
            next_place_change_s=(lambda _time_s: math.inf) if on_mains else self.wearer.next_move_s,
            outages=schedule.outages(),
            seed=f"{terms.seed} {record.lives}",
            device=record.name,
        )
        trickles, prefix = schedule.has(SlowLoris), f"fl/v1/{terms.tenant}/up/"
        transport: FleetRadio = FleetRadio(
            radio,
            TricklingEdge(edge, gap_s=schedule.upload_gap_s, upload_prefix=prefix) if trickles else edge,
            now_s=self._true.now_s,
            record=record,
            due=lambda at_s: self._wake_at(at_s, transport, wake),
        )
        self._connections.append((transport, RadioUse()))
        if not schedule.has(Packets):
            return transport
        return FaultyTransport(
            transport,
            down=lambda: schedule.packet_rates(self._true.now_s(), up=False),
            up=lambda: schedule.packet_rates(self._true.now_s(), up=True),
            key=key_of(terms.seed, "packets", record.name, str(record.lives)),
        )

    def compute_s(self, flop: float) -> float:
        """By the profile's speed at the present temperature; it drains and warms the board."""
        self.board.advance(self._true.now_s())
        seconds = self.board.compute_s(flop)
        if self.board.is_on:
            self.board.spend(flop * self.profile.processor.joule_per_flop * self._energy_factor, seconds, "compute")
        return seconds

    def write_s(self, pages: int) -> float:
        """By the profile's sustained speed."""
        return pages * PAGE_BYTES / self.profile.flash.write_bytes_per_s

    def check_memory(self, num_bytes: int) -> None:
        """Raises GraphError: there is not so much."""
        if num_bytes > self.profile.memory_bytes:
            raise GraphError(
                f"training this model takes {num_bytes:,} bytes of memory, and this {self.profile.name} has "
                f"{self.profile.memory_bytes:,} for it; take a smaller model or batch"
            )

    def shard_s(self, device_s: float) -> float:
        """By how much its clock is wrong now."""
        true_s = self._true.now_s()
        return device_s - self.clock.error_at(true_s) - self.terms.began_s

    def settle(self) -> None:
        """Radio and being awake drain the board; the clock is set by a network; the flash fills or is free."""
        now_s = self._true.now_s()
        self._flash_fate.tend(now_s)
        self.board.advance(now_s)
        awake_s, self._settled_s = float(self.environment.now) - self._settled_s, float(self.environment.now)
        joules = self.profile.processor.awake_mw / 1000 * awake_s * self._energy_factor
        if self.board.is_on:
            self.board.spend(joules, awake_s, "base")
        for transport, told in self._connections:
            self._account_radio(transport, told)
            if transport.is_connected:
                self.clock.connected()

    def ending(self, *, is_done: Callable[[], bool], has_heard: Callable[[], bool]) -> Ending | None:
        """A brown-out, a strike, or the end of the job."""
        now_s = float(self.environment.now)
        if not self.board.is_on:
            return Ending("brown_out", is_clean=False)
        true_s = self._true.now_s()
        return (
            self._struck(now_s, true_s)
            or self._firmware_ending(now_s, true_s)
            or self._job_ending(now_s, is_done, has_heard)
        )

    def _struck(self, now_s: float, true_s: float) -> Ending | None:
        """The end by a fault."""
        struck = [one for one in self._schedule.strikes(self.record.struck_until_s, true_s + _SHORTEST_S) if _ends(one)]
        if struck:
            self.record.struck_until_s = true_s + _SHORTEST_S
            self._flash_fate.damage(struck)
            # Not "crash": that is what a daemon does by itself, and a finding.
            kind = str(struck[0].fault.__struct_config__.tag)
            return Ending("killed" if kind == "crash" else kind, is_clean=False)
        loops = self._schedule.active_strikes(RebootLoop, true_s)
        if any(now_s >= self._started_s + fault.reboots_every_s for fault, _ in loops):
            return Ending("reboot_loop", is_clean=False)
        return None

    def _firmware_ending(self, now_s: float, true_s: float) -> Ending | None:
        """The end by a reset of the whole device."""
        if self._firmware is None:
            return None
        found = self._firmware.reset(now_s, may_update=self._is_powered(true_s))
        return None if found is None else Ending(found[0], is_clean=False, detail=found[1])

    def _job_ending(self, now_s: float, is_done: Callable[[], bool], has_heard: Callable[[], bool]) -> Ending | None:
        """The end of a job, which says that it is done; one that runs firmware on trial stays for as long as it may."""
        starts = self._job_starts
        if starts is None:
            return None
        if now_s >= self._started_s + starts.job.longest_run_s or not starts.may_run(self._true.now_s()):
            return Ending("job_stopped", is_clean=True)
        is_over = is_done() and (now_s >= self._looked_s or has_heard())
        if is_over and not (self._firmware is not None and self._firmware.is_on_trial):
            return Ending("job_over", is_clean=True)
        if now_s >= self._looked_s:
            self._looked_s = now_s + HEARD_WITHIN_S
        return None

    def next_change_s(self) -> float:
        """The board's, the radio's, the next strike, or the end of the job."""
        began_s, true_s, now_s = self.terms.began_s, self._true.now_s(), float(self.environment.now)
        changes_s = [self.board.next_change_s(battery_percents=self._percents, celsius=self._celsius) - began_s]
        changes_s.append(self._schedule.next_s(true_s) - began_s)
        if self._firmware is not None:
            changes_s.append(self._firmware.next_change_s(now_s))
        changes_s += [
            self._started_s + fault.reboots_every_s for fault, _ in self._schedule.active_strikes(RebootLoop, true_s)
        ]
        if self._job_starts is not None:
            changes_s += [self._looked_s, self._started_s + self._job_starts.job.longest_run_s]
        heard_s = min((transport.next_event_s() - began_s for transport, _ in self._connections), default=math.inf)
        return min(max(now_s, heard_s), max(now_s + _SHORTEST_S, min(changes_s)))

    def next_start_s(self, ending: Ending) -> float:
        """When the system starts it: a job in its time, what was reset after its boot."""
        now_s, true_s = float(self.environment.now), self._true.now_s()
        if self._firmware is not None and ending.kind.startswith("firmware_"):
            return max(now_s, self._firmware.starts_s)
        self.record.boot_cause = ending.kind
        if ending.kind == "brown_out":
            return self._charged_s() + BOOT_S
        if ending.kind == "hang":
            return self._goes_on_s(now_s, true_s)
        starts, began_s = self._job_starts, self.terms.began_s
        if starts is None:
            return now_s + BOOT_S
        period_s = self.terms.job_period_s or starts.job.period_s
        earliest_s = self._started_s + period_s if ending.is_clean else now_s + BOOT_S
        return starts.next_s(began_s + max(now_s, earliest_s)) - began_s

    def _goes_on_s(self, now_s: float, true_s: float) -> float:
        """When a daemon that hangs goes on, seconds of the shard's time; a hang that ends by itself is no boot."""
        lasts_s = min((one.for_s for one in self._schedule.active(Hang, true_s + _SHORTEST_S)), default=math.inf)
        end = hang_end(now_s, watchdog_timeout_s=self.profile.watchdog_timeout_s, lasts_s=lasts_s)
        if not end.is_reset:
            self.record.boot_cause = ""
        return end.at_s + (BOOT_S if end.is_reset else 0.0)

    def start_without_store_s(self) -> float | None:
        """After a full or read-only flash is well again; never, if it is damaged for good or worn out."""
        began_s = self.terms.began_s
        well_s = self._flash_fate.well_again_s(began_s, self._true.now_s())
        return None if well_s is None else well_s - began_s + BOOT_S

    def leave(self) -> None:
        """Board, clock and energy last."""
        record = self.record
        self.settle()
        if self._firmware is not None:
            self._firmware.leave()
        state = self.board.state()
        record.board, record.clock = state, self.clock.state()
        percent = None
        if self.profile.battery is not None:
            used = state.compute_mwh + state.radio_mwh + state.base_mwh
            percent = 100 * used / self.profile.battery.capacity_mwh
        record.energy = Energy(
            compute_mwh=state.compute_mwh,
            radio_mwh=state.radio_mwh,
            base_mwh=state.base_mwh,
            battery_percent=percent,
        )

    def _is_powered(self, true_s: float) -> bool:
        """Whether it is on the mains or its charger: only then its system installs an update."""
        return self.profile.battery is None or self.wearer.situation(true_s).on_charger

    def _fate_of(self, flash: LastingFlash) -> FlashFate:
        """What befalls a flash of this device."""
        return FlashFate(self.profile.flash, self._schedule, flash, page_writes=self.record.page_writes)

    def _start_up(self) -> None:
        """What starting the daemon takes."""
        processor = self.profile.processor
        self.board.advance(self._true.now_s())
        if self.board.is_on:
            joules = processor.start_cpu_s * processor.flop_per_s * processor.joule_per_flop * self._energy_factor
            self.board.spend(joules, processor.start_cpu_s, "base")

    def _board_state(self) -> BoardState:
        """Where the board stands: as the last life left it, or at the run's beginning."""
        if self.record.board is not None:
            return self.record.board
        terms = self.terms
        return first_state(self.profile, self.wearer, time_s=terms.began_s, seed=terms.seed, index=self.record.index)

    def _make_clock(self) -> RealTimeClock:
        """Its clock, as the last life left it."""
        terms, profile, name = self.terms, self.profile, self.record.name
        drift = _deviation(key_of(terms.seed, "drift", name)) * profile.clock.drift_sd_ppm
        model = ClockModel(
            drift_ppm=drift,
            utc_offset_s=self.wearer.utc_offset_s,
            jumps_per_day=profile.clock.jumps_per_day,
            jump_s=3600.0,
        )
        clock = RealTimeClock(
            model,
            true_s=self._true.now_s,
            began_s=terms.began_s,
            jumps=self._schedule.clock_jumps(),
            seed=terms.seed,
            device=name,
        )
        if self.record.clock:
            clock.restore(self.record.clock)
        return clock

    def _account_radio(self, transport: FleetRadio, told: RadioUse) -> None:
        """What the radio took since it was asked last."""
        use, record = transport.use, self.record
        if self.board.is_on and use.joules > told.joules:
            self.board.spend((use.joules - told.joules) * self._energy_factor, 0.0, "radio")
        record.bytes_up += use.up_bytes - told.up_bytes
        record.bytes_down += use.down_bytes - told.down_bytes
        record.bytes_metered += use.metered_bytes - told.metered_bytes
        told.set_to(use)

    def _wake_at(self, at_s: float, transport: FleetRadio, wake: Callable[[], None]) -> None:
        """Ring when something is there, unless the device has found it by then."""
        if at_s == math.inf:
            return

        def ring(_event: simpy.Event) -> None:
            if transport.next_event_s() <= self._true.now_s():
                wake()

        delay_s = max(0.0, at_s - self._true.now_s())
        self.environment.timeout(delay_s).callbacks.append(ring)

    def _charged_s(self) -> float:
        """When an empty device is on again, seconds of the shard's time."""
        true_s = self._true.now_s()
        while not self.board.is_on and true_s < self.terms.ends_s:
            true_s = self.board.next_change_s()
            if true_s < math.inf:
                self.board.advance(true_s)
        return min(true_s, self.terms.ends_s) - self.terms.began_s


def _ends(strike: Strike) -> bool:
    """Whether a strike ends the daemon: a flash that is full or read-only does not, one that lost bytes resets it."""
    return isinstance(strike.fault, Crash | Hang) or is_for_good(strike.fault)


def _deviation(key: int) -> float:
    """A standard normal number of a key (Box and Muller 1958); for hardware, never for noise."""
    return math.sqrt(-2 * math.log(1 - uniform(key, 0))) * math.cos(2 * math.pi * uniform(key, 1))
