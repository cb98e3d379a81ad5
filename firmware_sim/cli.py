"""The command ``covey-fleet`` (typer and rich)."""

from __future__ import annotations

import contextlib
import datetime
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from aggregator.command_line import make_app, run_app
from firmware_sim import cli_scenarios
from firmware_sim.cli_fleet_reports import add_report_commands
from firmware_sim.errors import FleetError, SettingsError
from firmware_sim.settings import BrokerChoice, DemoSettings, Engine, named_helpers
from firmware_sim.watch_data import default_cache, load_recordings
from fl_protocol.errors import CoveyError

if TYPE_CHECKING:
    from firmware_sim.metrics import RunMetrics
    from firmware_sim.run_folder import RunFolder

_HELP = """Run fleets of real device daemons.

Examples:

  covey-fleet demo                                  20 wrists train one model over MQTT, under a privacy budget

  covey-fleet demo --held-out 1,2 --rounds 20       measure on other people, stop earlier

  covey-fleet demo --no-dp                          without noise, to see what privacy costs

  covey-fleet demo --engine open                    without helpers: the aggregator sees each update

  covey-fleet demo --resume runs/2026-01-31-1200    go on with a run that was stopped

  covey-fleet run first-round                       simulate a fleet in virtual time; scenarios lists them

  covey-fleet report runs/2026-01-31-1200           draw its report again

  covey-fleet compare runs/week runs/winter         set two simulated runs side by side

Exit codes: 0 done, 1 error, 2 usage, 130 stopped before the end (resume it).
"""
_STOPPED = 130

app = make_app("covey-fleet", _HELP)
app.command()(cli_scenarios.run)
app.command()(cli_scenarios.replay)
app.command()(cli_scenarios.calibrate)
app.command("scenarios")(cli_scenarios.scenarios_command)
add_report_commands(app)


def main() -> None:
    """Entry point."""
    run_app(app, "covey-fleet", [(SettingsError, 2), (CoveyError, 1)])


@app.command()
def demo(
    held_out: Annotated[
        str, typer.Option(help="People (1 to 10) who never train; accuracy is measured on them.")
    ] = "9,10",
    rounds: Annotated[int, typer.Option(help="Rounds to run.")] = 60,
    epsilon: Annotated[float, typer.Option(help="Record-level privacy budget of each wrist, at delta 1e-5.")] = 3.0,
    no_dp: Annotated[bool, typer.Option("--no-dp", help="Train without noise; no privacy is claimed.")] = False,
    engine: Annotated[
        Engine, typer.Option(help="secure: updates are masked, helpers unmask sums; open: the aggregator sees each.")
    ] = "secure",
    helpers: Annotated[int, typer.Option(help="Helpers, each of another operator, with the engine secure.")] = 2,
    broker: Annotated[BrokerChoice, typer.Option(help="auto takes mosquitto where it is installed.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="New folder for the run; default: runs/ and the time.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Folder of a stopped run; its settings stand.")] = None,
) -> None:
    """Wrists of the smartwatch recordings train one model over MQTT; see what it learns and what it costs."""
    console = Console()
    if resume is not None:
        folder, settings = _stopped_run(resume)
    else:
        settings = DemoSettings(
            held_out=_people(held_out),
            rounds=rounds,
            epsilon=None if no_dp else epsilon,
            engine=engine,
            helpers=helpers,
        )
        folder = _new_run(out, settings, console)
    _run(folder, settings, console, broker)


def _stopped_run(path: Path) -> tuple[RunFolder, DemoSettings]:
    """A run that is to go on."""
    from firmware_sim.run_folder import RunFolder  # noqa: PLC0415 - help and wrong options need no database

    folder = RunFolder(path)
    return folder, folder.load_settings()


def _new_run(path: Path | None, settings: DemoSettings, console: Console) -> RunFolder:
    """Everything a new run needs, in its folder."""
    from firmware_sim.demo_folder import create_run  # noqa: PLC0415 - as above

    path = path or Path("runs") / datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")  # noqa: DTZ005 - a name
    _say(console, f"Run folder: {path}")
    return create_run(path, settings, load_recordings(default_cache()))


def _run(folder: RunFolder, settings: DemoSettings, console: Console, choice: BrokerChoice) -> None:
    """Start the broker and the run; tell what came out."""
    from firmware_sim.brokers import start_broker  # noqa: PLC0415 - as above
    from firmware_sim.demo import DemoRun  # noqa: PLC0415

    broker = start_broker(choice, folder, settings)
    run = DemoRun(folder, settings, console, broker)
    try:
        _say(console, f"Broker:     {broker.description}")
        _say(console, f"Fleet:      {_fleet(settings)}; each its own process")
        _say(console, f"Engine:     {_engine(settings)}")
        finished = run.run()
    except FleetError:
        with contextlib.suppress(CoveyError):
            run.write_results()  # as far as it came, and what went wrong
        raise
    finally:
        broker.stop()
    metrics = run.write_results()
    _summary(console, folder, metrics)
    if not finished:
        _say(console, f"Stopped; go on with: covey-fleet demo --resume {folder.path}")
        raise typer.Exit(_STOPPED)


def _fleet(settings: DemoSettings) -> str:
    """What processes run."""
    number = len(settings.operators)
    return ", ".join(
        [
            "1 aggregator",
            *([f"{number} helper{'s' if number > 1 else ''}"] if number else []),
            f"{len(settings.training_wrists)} wrists train",
            f"{len(settings.held_out_wrists)} held-out wrists measure",
        ]
    )


def _engine(settings: DemoSettings) -> str:
    """Who sees what of the updates."""
    if settings.engine == "open":
        return "open: the aggregator sees each update"
    unmasked = f"sums of at least {settings.minimum_cohort} are unmasked by {named_helpers(settings.operators)}"
    return f"secure: updates are masked; {unmasked}"


def _summary(console: Console, folder: RunFolder, metrics: RunMetrics) -> None:
    """The result, and where everything is."""
    if metrics.final is not None:
        people = ", ".join(f"person {name}: {100 * value:.1f} %" for name, value in metrics.final.by_person.items())
        accuracy = f"{100 * metrics.final.accuracy:.1f} % of {metrics.final.windows} windows"
        _say(console, f"\nUnseen people: {accuracy} ({people})")
        privacy = "none claimed: trained without noise"
        if metrics.settings.epsilon is not None:
            spent = max(metrics.epsilon_spent.values(), default=0.0)
            privacy = f"largest ε spent {spent:.3f} of {metrics.settings.epsilon:g} at δ {metrics.settings.delta:g}"
        _say(console, f"Privacy:       {privacy}")
    times_s = metrics.unmasking_times_s
    if times_s:
        _say(console, f"Unmasking:     {statistics.median(times_s):.2f} s at the median, {times_s[-1]:.2f} s at most")
    for name in ("report.html", "metrics.json", "model.covey", "model.tflite", "logs"):
        if (folder.path / name).exists():
            _say(console, f"  {folder.path / name}")


def _say(console: Console, text: str) -> None:
    """A line as it is: paths keep their brackets, and are not broken where the terminal ends."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _people(text: str) -> tuple[int, ...]:
    """People from the command line."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise SettingsError(f"--held-out: expected numbers such as 9,10, got {text!r}") from None


if __name__ == "__main__":
    main()
