"""The same scenario and seed give the same bytes, however many shards simulate it and wherever they are."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from firmware_sim.fleet.engines import Engine, InProcess, Processes
from firmware_sim.fleet.simulation import SCENARIO, make_engine
from tests.firmware_sim.fleet.fleets import HANDED, HARDWARE, REAL, Outcome, folder_of, simulated

ENGINES: dict[str, Callable[[Path], Engine]] = {
    "two shards": lambda path: InProcess(path, count=2),
    "three shards": lambda path: InProcess(path, count=3),
    "two processes": lambda path: Processes(path, 2),
}


@pytest.fixture(scope="module", params=[HARDWARE, REAL, HANDED], ids=["hardware", "real", "handed"])
def scenario(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def alone(scenario: str, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What one shard in this process gives."""
    return simulated(folder_of(tmp_path_factory.mktemp("alone") / "run", scenario))


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_gives_the_same_bytes(scenario: str, alone: Outcome, engine: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "run", scenario)
    assert len(alone.models) >= 2
    assert simulated(folder, ENGINES[engine](folder / SCENARIO)) == alone


def test_another_seed_gives_other_events(scenario: str, alone: Outcome, tmp_path: Path) -> None:
    other = simulated(folder_of(tmp_path / "run", scenario, seed=4))
    assert other.events != alone.events
    if scenario in {REAL, HANDED}:
        assert not set(other.models) & set(alone.models)


@pytest.mark.parametrize("scenario", [HARDWARE, HANDED], ids=["hardware", "handed"])
def test_two_ray_actors_give_the_same_bytes(scenario: str, tmp_path: Path) -> None:
    if os.environ.get("COVEY_TESTS_NEED_RAY") != "1":
        pytest.importorskip("ray")
    alone = simulated(folder_of(tmp_path / "alone", scenario))
    folder = folder_of(tmp_path / "run", scenario)
    assert simulated(folder, make_engine("ray", folder / SCENARIO, 2)) == alone
