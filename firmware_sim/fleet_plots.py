"""The plots of a simulated run, each drawn from its metrics alone; None where there is nothing to draw.

Times are virtual: days since the run began, hours of the day in UTC.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from firmware_sim.errors import FleetError
from firmware_sim.fleet_metrics import Epsilons, FaultSpan, FleetHour, FleetMetrics, FleetRound, ProfileUse
from firmware_sim.quantities import number
from firmware_sim.report_page import BLUE, GREEN, GREY, ORANGE, RULE, empty_axes, stacked_axes, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

_LEAST_DAYS = 2.0
"""Shorter runs are drawn over hours."""
_MANY_HOURS = 28 * 24
"""From here on a point is the mean hour of a day: single hours of a season or a year are a smear."""
_MANY_ROUNDS = 200
"""More rounds than these touch each other."""
_NARROWEST = 0.004
"""Of a plot's width: how wide a fault is drawn at least, so that a restart of a second is seen in a week."""
_OUTCOMES = {"committed": BLUE, "aborted": ORANGE}
_SEVERAL = 5
"""Faults of a kind that are each marked among the arrivals; more of them only below."""
_MOST_REASONS = 15
_THICKNESS = 0.6
_LINES = (BLUE, ORANGE, GREEN, "#7c3aed", "#b8860b", "#0e7490")


def participation_svg(metrics: FleetMetrics) -> str | None:
    """Awake and eligible devices above; updates begun and delivered below, on a scale of their own."""
    hours = _every_hour(metrics.hours)
    if not hours:
        return None
    label, unit_s = _time_unit(metrics)
    figure, panels = stacked_axes(["devices", "devices in an hour"], label, wide=True)
    means, width = _over_the_run(hours)
    _steps(panels, means, [3600 * width * index / unit_s for index in range(len(means) + 1)])
    return svg(figure)


def hour_of_day_svg(metrics: FleetMetrics) -> str | None:
    """The mean hour of the day, for runs of at least a day."""
    hours = _every_hour(metrics.hours)
    if len(hours) < 24:
        return None
    of_day: defaultdict[int, list[FleetHour]] = defaultdict(list)
    for hour in hours:
        of_day[int(metrics.began_s // 3600 + hour.hour) % 24].append(hour)
    figure, panels = stacked_axes(["devices", "devices in an hour"], "hour of the day (UTC)")
    _steps(panels, [_mean(of_day[hour]) for hour in range(24)], list(range(25)))
    panels[-1].set_xticks(range(0, 25, 3))
    return svg(figure)


def rounds_svg(metrics: FleetMetrics) -> str | None:
    """Arrived updates of each round by its outcome, against its goal; rounds in the order of their ends."""
    rounds = sorted(metrics.rounds, key=lambda record: (record.closed_s, record.task, record.round))
    if not rounds:
        return None
    figure, axes = empty_axes("updates", "round, in the order of ending")
    gap = 0.1 if len(rounds) <= _MANY_ROUNDS else 0.0
    # Bars and the gaps between them as one outline: a thousand rounds stay one line of the drawing.
    edges = [x for index in range(1, len(rounds) + 1) for x in (index - 0.5 + gap, index + 0.5 - gap)]
    for outcome in sorted({record.outcome for record in rounds}):
        heights = [record.arrived if record.outcome == outcome else 0 for record in rounds]
        colour, label = _OUTCOMES.get(outcome, GREY), f"arrived, {outcome}"
        if gap:
            outline = [height for pair in zip(heights, [0] * len(heights), strict=True) for height in pair][:-1]
            axes.stairs(outline, edges, fill=True, color=colour, label=label)
        else:
            axes.stairs(heights, [*edges[::2], edges[-1]], fill=True, color=colour, label=label)
    goals = [record.goal for record in rounds]
    middles = [index + 0.5 for index in range(len(rounds) + 1)]
    axes.stairs(goals, middles, baseline=None, color="#111827", linewidth=1, linestyle="--", label="goal")
    _from_zero(axes)
    axes.set_xlim(0.3, len(rounds) + 0.7)
    axes.locator_params(axis="x", integer=True)
    return svg(figure)


def accuracy_svg(metrics: FleetMetrics) -> str | None:
    """Accuracy against virtual time, a line a task."""
    tasks: defaultdict[str, list[FleetRound]] = defaultdict(list)
    for record in metrics.rounds:
        if record.accuracy is not None:
            tasks[record.task].append(record)
    if not tasks:
        return None
    label, unit_s = _time_unit(metrics)
    figure, axes = empty_axes("accuracy, %", label)
    for index, (task, records) in enumerate(sorted(tasks.items())):
        records.sort(key=lambda record: record.closed_s)
        axes.plot(
            [record.closed_s / unit_s for record in records],
            [100 * (record.accuracy or 0.0) for record in records],
            color=_LINES[index % len(_LINES)],
            marker="o" if len(records) <= 40 else "",
            markersize=3,
            label=task,
        )
    axes.set_ylim(0, 100)
    axes.set_xlim(left=0)
    axes.legend(frameon=False, loc="lower right")
    return svg(figure)


def energy_svg(profiles: Sequence[ProfileUse]) -> str | None:
    """Energy of a device and day, stacked; the 95th percentile marked, percent of the battery beside."""
    if not profiles:
        return None
    axes, ends = _stacked_bars(
        profiles,
        "mWh of a device and day",
        (("training", BLUE, [use.energy_compute_mwh for use in profiles]),
         ("radio", ORANGE, [use.energy_radio_mwh for use in profiles]),
         ("being awake", GREY, [use.energy_base_mwh for use in profiles])),
    )  # fmt: skip
    tops = [use.energy_p95_mwh for use in profiles]
    axes.plot(tops, range(len(profiles)), "|", color="#111827", markersize=14, label="worst 5 % above")
    for row, use in enumerate(profiles):
        share = "mains" if use.battery_percent_median is None else f"{number(use.battery_percent_median)} %"
        axes.annotate(share, (max(ends[row], tops[row]), row), xytext=(6, 0), textcoords="offset points", va="center")
    axes.set_xlim(0, 1.18 * max([*ends, *tops]) or 1.0)
    _legend_above(axes)
    return svg(axes.get_figure(root=True))  # type: ignore[arg-type]


def bytes_svg(profiles: Sequence[ProfileUse]) -> str | None:
    """Bytes of a device and day, up and down; of both, what was metered."""
    if not profiles:
        return None
    scale = 1e6 if max(use.bytes_up + use.bytes_down for use in profiles) >= 1e6 else 1e3
    axes, ends = _stacked_bars(
        profiles,
        f"{'MB' if scale == 1e6 else 'kB'} of a device and day",
        (("up", BLUE, [use.bytes_up / scale for use in profiles]),
         ("down", ORANGE, [use.bytes_down / scale for use in profiles])),
    )  # fmt: skip
    metered = [use.bytes_metered / scale for use in profiles]
    axes.barh(range(len(profiles)), metered, height=0.3 * _THICKNESS, color="#111827", label="of both, metered")
    axes.set_xlim(right=1.08 * max(ends) or 1.0)
    _legend_above(axes)
    return svg(axes.get_figure(root=True))  # type: ignore[arg-type]


def counts_svg(counts: dict[str, int], label: str) -> str | None:
    """Bars by name, the largest on top; of many names those of the largest."""
    happened = ((name, value) for name, value in counts.items() if value)
    rows = sorted(happened, key=lambda item: (item[1], item[0]))[-_MOST_REASONS:]
    if not rows:
        return None
    figure, axes = empty_axes("", label)
    bars = axes.barh([_short(name) for name, _ in rows], [value for _, value in rows], color=BLUE, height=_THICKNESS)
    axes.bar_label(bars, labels=[f"{value:,}" for _, value in rows], padding=4)
    axes.set_xlim(right=1.2 * max(value for _, value in rows))
    axes.locator_params(axis="x", nbins=5, integer=True)
    axes.set_ylim(*_room_for(len(rows)))
    _sideways(axes)
    return svg(figure)


def faults_svg(metrics: FleetMetrics) -> str | None:
    """When each kind of fault struck, below the updates that arrived."""
    if not metrics.faults:
        return None
    kinds: defaultdict[str, list[FaultSpan]] = defaultdict(list)
    for fault in metrics.faults:
        kinds[fault.kind].append(fault)
    order = sorted(kinds, key=lambda kind: (min(fault.starts_s for fault in kinds[kind]), kind), reverse=True)
    label, unit_s = _time_unit(metrics)
    figure, (upper, lower) = stacked_axes(
        ["delivered in an hour", ""], label, wide=True, heights=(1.6, max(0.7, 0.34 * len(order)))
    )
    end = max(metrics.virtual_s, *(fault.ends_s for fault in metrics.faults), 1.0) / unit_s
    delivered = [hour.delivered for hour in _every_hour(metrics.hours)]
    upper.stairs(delivered, [3600 * hour / unit_s for hour in range(len(delivered) + 1)], color=BLUE, fill=True)
    for row, kind in enumerate(order):
        spans = [_span(fault, unit_s, least=_NARROWEST * end) for fault in kinds[kind]]
        lower.broken_barh(spans, (row - 0.3, 0.6), color=ORANGE)
        for start, length in spans if len(spans) <= _SEVERAL else []:
            if length < end / 2:
                upper.axvspan(start, start + length, color=ORANGE, alpha=0.15, linewidth=0)
    lower.set_yticks(range(len(order)), [_kind_label(kind, kinds[kind]) for kind in order])
    lower.set_ylim(-0.6, len(order) - 0.4)
    _sideways(lower)
    _thousands(upper.yaxis)
    upper.set_ylim(bottom=0)
    lower.set_xlim(0, end)
    return svg(figure)


def _span(fault: FaultSpan, unit_s: float, *, least: float) -> tuple[float, float]:
    """Where a fault begins and how wide it is drawn."""
    return fault.starts_s / unit_s, max((fault.ends_s - fault.starts_s) / unit_s, least)


def epsilon_svg(epsilons: Epsilons | None) -> str | None:
    """How many devices had spent how much, with the budget."""
    if epsilons is None or not any(epsilons.counts):
        return None
    if len(epsilons.edges) != len(epsilons.counts) + 1:
        bins = len(epsilons.counts)
        raise FleetError(f"epsilons of {bins} bins: expected {bins + 1} edges, got {len(epsilons.edges)}")
    figure, axes = empty_axes("devices", f"ε spent, at δ = {epsilons.delta:g}")
    axes.stairs(epsilons.counts, epsilons.edges, fill=True, color=BLUE, label="devices")
    if epsilons.budget is not None:
        axes.axvline(
            epsilons.budget, color=ORANGE, linestyle="--", linewidth=1.5, label=f"budget: ε = {epsilons.budget:g}"
        )
    axes.set_xlim(0, 1.04 * max(epsilons.edges[-1], epsilons.budget or 0.0))
    _from_zero(axes)
    return svg(figure)


def _every_hour(hours: Sequence[FleetHour]) -> list[FleetHour]:
    """All hours from 0 to the last one; nothing happened in those that are not told."""
    told = {hour.hour: hour for hour in hours}
    return [
        told.get(hour) or FleetHour(hour=hour, awake=0, eligible=0, began=0, delivered=0)
        for hour in range(max(told, default=-1) + 1)
    ]


def _over_the_run(hours: Sequence[FleetHour]) -> tuple[list[dict[str, float]], int]:
    """Hours, or of long runs the mean hour of each day; and how many hours each stands for."""
    width = 1 if len(hours) <= _MANY_HOURS else 24
    return [_mean(hours[first : first + width]) for first in range(0, len(hours), width)], width


def _mean(hours: Sequence[FleetHour]) -> dict[str, float]:
    """The mean of some hours."""
    names = ("awake", "eligible", "began", "delivered")
    return {name: sum(getattr(hour, name) for hour in hours) / len(hours) for name in names}


def _steps(panels: Sequence[Axes], means: Sequence[dict[str, float]], edges: Sequence[float]) -> None:
    """Who could train above, who did below."""
    for axes, names in zip(panels, (("awake", "eligible"), ("began", "delivered")), strict=True):
        for name, colour in zip(names, (BLUE, ORANGE), strict=True):
            axes.stairs([mean[name] for mean in means], edges, baseline=None, color=colour, label=name)
        _from_zero(axes)
    panels[-1].set_xlim(edges[0], edges[-1])


def _time_unit(metrics: FleetMetrics) -> tuple[str, float]:
    """The name of the time axis, and its unit in seconds."""
    long = metrics.virtual_s >= _LEAST_DAYS * 86_400
    return ("virtual days", 86_400.0) if long else ("virtual hours", 3600.0)


def _stacked_bars(
    profiles: Sequence[ProfileUse], label: str, parts: Sequence[tuple[str, str, list[float]]]
) -> tuple[Axes, list[float]]:
    """A bar for each profile made of parts; with where each ends."""
    _, axes = empty_axes("", label)
    ends = [0.0] * len(profiles)
    for name, colour, values in parts:
        axes.barh(range(len(profiles)), values, left=ends, color=colour, height=_THICKNESS, label=name)
        ends = [end + value for end, value in zip(ends, values, strict=True)]
    axes.set_yticks(range(len(profiles)), [_short(use.profile) for use in profiles])
    axes.set_ylim(*reversed(_room_for(len(profiles))))
    _sideways(axes)
    return axes, ends


def _kind_label(kind: str, faults: Sequence[FaultSpan]) -> str:
    """A kind of fault and whom it struck, or how often."""
    return _short(f"{kind}: {faults[0].target}" if len(faults) == 1 else f"{kind} ({len(faults):,} times)")


def _short(name: str) -> str:
    """A name that leaves room for what it names."""
    return name if len(name) <= 36 else f"{name[:35]}…"


def _from_zero(axes: Axes) -> None:
    """Numbers of things: from nothing, with their names."""
    axes.use_sticky_edges = False
    axes.set_ylim(bottom=0)
    _thousands(axes.yaxis)
    _legend_above(axes)


def _thousands(axis: Axis) -> None:
    """Large numbers in full: 2,000,000."""
    axis.set_major_formatter(lambda value, _: f"{value:,.10g}")


def _legend_above(axes: Axes) -> None:
    """Names of what is drawn, where nothing is drawn."""
    axes.legend(
        frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.2, fontsize=9,
        handlelength=1.4, columnspacing=1.2,
    )  # fmt: skip


def _room_for(rows: int) -> tuple[float, float]:
    """Limits of bars that lie: few of them do not fill the plot."""
    spare = max(0, 4 - rows) / 2
    return -0.5 - spare, rows - 0.5 + spare


def _sideways(axes: Axes) -> None:
    """Bars that lie: lines for their lengths, none between them."""
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x", color=RULE)
    axes.tick_params(axis="y", length=0)
    _thousands(axes.xaxis)
