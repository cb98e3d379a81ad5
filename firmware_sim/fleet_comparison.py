"""Two simulated runs beside each other: what each measured, by how much they differ, and what was set differently."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from firmware_sim.errors import FleetError
from firmware_sim.fleet_lead import FIDELITY, count_of_days
from firmware_sim.fleet_metrics import FleetMetrics, ProfileUse
from firmware_sim.quantities import duration, number

_DAY_S = 86_400.0
_LEVELS = tuple(range(5, 100, 5))
"""Accuracies in percent whose times are compared."""


class Quantity(msgspec.Struct, frozen=True):
    """A number that both runs may have measured.

    Args:
        part: of the comparison, such as ``rounds``.
        name: of the number in its part, with its unit.
        a, b: the runs' values; None where a run has none, as of a profile that it lacks or an accuracy never reached.
    """

    part: str
    name: str
    a: float | None
    b: float | None

    @property
    def difference(self) -> float | None:
        """`b` - `a`."""
        return None if self.a is None or self.b is None else self.b - self.a

    @property
    def ratio(self) -> float | None:
        """`b` / `a`; None where that is no number."""
        return None if self.a is None or self.b is None or self.a == 0 else self.b / self.a


class Setting(msgspec.Struct, frozen=True):
    """A key that the runs' scenarios set differently: its values as TOML has them, None for a key that is not set."""

    key: str
    a: str | None
    b: str | None


class Comparison(msgspec.Struct, frozen=True):
    """Two runs.

    Args:
        names: what the runs are called, `a` first; they differ.
        cautions: sentences on why numbers of the two may not be set against each other.
        settings: keys of their scenarios that differ, in alphabetical order.
        quantities: part by part.
    """

    names: tuple[str, str]
    cautions: tuple[str, ...]
    settings: tuple[Setting, ...]
    quantities: tuple[Quantity, ...]


def compare(a: FleetMetrics, b: FleetMetrics, *, names: tuple[str, str] | None = None) -> Comparison:
    """Set two runs beside each other.

    Args:
        a: what is compared with.
        b: what is compared; differences are `b` - `a`.
        names: what the runs are called; their scenarios' names unless given, with their place where these are equal.

    Raises:
        FleetError: the scenario of a run is no TOML.
    """
    names = names or (a.scenario, b.scenario)
    if names[0] == names[1]:
        names = (f"a: {names[0]}", f"b: {names[1]}")
    return Comparison(
        names=names,
        cautions=tuple(_cautions(a, b, names)),
        settings=tuple(_settings(a, b)),
        quantities=(
            *_rounds(a, b),
            *_times_to_accuracy(a, b),
            *_use_by_profile(a, b),
            *_counts("updates", a.deliveries, b.deliveries),
            *_counts("refused", a.refused, b.refused),
            *_counts("declined", a.declined, b.declined),
            *_counts("blocked", a.blocked, b.blocked),
            Quantity("faults", "injected", len(a.faults), len(b.faults)),
            Quantity("faults", "daemons crashed", len(a.crashes), len(b.crashes)),
            *_simulation(a, b),
        ),
    )


def table_rows(comparison: Comparison, *, none: str) -> list[tuple[str, ...]]:
    """The numbers as people read them: part, name, both values, difference, ratio.

    Args:
        comparison: of two runs.
        none: what stands for a number that there is not.
    """
    return [
        (
            quantity.part,
            quantity.name,
            *(none if value is None else number(value) for value in (quantity.a, quantity.b)),
            none
            if quantity.difference is None
            else f"{'+' if quantity.difference > 0 else ''}{number(quantity.difference)}",
            none if quantity.ratio is None else f"{quantity.ratio:.3g}",
        )
        for quantity in comparison.quantities
    ]


def _cautions(a: FleetMetrics, b: FleetMetrics, names: tuple[str, str]) -> Iterable[str]:
    """Why the runs' numbers may not be comparable."""
    if a.fidelity == b.fidelity:
        yield FIDELITY[a.fidelity]
    else:
        yield from (f"{name}: {FIDELITY[run.fidelity]}" for run, name in zip((a, b), names, strict=True))
        yield f"The fidelities differ ({a.fidelity}, {b.fidelity}), so times to an accuracy do not compare."
    for run, name in ((a, names[0]), (b, names[1])):
        if run.virtual_s < 0.999 * run.days * _DAY_S:
            yield f"{name} ended after {duration(run.virtual_s)} of {count_of_days(run.days)}."
    if a.covey != b.covey:
        yield f"The runs are of different versions of covey ({a.covey}, {b.covey})."


def _settings(a: FleetMetrics, b: FleetMetrics) -> Iterable[Setting]:
    """Keys that differ; the seed among them, which a command may have set."""
    set_a, set_b = (_flat(_parsed(run)) | {"seed": str(run.seed)} for run in (a, b))
    for key in sorted(set_a.keys() | set_b.keys()):
        if set_a.get(key) != set_b.get(key):
            yield Setting(key, set_a.get(key), set_b.get(key))


def _parsed(run: FleetMetrics) -> dict[str, Any]:
    """A run's scenario."""
    try:
        return msgspec.toml.decode(run.text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise FleetError(f"scenario {run.scenario}: expected the run to hold it as TOML ({error})") from error


def _flat(value: Any, key: str = "") -> dict[str, str]:
    """Every single value by its key: ``fleet.devices``, ``faults[0].kind``."""
    if isinstance(value, dict) and value:
        parts = ((f"{key}.{name}" if key else name, part) for name, part in value.items())
    elif isinstance(value, list) and any(isinstance(part, dict) for part in value):
        parts = ((f"{key}[{index}]", part) for index, part in enumerate(value))
    else:
        return {key: msgspec.json.encode(value).decode()} if key else {}
    return {name: text for path, part in parts for name, text in _flat(part, path).items()}


def _rounds(a: FleetMetrics, b: FleetMetrics) -> Iterable[Quantity]:
    """What came of rounds."""
    of_a, of_b = _round_numbers(a), _round_numbers(b)
    return (Quantity("rounds", name, of_a[name], of_b[name]) for name in of_a)


def _round_numbers(run: FleetMetrics) -> dict[str, float | None]:
    """A run's rounds in numbers, by their names."""
    done = [record for record in run.rounds if record.outcome == "committed"]
    seconds = [record.closed_s - record.opened_s for record in done]
    return {
        "opened": len(run.rounds),
        "committed": len(done),
        "last commit, days": max(record.closed_s for record in done) / _DAY_S if done else None,
        "updates of a committed one, mean": statistics.fmean(record.arrived for record in done) if done else None,
        "hours of a committed one, mean": statistics.fmean(seconds) / 3600 if done else None,
    }


def _times_to_accuracy(a: FleetMetrics, b: FleetMetrics) -> Iterable[Quantity]:
    """For each task and accuracy that a run reached: when, in days since its beginning."""
    for task in sorted({record.task for run in (a, b) for record in run.rounds}):
        first = [_days_to(run, task, 0) for run in (a, b)]
        days = {percent: [_days_to(run, task, percent) for run in (a, b)] for percent in _LEVELS}
        reached = [percent for percent in _LEVELS if days[percent] != [None, None]]
        at_once = [percent for percent in reached if days[percent] == first]
        for percent in reached[max(0, len(at_once) - 1) :]:  # of what the first models had, the best alone
            yield Quantity("days to accuracy", f"{task}: {percent} %", *days[percent])


def _days_to(run: FleetMetrics, task: str, percent: int) -> float | None:
    """When a task's model first was as good."""
    reached = (
        record.closed_s
        for record in run.rounds
        if record.task == task and record.accuracy is not None and 100 * record.accuracy >= percent
    )
    first_s = min(reached, default=None)
    return None if first_s is None else first_s / _DAY_S


def _use_by_profile(a: FleetMetrics, b: FleetMetrics) -> Iterable[Quantity]:
    """What a device and day took."""
    of_a, of_b = ({use.profile: _use(use) for use in run.profiles} for run in (a, b))
    for profile in sorted(of_a.keys() | of_b.keys()):
        one, other = of_a.get(profile, {}), of_b.get(profile, {})
        for name in one or other:
            yield Quantity(f"profile {profile}", name, one.get(name), other.get(name))


def _use(use: ProfileUse) -> dict[str, float | None]:
    """A profile's numbers by their names."""
    return {
        "devices": use.devices,
        "updates": use.updates,
        "battery of the median device, % a day": use.battery_percent_median,
        "energy, mWh a day": use.energy_compute_mwh + use.energy_radio_mwh + use.energy_base_mwh,
        "energy for training, mWh a day": use.energy_compute_mwh,
        "energy for radio, mWh a day": use.energy_radio_mwh,
        "energy above which the worst 5 % are, mWh a day": use.energy_p95_mwh,
        "up, kB a day": use.bytes_up / 1000,
        "down, kB a day": use.bytes_down / 1000,
        "metered, kB a day": use.bytes_metered / 1000,
    }


def _counts(part: str, a: Mapping[str, int], b: Mapping[str, int]) -> Iterable[Quantity]:
    """Counts by name; what a run does not name did not happen in it."""
    for name in sorted(a.keys() | b.keys()):
        yield Quantity(part, name, a.get(name, 0), b.get(name, 0))


def _simulation(a: FleetMetrics, b: FleetMetrics) -> Iterable[Quantity]:
    """What the simulation itself took."""
    yield Quantity("simulation", "devices", a.devices, b.devices)
    yield Quantity("simulation", "virtual days", a.virtual_s / _DAY_S, b.virtual_s / _DAY_S)
    yield Quantity("simulation", "seconds", a.wall_s, b.wall_s)
    yield Quantity("simulation", "memory, MB", a.peak_rss_bytes / 1e6, b.peak_rss_bytes / 1e6)
