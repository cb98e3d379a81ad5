"""The picture of benchmarks/simulation.py: how rates and memory grow with clients, and a week's cost with devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

COLOURS = {"covey": "#1f77b4", "covey_off": "#17becf", "flower_simulation": "#7f7f7f", "pfl": "#ff7f0e"}
LABELS = {"covey": "Covey", "covey_off": "Covey, wire off", "flower_simulation": "Flower", "pfl": "pfl"}
TITLES = {"real": "Real training", "noop": "No-op, 9k parameters", "million": "No-op, 1M parameters"}


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Draw what was measured into an image file.

    Args:
        report: as the benchmark prints it; what it lacks is left out.
        path: of the image.
    """
    kinds = [kind for kind in TITLES if any(one["kind"] == kind for one in report["growth"])]
    weeks = report["weeks"]
    columns = len(kinds) + bool(weeks)
    figure, axes = plt.subplots(2, columns, figsize=(3.6 * columns, 6), layout="constrained", squeeze=False)
    for column, kind in enumerate(kinds):
        records = [one for one in report["growth"] if one["kind"] == kind]
        _growth(axes[0][column], records, "client_rounds_per_s", ylabel="client-rounds/s")
        _growth(axes[1][column], records, "peak_pss_mb", ylabel="peak memory (PSS), MB")
        axes[0][column].set_title(TITLES[kind], fontsize=10)
        axes[1][column].set_xlabel("clients")
    if weeks:
        _week(axes[0][-1], weeks, "seconds", ylabel="seconds")
        _week(axes[1][-1], weeks, "peak_pss_mb", ylabel="peak memory (PSS), MB")
        axes[0][-1].set_title("A virtual week", fontsize=10)
        axes[1][-1].set_xlabel("devices")
    lines = {line.get_label(): line for one in axes[0][: len(kinds)] for line in one.get_lines()}
    if lines:
        figure.legend(
            lines.values(), lines.keys(), loc="outside upper center", ncols=len(lines), frameon=False, fontsize=8
        )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _growth(axes: Axes, records: Sequence[Mapping[str, Any]], key: str, *, ylabel: str) -> None:
    """One line for each simulator; of several numbers of processes the fastest counts."""
    for simulator, label in LABELS.items():
        best: dict[int, Mapping[str, Any]] = {}
        for one in records:
            if one["simulator"] == simulator and one.get("client_rounds_per_s"):
                there = best.get(one["clients"])
                if there is None or one["client_rounds_per_s"] > there["client_rounds_per_s"]:
                    best[one["clients"]] = one
        points = sorted((clients, one[key]) for clients, one in best.items() if one.get(key))
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=COLOURS[simulator], label=label, markersize=4)
    _finish(axes, ylabel)


def _week(axes: Axes, weeks: Sequence[Mapping[str, Any]], key: str, *, ylabel: str) -> None:
    """What was measured, and what would be if cost went with the number of devices from the largest fleet down."""
    points = sorted((one["devices"], one[key]) for one in weeks)
    axes.plot(*zip(*points, strict=True), "o-", color=COLOURS["covey"], markersize=4, label="measured")
    devices, cost = points[-1]
    smallest = points[0][0]
    axes.plot([smallest, devices], [cost * smallest / devices, cost], ":", color="#7f7f7f", label="proportional")
    axes.legend(frameon=False, fontsize=8)
    _finish(axes, ylabel)


def _finish(axes: Axes, ylabel: str) -> None:
    """Both axes are logarithmic, so that growth in proportion is a slope of one."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,.0f}")
        axis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.set_ylabel(ylabel)
    axes.grid(visible=True, which="major", color="#e5e5e5")
    axes.spines[["top", "right"]].set_visible(False)
