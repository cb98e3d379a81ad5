"""``covey-fleet report`` and ``covey-fleet compare``: what runs left in their folders, drawn and set side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aggregator.command_line import say_table
from firmware_sim.errors import FleetError
from firmware_sim.fleet_metrics import FleetMetrics, read_metrics
from fl_protocol.adapters.files import write_atomic

_SIMULATED, _LIVE = "fleet.json", "metrics.json"


def add_report_commands(app: typer.Typer) -> None:
    """Make the commands part of an application."""
    app.command()(report)
    app.command(epilog="Example: covey-fleet compare runs/week runs/week-with-outage --out outage.html")(compare)


def report(
    folder: Annotated[Path, typer.Argument(help="Of a run: one that holds fleet.json or metrics.json.")],
) -> None:
    """Draw a run's report.html again: of a simulation from its fleet.json, of a demo from its metrics.json."""
    if (folder / _SIMULATED).exists():
        from firmware_sim.fleet_report import fleet_report_html  # noqa: PLC0415 - help needs no plots

        text = fleet_report_html(read_metrics(folder / _SIMULATED, FleetMetrics))
    else:
        from firmware_sim.metrics import RunMetrics  # noqa: PLC0415 - help needs no database
        from firmware_sim.report import report_html  # noqa: PLC0415

        text = report_html(read_metrics(folder / _LIVE, RunMetrics))
    _write(folder / "report.html", text)


def compare(
    a: Annotated[Path, typer.Argument(help="Folder of a simulated run.")],
    b: Annotated[Path, typer.Argument(help="Folder of the run that is set against it.")],
    out: Annotated[Path | None, typer.Option(help="Write the comparison as an HTML file too.")] = None,
) -> None:
    """Set two simulated runs side by side: what each measured, and what their scenarios set differently."""
    from firmware_sim.fleet_comparison import compare as compared  # noqa: PLC0415 - as above
    from firmware_sim.fleet_comparison import table_rows  # noqa: PLC0415
    from firmware_sim.fleet_comparison_page import comparison_html  # noqa: PLC0415

    runs = [read_metrics(folder / _SIMULATED, FleetMetrics) for folder in (a, b)]
    comparison = compared(runs[0], runs[1], names=(a.name, b.name) if a.name != b.name else None)
    for caution in comparison.cautions:
        typer.echo(caution)
    settings = [(entry.key, entry.a or "-", entry.b or "-") for entry in comparison.settings]
    if settings:
        say_table("Set differently", ("key", *comparison.names), settings)
    else:
        typer.echo("Nothing was set differently: the runs have the same scenario and the same seed.")
    say_table("Measured", ("part", "", *comparison.names, "difference", "ratio"), table_rows(comparison, none="-"))
    if out is not None:
        _write(out, comparison_html(comparison))


def _write(path: Path, text: str) -> None:
    """Write a page and say where."""
    try:
        write_atomic(path, text.encode(), mode=0o644)
    except OSError as error:
        raise FleetError(f"{path} cannot be written ({error.strerror})") from error
    typer.echo(str(path))
