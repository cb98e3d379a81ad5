"""One kind of hardware as data; `firmware_sim.profiles.catalogue` reads the TOML files beside this module.

Units are in the names. A profile describes; `firmware_sim.board` computes with it. A device has one radio link at home
and one away. No I/O.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

from firmware_sim.errors import ProfileError
from firmware_sim.radio.links import DutyCycle, LinkModel
from firmware_sim.wearer.situation import Place

Above0 = Annotated[float, msgspec.Meta(gt=0)]
AtLeast0 = Annotated[float, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Celsius = Annotated[float, msgspec.Meta(ge=-60, le=150)]
Bytes = Annotated[int, msgspec.Meta(gt=0)]
LinkKind = Literal["wifi", "cellular", "ble_tether", "ethernet"]


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A table of a profile."""


class Battery(_Part, frozen=True):
    """A battery and its charger; a profile without one is on the mains.

    Args:
        capacity_mwh: full.
        self_discharge_percent_per_month: of the capacity, in 30 days.
        background_mw: what all but Covey draws, on average.
        charge_mw: into the cells while the current is constant.
        taper_fraction: of the capacity, above which the voltage is constant and the power falls off.
        restart_fraction: of the capacity, from which on an empty device starts again on its charger.
        winter_loss_fraction: of the capacity, that it does not give out of doors in winter.
    """

    capacity_mwh: Above0
    self_discharge_percent_per_month: Annotated[float, msgspec.Meta(ge=0, le=100)]
    background_mw: AtLeast0
    charge_mw: Above0
    taper_fraction: Annotated[float, msgspec.Meta(ge=0, lt=1)]
    restart_fraction: Annotated[float, msgspec.Meta(gt=0, lt=1)]
    winter_loss_fraction: Annotated[float, msgspec.Meta(ge=0, lt=1)]


class Thermal(_Part, frozen=True):
    """First-order thermal mass and throttling.

    Args:
        ambient_celsius: settles there on its charger when full, or on the mains.
        worn_celsius: settles there off its charger.
        charging_celsius: settles there while the charging current is constant.
        winter_drop_kelvin: how much lower it settles out of doors in winter.
        resistance_kelvin_per_watt: from the place of heat to the surroundings.
        time_constant_s: time in which it covers 63 % of the way.
        throttle_start_celsius, throttle_end_celsius: between them speed falls linearly from all to `throttle_factor`.
        sensor_offset_sd_celsius: spread of the sensor's error among devices.
    """

    ambient_celsius: Celsius
    worn_celsius: Celsius
    charging_celsius: Celsius
    winter_drop_kelvin: AtLeast0
    resistance_kelvin_per_watt: AtLeast0
    time_constant_s: Above0
    throttle_start_celsius: Celsius
    throttle_end_celsius: Celsius
    throttle_factor: Annotated[float, msgspec.Meta(gt=0, le=1)]
    sensor_offset_sd_celsius: AtLeast0

    def __post_init__(self) -> None:
        if not self.throttle_start_celsius < self.throttle_end_celsius:
            raise ValueError("throttle_start_celsius: expected less than throttle_end_celsius")


class Processor(_Part, frozen=True):
    """Speed and energy of training.

    Args:
        flop_per_s: sustained in training, cool.
        joule_per_flop: above `awake_mw`.
        awake_mw: what the device draws more because the daemon is awake, though it only waits.
        start_cpu_s: processor time of the daemon's start.
    """

    flop_per_s: Above0
    joule_per_flop: AtLeast0
    awake_mw: AtLeast0
    start_cpu_s: AtLeast0


class Flash(_Part, frozen=True):
    """Where the store lies.

    Args:
        capacity_bytes: that Covey may use; wear is spread over these.
        page_bytes: unit of writing.
        write_bytes_per_s: sustained.
        endurance_writes: of each page.
    """

    capacity_bytes: Bytes
    page_bytes: Bytes
    write_bytes_per_s: Above0
    endurance_writes: Above0


class RadioLink(_Part, frozen=True):
    """A way to the network.

    Args:
        kind: what it is.
        metered: whether it is paid by volume.
        up_bytes_per_s, down_bytes_per_s: of payload.
        latency_s, jitter_s: one way: mean, and standard deviation.
        loss: probability that a packet is lost once.
        up_joule_per_byte, down_joule_per_byte: marginal.
        wake_joule: of one wake-up, its tail included.
        duty: when it is there at all, as a phone that a watch is tethered to; always, if there is none.
    """

    kind: LinkKind
    metered: bool
    up_bytes_per_s: Above0
    down_bytes_per_s: Above0
    latency_s: AtLeast0
    jitter_s: AtLeast0
    loss: Annotated[float, msgspec.Meta(ge=0, lt=1)]
    up_joule_per_byte: AtLeast0
    down_joule_per_byte: AtLeast0
    wake_joule: AtLeast0
    duty: DutyCycle | None = None


@functools.lru_cache(maxsize=256)
def link_model(link: RadioLink) -> LinkModel:
    """A link as the radio simulates it; made once, for every connection asks for it."""
    return LinkModel(
        kind=link.kind,
        metered=link.metered,
        up_bytes_per_s=link.up_bytes_per_s,
        down_bytes_per_s=link.down_bytes_per_s,
        latency_s=link.latency_s,
        jitter_s=link.jitter_s,
        loss=link.loss,
        joules_per_byte_up=link.up_joule_per_byte,
        joules_per_byte_down=link.down_joule_per_byte,
        tail_joules=link.wake_joule,
        tail_s=1.0 if link.wake_joule else 0.0,
        duty=link.duty,
    )


class RealTimeClock(_Part, frozen=True):
    """Its error.

    Args:
        drift_sd_ppm: spread of the drift among devices.
        jumps_per_day: probability of a jump on a day (time lost with the power, a network that sets it).
    """

    drift_sd_ppm: AtLeast0
    jumps_per_day: Share


class Resident(_Part, frozen=True, tag="resident", tag_field="kind"):
    """The daemon stays in memory."""


class Job(_Part, frozen=True, tag="job", tag_field="kind"):
    """The system starts the daemon when it sees fit, and ends it.

    Args:
        period_s: at most once in it.
        charging, idle, unmetered: conditions that must hold.
        longest_run_s: after which it is stopped.
    """

    period_s: Above0
    charging: bool
    idle: bool
    unmetered: bool
    longest_run_s: Above0


class HardwareProfile(_Part, frozen=True):
    """A kind of device.

    Args:
        name: as in the file's name.
        title: for people.
        memory_bytes: that Covey may use; a model whose training needs more cannot be trained.
        watchdog_timeout_s: from a hang until the watchdog resets the device.
        home, away: radio links.
        battery: None on the mains.
    """

    name: str
    title: str
    memory_bytes: Bytes
    watchdog_timeout_s: Above0
    thermal: Thermal
    processor: Processor
    flash: Flash
    home: RadioLink
    away: RadioLink
    clock: RealTimeClock
    residency: Resident | Job
    battery: Battery | None = None

    def link(self, place: Place) -> RadioLink:
        """The radio link at a place."""
        return self.home if place == "home" else self.away


def read_profile(content: bytes, *, where: str) -> HardwareProfile:
    """Decode and check a profile.

    Args:
        content: TOML.
        where: its path, for the error.

    Raises:
        ProfileError: not TOML, or a key is wrong, missing or unknown; the text names it and the keys that there are.
    """
    try:
        return msgspec.toml.decode(content, type=HardwareProfile)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProfileError(f"profile {where}: {error}{_allowed(str(error))}") from error


_TABLES: Mapping[str, type[_Part]] = {
    "$": HardwareProfile,
    "$.battery": Battery,
    "$.thermal": Thermal,
    "$.processor": Processor,
    "$.flash": Flash,
    "$.home": RadioLink,
    "$.away": RadioLink,
    "$.clock": RealTimeClock,
    "$.residency": Job,
}


def _allowed(text: str) -> str:
    """The keys of the table in which an unknown or missing one was found."""
    if "field" not in text:
        return ""
    path = text.rpartition("at `")[2].rstrip("`") if "at `" in text else "$"
    table = _TABLES.get(path)
    return "" if table is None else f"; the keys of {path} are {', '.join(table.__struct_fields__)}"
