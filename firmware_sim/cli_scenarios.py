"""``covey-fleet run`` and ``covey-fleet scenarios``: fleets in virtual time."""

from __future__ import annotations

import datetime
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from firmware_sim.errors import FleetError, SettingsError
from firmware_sim.settings import BrokerChoice
from fl_protocol.errors import CoveyError

if TYPE_CHECKING:
    from firmware_sim.fleet.run import Progress as RunProgress
    from firmware_sim.fleet.simulation import RunResult
    from firmware_sim.fleet_metrics import FleetMetrics
    from firmware_sim.profiles.hardware_profile import HardwareProfile
    from firmware_sim.scenario.loading import LoadedScenario

_AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
_STOPPED = 130
_DAY_S = 86_400.0


def run(
    scenarios: Annotated[
        list[Path] | None, typer.Argument(help="Scenario files, or names of those that come with covey.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="New folder for the run; default: runs/, its name and the time.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Instead of the scenario's.")] = None,
    engine: Annotated[str, typer.Option(help="local: processes of this machine; ray: Ray actors.")] = "local",
    shards: Annotated[int, typer.Option(min=1, help="Parts that are simulated at the same time.")] = 2,
    resume: Annotated[Path | None, typer.Option(help="Folder of a run that was stopped or killed.")] = None,
    parquet: Annotated[bool, typer.Option("--parquet", help="Write the events as Parquet too.")] = False,
    live: Annotated[
        bool, typer.Option("--live", help="In real time: a process for each device, over a real broker.")
    ] = False,
    broker: Annotated[BrokerChoice, typer.Option(help="--live: auto takes mosquitto where it is installed.")] = "auto",
    longest_hours: Annotated[float, typer.Option(min=0, help="--live: refuse what would take longer.")] = 2.0,
) -> None:
    """Simulate a fleet: real devices on virtual hardware, the real aggregator, in virtual time.

    Examples:
      covey-fleet run first-round                       one that comes with covey

      covey-fleet run scenarios/*.toml                  one after the other; the last line says which failed

      covey-fleet run my.toml --seed 7 --shards 4       one of your own

      covey-fleet run --resume runs/first-round-...     go on where a run was put down

      covey-fleet run first-round --live                in real time, with processes and a broker
    """
    _check_options(scenarios or [], out=out, engine=engine, resume=resume, live=live)
    from firmware_sim.fleet.simulation import begin_run, resumed_run  # noqa: PLC0415 - help needs no database
    from firmware_sim.scenario.loading import load_scenario  # noqa: PLC0415

    console = Console()
    if resume is not None:
        _simulate(console, resume, resumed_run(resume), engine=engine, shards=shards)
        _write_parquet(resume, wanted=parquet)
        return
    loaded = [load_scenario(path) for path in scenarios or []]  # all of them before the first is run
    if live:
        from firmware_sim.fleet.live_folder import require_live  # noqa: PLC0415 - as above

        for one in loaded:
            require_live(one, longest_hours=longest_hours)

    def run_one(one: LoadedScenario) -> None:
        folder = out or _new_folder(one.scenario.name)
        begun = begin_run(folder, one, seed=seed)
        if live:
            _run_live(console, folder, begun, broker=broker)
        else:
            _simulate(console, folder, begun, engine=engine, shards=shards)
        _write_parquet(folder, wanted=parquet)

    _run_all(console, loaded, run_one)


def _run_all(console: Console, loaded: list[LoadedScenario], run_one: Callable[[LoadedScenario], None]) -> None:
    """Run one after the other; of several, those that fail do not keep the others. Raises CoveyError."""
    if len(loaded) == 1:
        run_one(loaded[0])
        return
    failed: list[str] = []
    for one in loaded:
        try:
            run_one(one)
        except CoveyError as error:
            failed.append(one.scenario.name)
            _say(console, f"Failed:     {one.scenario.name}: {error}")
    if failed:
        raise FleetError(f"{len(failed)} of {len(loaded)} scenarios failed: {', '.join(failed)}")


def _check_options(scenarios: list[Path], *, out: Path | None, engine: str, resume: Path | None, live: bool) -> None:
    """Raises SettingsError: options that do not go together."""
    if engine not in {"local", "ray"}:
        raise SettingsError(f"--engine: expected local or ray, got {engine}")
    if bool(scenarios) == bool(resume):
        raise SettingsError("expected scenarios, or --resume and the folder of a run")
    if out is not None and len(scenarios) > 1:
        raise SettingsError("--out: expected one scenario with it; leave it out for several")
    if live and resume is not None:
        raise SettingsError("--resume: a live run cannot be put down; start it anew with --live")


def replay(
    seed: Annotated[int, typer.Argument(help="The run's seed.")],
    device: Annotated[str, typer.Argument(help="Name of the device, such as device-0000012.")],
    scenario: Annotated[Path, typer.Option(help="The run's scenario: its folder's scenario.toml.")],
    until_crash: Annotated[bool, typer.Option(help="Stop when it has crashed.")] = True,
) -> None:
    """Simulate a run again, exactly as it was, and tell everything that one device did.

    The whole fleet is simulated, since what a device is sent depends on the others.

    Example: covey-fleet replay 1 device-0000012 --scenario runs/bad-firmware-.../scenario.toml
    """
    console = Console()
    with _stopped_by_signals() as should_stop:
        from firmware_sim.fleet.simulation import replayed  # noqa: PLC0415 - as above

        for event in replayed(scenario, seed=seed, device=device, should_stop=should_stop):
            detail = event.detail if event.event == "crash" else event.detail[:400]
            _say(console, f"{event.time_s:14.3f} s  {event.event:22}  {detail}")
            if event.event == "crash" and until_crash:
                return
        if should_stop():
            again = f"covey-fleet replay {seed} {device} --scenario {scenario}"
            _say(console, f"Stopped; nothing is kept of a replay, to see it from its beginning: {again}")
            raise typer.Exit(_STOPPED)


def calibrate(folder: Annotated[Path, typer.Argument(help="Folder of a run with the fidelity real.")]) -> None:
    """Fit the curve of a surrogate to a run in which a model was trained; print it as a scenario's table.

    Example: covey-fleet calibrate runs/first-round-2026-01-31-120000 >> my.toml
    """
    from firmware_sim.fleet.calibration import fitted_curve  # noqa: PLC0415 - as above
    from firmware_sim.fleet.simulation import METRICS  # noqa: PLC0415
    from firmware_sim.fleet_metrics import FleetMetrics, read_metrics  # noqa: PLC0415

    fit = fitted_curve(read_metrics(folder / METRICS, FleetMetrics).rounds)
    curve = fit.curve
    typer.echo(f"# fitted to {folder.name}: errors of {100 * fit.error:.1f} points (root mean square)")
    typer.echo(
        f"[surrogate]\nfloor = {curve.floor:.3f}\nceiling = {curve.ceiling:.3f}\nupdates = {curve.updates:.0f}.0"
    )


def scenarios_command(as_json: _AsJson = False) -> None:
    """List the scenarios that come with covey."""
    from aggregator.command_line import say_list  # noqa: PLC0415 - as above
    from firmware_sim.scenario.loading import load_scenario, shipped_scenarios  # noqa: PLC0415

    loaded = [load_scenario(path) for path in shipped_scenarios()]
    rows = [
        (one.path.stem, one.scenario.devices, one.scenario.days, one.scenario.fidelity, one.scenario.about)
        for one in loaded
    ]
    say_list("Scenarios", ("name", "devices", "days", "fidelity", "about"), rows, as_json=as_json)


def profiles_command(
    name: Annotated[str | None, typer.Argument(help="Print this profile's TOML.")] = None,
    as_json: _AsJson = False,
) -> None:
    """List the hardware profiles that come with covey, or print one, with the sources of its figures.

    Examples:
      covey-fleet profiles                battery, speed and residency of each

      covey-fleet profiles smartwatch     its TOML
    """
    from aggregator.command_line import say_list  # noqa: PLC0415 - help needs none of it
    from firmware_sim.profiles.catalogue import FOLDER, load_profile, profile_names  # noqa: PLC0415

    if name is not None:
        typer.echo((FOLDER / f"{load_profile(name).name}.toml").read_text(encoding="utf-8"), nl=False)
        return
    rows = [
        (
            one.name,
            "mains" if one.battery is None else f"{one.battery.capacity_mwh / 1000:.1f} Wh",
            f"{one.processor.flop_per_s / 1e9:g} GFLOP/s",
            _residency(one),
            one.title,
        )
        for one in map(load_profile, profile_names())
    ]
    say_list("Profiles", ("name", "battery", "speed", "daemon", "what it is"), rows, as_json=as_json)


def _residency(profile: HardwareProfile) -> str:
    """Whether a profile's daemon stays, or when its system starts it."""
    from firmware_sim.profiles.hardware_profile import Job  # noqa: PLC0415 - as above

    job = profile.residency
    if not isinstance(job, Job):
        return "stays"
    conditions = [name for name in ("charging", "idle", "unmetered") if getattr(job, name)]
    return f"a job at most every {job.period_s / 3600:g} h, while {', '.join(conditions) or 'on'}"


def _write_parquet(folder: Path, *, wanted: bool) -> None:
    """The events as Parquet beside the CSV. Raises FleetError: pyarrow is missing."""
    from firmware_sim.fleet_events import to_parquet  # noqa: PLC0415 - as above

    if wanted:
        to_parquet(folder / "events.csv", folder / "events.parquet")


def _new_folder(name: str) -> Path:
    """Where a run of a scenario goes."""
    return Path("runs") / f"{name}-{datetime.datetime.now():%Y-%m-%d-%H%M%S}"  # noqa: DTZ005 - a name


def _simulate(console: Console, folder: Path, loaded: LoadedScenario, *, engine: str, shards: int) -> None:
    """Simulate one scenario, and say what came out."""
    from firmware_sim.fleet.simulation import simulate  # noqa: PLC0415 - as above

    scenario = loaded.scenario
    _say(
        console, f"Scenario:   {scenario.name}: {scenario.devices} devices, {scenario.days:g} days, {scenario.fidelity}"
    )
    _say(console, f"Run folder: {folder}")
    with _shown(console) as told, _stopped_by_signals() as should_stop:
        result = simulate(
            folder,
            loaded,
            engine="ray" if engine == "ray" else "local",
            shards=min(shards, scenario.devices),
            told=told,
            should_stop=should_stop,
        )
    _tell(console, folder, result)


def _run_live(console: Console, folder: Path, loaded: LoadedScenario, *, broker: BrokerChoice) -> None:
    """Run one scenario in real time, and say what came out."""
    from firmware_sim.fleet.live_folder import create_live  # noqa: PLC0415 - as above
    from firmware_sim.fleet.live_run import run_live  # noqa: PLC0415

    scenario = loaded.scenario
    _say(console, f"Scenario:   {scenario.name}, live: {scenario.devices} processes, at most {scenario.days:g} days")
    _say(console, f"Run folder: {folder}")
    made = create_live(folder, loaded)
    with _stopped_by_signals() as should_stop, _shown(console) as told:
        result = run_live(
            made,
            broker=broker,
            told=told,
            should_stop=should_stop,
            said=lambda text: _say(console, f"Broker:     {text}"),
        )
    _tell(console, folder, result)
    if not result.finished:
        _say(console, "Stopped before its end")
        raise typer.Exit(_STOPPED)


@contextmanager
def _shown(console: Console) -> Iterator[Callable[[RunProgress], None]]:
    """A bar: how far, rounds, devices woken a second, virtual over real time, and when it will be done."""
    columns = (
        TextColumn("{task.fields[what]}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rates]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("run", total=None, what="starting", rates="")
        first: list[tuple[float, float, int]] = []

        def told(progress: RunProgress) -> None:
            now_s = time.monotonic()
            if not first:
                first.append((now_s, progress.now_s, progress.starts))
            began_s, virtual_s, starts = first[0]
            elapsed_s = max(1e-3, now_s - began_s)
            rates = f"{(progress.starts - starts) / elapsed_s:,.0f} wakes/s, "
            rates += f"{(progress.now_s - virtual_s) / elapsed_s:,.0f} x real time, {progress.awake} awake"
            what = f"day {progress.now_s / _DAY_S:.2f}, round {progress.committed}/{progress.rounds}"
            # Whichever ends it first: the time, or the rounds.
            share = max(progress.now_s / progress.duration_s, progress.committed / progress.rounds)
            bar.update(task, total=1.0, completed=min(1.0, share), what=what, rates=rates)

        yield told


@contextmanager
def _stopped_by_signals() -> Iterator[Callable[[], bool]]:
    """Whether somebody wants it to stop: after the window that is simulated now."""
    stopped: list[int] = []
    before = {
        one: signal.signal(one, lambda number, _frame: stopped.append(number))
        for one in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield lambda: bool(stopped)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell(console: Console, folder: Path, result: RunResult) -> None:
    """What came out, and where it is."""
    if result.metrics is None:
        _say(console, f"Stopped; go on with: covey-fleet run --resume {folder}")
        raise typer.Exit(_STOPPED)
    for line in _summary(result.metrics):
        _say(console, line)
    for name in ("report.html", "fleet.json", "events.csv"):
        _say(console, f"  {folder / name}")


def _summary(metrics: FleetMetrics) -> list[str]:
    """The result in a few lines."""
    committed = [one for one in metrics.rounds if one.outcome == "committed"]
    delivered = metrics.deliveries.get("delivered", 0)
    lines = [
        f"Rounds:     {len(committed)} committed, {len(metrics.rounds) - len(committed)} aborted, in "
        f"{metrics.virtual_s / _DAY_S:.2f} virtual days; {delivered:,} updates delivered",
        f"Simulation: {metrics.wall_s:.1f} s, {metrics.virtual_s / max(metrics.wall_s, 1e-3):,.0f} times real time, "
        f"{metrics.peak_rss_bytes / 2**20:,.0f} MiB",
    ]
    if metrics.live is not None:
        lines = [
            f"Rounds:     {len(committed)} committed, {len(metrics.rounds) - len(committed)} aborted; {delivered:,} "
            f"updates delivered in {metrics.wall_s:.1f} s; {metrics.peak_rss_bytes / 2**20:,.0f} MiB in all processes",
            f"Left out:   {', '.join(metrics.live.left_out) or 'nothing'}",
        ]
    accuracies = [one.accuracy for one in committed if one.accuracy is not None]
    if accuracies:
        lines.append(f"Accuracy:   {100 * accuracies[-1]:.1f} % ({metrics.fidelity})")
    if metrics.crashes:
        first = metrics.crashes[0]
        again = f"see it again with covey-fleet replay {metrics.seed} {first.device} --scenario ..."
        if metrics.live is not None:
            again = f"what it said is in logs/{first.device}.err"
        lines.append(f"Crashes:    {len(metrics.crashes)}; the first: {first.device}, {first.error}; {again}")
    return lines


def _say(console: Console, text: str) -> None:
    """A line as it is."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
