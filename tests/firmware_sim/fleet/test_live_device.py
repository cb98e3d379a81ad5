"""A live run's device: the real one, with the virtual one's randomness, which must reach nobody else's aggregator."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from device_client.assembly import DeviceFiles
from firmware_sim.errors import FleetError
from firmware_sim.fleet import life_file, live_device
from firmware_sim.fleet.life_file import Lives, begin_life, write_lives
from firmware_sim.fleet.live_device import SeededDevice
from firmware_sim.seeded_entropy import SeededEntropy
from fl_protocol.errors import ConfigError
from tests.enrolments import broken_copy
from tests.firmware_sim.fleet.live_scenarios import configured


@pytest.fixture(scope="module")
def device_toml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A device's configuration, with an empty store."""
    made = configured(tmp_path_factory.mktemp("live"))
    path = made.run.device_toml("device-0000002")
    with closing(DeviceFiles.load(path).open_store(create=True)):
        return path


def draws(path: Path) -> tuple[bytes, bytes]:
    """What a daemon draws first for training, and for its session."""
    with SeededDevice.open(path) as device:
        ports: Any = device._ports
        return ports.entropy(32), ports.jitter(8)


def test_it_draws_what_the_virtual_device_draws_in_the_same_life(device_toml: Path) -> None:
    write_lives(device_toml.parent, Lives("7", "device-0000002"))
    for life in (1, 2):
        seed = f"7 device-0000002 {life}"
        assert draws(device_toml) == (SeededEntropy(seed)(32), SeededEntropy(f"{seed} session")(8))


def check_no_two_lives_draw_alike(module: ModuleType, folder: Path) -> None:
    module.write_lives(folder, module.Lives("7", "device-0000000"))
    assert len({module.begin_life(folder).entropy_seed for _ in range(3)}) == 3


def test_no_two_lives_draw_alike(tmp_path: Path) -> None:
    check_no_two_lives_draw_alike(life_file, tmp_path)


def test_lives_that_are_not_counted_are_caught(tmp_path: Path) -> None:
    broken = broken_copy("firmware_sim.fleet.life_file", ("before.lives + 1", "1"))
    with pytest.raises(AssertionError):
        check_no_two_lives_draw_alike(broken, tmp_path)


def test_a_life_is_counted_before_anything_is_drawn_in_it(tmp_path: Path) -> None:
    write_lives(tmp_path, Lives("7", "device-0000000"))
    first = begin_life(tmp_path)  # and then it is killed
    assert (first.lives, begin_life(tmp_path).lives) == (1, 2)


@pytest.mark.parametrize("content", [None, b"", b'{"seed": 7}'], ids=["missing", "empty", "of another kind"])
def test_a_device_of_no_live_run_is_one_sentence(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / life_file.LIFE_FILE).write_bytes(content)
    with pytest.raises(
        FleetError, match=r"life\.json: expected the device of a live run, which covey-fleet run --live"
    ):
        begin_life(tmp_path)


def check_stays_on_this_machine(module: ModuleType, path: Path) -> None:
    elsewhere = path.with_name("elsewhere.toml")
    elsewhere.write_text(path.read_text().replace("127.0.0.1", "broker.example"))
    with pytest.raises(ConfigError, match=r"protects nobody.* got broker\.example; run covey-device"):
        module.SeededDevice.open(elsewhere).close()


def test_seeded_noise_is_for_a_broker_on_this_machine_only(device_toml: Path) -> None:
    check_stays_on_this_machine(live_device, device_toml)


def test_a_device_that_would_talk_to_any_broker_is_caught(device_toml: Path) -> None:
    broken = broken_copy(
        "firmware_sim.fleet.live_device",
        ("if elsewhere :=", "if False and (elsewhere :="),
        ("- _THIS_MACHINE:", "- _THIS_MACHINE):"),
    )
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check_stays_on_this_machine(broken, device_toml)


def test_its_errors_and_exit_codes_are_those_of_the_device(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "firmware_sim.fleet.live_device", "run", "--config", str(tmp_path / "no.toml")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("live_device: configuration ")


def test_a_process_loads_no_more_than_the_device_needs() -> None:
    """There are up to 64 of them on a machine."""
    program = "import sys, firmware_sim.fleet.live_device; print(*{name.split('.')[0] for name in sys.modules})"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    loaded = set(result.stdout.split())
    assert "device_client" in loaded
    assert not loaded & {"aggregator", "sqlalchemy", "simpy", "typer", "rich", "matplotlib"}
