"""Every key of a scenario file, with its default (docs/scenarios.md says the same for readers)."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from device_client.config import EligibilityConfig
from firmware_sim.firmware.images import FirmwareImage, Rollout, Wave
from firmware_sim.firmware.life import FirmwareTerms
from firmware_sim.fleet_metrics import Fidelity
from firmware_sim.sensors.config import SensorsConfig
from firmware_sim.wearer.habits import Habits
from fl_protocol.messages import Name

AtLeastOne = Annotated[int, Meta(ge=1)]
Positive = Annotated[float, Meta(gt=0)]
AtLeastZero = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """A table of the file."""


class Privacy(Section, frozen=True, kw_only=True):
    """``[privacy]``: each wearer's budget at record level.

    Args:
        epsilon, delta: of a period.
        period_days: length of a period; without it there is one for ever.
        minimum_noise_multiplier, minimum_cohort: floors.
    """

    epsilon: Positive = 3.0
    delta: Annotated[float, Meta(gt=0, lt=1)] = 1e-5
    period_days: Annotated[float, Meta(ge=1)] | None = None
    minimum_noise_multiplier: AtLeastZero = 0.0
    minimum_cohort: AtLeastOne = 1


class Curve(Section, frozen=True, kw_only=True):
    """``[surrogate]``: accuracy after n updates in all, floor + (ceiling − floor)·(1 − exp(−n / updates)).

    The defaults are what ``covey-fleet calibrate`` fits to a run of the scenario ``calibration`` (2.6 points of error).

    Args:
        floor, ceiling: accuracy of the first model, and the one that training comes near to.
        updates: after so many, 63 % of the way is gone.
    """

    floor: Share = 0.34
    ceiling: Share = 0.69
    updates: Positive = 517.0


class Population(Section, frozen=True, kw_only=True):
    """``[population]``: which hardware the devices are.

    Args:
        profiles: weights by the profiles' names (``covey-fleet profiles`` lists them). Empty: every device is ideal: on
            the mains, on a network that never fails, and its computing takes no time.
        job_period_hours: how often at most systems start the daemon, instead of what the profiles say.
        network: ``away``: every device has its profile's network of away from home wherever it is, such as phones whose
            only network is cellular.
        own_profiles: a folder, relative to the file, with profiles of your own: ``NAME.toml`` as ``covey-fleet profiles
            smartwatch`` prints one, its ``name`` the file's. `profiles` may name them beside covey's.
        watchdog_timeout_s: from a hang until the watchdog resets the device, instead of what the profiles say.
        traces: a CSV of real devices' states (docs/simulation-hardware.md), relative to the file; devices take its
            traces in turn, and ``[wearers]`` says nothing then.
    """

    profiles: dict[str, Annotated[float, Meta(gt=0)]] = {}
    job_period_hours: Positive | None = None
    network: Literal["profile", "away"] = "profile"
    own_profiles: str | None = None
    watchdog_timeout_s: Positive | None = None
    traces: str | None = None


class RolloutTable(Section, frozen=True, kw_only=True):
    """``[rollout]``: an update of the devices' firmware, good or bad (docs/simulation-faults.md).

    Args:
        factory: version that devices have before.
        image: the update: ``version``, ``defect``, ``after_s``, ``energy_factor``.
        waves: ``{at_s, share}``: from then on so large a share of the fleet in all is offered it.
        spread_s: within a wave devices are offered it over so long a time.
        boot_s: from reset until an image is up.
        boot_limit: failed boots that an update gets before the other slot boots again.
        confirm_after_s: up for so long, it is trusted.
    """

    factory: Annotated[str, Meta(min_length=1, max_length=64)] = "1.0"
    image: FirmwareImage
    waves: Annotated[tuple[Wave, ...], Meta(min_length=1)]
    spread_s: AtLeastZero = 0.0
    boot_s: Positive = 20.0
    boot_limit: Annotated[int, Meta(ge=1, le=100)] = 3
    confirm_after_s: Positive = 300.0

    def __post_init__(self) -> None:
        if self.image.version == self.factory:
            raise ValueError(f"image.version: expected another version than factory, got {self.factory!r}")
        _ = self.rollout  # says what is wrong with the waves

    @property
    def rollout(self) -> Rollout:
        """As the devices are offered it."""
        return Rollout(image=self.image, waves=self.waves, spread_s=self.spread_s)

    @property
    def terms(self) -> FirmwareTerms:
        """Of the boot loaders."""
        return FirmwareTerms(
            factory=self.factory,
            boot_s=self.boot_s,
            boot_limit=self.boot_limit,
            confirm_after_s=self.confirm_after_s,
        )


class Scenario(Section, frozen=True, kw_only=True):
    """A whole file.

    Args:
        name: of the scenario; its runs are called after it.
        about: a sentence or two for people.
        seed: of everything; the same seed gives the same bytes.
        devices: how many.
        days: virtual days after which the run ends, if its task has not ended before.
        begins: moment at which virtual time begins.
        exchange_s: how long a window is: messages take effect at its multiples (ADR 14).
        checkpoint_hours: the run is put down, so that it can be resumed, after each round that ends, but at most
            every so many virtual hours. Every daemon is restarted then, as systems do.
        fidelity: how training is simulated.
        wire: ``off`` leaves out sealing and signatures, and hands models and updates over in memory, to see what the
            rest costs; radios then carry only names of them. Only with the engine open.
        model: name of one of covey's bundles, or path of one, relative to the file.
        publisher_key: of a bundle that is given by its path, 64 hex digits.
        task: the aggregator's task file, without name, bundle and key (docs/tasks.md).
        helpers: of secure aggregation; none with the engine open.
        population: which hardware; `wearers`: who carries it; `sensors`: what they record; `faults`: what befalls them,
            ``[[fault]]`` (docs/simulation-faults.md); `attackers`: which devices are hostile, ``[[attacker]]``
            (docs/simulation-attackers.md).
        rollout: of an update of the firmware; it takes hardware, so not with ideal devices.
        history_days: how long wearers have recorded when the run begins.
        held_out_windows: with the fidelity ``real``: how many windows of other people each model is measured on.
        recorded: with the fidelity ``recorded``: folder of the run whose accuracy by round is played back.
    """

    name: Name
    about: str = ""
    seed: Annotated[int, Meta(ge=0, le=2**62)] = 1
    devices: Annotated[int, Meta(ge=1, le=10_000_000)]
    days: Annotated[float, Meta(gt=0, le=3_700)] = 1.0
    begins: datetime.datetime = datetime.datetime(2026, 3, 2, tzinfo=datetime.timezone.utc)
    exchange_s: Annotated[float, Meta(ge=0.1, le=4.0)] = 1.0
    checkpoint_hours: AtLeastZero = 0.0
    fidelity: Fidelity = "real"
    wire: Literal["on", "off"] = "on"
    model: str = "watch_cnn"
    publisher_key: str | None = None
    task: dict[str, Any]
    helpers: Annotated[int, Meta(ge=0, le=8)] = 0
    privacy: Privacy = Privacy()
    eligibility: EligibilityConfig = EligibilityConfig()
    population: Population = Population()
    wearers: Habits = Habits()
    sensors: SensorsConfig = SensorsConfig(kind="none")
    history_days: Annotated[float, Meta(ge=0, le=365)] = 7.0
    held_out_windows: Annotated[int, Meta(ge=0, le=100_000)] = 400
    rollout: RolloutTable | None = None
    faults: tuple[dict[str, Any], ...] = msgspec.field(default=(), name="fault")
    attackers: tuple[dict[str, Any], ...] = msgspec.field(default=(), name="attacker")
    surrogate: Curve = Curve()
    recorded: str | None = None

    @property
    def began_s(self) -> float:
        """Unix seconds of the virtual beginning."""
        return self.begins.timestamp()

    @property
    def ends_s(self) -> float:
        """Unix seconds of the virtual end."""
        return self.began_s + self.duration_s

    @property
    def duration_s(self) -> float:
        """Virtual seconds of the whole run."""
        return self.days * 86_400.0
