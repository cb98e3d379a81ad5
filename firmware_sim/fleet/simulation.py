"""A run's folder and what is in it: begin a run, go on with one, and leave metrics and a report."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from device_client.ports import Float32
from device_client.training import evaluate
from firmware_sim.attackers.kinds import ScalingBackdoor
from firmware_sim.attackers.trigger import backdoor_success
from firmware_sim.errors import FleetError
from firmware_sim.fleet.build import device_name
from firmware_sim.fleet.engines import Engine, InProcess, Processes
from firmware_sim.fleet.measuring import accuracy_on_curve, metrics_of
from firmware_sim.fleet.run import FleetRun, Progress
from firmware_sim.fleet.windows import FleetEvent
from firmware_sim.fleet_metrics import FaultSpan, FleetMetrics, FleetRound, read_metrics
from firmware_sim.fleet_report import fleet_report_html
from firmware_sim.profiles.catalogue import profile_names
from firmware_sim.scenario.loading import LoadedScenario, load_scenario
from firmware_sim.scenario.schema import Scenario
from firmware_sim.scenario.toml_lines import Path as Keys
from firmware_sim.scenario.toml_lines import with_text_at
from firmware_sim.sensors.assembly import make_sensor
from fl_protocol.adapters.config_files import relative_to_config
from fl_protocol.adapters.files import write_atomic
from fl_protocol.adapters.tflite_graph import TfliteGraph

SCENARIO, METRICS, REPORT, _TIMES = "scenario.toml", "fleet.json", "report.html", "wall.json"
_SERVICES = {"broker_restart": "broker", "aggregator_kill": "aggregator"}
EngineName = Literal["local", "ray"]


@dataclass(frozen=True)
class RunResult:
    """How a run ended: whether at its end, and what it measured; None for one that was stopped before."""

    finished: bool
    metrics: FleetMetrics | None


def begin_run(folder: Path, loaded: LoadedScenario, *, seed: int | None = None) -> LoadedScenario:
    """Make the folder of a new run; the scenario as it is kept there. Raises FleetError, ConfigError.

    Args:
        folder: new.
        loaded: what is to be run.
        seed: instead of the file's.
    """
    try:
        folder.mkdir(parents=True)
        text = loaded.text if seed is None else with_seed(loaded.text, seed)
        text = _with_files(folder, loaded, text)
        write_atomic(folder / SCENARIO, text.encode(), mode=0o644)
    except FileExistsError:
        raise FleetError(f"{folder} exists; give another folder with --out, or go on with --resume {folder}") from None
    except OSError as error:
        raise FleetError(f"the folder {folder} cannot be made ({error.strerror})") from error
    return load_scenario(folder / SCENARIO)


def _with_files(folder: Path, loaded: LoadedScenario, text: str) -> str:
    """Copy what a scenario names by path into a run's folder, so that the run can be moved; the text with new paths.

    Raises OSError.
    """
    scenario = loaded.scenario
    named: list[tuple[Keys, str | None, str]] = [
        (("model",), scenario.model if scenario.model.endswith(".covey") else None, "model.covey"),
        (("population", "traces"), scenario.population.traces, "traces.csv"),
        (("recorded",), scenario.recorded, "recorded"),
        (("population", "own_profiles"), scenario.population.own_profiles, "profiles"),
    ]
    for key, name, kept in named:
        if name is None:
            continue
        source, target = relative_to_config(loaded.path, name), folder / kept
        if source.is_dir():
            target.mkdir()
            wanted = [METRICS] if kept == "recorded" else [f"{one}.toml" for one in profile_names(source)]
            for file in wanted:
                (target / file).write_bytes((source / file).read_bytes())
        else:
            target.write_bytes(source.read_bytes())
        text = with_text_at(text, key, kept)
    return text


def with_seed(text: str, seed: int) -> str:
    """A scenario's text with another seed."""
    lines = text.splitlines()
    # A table may have a seed of its own.
    tables = next((at for at, line in enumerate(lines) if line.lstrip().startswith("[")), len(lines))
    top = [line for line in lines[:tables] if not line.replace(" ", "").startswith("seed=")]
    return "\n".join([f"seed = {seed}", *top, *lines[tables:]]) + "\n"


def resumed_run(folder: Path) -> LoadedScenario:
    """The scenario of a run that is to go on. Raises FleetError, ConfigError."""
    if not (folder / SCENARIO).exists():
        raise FleetError(f"{folder} holds no run of a scenario: expected {SCENARIO} in it")
    if (folder / METRICS).exists():
        raise FleetError(f"the run in {folder} is at its end; its report is {folder / REPORT}")
    return load_scenario(folder / SCENARIO)


def make_engine(name: EngineName, scenario: Path, shards: int) -> Engine:
    """What simulates the shards. Raises FleetError."""
    if name == "ray":
        from firmware_sim.fleet.ray_engine import RayActors  # noqa: PLC0415 - an extra of its own

        return RayActors(scenario, shards)
    return InProcess(scenario) if shards == 1 else Processes(scenario, shards)


def simulate(
    folder: Path,
    loaded: LoadedScenario,
    *,
    engine: EngineName,
    shards: int,
    told: Callable[[Progress], None],
    should_stop: Callable[[], bool],
) -> RunResult:
    """Run, or go on with, what is in a folder; write metrics and report when it is at its end.

    Raises:
        FleetError, ConfigError: it cannot be run.
    """
    with _disk_failures_told(folder):
        began_s = time.monotonic()
        earlier_s = _earlier_s(folder)
        simulates = make_engine(engine, folder / SCENARIO, shards)
        try:
            run = FleetRun(
                loaded,
                folder,
                simulates,
                told=told,
                should_stop=should_stop,
                faults=planned_faults(loaded),
                measure=measure_of(loaded),
                measure_attack=measure_attack_of(loaded),
            )
            finished = run.run()
        finally:
            simulates.close()
            wall_s = earlier_s + time.monotonic() - began_s
            with contextlib.suppress(OSError):  # whatever ended the run says more than a time that is not kept
                write_atomic(folder / _TIMES, json.dumps({"wall_s": wall_s}).encode(), mode=0o644)
        if not finished:
            return RunResult(finished=False, metrics=None)
        metrics = metrics_of(run, accuracies=_accuracies(run), wall_s=wall_s)
        write_results(folder, metrics)
        return RunResult(finished=True, metrics=metrics)


@contextlib.contextmanager
def _disk_failures_told(folder: Path) -> Iterator[None]:
    """A disk's error as a sentence."""
    try:
        yield
    except OSError as error:
        raise FleetError(
            f"the run in {folder} cannot go on ({error.strerror}); make room if its disk is full, and resume it"
        ) from error


def write_results(folder: Path, metrics: FleetMetrics) -> None:
    """Leave metrics and report in a run's folder."""
    write_atomic(folder / METRICS, msgspec.json.format(msgspec.json.encode(metrics), indent=1), mode=0o644)
    write_atomic(folder / REPORT, fleet_report_html(metrics).encode(), mode=0o644)


def replayed(
    scenario: Path, *, seed: int, device: str, should_stop: Callable[[], bool] = lambda: False
) -> Iterator[FleetEvent]:
    """Everything that one device of a run does, as it is simulated once more. Raises FleetError, ConfigError.

    Args:
        scenario: path of the run's scenario file.
        seed: of the run.
        device: by name.
        should_stop: whether to stop, asked after every window.
    """
    loaded = load_scenario(scenario)
    count = loaded.scenario.devices
    if device not in {device_name(index) for index in range(count)}:
        raise FleetError(f"device {device}: expected one from {device_name(0)} to {device_name(count - 1)}")
    with tempfile.TemporaryDirectory() as folder:
        kept = begin_run(Path(folder) / "run", loaded, seed=seed)
        found: list[FleetEvent] = []
        engine = InProcess(kept.path, traced=device)
        run = FleetRun(kept, kept.path.parent, engine, heard=found.append, should_stop=should_stop)
        for _ in run.steps():
            mine = [event for event in found if event.device == device]
            found.clear()
            yield from mine


def measure_of(loaded: LoadedScenario) -> Callable[[Float32], tuple[float, float]] | None:
    """How a model does on people who are on no device; None where no model is trained, or nobody records."""
    scenario = loaded.scenario
    if scenario.fidelity != "real" or scenario.sensors.kind == "none" or not scenario.held_out_windows:
        return None
    records = make_sensor(scenario.sensors, loaded.bundle.manifest, scenario.seed).held_out(scenario.held_out_windows)
    graph = TfliteGraph.of_bundle(loaded.bundle)
    personal = loaded.bundle.params[loaded.bundle.manifest.num_shared_parameters :]

    def measure(params: Float32) -> tuple[float, float]:
        found = evaluate(graph, np.concatenate([params, personal]), records)
        return found.correct / max(1, found.count), found.loss_sum / max(1, found.count)

    return measure


def measure_attack_of(loaded: LoadedScenario) -> Callable[[Float32], dict[str, float]] | None:
    """How far a back door is in a model; None where nobody wants one, or models are not measured."""
    scenario = loaded.scenario
    doors = [one for one in loaded.attackers if isinstance(one, ScalingBackdoor)]
    if not doors or scenario.sensors.kind == "none" or not scenario.held_out_windows:
        return None
    records = make_sensor(scenario.sensors, loaded.bundle.manifest, scenario.seed).held_out(scenario.held_out_windows)
    graph = TfliteGraph.of_bundle(loaded.bundle)
    personal = loaded.bundle.params[loaded.bundle.manifest.num_shared_parameters :]

    def measure(params: Float32) -> dict[str, float]:
        whole = np.concatenate([params, personal])
        return {"backdoor_success": max(backdoor_success(graph, whole, records, one) for one in doors)}

    return measure


def _accuracies(run: FleetRun) -> list[tuple[float | None, float | None]]:
    """Accuracy and loss after each round, as the scenario's fidelity has them. Raises FleetError."""
    scenario, rounds = run.loaded.scenario, run.chronicle.rounds
    if scenario.fidelity == "surrogate":
        return accuracy_on_curve(scenario.surrogate, rounds)
    if scenario.fidelity == "recorded" and scenario.recorded is not None:
        return played_back(relative_to_config(run.loaded.path, scenario.recorded) / METRICS, rounds)
    unknown = (None, None)
    return [run.chronicle.measured.get(one.round, unknown) for one in rounds]


def played_back(path: Path, rounds: Sequence[FleetRound]) -> list[tuple[float | None, float | None]]:
    """Accuracy and loss after as many committed rounds as an earlier run had; its last ones for what goes beyond.

    Args:
        path: of the earlier run's ``fleet.json``.
        rounds: of this run.

    Raises:
        FleetError: it cannot be read, or has no accuracy.
    """
    earlier = read_metrics(path, FleetMetrics)
    known = [(one.accuracy, one.loss) for one in earlier.rounds if one.accuracy is not None]
    if not known:
        raise FleetError(f"recorded: the run in {path.parent} has no accuracy; take one with fidelity real")
    count, result = 0, list[tuple[float | None, float | None]]()
    for one in rounds:
        committed = one.outcome == "committed"
        result.append(known[min(count, len(known) - 1)] if committed else (None, None))
        count += committed
    return result


def planned_faults(loaded: LoadedScenario) -> tuple[FaultSpan, ...]:
    """What is planned to befall fleet and services, for the report's timeline."""
    scenario, spans = loaded.scenario, list[FaultSpan]()
    for fault in loaded.faults:
        kind = str(fault.__struct_config__.tag)
        at_s = getattr(fault, "at_s", None)
        lasts_s = float(getattr(fault, "for_s", 0.0) or 0.0)
        starts_s = 0.0 if at_s is None else float(at_s)
        ends_s = scenario.duration_s if at_s is None else starts_s + lasts_s
        target = str(getattr(fault, "target", _SERVICES.get(kind, "fleet")))
        detail = ", ".join(
            f"{name} {getattr(fault, name):g}" for name in ("probability", "every_s") if getattr(fault, name, None)
        )
        spans.append(
            FaultSpan(
                kind=kind, starts_s=starts_s, ends_s=min(ends_s, scenario.duration_s), target=target, detail=detail
            )
        )
    return (*spans, *_planned_waves(scenario))


def _planned_waves(scenario: Scenario) -> Iterator[FaultSpan]:
    """The waves in which an update of the firmware is offered, each until the next."""
    table = scenario.rollout
    if table is None:
        return
    ends_s = [*(wave.at_s for wave in table.waves[1:]), scenario.duration_s]
    for wave, end_s in zip(table.waves, ends_s, strict=True):
        detail = f"{table.image.version}, defect {table.image.defect}"
        yield FaultSpan(
            kind="rollout",
            starts_s=min(wave.at_s, scenario.duration_s),
            ends_s=min(end_s, scenario.duration_s),
            target=f"{wave.share:.0%}",
            detail=detail,
        )


def _earlier_s(folder: Path) -> float:
    """How long earlier sessions of the run took."""
    try:
        return float(json.loads((folder / _TIMES).read_text(encoding="utf-8"))["wall_s"])
    except (OSError, ValueError, KeyError):
        return 0.0
