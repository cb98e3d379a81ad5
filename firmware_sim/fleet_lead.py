"""What an operator asks of a simulated run, in sentences: how long, how many, at what cost, what went wrong."""

from __future__ import annotations

from collections.abc import Mapping

from firmware_sim.fleet_metrics import Fidelity, FleetMetrics, ProfileUse
from firmware_sim.quantities import amount, count, duration, number

_DAY_S = 86_400.0
FIDELITY: dict[Fidelity, str] = {
    "real": "Every update was trained: LiteRT ran every step.",
    "recorded": "No model was trained: accuracy is, round by round, what an earlier real run had.",
    "surrogate": "No model was trained: accuracy comes from a calibrated curve.",
    "noop": "No model was trained, and nothing was learned: updates only had their size.",
}


def lead_sentences(metrics: FleetMetrics) -> list[str]:
    """The answers, the fidelity first; each entry is a sentence or a few, as plain text."""
    if not metrics.virtual_s:
        return [
            FIDELITY[metrics.fidelity],
            _live(metrics),
            "The run ended before any virtual time had passed.",
            trouble(metrics),
        ]
    return [
        FIDELITY[metrics.fidelity],
        _live(metrics),
        _length(metrics),
        _accuracy(metrics),
        _updates(metrics),
        _cost(metrics),
        trouble(metrics),
    ]


def _live(metrics: FleetMetrics) -> str:
    """Where a live run differs from its scenario; nothing for a simulated one."""
    if metrics.live is None:
        return ""
    told = (
        f"This run was live: each device was a process of its own, in real time, over {metrics.live.broker}. Live runs "
        "have this machine's hardware and network, and seeded noise, which protects nobody."
    )
    return f"{told} Left out of the scenario: {', '.join(metrics.live.left_out)}." if metrics.live.left_out else told


def _length(metrics: FleetMetrics) -> str:
    """How long the study took."""
    fleet = count(metrics.devices, "device")
    was = "was" if metrics.devices == 1 else "were"
    did = "ran" if metrics.live is not None else f"{was} simulated"
    took = f"{fleet} {did} for {duration(metrics.virtual_s)}"
    if metrics.virtual_s < 0.999 * _DAY_S * metrics.days:
        took += f", of {count_of_days(metrics.days)} planned"
    committed = [record for record in metrics.rounds if record.outcome == "committed"]
    if not committed:
        return f"{took}; no round was committed."
    first = min(record.opened_s for record in metrics.rounds)
    last = max(record.closed_s for record in committed)
    all_rounds = len(metrics.rounds)
    number_of_all = f"{len(committed):,} of {count(all_rounds, 'round')}" if len(committed) < all_rounds else ""
    return (
        f"{took}. From the first round's opening to the last commit the study took {duration(last - first)}: "
        f"{number_of_all or count(all_rounds, 'round')} {'was' if len(committed) == 1 else 'were'} committed."
    )


def count_of_days(planned: float) -> str:
    """Days as planned: 1 day, 7 days, 0.5 days."""
    return f"{number(planned)} day{'' if planned == 1 else 's'}"


def _accuracy(metrics: FleetMetrics) -> str:
    """How good the model was in the end; nothing where it was not measured."""
    measured = sorted(
        (record.task, record.closed_s, record.accuracy) for record in metrics.rounds if record.accuracy is not None
    )
    last = {task: (closed_s, accuracy) for task, closed_s, accuracy in measured}
    return " ".join(
        f"{'Accuracy' if len(last) == 1 else f'Accuracy of {task}'} was {100 * accuracy:.1f} % after "
        f"{duration(closed_s)}."
        for task, (closed_s, accuracy) in last.items()
    )


def _updates(metrics: FleetMetrics) -> str:
    """What became of the updates."""
    if not any(metrics.deliveries.values()):
        return "No update was made."
    delivered = count(metrics.deliveries.get("delivered", 0), "update")
    others = [
        f"{value:,} {name}" for name, value in sorted(metrics.deliveries.items()) if name != "delivered" and value
    ]
    rest = f"; others: {', '.join(others)}" if others else ""
    return f"{delivered} came{rest}."


def _cost(metrics: FleetMetrics) -> str:
    """What a day cost a wearer, cheapest and dearest profile."""
    if not metrics.profiles:
        return ""
    sentences = [_battery(metrics)] if any(use.battery_percent_median is not None for use in metrics.profiles) else []
    dearest = max(metrics.profiles, key=lambda use: (use.energy_p95_mwh, use.profile))
    traffic = sorted(metrics.profiles, key=lambda use: (_traffic(use), use.profile))
    if dearest.energy_p95_mwh:
        sentences.append(
            f"The worst 5 % of {dearest.profile} devices used more than {number(dearest.energy_p95_mwh)} mWh a day."
        )
    least, most = traffic[0], traffic[-1]
    means = amount(_traffic(most))
    if amount(_traffic(least)) != means:
        means = f"between {amount(_traffic(least))} ({least.profile}) and {means} ({most.profile})"
    sentences.append(f"Devices sent and received {means} a day on average.")
    if metrics.virtual_s < _DAY_S:
        sentences.append(f"These costs of a day are extrapolated from {duration(metrics.virtual_s)}.")
    return " ".join(sentences)


def _battery(metrics: FleetMetrics) -> str:
    """Percent of the battery by profile."""
    shares = sorted(
        (use.battery_percent_median, use.profile) for use in metrics.profiles if use.battery_percent_median is not None
    )
    low, high = shares[0], shares[-1]
    if low[0] == high[0]:
        return f"A day cost the median wearer {number(high[0])} % of the battery."
    return (
        f"A day cost the median wearer between {number(low[0])} % ({low[1]}) and {number(high[0])} % ({high[1]}) of "
        "the battery."
    )


def _traffic(use: ProfileUse) -> float:
    """Bytes of a device and day, both ways."""
    return use.bytes_up + use.bytes_down


def trouble(metrics: FleetMetrics) -> str:
    """What went wrong, in one sentence."""
    failed = sum(record.outcome != "committed" for record in metrics.rounds)
    parts = [
        count(failed, "round") + " came to nothing" if failed else "",
        _refusals(metrics.refused),
        count(len(metrics.crashes), "daemon") + " crashed" if metrics.crashes else "",
    ]
    told = [part for part in parts if part]
    planned = f"{count(len(metrics.faults), 'fault')} {'was' if len(metrics.faults) == 1 else 'were'} injected"
    if not told:
        return f"Nothing went wrong{f', although {planned}' if metrics.faults else ''}."
    return f"What went wrong: {', '.join(told)}{f'; {planned}' if metrics.faults else ''}."


def _refusals(refused: Mapping[str, int]) -> str:
    """How many updates were refused, and mostly why."""
    total = sum(refused.values())
    if not total:
        return ""
    reason = max(sorted(refused), key=lambda name: refused[name])
    why = f"{'all' if refused[reason] == total else 'most'} as {reason}" if total > 1 else f"as {reason}"
    return f"{count(total, 'update')} refused ({why})"
