"""A simulated run's ``report.html``: answers, plots and tables in one self-contained file, drawn from its metrics."""

from __future__ import annotations

import datetime
import html
import math
import shlex

from firmware_sim.fleet_lead import FIDELITY, count_of_days, lead_sentences
from firmware_sim.fleet_metrics import FleetMetrics, ProfileUse
from firmware_sim.fleet_plots import (
    accuracy_svg,
    bytes_svg,
    counts_svg,
    energy_svg,
    epsilon_svg,
    faults_svg,
    hour_of_day_svg,
    participation_svg,
    rounds_svg,
)
from firmware_sim.quantities import amount, count, duration, number
from firmware_sim.report_page import drawing, figure_html, page_html, table_html

_MOST_ROWS = 50
"""Of failed rounds and crashes; all of them are in fleet.json."""
_MOST_OF_A_KIND = 5
"""More faults of a kind than these share a line."""


def fleet_report_html(metrics: FleetMetrics) -> str:
    """The whole page.

    Args:
        metrics: what the run measured; nothing on the page comes from anywhere else.
    """
    kind = "Simulation" if metrics.live is None else "Live run"
    lead = " ".join(sentence for sentence in lead_sentences(metrics) if sentence)
    with drawing():
        sections = [
            _participation(metrics),
            _rounds(metrics),
            _cost(metrics),
            _kept_away(metrics),
            _faults(metrics),
            _privacy(metrics),
            _crashes(metrics),
        ]
    return page_html(
        f"Covey {kind.lower()}: {metrics.scenario}",
        f"<h1>{kind}: {html.escape(metrics.scenario)}</h1>"
        f'<p class="lead">{html.escape(lead)}</p>{"".join(sections)}'
        f"<h2>The run</h2>{table_html(_run_rows(metrics))}{_scenario(metrics)}",
    )


def _section(title: str, figures: list[str], *, otherwise: str, after: str = "") -> str:
    """A heading, and its plots or a sentence that says why there are none."""
    drawn = "".join(figures)
    body = f'<div class="plots">{drawn}</div>' if drawn else f'<p class="none">{html.escape(otherwise)}</p>'
    return f"<h2>{html.escape(title)}</h2>{body}{after}"


def _plot(drawn: str | None, caption: str, *, wide: bool = False) -> str:
    """A figure; nothing where nothing was drawn."""
    if drawn is None:
        return ""
    figure = figure_html(drawn, caption)
    return figure.replace("<figure>", '<figure class="wide">', 1) if wide else figure


def _participation(metrics: FleetMetrics) -> str:
    """Who was there."""
    figures = [
        _plot(
            participation_svg(metrics),
            "Devices that were awake and that could train, and devices that began a round and that delivered an "
            "update, by hour of the run (of runs over four weeks: the mean hour of each day).",
            wide=True,
        ),
        _plot(hour_of_day_svg(metrics), "The same by hour of the day in UTC: the mean over the run."),
    ]
    return _section("Participation", figures, otherwise="The run ended before its first hour was counted.")


def _rounds(metrics: FleetMetrics) -> str:
    """What came of rounds."""
    figures = [
        _plot(rounds_svg(metrics), "Updates that arrived in each round, by its outcome, against its goal."),
        _plot(accuracy_svg(metrics), f"Accuracy against virtual time. {FIDELITY[metrics.fidelity]}"),
    ]
    failed = [record for record in metrics.rounds if record.outcome != "committed"]
    rows = [
        (record.task, str(record.round), record.outcome, record.reason, f"{record.arrived:,} of {record.goal:,}")
        for record in failed[:_MOST_ROWS]
    ]
    after = ""
    if rows:
        header = ("task", "round", "outcome", "reason", "arrived")
        after = table_html(rows, header=header, numbers=(4,)) + _more(len(failed), "rounds")
    return _section("Rounds", figures, otherwise="No round was opened.", after=after)


def _cost(metrics: FleetMetrics) -> str:
    """What a device and day took."""
    figures = [
        _plot(
            energy_svg(metrics.profiles) if metrics.live is None else None,
            "Energy of a device in a day, mean, by what took it. The stroke: 95 in 100 devices use less. Beside it: "
            "percent of the battery that the median device gave in a day.",
        ),
        _plot(
            bytes_svg(metrics.profiles),
            "Bytes of a device in a day, mean. The narrow bar: how many of both ways were metered.",
        ),
    ]
    header = (
        "profile", "devices", "updates", "battery a day", "mWh a day", "worst 5 % above", "up a day", "down a day",
        "metered a day",
    )  # fmt: skip

    def energies(use: ProfileUse) -> tuple[str, str]:
        if metrics.live is not None:
            return "not measured", "not measured"
        mean = use.energy_compute_mwh + use.energy_radio_mwh + use.energy_base_mwh
        return number(mean), f"{number(use.energy_p95_mwh)} mWh"

    rows = [
        (
            use.profile,
            f"{use.devices:,}",
            f"{use.updates:,}",
            "mains" if use.battery_percent_median is None else f"{number(use.battery_percent_median)} %",
            *energies(use),
            amount(use.bytes_up),
            amount(use.bytes_down),
            amount(use.bytes_metered),
        )
        for use in metrics.profiles
    ]
    after = table_html(rows, header=header, numbers=range(1, 9)) if rows else ""
    return _section("What it cost a wearer", figures, otherwise="No device's use was measured.", after=after)


def _kept_away(metrics: FleetMetrics) -> str:
    """Rules, refusals and reasons."""
    figures = [
        _plot(
            counts_svg(metrics.blocked, "times"),
            "What kept devices from training while they were awake, by rule; a device counts under each.",
        ),
        _plot(counts_svg(metrics.declined, "rounds"), "Rounds that devices left out, by reason."),
        _plot(counts_svg(metrics.refused, "updates"), "Updates that the aggregator refused, by reason."),
    ]
    otherwise = "No rule kept a device from training, no device left out a round, and no update was refused."
    return _section("What kept devices from training, and updates from counting", figures, otherwise=otherwise)


def _faults(metrics: FleetMetrics) -> str:
    """When what was broken."""
    plot = _plot(
        faults_svg(metrics),
        "Above: updates delivered in each hour. Below: faults and attacks while they lasted; very short ones are drawn "
        "wider than they were.",
        wide=True,
    )
    rows = [row for kind in sorted({fault.kind for fault in metrics.faults}) for row in _fault_rows(metrics, kind)]
    header = ("fault", "whom it struck", "began", "lasted", "")
    after = table_html(rows, header=header) if rows else ""
    if metrics.firmware:
        versions = [(version, f"{devices:,}") for version, devices in metrics.firmware.items()]
        after += table_html(versions, header=("firmware in the end", "devices"), numbers=range(1, 2))
    return _section("Faults and attacks", [plot], otherwise="No fault was injected, and nobody attacked.", after=after)


def _fault_rows(metrics: FleetMetrics, kind: str) -> list[tuple[str, ...]]:
    """A line for each fault of a kind, or one for many."""
    faults = sorted((f for f in metrics.faults if f.kind == kind), key=lambda fault: (fault.starts_s, fault.target))
    if len(faults) <= _MOST_OF_A_KIND:
        return [
            (kind, fault.target, _moment(fault.starts_s), duration(fault.ends_s - fault.starts_s), fault.detail)
            for fault in faults
        ]
    targets = {fault.target for fault in faults}
    whom = faults[0].target if len(targets) == 1 else f"{len(targets):,} of them"
    times = f"{_moment(faults[0].starts_s)} to {_moment(faults[-1].starts_s)}"
    together_s = sum(fault.ends_s - fault.starts_s for fault in faults)
    return [(kind, whom, times, f"{duration(together_s)} in all", f"{len(faults):,} times")]


def _privacy(metrics: FleetMetrics) -> str:
    """Budgets of the devices."""
    epsilons = metrics.epsilons
    drawn, caption = epsilon_svg(epsilons), ""
    if epsilons is not None and drawn is not None:
        most = max(edge for edge, value in zip(epsilons.edges[1:], epsilons.counts, strict=True) if value)
        # A bound is rounded up: rounded down it would claim more privacy than there was.
        caption = (
            f"ε that devices had spent in the end: {count(sum(epsilons.counts), 'device')}, none of them more than "
            f"{math.ceil(1000 * most) / 1000:g}."
        )
    otherwise = (
        "No device was charged an ε, so no privacy is claimed."
        if epsilons is None
        else "No device had spent any ε in the end."
    )
    return _section("Privacy", [_plot(drawn, caption)], otherwise=otherwise)


def _crashes(metrics: FleetMetrics) -> str:
    """Findings, and how to see each again."""
    if not metrics.crashes:
        return _section("Crashes", [], otherwise="No daemon raised what it should not have.")
    rows = "".join(
        f"<tr><td>{html.escape(crash.device)}</td><td>{_moment(crash.time_s)}</td>"
        f"<td>{html.escape(crash.error)}<br><code>{html.escape(_replay(metrics, crash.device))}</code>"
        f"<details><summary>trace</summary><pre>{html.escape(crash.trace)}</pre></details></td></tr>"
        for crash in metrics.crashes[:_MOST_ROWS]
    )
    return (
        "<h2>Crashes</h2><table><tr><th>device</th><th>when</th><th>error, and how to run it again</th></tr>"
        f"{rows}</table>{_more(len(metrics.crashes), 'crashes')}"
    )


def _replay(metrics: FleetMetrics, device: str) -> str:
    """The command that runs a device again; of a live run, which cannot be run again, what its process said."""
    if metrics.live is not None:
        return f"logs/{device}.err"
    return shlex.join(["covey-fleet", "replay", str(metrics.seed), device, "--scenario", f"{metrics.scenario}.toml"])


def _more(all_of_them: int, what: str) -> str:
    """That a table is not whole."""
    if all_of_them <= _MOST_ROWS:
        return ""
    return f'<p class="none">{all_of_them - _MOST_ROWS:,} more {what} are in fleet.json.</p>'


def _moment(seconds: float) -> str:
    """A time of the run: day 3, 04:05:06; the first day is day 1."""
    day, rest = divmod(round(seconds), 86_400)
    return f"day {day + 1}, {rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}"


def _run_rows(metrics: FleetMetrics) -> list[tuple[str, str]]:
    """What the run was, and what the simulation itself took."""
    began = datetime.datetime.fromtimestamp(metrics.began_s, datetime.timezone.utc)
    speed = f", {number(metrics.virtual_s / metrics.wall_s)} times as fast as time" if metrics.wall_s > 0 else ""
    about = [
        ("software", f"covey {metrics.covey}"),
        ("seed", str(metrics.seed)),
        ("fidelity", f"{metrics.fidelity}: {FIDELITY[metrics.fidelity]}"),
        ("devices", f"{metrics.devices:,}"),
    ]
    if metrics.live is not None:
        return [
            *about,
            ("beginning", f"{began:%Y-%m-%d %H:%M:%S} UTC"),
            ("time", f"{duration(metrics.virtual_s)}; planned: at most {count_of_days(metrics.days)}"),
            ("all processes together", f"{amount(metrics.peak_rss_bytes)} of memory, shared pages counted in each"),
            ("broker", metrics.live.broker),
            ("left out", ", ".join(metrics.live.left_out) or "nothing"),
        ]
    return [
        *about,
        ("virtual beginning", f"{began:%Y-%m-%d %H:%M:%S} UTC"),
        ("virtual time", f"{duration(metrics.virtual_s)}; planned: {count_of_days(metrics.days)}"),
        ("the simulation took", f"{duration(metrics.wall_s)}{speed}; {amount(metrics.peak_rss_bytes)} of memory"),
    ]


def _scenario(metrics: FleetMetrics) -> str:
    """The scenario as it was run."""
    if not metrics.text.strip():
        return ""
    return f"<details><summary>The scenario as it was run</summary><pre>{html.escape(metrics.text)}</pre></details>"
