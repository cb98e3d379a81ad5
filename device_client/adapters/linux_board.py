"""`device_client.ports.Board` on Linux: power supplies and thermal zones of sysfs, load average, NetworkManager.

A sensor that this machine lacks reads as None; one that is there and fails is named in `Conditions.broken`. Files are
read anew each time, a handful per reading; the one question that needs a process, whether the network is metered, is
asked once a minute and given `NETWORK_TIMEOUT_S`.

Sources: kernel documentation, ABI/testing/sysfs-class-power (type, scope, present, capacity, status, online) and
driver-api/thermal/sysfs-api (temp in millidegrees Celsius, type); NetworkManager's D-Bus reference, property Metered of
org.freedesktop.NetworkManager and type NMMetered; proc_loadavg(5).
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from device_client.config import BoardConfig
from device_client.eligibility import BrokenReading, Conditions
from fl_protocol.errors import ConfigError

NETWORK_CACHE_S = 60.0
"""How long NetworkManager's answer is used."""
NETWORK_TIMEOUT_S = 2.0
"""How long it may take to answer."""

_LOAD_WINDOW_S = 60.0
_BATTERY_TYPES = frozenset({"Battery", "UPS"})
_NETWORK_MANAGER = "org.freedesktop.NetworkManager"
_NETWORK_QUESTIONS: tuple[tuple[str, ...], ...] = (
    # A call, not get-property: it alone can be told not to start a NetworkManager that is installed but not in use.
    (
        *("busctl", "call", "--system", "--auto-start=no", _NETWORK_MANAGER, "/org/freedesktop/NetworkManager"),
        *("org.freedesktop.DBus.Properties", "Get", "ss", _NETWORK_MANAGER, "Metered"),
    ),
    ("nmcli", "-t", "-f", "GENERAL.METERED", "device", "show"),
)
_UNMETERED_BY_NUMBER = {"0": None, "1": False, "2": True, "3": False, "4": True}
"""NMMetered: unknown, yes, no, guess-yes, guess-no."""

Reading = TypeVar("Reading")


class _BrokenSensorError(Exception):
    """A sensor exists and did not answer; the text says which file or program, and how."""


class LinuxBoard:
    """The readings of the machine that this runs on.

    Args:
        config: ``[board]``.
        sysfs, proc: where the kernel shows itself.
        monotonic_s: a clock that only goes forward, in seconds.
        own_cpu_s: processor seconds that this process has used.
        cores: processors that share the load; those of this machine by default.
        network_timeout_s: how long NetworkManager may take to answer.
        search_path: where ``busctl`` and ``nmcli`` are looked for, as in ``PATH``, which is the default.

    Raises:
        ConfigError: the battery or zone that is named is not there.
    """

    def __init__(
        self,
        config: BoardConfig,
        *,
        sysfs: Path = Path("/sys"),
        proc: Path = Path("/proc"),
        monotonic_s: Callable[[], float] = time.monotonic,
        own_cpu_s: Callable[[], float] = time.process_time,
        cores: int | None = None,
        network_timeout_s: float = NETWORK_TIMEOUT_S,
        search_path: str | None = None,
    ) -> None:
        self._supplies = _PowerSupplies(sysfs / "class" / "power_supply", battery=config.battery)
        self._zones = _ThermalZones(sysfs / "class" / "thermal", zone=config.thermal_zone)
        load = _Load(proc / "loadavg", monotonic_s=monotonic_s, own_cpu_s=own_cpu_s, cores=cores or os.cpu_count() or 1)
        network = _NetworkManager(monotonic_s=monotonic_s, timeout_s=network_timeout_s, search_path=search_path)
        self._idle: Callable[[], bool | None] = {
            "auto": lambda: load.is_below(config.idle_load),
            "idle": lambda: True,
            "busy": lambda: False,
        }[config.idle]
        self._unmetered: Callable[[], bool | None] = {
            "auto": network.unmetered,
            "unmetered": lambda: True,
            "metered": lambda: False,
        }[config.network]

    def read(self) -> Conditions:
        """The readings of this moment."""
        broken: list[BrokenReading] = []

        def take(name: str, sensor: Callable[[], Reading | None]) -> Reading | None:
            try:
                return sensor()
            except _BrokenSensorError as error:
                broken.append(BrokenReading(name, str(error)))
                return None

        return Conditions(
            battery_percent=take("battery_percent", self._supplies.battery_percent),
            charging=take("charging", self._supplies.charging),
            idle=take("idle", self._idle),
            unmetered=take("unmetered", self._unmetered),
            temperature_celsius=take("temperature_celsius", self._zones.celsius),
            broken=tuple(broken),
        )


class _PowerSupplies:
    """Batteries and chargers of ``/sys/class/power_supply``."""

    def __init__(self, root: Path, *, battery: str) -> None:
        self._root = root
        self._battery = battery
        if battery in {"auto", "none"}:
            return
        batteries = [
            path.name for path in _or_none(_folders, root) or () if _or_none(_text, path / "type") in _BATTERY_TYPES
        ]
        if battery not in batteries:
            raise ConfigError(
                f"board.battery: there is no battery {battery!r} in {root};"
                f" expected auto, none or one of: {', '.join(batteries) or 'no battery is there'}"
            )

    def battery_percent(self) -> float | None:
        """Charge of the battery that counts."""
        battery = self._find_battery()
        if battery is None:
            return None
        capacity = _number(battery / "capacity")
        if capacity is not None:
            return capacity
        # Some fuel gauges give amounts only (µWh or µAh).
        for unit in ("energy", "charge"):
            now, full = _number(battery / f"{unit}_now"), _number(battery / f"{unit}_full")
            if now is not None and full:
                return 100.0 * now / full
        raise _BrokenSensorError(f"{battery} gives neither capacity, energy nor charge")

    def charging(self) -> bool | None:
        """Whether a charger is connected."""
        online = [_number(path / "online") for path in self._of_this_machine() if not _is_battery(path)]
        known = [value for value in online if value is not None]
        if any(known):  # 1, or 2 for a charger whose voltage is negotiated
            return True
        battery = self._find_battery()
        status = None if battery is None else _text(battery / "status")
        if status == "Charging":
            return True  # from a charger that is no supply of its own, such as a cradle
        if known or status in {"Discharging", "Not charging"}:
            return False
        # Where nothing else tells, a full battery that does not discharge is on its charger.
        return True if status == "Full" else None

    def _find_battery(self) -> Path | None:
        """The battery that is named, or the first of this machine that is in its bay."""
        if self._battery == "none":
            return None
        if self._battery != "auto":
            return self._root / self._battery
        batteries = (path for path in self._of_this_machine() if _is_battery(path))
        return next((path for path in batteries if _number(path / "present") != 0), None)

    def _of_this_machine(self) -> list[Path]:
        """Supplies that power this machine; those of its mice, pens and headsets have the scope Device."""
        return [path for path in _folders(self._root) if _text(path / "scope") != "Device"]


class _ThermalZones:
    """Temperatures of ``/sys/class/thermal``."""

    def __init__(self, root: Path, *, zone: str) -> None:
        self._root = root
        self._zone: Path | None = None
        self._hottest = zone == "auto"
        if zone in {"auto", "none"}:
            return
        zones = _or_none(_zones, root) or []
        named = {path.name: path for path in zones}
        # Numbers change when drivers load in another order, so a zone may also be named by its type.
        by_type = {_or_none(_text, path / "type"): path for path in reversed(zones)}
        self._zone = named.get(zone) or by_type.get(zone)
        if self._zone is None:
            there = ", ".join(f"{path.name} ({_or_none(_text, path / 'type')})" for path in named.values())
            raise ConfigError(
                f"board.thermal_zone: there is no zone {zone!r} in {root};"
                f" expected auto, none or one of: {there or 'no zone is there'}"
            )

    def celsius(self) -> float | None:
        """Temperature of the zone that is named, or of the hottest."""
        if self._zone is not None:
            return _celsius(self._zone)
        zones = _zones(self._root) if self._hottest else []
        if not zones:
            return None
        # A zone whose device is switched off (a Wi-Fi card, say) does not answer; the others do.
        found = [value for value in (_or_none(_celsius, zone) for zone in zones) if value is not None]
        if not found:
            raise _BrokenSensorError(f"none of the {len(zones)} zones in {self._root} can be read")
        return max(found)


class _Load:
    """The machine's load average, less what this process adds to it: training must not look like use."""

    def __init__(
        self, path: Path, *, monotonic_s: Callable[[], float], own_cpu_s: Callable[[], float], cores: int
    ) -> None:
        self._path = path
        self._monotonic_s, self._own_cpu_s = monotonic_s, own_cpu_s
        self._cores = cores
        self._last = (monotonic_s(), own_cpu_s())
        self._own_load = 0.0

    def is_below(self, limit: float) -> bool | None:
        """Whether others load each core less than `limit`."""
        text = _text(self._path)
        if text is None:
            return None
        try:
            load = float(text.split()[0])
        except (ValueError, IndexError):
            raise _BrokenSensorError(f"{self._path} holds {text!r}, not a load average") from None
        return (load - self._follow_own_load()) / self._cores < limit

    def _follow_own_load(self) -> float:
        """What this process adds: its use of processors, damped as the kernel damps its one-minute average."""
        now_s, cpu_s = self._monotonic_s(), self._own_cpu_s()
        elapsed_s, used_s = now_s - self._last[0], cpu_s - self._last[1]
        if elapsed_s > 0:
            self._last = (now_s, cpu_s)
            self._own_load += (used_s / elapsed_s - self._own_load) * -math.expm1(-elapsed_s / _LOAD_WINDOW_S)
        return self._own_load


class _NetworkManager:
    """Whether the network is metered, asked of NetworkManager through the first program that is installed."""

    def __init__(self, *, monotonic_s: Callable[[], float], timeout_s: float, search_path: str | None) -> None:
        self._monotonic_s = monotonic_s
        self._timeout_s = timeout_s
        self._search_path = search_path
        self._asked_s = -math.inf
        self._answer: bool | None = None
        self._failure: str | None = None

    def unmetered(self) -> bool | None:
        """The answer, at most a minute old; None when NetworkManager does not run or does not know."""
        now_s = self._monotonic_s()
        if now_s - self._asked_s >= NETWORK_CACHE_S:
            self._asked_s = now_s
            try:
                self._answer, self._failure = self._ask(), None
            except _BrokenSensorError as error:
                self._answer, self._failure = None, str(error)
        if self._failure is not None:
            raise _BrokenSensorError(self._failure)
        return self._answer

    def _ask(self) -> bool | None:
        """Run the program."""
        for name, *arguments in _NETWORK_QUESTIONS:
            program = shutil.which(name, path=self._search_path)
            if program is not None:
                output = _run([program, *arguments], timeout_s=self._timeout_s)
                return None if output is None else _unmetered(name, output)
        return None


def _run(command: Sequence[str], *, timeout_s: float) -> str | None:
    """What a program prints, None when it fails: NetworkManager, or the bus, does not run."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        raise _BrokenSensorError(f"{command[0]} did not answer within {timeout_s:g} s") from None
    except OSError as error:
        raise _BrokenSensorError(f"{command[0]} could not be run: {error.strerror}") from error
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def _unmetered(program: str, output: str) -> bool | None:
    """The answer in what `program` printed: ``v u 4`` of busctl, ``GENERAL.METERED:no (guessed)`` lines of nmcli."""
    try:
        if program == "busctl":
            return _UNMETERED_BY_NUMBER[output.rsplit(maxsplit=1)[-1]]
        answers = {line.partition(":")[2].split()[0] for line in output.splitlines() if line.strip()}
    except (IndexError, KeyError):
        raise _BrokenSensorError(f"{program} answered {output.strip()[:100]!r}, which means nothing") from None
    # nmcli does not say which of the networks ours goes over: one that is metered decides.
    return False if "yes" in answers else True if "no" in answers else None


def _folders(root: Path) -> list[Path]:
    """The devices of a class, sorted; none when the kernel does not have the class."""
    try:
        return sorted(root.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _BrokenSensorError(f"{root}: {error.strerror}") from error


def _text(path: Path) -> str | None:
    """A file's text without its newline, None where there is no such file."""
    try:
        return path.read_bytes().decode("ascii", "replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _BrokenSensorError(f"{path}: {error.strerror}") from error


def _number(path: Path) -> float | None:
    """A file's number, None where there is no such file."""
    text = _text(path)
    try:
        return None if text is None else float(text)
    except ValueError:
        raise _BrokenSensorError(f"{path} holds {text!r}, not a number") from None


def _zones(root: Path) -> list[Path]:
    """The thermal zones, without the cooling devices beside them."""
    return [path for path in _folders(root) if path.name.startswith("thermal_zone")]


def _celsius(zone: Path) -> float:
    """Temperature of a zone."""
    millidegrees = _number(zone / "temp")
    if millidegrees is None:
        raise _BrokenSensorError(f"{zone / 'temp'} is not there")
    return millidegrees / 1000


def _is_battery(supply: Path) -> bool:
    """Whether a supply is a battery, not a charger."""
    return _text(supply / "type") in _BATTERY_TYPES


def _or_none(read: Callable[[Path], Reading], path: Path) -> Reading | None:
    """The reading, None where the sensor fails."""
    try:
        return read(path)
    except _BrokenSensorError:
        return None
