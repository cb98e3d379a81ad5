"""``covey-fleet run`` and ``replay``: what a person can get wrong is told in a sentence."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from firmware_sim import cli
from firmware_sim.scenario.loading import load_scenario
from tests.firmware_sim.fleet.small_fleets import BASE, scenario_file


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str]:
    """Exit code, and the sentence on standard error."""
    monkeypatch.setattr(sys, "argv", ["covey-fleet", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert isinstance(ended.value.code, int)
    return ended.value.code, told


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    return scenario_file(tmp_path / "scenarios", task={**BASE["task"], "rounds": 1})


def test_what_to_run_has_to_be_said_and_only_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, scenario: Path, tmp_path: Path
) -> None:
    for arguments in (["run"], ["run", scenario, "--resume", tmp_path]):
        assert refused(capsys, monkeypatch, *arguments)[0] == 2
    code, told = refused(capsys, monkeypatch, "run", scenario, "--engine", "spark")
    assert code == 2
    assert "expected local" in told
    code, told = refused(capsys, monkeypatch, "run", scenario, scenario, "--out", tmp_path / "run")
    assert code == 2
    assert "--out" in told


def test_a_folder_is_not_run_in_twice_and_a_finished_run_is_not_resumed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, scenario: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["covey-fleet", "run", str(scenario), "--out", str(folder), "--shards", "1"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    kept = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    code, told = refused(capsys, monkeypatch, "run", scenario, "--out", folder)
    assert code == 1
    assert f"{folder} exists" in told
    code, told = refused(capsys, monkeypatch, "run", "--resume", folder)
    assert code == 1
    assert "at its end" in told
    assert kept == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_what_holds_no_run_is_not_resumed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"")
    for folder in (tmp_path, tmp_path / "nowhere"):
        code, told = refused(capsys, monkeypatch, "run", "--resume", folder)
        assert code == 1
        assert "holds no run" in told
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


@pytest.mark.parametrize("device", ["device-0000008", "device-0000003x", "device-3", "watch", ""])
def test_only_a_device_of_the_fleet_is_replayed(
    device: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, scenario: Path
) -> None:
    code, told = refused(capsys, monkeypatch, "replay", "1", device, "--scenario", scenario)
    assert code == 1
    assert "expected one from device-0000000 to device-0000007" in told


def test_a_runs_folder_finds_the_traces_that_its_scenario_names(tmp_path: Path) -> None:
    from firmware_sim.fleet.simulation import begin_run  # noqa: PLC0415 - with the database

    path = scenario_file(tmp_path / "scenarios", population={"profiles": {"smartwatch": 1}, "traces": "people.csv"})
    (path.parent / "people.csv").write_text("")
    kept = begin_run(tmp_path / "run", load_scenario(path))
    assert kept.scenario.population.traces is not None
    assert (kept.path.parent / kept.scenario.population.traces).is_file()


def test_a_run_too_short_for_a_round_has_metrics_and_a_report_too(tmp_path: Path) -> None:
    from firmware_sim.fleet.simulation import begin_run, simulate  # noqa: PLC0415 - with the database

    folder = tmp_path / "run"
    loaded = begin_run(folder, load_scenario(scenario_file(tmp_path / "scenarios", days=0.00001)))
    result = simulate(folder, loaded, engine="local", shards=1, told=lambda progress: None, should_stop=lambda: False)
    assert result.finished
    assert result.metrics is not None
    assert result.metrics.rounds == ()
    assert sum(profile.updates for profile in result.metrics.profiles) == 0
    assert "<html" in (folder / "report.html").read_text()


def test_of_several_scenarios_one_that_fails_is_named_and_the_others_are_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    fine = scenario_file(tmp_path / "fine", name="fine")
    broken = scenario_file(tmp_path / "broken", name="broken", model="watch_cnn")
    monkeypatch.setattr("firmware_sim.cli_scenarios._new_folder", lambda name: tmp_path / f"run-{name}")
    (tmp_path / "run-broken").mkdir()  # where its run should go
    code, told = refused(capsys, monkeypatch, "run", broken, fine, "--shards", "1")
    assert code == 1
    assert "1 of 2 scenarios failed: broken" in told
    assert (tmp_path / "run-fine" / "fleet.json").exists()


def test_another_seed_leaves_the_seeds_of_tables_alone() -> None:
    from firmware_sim.fleet.simulation import with_seed  # noqa: PLC0415 - with the database

    assert with_seed('seed = 1\nname = "x"\n[task]\nseed = 5\n', 7) == 'seed = 7\nname = "x"\n[task]\nseed = 5\n'
