"""A run that was stopped or killed, and then resumed, is the run that nobody disturbed."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from firmware_sim.errors import FleetError
from firmware_sim.fleet import checkpoint as checkpoints
from firmware_sim.fleet.checkpoint import latest_checkpoint, write_checkpoint
from firmware_sim.fleet.engines import InProcess, Processes
from firmware_sim.fleet.simulation import SCENARIO
from firmware_sim.fleet.windows import Window
from tests.enrolments import broken_copy
from tests.firmware_sim.fleet.fleets import HANDED, HARDWARE, REAL, Outcome, folder_of, prepared, simulated
from tests.firmware_sim.fleet.small_fleets import scenario_file

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return simulated(folder_of(tmp_path_factory.mktemp("undisturbed") / "run", HARDWARE))


@pytest.fixture(scope="module")
def handed(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return simulated(folder_of(tmp_path_factory.mktemp("handed") / "run", HANDED))


def stopped_after(folder: Path, windows: int) -> None:
    """Simulate so many windows, and let go of everything as a kill does."""
    run = prepared(folder, InProcess(folder / SCENARIO))
    steps = run.steps()
    for _ in itertools.islice(steps, windows):
        pass
    steps.close()


def has_checkpoint(folder: Path) -> bool:
    return (folder / "checkpoint" / "state.pickle").exists()


def test_a_run_that_stops_again_and_again_is_the_run_that_nobody_disturbed(
    undisturbed: Outcome, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path / "run", HARDWARE)
    stopped_after(folder, 3)
    assert not has_checkpoint(folder)  # it begins anew
    stopped_after(folder, 700)
    assert has_checkpoint(folder)
    stopped_after(folder, 200)
    assert simulated(folder) == undisturbed


def test_what_was_handed_over_in_memory_is_put_down_with_the_run(handed: Outcome, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "run", HANDED)
    held = 0
    for windows in (120, 100, 200, 200):
        stopped_after(folder, windows)
        found = latest_checkpoint(folder)
        assert found is not None
        assert not found.finished
        held += sum(len(record.vectors) for record in found.records)
    assert held
    assert simulated(folder, Processes(folder / SCENARIO, 2)) == handed


def test_a_hand_over_that_ends_with_its_daemon_is_caught(
    handed: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = broken_copy(
        "firmware_sim.hand_over", ("self._vectors, self", "vectors.clear()\n        self._vectors, self")
    )
    monkeypatch.setattr("firmware_sim.fleet.maker.HandOver", broken.HandOver)
    assert simulated(folder_of(tmp_path / "run", HANDED)) != handed


def test_a_real_run_resumed_on_another_number_of_shards_gives_the_same_models(tmp_path: Path) -> None:
    whole = simulated(folder_of(tmp_path / "whole", REAL))
    folder = folder_of(tmp_path / "run", REAL)
    run = prepared(folder, InProcess(folder / SCENARIO))
    steps = run.steps()
    while not has_checkpoint(folder):
        next(steps)
    next(steps)
    steps.close()
    assert simulated(folder, InProcess(folder / SCENARIO, count=2)) == whole


def test_a_run_killed_at_its_end_does_nothing_more(undisturbed: Outcome, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "run", HARDWARE)
    simulated(folder)
    (folder / "events.csv").open("a").write("half a li")  # what was written after the checkpoint does not count
    assert simulated(folder) == undisturbed


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "firmware_sim.cli", *map(str, arguments)]


def started(*arguments: object, **environment: object) -> subprocess.Popen[str]:
    """The command itself, in a process group of its own, as in a terminal."""
    return subprocess.Popen(
        command(*arguments),
        env=os.environ | {"PYTHONPATH": str(ROOT)} | {name: str(value) for name, value in environment.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def started_run(folder: Path, text: str, *, shards: int, engine: str = "local") -> subprocess.Popen[str]:
    """A run that has a checkpoint."""
    scenario = folder.with_suffix(".toml")
    scenario.write_text(text)
    process = started("run", scenario, "--out", folder, "--shards", shards, "--engine", engine)
    wait_for_checkpoint(folder, process)
    return process


def has_processes(group: int) -> bool:
    """Whether anything runs, 10 seconds after the first process of a group has ended."""
    for _ in range(1000):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.01)
    return True


def written_ns(folder: Path) -> int:
    """When a run was put down last; 0: it was not yet, or is at this moment."""
    try:
        return (folder / "checkpoint" / "state.pickle").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def wait_for_checkpoint(folder: Path, process: subprocess.Popen[str], *, after_ns: int = 0) -> None:
    """Until there is one that is newer, or the process has ended."""
    deadline_s = time.monotonic() + 60
    while written_ns(folder) <= after_ns and process.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert written_ns(folder) > after_ns


def resumed(folder: Path) -> Outcome:
    """Go on, in this process, with what is in a folder."""
    return simulated(folder)


LONG = HARDWARE.replace("rounds = 3", "rounds = 9").replace("days = 0.6", "days = 2.0")


@pytest.fixture(scope="module")
def long_one(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return simulated(folder_of(tmp_path_factory.mktemp("long") / "run", LONG))


def test_a_killed_process_is_resumed_from_its_checkpoint(long_one: Outcome, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = started_run(folder, LONG, shards=1)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "fleet.json").exists()
    assert resumed(folder) == long_one


def test_a_run_that_hands_over_in_memory_and_is_killed_twice_gives_the_same_models(
    handed: Outcome, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = started_run(folder, HANDED, shards=2)
    held = 0
    for left in (1, 0):
        process.kill()  # the first process alone: the shards' must notice
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        assert not has_processes(process.pid)
        found = latest_checkpoint(folder)
        assert found is not None
        assert not found.finished
        held += sum(len(record.vectors) for record in found.records)
        if left:
            killed_ns = written_ns(folder)
            process = started("run", "--resume", folder, "--shards", 2)
            wait_for_checkpoint(folder, process, after_ns=killed_ns)
    assert held
    assert simulated(folder, Processes(folder / SCENARIO, 2)) == handed


def check_stopped(process: subprocess.Popen[str], told: str) -> None:
    """It was stopped, says how to go on, and leaves nothing running."""
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert told in output
    assert "Traceback" not in output
    assert not has_processes(process.pid)


def test_ctrl_c_in_a_terminal_stops_a_run_of_several_processes_which_can_be_resumed(
    long_one: Outcome, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = started_run(folder, LONG, shards=2)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all
    check_stopped(process, f"--resume {folder}")
    assert resumed(folder) == long_one


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_on_ray_that_is_stopped_leaves_nothing_running_and_can_be_resumed(
    number: signal.Signals, long_one: Outcome, tmp_path: Path
) -> None:
    if os.environ.get("COVEY_TESTS_NEED_RAY") != "1":
        pytest.importorskip("ray")
    folder = tmp_path / "run"
    process = started_run(folder, LONG, shards=2, engine="ray")
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # a terminal sends it to all
    else:
        process.send_signal(number)
    check_stopped(process, f"--resume {folder}")
    assert resumed(folder) == long_one


def test_ctrl_c_in_a_terminal_stops_a_replay_and_leaves_nothing(tmp_path: Path) -> None:
    scenario, temporary = tmp_path / "longer.toml", tmp_path / "temporary"
    scenario.write_text(LONG.replace("rounds = 9", "rounds = 5000").replace("days = 2.0", "days = 300.0"))
    temporary.mkdir()
    process = started("replay", 3, "device-0000001", "--scenario", scenario, TMPDIR=temporary)
    assert process.stdout is not None
    assert "study_started" in process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    check_stopped(process, f"covey-fleet replay 3 device-0000001 --scenario {scenario}")
    assert not list(temporary.iterdir())


class KilledError(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("second", [False, True], ids=["first", "after a torn one"])
def test_a_checkpoint_torn_at_any_step_leaves_the_old_or_the_new(
    second: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path / "run", REAL)
    stopped_after(folder, 200)
    old = latest_checkpoint(folder)
    assert old is not None
    new = checkpoints.Checkpoint(**{**vars(old), "now_s": old.now_s + 1})
    if second:  # an earlier write was killed between its two renames: the old one has the other name
        (folder / "checkpoint").rename(folder / "checkpoint.old")
    done = False
    for kill_at in itertools.count():
        calls = itertools.count()

        def step(original: object, at: int = kill_at, calls: itertools.count[int] = calls) -> object:
            def call(*arguments: object, **named: object) -> object:
                if next(calls) == at:
                    raise KilledError
                return original(*arguments, **named)  # type: ignore[operator]

            return call

        with monkeypatch.context() as patch:
            for owner, name in (
                (checkpoints.shutil, "rmtree"),
                (checkpoints.shutil, "copyfile"),
                (checkpoints.pickle, "dump"),
                (checkpoints, "fsync_folder"),
                (Path, "rename"),
            ):
                patch.setattr(owner, name, step(getattr(owner, name)))
            try:
                write_checkpoint(folder, new)
                done = True
            except KilledError:
                pass
        found = latest_checkpoint(folder)
        assert found is not None
        assert found.now_s in {old.now_s, new.now_s}
        if done:
            break
    assert found.now_s == new.now_s
    assert kill_at > 6


def test_a_checkpoint_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    kept = tmp_path / "checkpoint"
    kept.mkdir()
    for content in (b"", b"half of a pickle", b"\x80\x05K\x01."):
        (kept / "state.pickle").write_bytes(content)
        with pytest.raises(FleetError, match="run the scenario anew"):
            latest_checkpoint(tmp_path)


def simulate_windows(engine: Processes) -> None:
    """As many as it takes: a line may need a moment before it breaks."""
    for number in range(1000):
        engine.begin(Window(float(number), float(number + 1)))
        engine.collect()


def test_the_death_of_a_shards_process_is_one_sentence(tmp_path: Path) -> None:
    engine = Processes(scenario_file(tmp_path), 2)
    try:
        engine.start(0.0, None)
        os.kill(engine._workers[1].process.pid or 0, signal.SIGKILL)
        with pytest.raises(FleetError, match=r"the process of shard 1 died \(exit code -9\).*resumed"):
            simulate_windows(engine)
    finally:
        engine.close()
