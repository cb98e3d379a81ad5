"""The picture of benchmarks/device_footprint.py: install size and peak memory, ours beside Flower's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

OURS, THEIRS = "#1f77b4", "#b0b0b0"
LABELS = {"device": "LiteRT", "tflite": "tflite-runtime"}


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Draw both panels into an image file."""
    shown = [extra for extra in LABELS if report.get(extra, {}).get("flower")]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.2), layout="constrained")
    _bars(left, report, shown, ours="install_mb", theirs="install_mb", title="Clean install, MB")
    title = "Peak memory while training, MB"
    _bars(right, report, shown, ours="peak_high_water_mb", theirs="peak_pss_mb", title=title)
    left.legend(frameon=False, fontsize=8)
    right.set_xlabel("Covey: RSS. Flower: sum over its processes, shared pages divided.", fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _bars(axes: Axes, report: Mapping[str, Any], shown: list[str], *, ours: str, theirs: str, title: str) -> None:
    """Two bars for each runtime, with their values."""
    sides = ((-0.2, OURS, "Covey", "covey", ours), (0.2, THEIRS, "Flower", "flower", theirs))
    for offset, colour, name, side, key in sides:
        values = [report[extra][side][key] for extra in shown]
        bars = axes.bar([place + offset for place in range(len(shown))], values, 0.38, color=colour, label=name)
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_xticks(range(len(shown)), [LABELS[extra] for extra in shown])
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.15)
