"""Readings of Linux machines, from trees of files as their kernels show them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from device_client.adapters.linux_board import LinuxBoard
from device_client.config import BoardConfig
from device_client.eligibility import Conditions
from fl_protocol.errors import ConfigError

LAPTOP = {
    "class/power_supply/AC/type": "Mains",
    "class/power_supply/AC/online": "0",
    "class/power_supply/BAT0/type": "Battery",
    "class/power_supply/BAT0/present": "1",
    "class/power_supply/BAT0/capacity": "81",
    "class/power_supply/BAT0/status": "Discharging",
    "class/power_supply/hidpp_battery_0/type": "Battery",
    "class/power_supply/hidpp_battery_0/scope": "Device",
    "class/power_supply/hidpp_battery_0/capacity": "5",
    "class/power_supply/hidpp_battery_0/status": "Charging",
    "class/thermal/cooling_device0/type": "Processor",
    "class/thermal/thermal_zone0/type": "acpitz",
    "class/thermal/thermal_zone0/temp": "27800",
    "class/thermal/thermal_zone1/type": "x86_pkg_temp",
    "class/thermal/thermal_zone1/temp": "51000",
}
RASPBERRY_PI = {
    "class/thermal/thermal_zone0/type": "cpu-thermal",
    "class/thermal/thermal_zone0/temp": "48312",
}
FIXED = BoardConfig(network="unmetered", idle="idle")


class Machine:
    """A kernel's files, two clocks, and the programs that are installed."""

    def __init__(self, folder: Path, files: dict[str, str]) -> None:
        self.sysfs, self.proc, self.programs = folder / "sys", folder / "proc", folder / "bin"
        self.now_s, self.own_cpu_s = 0.0, 0.0
        for path in (self.sysfs, self.proc, self.programs):
            path.mkdir()
        self.proc.joinpath("loadavg").write_text("0.10 0.20 0.30 1/95 27601\n")
        for name, text in files.items():
            self.set(name, text)

    def set(self, name: str, text: str) -> None:
        path = self.sysfs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")

    def fail(self, name: str) -> None:
        """Make a file fail when it is read, as sysfs does when a chip does not answer."""
        path = self.sysfs / name
        path.unlink()
        path.mkdir()

    def install(self, program: str, script: str) -> None:
        path = self.programs / program
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def board(self, config: BoardConfig = FIXED, *, cores: int = 1) -> LinuxBoard:
        return LinuxBoard(
            config,
            sysfs=self.sysfs,
            proc=self.proc,
            monotonic_s=lambda: self.now_s,
            own_cpu_s=lambda: self.own_cpu_s,
            cores=cores,
            network_timeout_s=5.0,
            search_path=str(self.programs),
        )

    def read(self, config: BoardConfig = FIXED) -> Conditions:
        return self.board(config).read()


@pytest.fixture
def laptop(tmp_path: Path) -> Machine:
    return Machine(tmp_path, LAPTOP)


def _broken(conditions: Conditions) -> dict[str, str]:
    return {broken.reading: broken.cause for broken in conditions.broken}


def test_a_laptop_on_its_battery(laptop: Machine) -> None:
    assert laptop.read() == Conditions(
        battery_percent=81, charging=False, idle=True, unmetered=True, temperature_celsius=51
    )


def test_a_raspberry_pi_has_no_battery_and_no_charger(tmp_path: Path) -> None:
    assert Machine(tmp_path, RASPBERRY_PI).read() == Conditions(idle=True, unmetered=True, temperature_celsius=48.312)


def test_a_machine_without_any_of_the_classes_reads_none(tmp_path: Path) -> None:
    machine = Machine(tmp_path, {})
    (machine.proc / "loadavg").unlink()
    assert machine.read(BoardConfig()) == Conditions()


def test_this_machine_can_be_read() -> None:
    conditions = LinuxBoard(BoardConfig(network="metered")).read()
    assert conditions.unmetered is False
    assert isinstance(conditions.idle, bool)


class TestTheCharger:
    @pytest.mark.parametrize("status", ["Charging", "Full", "Not charging", "Unknown"])
    def test_is_connected_while_the_mains_are_online_whatever_the_battery_does(
        self, laptop: Machine, status: str
    ) -> None:
        laptop.set("class/power_supply/AC/online", "1")
        laptop.set("class/power_supply/BAT0/status", status)
        assert laptop.read().charging is True

    @pytest.mark.parametrize("status", ["Discharging", "Full", "Not charging", "Unknown"])
    def test_is_not_connected_while_the_mains_are_offline(self, laptop: Machine, status: str) -> None:
        laptop.set("class/power_supply/BAT0/status", status)
        assert laptop.read().charging is False

    def test_that_is_no_supply_of_its_own_shows_in_the_battery(self, laptop: Machine) -> None:
        laptop.set("class/power_supply/BAT0/status", "Charging")
        assert laptop.read().charging is True

    @pytest.mark.parametrize("kind", ["USB", "USB_PD", "Wireless"])
    @pytest.mark.parametrize(("online", "charging"), [("0", False), ("1", True), ("2", True)])
    def test_may_be_one_of_several(self, laptop: Machine, kind: str, online: str, charging: bool) -> None:
        laptop.set("class/power_supply/usb/type", kind)
        laptop.set("class/power_supply/usb/online", online)
        assert laptop.read().charging is charging

    @pytest.mark.parametrize(
        ("status", "charging"),
        [("Charging", True), ("Full", True), ("Discharging", False), ("Not charging", False), ("Unknown", None)],
    )
    def test_is_told_by_the_battery_where_nothing_else_tells(
        self, tmp_path: Path, status: str, charging: bool | None
    ) -> None:
        gauge = "class/power_supply/max17042"
        files = {f"{gauge}/type": "Battery", f"{gauge}/capacity": "50", f"{gauge}/status": status}
        assert Machine(tmp_path, files).read().charging is charging

    def test_of_a_machine_without_a_battery_is_its_mains(self, tmp_path: Path) -> None:
        files = {"class/power_supply/AC/type": "Mains", "class/power_supply/AC/online": "1"}
        conditions = Machine(tmp_path, files).read()
        assert (conditions.battery_percent, conditions.charging) == (None, True)

    def test_that_fails_is_named(self, laptop: Machine) -> None:
        laptop.fail("class/power_supply/AC/online")
        conditions = laptop.read()
        assert conditions.charging is None
        assert "AC/online" in _broken(conditions)["charging"]


class TestTheBattery:
    def test_is_the_first_that_is_in_its_bay(self, laptop: Machine) -> None:
        laptop.set("class/power_supply/BAT0/present", "0")
        laptop.fail("class/power_supply/BAT0/capacity")
        laptop.set("class/power_supply/BAT1/type", "Battery")
        laptop.set("class/power_supply/BAT1/capacity", "64")
        assert laptop.read().battery_percent == 64

    def test_can_be_named(self, laptop: Machine) -> None:
        assert laptop.read(BoardConfig(battery="hidpp_battery_0")).battery_percent == 5

    def test_can_be_left_out(self, laptop: Machine) -> None:
        assert laptop.read(BoardConfig(battery="none")).battery_percent is None

    @pytest.mark.parametrize("name", ["BAT7", "AC", ""])
    def test_that_is_named_and_not_there_is_refused_with_those_that_are(self, laptop: Machine, name: str) -> None:
        with pytest.raises(ConfigError, match=r"board.battery.*BAT0, hidpp_battery_0") as caught:
            laptop.board(BoardConfig(battery=name))
        assert repr(name) in str(caught.value)

    def test_that_is_named_and_goes_away_is_broken(self, laptop: Machine) -> None:
        board = laptop.board(BoardConfig(battery="BAT0"))
        for file in (laptop.sysfs / "class/power_supply/BAT0").iterdir():
            file.unlink()
        (laptop.sysfs / "class/power_supply/BAT0").rmdir()
        assert "BAT0" in _broken(board.read())["battery_percent"]

    @pytest.mark.parametrize("unit", ["energy", "charge"])
    def test_may_give_amounts_only(self, laptop: Machine, unit: str) -> None:
        (laptop.sysfs / "class/power_supply/BAT0/capacity").unlink()
        laptop.set(f"class/power_supply/BAT0/{unit}_now", "1500000")
        laptop.set(f"class/power_supply/BAT0/{unit}_full", "2000000")
        assert laptop.read().battery_percent == 75

    @pytest.mark.parametrize("text", ["", "eighty", "81 %"])
    def test_that_gives_no_number_is_named(self, laptop: Machine, text: str) -> None:
        laptop.set("class/power_supply/BAT0/capacity", text)
        conditions = laptop.read()
        assert conditions.battery_percent is None
        assert "BAT0/capacity" in _broken(conditions)["battery_percent"]

    def test_that_fails_is_named_and_the_other_sensors_are_read(self, laptop: Machine) -> None:
        laptop.fail("class/power_supply/BAT0/capacity")
        conditions = laptop.read()
        assert list(_broken(conditions)) == ["battery_percent"]
        assert conditions.temperature_celsius == 51

    def test_that_gives_nothing_at_all_is_named(self, laptop: Machine) -> None:
        (laptop.sysfs / "class/power_supply/BAT0/capacity").unlink()
        assert "neither capacity" in _broken(laptop.read())["battery_percent"]


class TestTheTemperature:
    @pytest.mark.parametrize(("zone", "celsius"), [("thermal_zone0", 27.8), ("x86_pkg_temp", 51.0), ("none", None)])
    def test_is_of_the_zone_that_is_named(self, laptop: Machine, zone: str, celsius: float | None) -> None:
        assert laptop.read(BoardConfig(thermal_zone=zone)).temperature_celsius == celsius

    def test_below_freezing_is_negative(self, laptop: Machine) -> None:
        laptop.set("class/thermal/thermal_zone0/temp", "-12500")
        assert laptop.read(BoardConfig(thermal_zone="acpitz")).temperature_celsius == -12.5

    def test_of_a_type_that_several_zones_have_is_the_first(self, laptop: Machine) -> None:
        laptop.set("class/thermal/thermal_zone1/type", "acpitz")
        assert laptop.read(BoardConfig(thermal_zone="acpitz")).temperature_celsius == 27.8

    def test_of_an_unknown_zone_is_refused_with_those_that_are_there(self, laptop: Machine) -> None:
        with pytest.raises(ConfigError, match=r"'skin'.*thermal_zone0 \(acpitz\), thermal_zone1 \(x86_pkg_temp\)"):
            laptop.board(BoardConfig(thermal_zone="skin"))

    def test_of_a_zone_that_is_switched_off_does_not_count(self, laptop: Machine) -> None:
        laptop.fail("class/thermal/thermal_zone1/temp")
        conditions = laptop.read()
        assert (conditions.temperature_celsius, conditions.broken) == (27.8, ())

    def test_of_a_named_zone_that_fails_is_named(self, laptop: Machine) -> None:
        laptop.fail("class/thermal/thermal_zone1/temp")
        assert (
            "thermal_zone1/temp"
            in _broken(laptop.read(BoardConfig(thermal_zone="x86_pkg_temp")))["temperature_celsius"]
        )

    def test_that_no_zone_gives_is_broken(self, laptop: Machine) -> None:
        laptop.fail("class/thermal/thermal_zone0/temp")
        laptop.fail("class/thermal/thermal_zone1/temp")
        assert "none of the 2 zones" in _broken(laptop.read())["temperature_celsius"]


class TestIdleness:
    @pytest.mark.parametrize(("load", "idle"), [("0.00", True), ("1.99", True), ("2.00", False), ("7.50", False)])
    def test_is_little_load_per_core(self, laptop: Machine, load: str, idle: bool) -> None:
        (laptop.proc / "loadavg").write_text(f"{load} 9.00 9.00 3/95 27601\n")
        assert laptop.board(BoardConfig(network="metered", idle_load=0.5), cores=4).read().idle is idle

    def test_can_be_a_fixed_answer(self, laptop: Machine) -> None:
        assert laptop.read(BoardConfig(network="metered", idle="busy")).idle is False

    @pytest.mark.parametrize("text", ["", "busy"])
    def test_that_cannot_be_read_is_named(self, laptop: Machine, text: str) -> None:
        (laptop.proc / "loadavg").write_text(text)
        assert "loadavg" in _broken(laptop.read(BoardConfig(network="metered")))["idle"]

    def _load_of_training(self, laptop: Machine, *, others: float, seen_s: float = 10.0) -> list[bool | None]:
        """Ten minutes of training on the only core, beside others' load; read every ten seconds."""
        board, load, idle = laptop.board(BoardConfig(network="metered")), 0.0, []
        for _ in range(60):
            laptop.now_s, laptop.own_cpu_s = laptop.now_s + 10, laptop.own_cpu_s + seen_s
            for _ in range(2):  # the kernel's average, which moves every five seconds
                load += (1.0 + others - load) * (1 - math.exp(-5 / 60))
            (laptop.proc / "loadavg").write_text(f"{load:.2f} 1.00 1.00 1/95 27601\n")
            idle.append(board.read().idle)
        return idle

    def test_is_not_lost_to_the_devices_own_training(self, laptop: Machine) -> None:
        assert all(self._load_of_training(laptop, others=0.2))

    def test_a_board_that_does_not_count_its_own_training_is_caught(self, laptop: Machine) -> None:
        assert not all(self._load_of_training(laptop, others=0.2, seen_s=0))

    def test_is_lost_to_others_beside_the_devices_own_training(self, laptop: Machine) -> None:
        assert not any(self._load_of_training(laptop, others=1.0)[5:])


class TestTheNetwork:
    AUTO = BoardConfig(idle="idle")
    # What `busctl call` prints for a variant of an unsigned number (systemd 252, against a live bus).
    BUSCTL = (("v u 0", None), ("v u 1", False), ("v u 2", True), ("v u 3", False), ("v u 4", True))
    NMCLI = (
        ("GENERAL.METERED:yes", False),
        ("GENERAL.METERED:yes (guessed)", False),
        ("GENERAL.METERED:no (guessed)", True),
        ("GENERAL.METERED:unknown", None),
        ("GENERAL.METERED:no\n\nGENERAL.METERED:yes (guessed)\n\nGENERAL.METERED:unknown", False),
        ("GENERAL.METERED:unknown\n\nGENERAL.METERED:no", True),
        ("", None),
    )

    @pytest.mark.parametrize(
        ("program", "output", "unmetered"),
        [*(("busctl", *answer) for answer in BUSCTL), *(("nmcli", *answer) for answer in NMCLI)],
    )
    def test_is_what_network_manager_says(
        self, laptop: Machine, program: str, output: str, unmetered: bool | None
    ) -> None:
        laptop.install(program, f"printf '%s\\n' '{output}'")
        conditions = laptop.read(self.AUTO)
        assert (conditions.unmetered, conditions.broken) == (unmetered, ())

    def test_is_asked_without_starting_network_manager(self, laptop: Machine) -> None:
        laptop.install("busctl", f'echo "$*" > {laptop.programs}/asked; echo v u 2')
        laptop.read(self.AUTO)
        asked = (laptop.programs / "asked").read_text().split()
        assert asked[0] == "call"
        assert "--auto-start=no" in asked
        assert asked[-4:] == ["Get", "ss", "org.freedesktop.NetworkManager", "Metered"]

    def test_is_not_known_without_a_program_that_can_ask(self, laptop: Machine) -> None:
        conditions = laptop.read(self.AUTO)
        assert (conditions.unmetered, conditions.broken) == (None, ())

    def test_is_not_known_where_network_manager_does_not_run(self, laptop: Machine) -> None:
        laptop.install("busctl", 'echo "The name is not activatable" >&2; exit 1')
        conditions = laptop.read(self.AUTO)
        assert (conditions.unmetered, conditions.broken) == (None, ())

    @pytest.mark.parametrize("program", ["busctl", "nmcli"])
    @pytest.mark.parametrize("output", ["v s yes", "12", "GENERAL.METERED:"])
    def test_that_is_answered_in_other_words_is_broken(self, laptop: Machine, program: str, output: str) -> None:
        laptop.install(program, f"echo '{output}'")
        assert program in _broken(laptop.read(self.AUTO))["unmetered"]

    def test_that_is_not_answered_is_broken(self, laptop: Machine) -> None:
        laptop.install("busctl", "exec sleep 600")
        board = LinuxBoard(self.AUTO, sysfs=laptop.sysfs, network_timeout_s=0.05, search_path=str(laptop.programs))
        assert "did not answer within 0.05 s" in _broken(board.read())["unmetered"]

    def test_that_cannot_be_asked_is_broken(self, laptop: Machine) -> None:
        laptop.install("busctl", "echo v u 2")
        (laptop.programs / "busctl").write_bytes(b"\x7fELF of another processor")
        assert "could not be run" in _broken(laptop.read(self.AUTO))["unmetered"]

    def test_is_asked_once_a_minute(self, laptop: Machine) -> None:
        laptop.install("busctl", f"echo asked >> {laptop.programs}/log; echo v u 4")
        board = laptop.board(self.AUTO)
        for laptop.now_s in (0, 30, 59, 60, 90, 119, 120):
            assert board.read().unmetered is True
        assert (laptop.programs / "log").read_text().split() == ["asked"] * 3

    def test_that_is_broken_is_asked_once_a_minute_too(self, laptop: Machine) -> None:
        laptop.install("busctl", f"echo asked >> {laptop.programs}/log; echo nonsense")
        board = laptop.board(self.AUTO)
        for laptop.now_s in (0, 30, 60):
            assert "unmetered" in _broken(board.read())
        laptop.install("busctl", "echo v u 4")
        laptop.now_s = 119
        assert "unmetered" in _broken(board.read())
        laptop.now_s = 120
        assert board.read().unmetered is True
        assert (laptop.programs / "log").read_text().split() == ["asked"] * 2

    @pytest.mark.parametrize(("answer", "unmetered"), [("metered", False), ("unmetered", True)])
    def test_can_be_a_fixed_answer(self, laptop: Machine, answer: str, unmetered: bool) -> None:
        laptop.install("busctl", f"touch {laptop.programs}/log")
        config = BoardConfig(idle="idle", network=answer)  # type: ignore[arg-type]
        assert laptop.read(config).unmetered is unmetered
        assert not (laptop.programs / "log").exists()
