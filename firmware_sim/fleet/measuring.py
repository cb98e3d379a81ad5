"""What a run measured, from what it left: its rounds, its totals and its devices."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np

from firmware_sim.fleet.build import attack_plan_of
from firmware_sim.fleet.chronicle import Chronicle
from firmware_sim.fleet.record import DeviceRecord
from firmware_sim.fleet.replaying import REPLAYED
from firmware_sim.fleet.run import EVENTS
from firmware_sim.fleet.windows import Totals
from firmware_sim.fleet_events import read_events
from firmware_sim.fleet_metrics import Crash, Epsilons, FaultSpan, FleetHour, FleetMetrics, FleetRound, ProfileUse
from firmware_sim.scenario.loading import LoadedScenario
from firmware_sim.scenario.schema import Curve
from fl_protocol.adapters.software import software_version

_DAY_S, _HOUR_S = 86_400.0, 3600.0
_BINS = 20


class MeasuredRun(Protocol):
    """A run that has ended, virtual or live."""

    @property
    def loaded(self) -> LoadedScenario:
        """The scenario."""

    @property
    def folder(self) -> Path:
        """Of the run; its events are in it."""

    @property
    def chronicle(self) -> Chronicle:
        """What the aggregator told."""

    @property
    def records(self) -> Sequence[DeviceRecord]:
        """The devices as they are in the end."""

    @property
    def totals(self) -> Totals:
        """What they did."""

    @property
    def now_s(self) -> float:
        """Seconds that it took, virtual ones if it was."""

    @property
    def faults(self) -> tuple[FaultSpan, ...]:
        """That befell it."""

    @property
    def peak_rss_bytes(self) -> int:
        """Memory of all its processes."""


def metrics_of(
    run: MeasuredRun, *, accuracies: Sequence[tuple[float | None, float | None]], wall_s: float
) -> FleetMetrics:
    """The whole document.

    Args:
        run: that has ended or was stopped, and put down.
        accuracies: accuracy and loss of the model that each of its rounds made, in order.
        wall_s: how long it took, all its sessions together.
    """
    scenario, totals = run.loaded.scenario, run.totals
    rounds = tuple(
        msgspec.structs.replace(one, accuracy=accuracy, loss=loss)
        for one, (accuracy, loss) in zip(run.chronicle.rounds, accuracies, strict=True)
    )
    return FleetMetrics(
        covey=software_version(),
        scenario=scenario.name,
        text=run.loaded.text,
        seed=scenario.seed,
        fidelity=scenario.fidelity,
        devices=scenario.devices,
        days=scenario.days,
        began_s=scenario.began_s,
        virtual_s=run.now_s,
        rounds=rounds,
        hours=_hours(run),
        profiles=_uses(run.records, days=max(run.now_s, 1.0) / _DAY_S),
        blocked=dict(sorted(totals.blocked.items())),
        refused=dict(sorted(run.chronicle.refused.items())),
        declined=dict(sorted(totals.declined.items())),
        deliveries=dict(sorted(totals.deliveries.items())),
        faults=run.faults,
        crashes=_crashes(run.folder),
        epsilons=_epsilons(run),
        wall_s=wall_s,
        peak_rss_bytes=run.peak_rss_bytes,
        firmware=_firmware(run),
        attack=_attack(run),
    )


def _firmware(run: MeasuredRun) -> dict[str, int]:
    """Devices by the version that they run in the end; one that was never on has the factory's."""
    table = run.loaded.scenario.rollout
    if table is None or not any(record.firmware for record in run.records):  # a live run simulates none
        return {}
    return dict(sorted(Counter(record.firmware or table.factory for record in run.records).items()))


def _attack(run: MeasuredRun) -> dict[str, float]:
    """Who attacked, and what came of it; nothing where nobody did."""
    plan = attack_plan_of(run.loaded)
    if not plan.attackers:
        return {}
    kinds: dict[str, float] = {str(one.__struct_config__.tag): 0.0 for one in plan.attackers}
    replaying = set()
    for record in run.records:
        mine = {str(one.attacker.__struct_config__.tag) for one in plan.attacks_of(record.index, record.name)}
        for kind in mine:
            kinds[kind] += 1
        if "replay" in mine:
            replaying.add(record.name)
    found = kinds | run.chronicle.attack
    if "replay" in kinds:
        found["replays_sent"] = float(sum(one.event == REPLAYED for one in read_events(run.folder / EVENTS)))
        refused = run.chronicle.refused_devices
        found["replays_refused"] = float(sum(refused.get(name, 0) for name in replaying))
    return dict(sorted(found.items()))


def accuracy_on_curve(curve: Curve, rounds: Sequence[FleetRound]) -> list[tuple[float | None, float | None]]:
    """Accuracy after each round by a calibrated curve of the updates so far; no loss. None for an aborted round."""
    updates, result = 0, list[tuple[float | None, float | None]]()
    for one in rounds:
        if one.outcome != "committed":
            result.append((None, None))
            continue
        updates += one.arrived
        gone = -math.expm1(-updates / curve.updates)
        result.append((curve.floor + (curve.ceiling - curve.floor) * gone, None))
    return result


def _hours(run: MeasuredRun) -> tuple[FleetHour, ...]:
    """Every hour of the run, those in which nothing happened too."""
    totals = run.totals
    return tuple(
        FleetHour(
            hour=hour,
            awake=totals.awake_hours.get(hour, 0),
            eligible=totals.eligible_hours.get(hour, 0),
            began=totals.began_hours.get(hour, 0),
            delivered=totals.delivered_hours.get(hour, 0),
        )
        for hour in range(math.ceil(run.now_s / _HOUR_S))
    )


def _uses(records: Sequence[DeviceRecord], *, days: float) -> tuple[ProfileUse, ...]:
    """What each profile's devices used, a device and day."""
    profiles: dict[str, list[DeviceRecord]] = {}
    for record in records:
        profiles.setdefault(record.profile, []).append(record)
    return tuple(_use(name, profiles[name], days) for name in sorted(profiles))


def _use(name: str, records: Sequence[DeviceRecord], days: float) -> ProfileUse:
    """One profile."""
    energies = [record.energy for record in records]
    sums = sorted(sum(energy.parts) / days for energy in energies)
    percents = [energy.battery_percent / days for energy in energies if energy.battery_percent is not None]

    def mean(values: Sequence[float]) -> float:
        return math.fsum(values) / len(values) / days

    return ProfileUse(
        profile=name,
        devices=len(records),
        updates=sum(record.updates for record in records),
        battery_percent_median=statistics.median(percents) if percents else None,
        energy_compute_mwh=mean([energy.compute_mwh for energy in energies]),
        energy_radio_mwh=mean([energy.radio_mwh for energy in energies]),
        energy_base_mwh=mean([energy.base_mwh for energy in energies]),
        energy_p95_mwh=sums[math.ceil(0.95 * len(sums)) - 1],
        bytes_up=mean([record.bytes_up for record in records]),
        bytes_down=mean([record.bytes_down for record in records]),
        bytes_metered=mean([record.bytes_metered for record in records]),
    )


def _epsilons(run: MeasuredRun) -> Epsilons | None:
    """How the spent ε is spread over the devices; None where training had no noise."""
    privacy, spent = run.loaded.scenario.privacy, np.array([record.spent_epsilon for record in run.records])
    if not np.isfinite(spent).all():
        return None
    counts, edges = np.histogram(spent, bins=_BINS, range=(0.0, max(privacy.epsilon, float(spent.max(initial=0.0)))))
    return Epsilons(
        budget=privacy.epsilon,
        delta=privacy.delta,
        edges=tuple(float(edge) for edge in edges),
        counts=tuple(int(count) for count in counts),
    )


def _crashes(folder: Path) -> tuple[Crash, ...]:
    """The crashes among the run's events."""
    found = []
    for event in read_events(folder / EVENTS):
        if event.event == "crash":
            error, _, trace = event.detail.partition("\n")
            found.append(Crash(device=event.device, time_s=event.time_s, error=error, trace=trace))
    return tuple(found)
