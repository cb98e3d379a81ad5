"""The comparison of two simulated runs as one self-contained HTML file."""

from __future__ import annotations

import html

from firmware_sim.fleet_comparison import Comparison, table_rows
from firmware_sim.report_page import page_html, table_html


def comparison_html(comparison: Comparison) -> str:
    """The whole page.

    Args:
        comparison: of two runs; nothing on the page comes from anywhere else.
    """
    a, b = comparison.names
    title = f"{a} and {b}"
    return page_html(
        f"Covey simulations: {title}",
        f'<h1>Simulations: {html.escape(title)}</h1><p class="lead">{html.escape(_lead(comparison))}</p>'
        f"<h2>What was set differently</h2>{_settings(comparison)}"
        f'<div class="aligned">{_parts(comparison)}</div>',
    )


def _lead(comparison: Comparison) -> str:
    """What the page holds, and what has to be known first."""
    a, b = comparison.names
    explained = f"Differences are {b} less {a}, ratios {b} over {a}; – stands for a number that a run does not have."
    return " ".join([*comparison.cautions, explained])


def _settings(comparison: Comparison) -> str:
    """Keys of the scenarios."""
    if not comparison.settings:
        return '<p class="none">Nothing: the runs have the same scenario and the same seed.</p>'
    rows = [(entry.key, *(_set(value) for value in (entry.a, entry.b))) for entry in comparison.settings]
    return table_html(rows, header=("key", *comparison.names))


def _set(value: str | None) -> str:
    """A key's value."""
    return "not set" if value is None else value


def _parts(comparison: Comparison) -> str:
    """A table for each part."""
    rows = table_rows(comparison, none="–")
    header = ("", *comparison.names, "difference", "ratio")
    return "".join(
        f"<h2>{html.escape(part[:1].upper() + part[1:])}</h2>"
        + table_html([row[1:] for row in rows if row[0] == part], header=header, numbers=range(1, 5))
        for part in dict.fromkeys(row[0] for row in rows)
    )
