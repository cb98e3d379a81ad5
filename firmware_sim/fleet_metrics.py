"""``fleet.json``: what one simulated run measured, as one document; its report and its comparison are drawn from it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from firmware_sim.errors import FleetError

T = TypeVar("T")

Fidelity = Literal["real", "recorded", "surrogate", "noop"]
"""``real``: LiteRT runs every step; ``recorded``: accuracy by round as an earlier real run had it; ``surrogate``:
accuracy from a calibrated curve; ``noop``: nothing is learned. Only ``real`` computes with recordings."""


class FleetRound(msgspec.Struct, frozen=True, kw_only=True):
    """One round of a task; `accuracy` and `loss` are of the model it made. Times are seconds since the beginning."""

    task: str
    round: int
    outcome: str
    reason: str
    opened_s: float
    closed_s: float
    arrived: int
    goal: int
    bytes_up: int
    accuracy: float | None = None
    loss: float | None = None


class FleetHour(msgspec.Struct, frozen=True, kw_only=True):
    """An hour, counted from 0: how many devices were awake, could train, began a round, delivered an update."""

    hour: int
    awake: int
    eligible: int
    began: int
    delivered: int


class ProfileUse(msgspec.Struct, frozen=True, kw_only=True):
    """What a profile's devices used. Energy in milliwatt hours and bytes, of one device in one day of 24 hours.

    Args:
        battery_percent_median: of its battery that Covey took, a day; None for devices on the mains.
        energy_compute_mwh, energy_radio_mwh, energy_base_mwh: means: training, radio, being awake.
        energy_p95_mwh: of the sum of the three: 95 in 100 devices used no more.
        bytes_up, bytes_down, bytes_metered: means; the metered ones are part of both others.
    """

    profile: str
    devices: int
    updates: int
    battery_percent_median: float | None
    energy_compute_mwh: float
    energy_radio_mwh: float
    energy_base_mwh: float
    energy_p95_mwh: float
    bytes_up: float
    bytes_down: float
    bytes_metered: float


class FaultSpan(msgspec.Struct, frozen=True, kw_only=True):
    """A fault or an attack: seconds since the beginning, its kind, whom it struck (``fleet``, ``broker``, a device)."""

    kind: str
    starts_s: float
    ends_s: float
    target: str
    detail: str = ""


class Crash(msgspec.Struct, frozen=True, kw_only=True):
    """A device whose daemon raised what it should not have: a finding; ``covey-fleet replay`` runs it again."""

    device: str
    time_s: float
    error: str
    trace: str


class Epsilons(msgspec.Struct, frozen=True, kw_only=True):
    """The ε that devices had spent in the end, at `delta`: how many lay in each of the bins between `edges`."""

    budget: float | None
    delta: float
    edges: tuple[float, ...]
    counts: tuple[int, ...]


class LiveTerms(msgspec.Struct, frozen=True, kw_only=True):
    """What is particular to a live run: the broker that carried it, and what of the scenario was left out."""

    broker: str
    left_out: tuple[str, ...]


class FleetMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """A whole run. Of a live one all times are real: what is called virtual elsewhere too.

    Args:
        scenario: its name; `text` is the TOML that was run.
        fidelity: of training.
        days: virtual days that the run was to take; `virtual_s` is what it took.
        began_s: Unix seconds of the virtual beginning.
        blocked: how often each rule kept a device that was awake from training (``battery``, ``network``, ...).
        refused: updates that the aggregator refused, by reason.
        declined: rounds that devices left out, by reason (``coin``, ``budget``, ``floors``, ...).
        deliveries: updates by outcome: ``delivered``, ``expired``, ``refused``, ``pending``.
        firmware: devices by the version that they ran in the end; empty where no firmware was simulated.
        attack: of runs with attackers: how many devices attack, by kind; ``backdoor_success``: fraction of held-out
            windows of other labels that the last model takes for the target when they bear the trigger;
            ``replays_sent`` and ``replays_refused``: updates.
        wall_s, peak_rss_bytes: what the simulation itself took, all processes together.
        live: of a live run; None for a simulated one.
    """

    covey: str
    scenario: str
    text: str
    seed: int
    fidelity: Fidelity
    devices: int
    days: float
    began_s: float
    virtual_s: float
    rounds: tuple[FleetRound, ...]
    hours: tuple[FleetHour, ...]
    profiles: tuple[ProfileUse, ...]
    blocked: dict[str, int]
    refused: dict[str, int]
    declined: dict[str, int]
    deliveries: dict[str, int]
    faults: tuple[FaultSpan, ...]
    crashes: tuple[Crash, ...]
    epsilons: Epsilons | None
    wall_s: float
    peak_rss_bytes: int
    attack: dict[str, float] = {}
    live: LiveTerms | None = None
    firmware: dict[str, int] = {}


def read_metrics(source: Path, kind: type[T]) -> T:
    """What a run measured.

    Args:
        source: the file in the run's folder.
        kind: what it holds.

    Raises:
        FleetError: the folder holds no such file, or one that cannot be read.
    """
    try:
        return msgspec.json.decode(source.read_bytes(), type=kind)
    except OSError as error:
        raise FleetError(
            f"{source.parent} holds no run that can be reported: {error.strerror} ({source.name})"
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FleetError(f"{source} cannot be read ({error})") from error
