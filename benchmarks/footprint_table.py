"""How benchmarks/device_footprint.py compares two devices and prints them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ROWS = (
    ("install_mb", "install size, MB"),
    ("compiled_mb", "install size with byte code, MB"),
    ("import_s", "import time, s"),
    ("cold_start_s", "start until connected, s"),
    ("processes_idle", "processes, idle"),
    ("idle_rss_mb", "RSS idle, MB (sum of its processes)"),
    ("idle_pss_mb", "PSS idle, MB (shared pages divided)"),
    ("peak_high_water_mb", "peak RSS training, MB (sum of high-water marks)"),
    ("peak_pss_mb", "peak PSS training, MB (shared pages divided)"),
    ("idle_cpu_s_per_minute", "CPU idle, s a minute"),
    ("cpu_s_per_round", "CPU, s a round"),
    ("idle_bytes_per_minute", "bytes idle, a minute"),
    ("up_bytes_per_round", "bytes up, a round"),
    ("down_bytes_per_round", "bytes down, a round"),
)
RATIOS = (
    "install_over_flower",
    "compiled_over_flower",
    "rss_over_flower",
    "high_water_over_flower",
    "pss_over_flower",
    "idle_over_flower",
)


def ratios(covey: Mapping[str, Any], flower: Mapping[str, Any] | None) -> dict[str, float | None]:
    """Ours over Flower's; null without it.

    ``rss_over_flower`` and ``idle_over_flower`` set our whole resident memory against Flower's with shared pages
    divided, which is the comparison that favours Flower; the two others use one measure for both.
    """
    if flower is None:
        return dict.fromkeys(RATIOS)
    pairs = (
        (covey["install_mb"], flower["install_mb"]),
        (covey["compiled_mb"], flower["compiled_mb"]),
        (covey["peak_high_water_mb"], flower["peak_pss_mb"]),
        (covey["peak_high_water_mb"], flower["peak_high_water_mb"]),
        (covey["peak_pss_mb"], flower["peak_pss_mb"]),
        (covey["idle_rss_mb"], flower["idle_pss_mb"]),
    )
    return {name: round(ours / theirs, 3) for name, (ours, theirs) in zip(RATIOS, pairs, strict=True)}


def as_table(report: Mapping[str, Any]) -> str:
    """The whole report for people: a table for each runtime, then the ratios and what fills the environments."""
    lines = []
    for extra, name in (("device", "LiteRT"), ("tflite", "tflite-runtime")):
        if extra in report:
            lines += _section(report[extra], f"covey[{extra}]", f"Flower, {name}")
    cnn, bare = report["watch_cnn"], report["bare_numpy_and_litert"]
    lines += [
        f"watch_cnn: peak RSS {cnn['peak_rss_mb']} MB, start {cnn['cold_start_s']} s",
        f"numpy and LiteRT alone: peak RSS {bare['peak_rss_mb']} MB, start {bare['start_s']} s",
        f"{report['repeats']} runs each of {report['rounds_each']} rounds, {report['period_s']:g} s a round;"
        f" idle for {report['idle_s']:g} s; {report['flower_version']}; Python {report['python']}; {report['cpu']}",
    ]
    return "\n".join(lines)


def _section(both: Mapping[str, Any], ours: str, theirs: str) -> list[str]:
    """One runtime."""
    covey, flower = both["covey"], both["flower"]
    lines = [f"{'':<50}{ours:>16}{theirs:>24}"]
    lines += [f"{text:<50}{_number(covey[key]):>16}{_number((flower or {}).get(key)):>24}" for key, text in ROWS]
    if flower is None:
        return [*lines, f"Flower was not measured: {both['no_flower']}", ""]
    lines += [f"{name:<50}{both[name]:>16.3f}" for name in RATIOS]
    for owner, column in ((ours, covey), (theirs, flower)):
        lines.append(f"{owner}: " + ", ".join(f"{name} {size:g} MB" for name, size in column["largest_mb"].items()))
    return [*lines, ""]


def _number(value: float | None) -> str:
    """Digits that a reader can use."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"
