"""The systemd unit and the example configuration: real commands, documented paths, the sandbox, matching timeouts."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import msgspec
import pytest

from device_client.adapters.systemd import Systemd
from device_client.cli import _EXIT_CODES, _parser
from device_client.config import DeviceConfig
from fl_protocol.adapters.config_files import load_toml
from fl_protocol.errors import BundleError, ConfigError

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "device_client" / "systemd"
UNIT = FOLDER / "covey-device.service"
PAGE = (ROOT / "docs" / "raspberry-pi.md").read_text()

REQUIRED = {
    "Type": "notify",
    "Restart": "on-failure",
    "User": "covey",
    "UMask": "0077",
    "StateDirectoryMode": "0700",
    "NoNewPrivileges": "yes",
    "CapabilityBoundingSet": "",
    "AmbientCapabilities": "",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "PrivateDevices": "yes",
    "ProtectKernelTunables": "yes",
    "ProtectKernelModules": "yes",
    "ProtectKernelLogs": "yes",
    "ProtectControlGroups": "yes",
    "ProtectProc": "invisible",
    "RestrictNamespaces": "yes",
    "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX",
    "MemoryDenyWriteExecute": "yes",
    "SystemCallArchitectures": "native",
    "LimitCORE": "0",
    "MemorySwapMax": "0",
}
FORBIDDEN = {
    "ProcSubset": "it would hide /proc/loadavg",
    "DynamicUser": "the store and the sockets belong to one user for years",
    "PrivateNetwork": "there would be no broker",
    "PrivateUsers": "the group of the ingest socket would not exist",
}


def settings(text: str) -> dict[str, dict[str, list[str]]]:
    """A unit file by section and key; what is no section, assignment or comment fails."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    section = None
    for number, line in enumerate(text.splitlines(), 1):
        if not line or line.startswith(("#", ";")):
            continue
        if heading := re.fullmatch(r"\[(\w+)\]", line):
            section = heading[1]
            continue
        assignment = re.fullmatch(r"([A-Za-z]+)=(.*)", line)
        assert assignment, f"line {number}: {line}"
        assert section, f"line {number} is in no section"
        found[section][assignment[1]].append(assignment[2])
    return found


def service() -> dict[str, list[str]]:
    return settings(UNIT.read_text())["Service"]


def missing_protections(found: dict[str, list[str]]) -> list[str]:
    """What a unit lacks of the sandbox, or has and must not."""
    lacks = [key for key, value in REQUIRED.items() if found.get(key, [None])[-1] != value]
    lacks += [key for key in FORBIDDEN if key in found]
    if found.get("SystemCallFilter") != ["@system-service", "~@privileged"]:
        lacks.append("SystemCallFilter")
    return lacks


def seconds(text: str) -> float:
    """A time span with one unit, such as ``5min``."""
    number, unit = re.fullmatch(r"(\d+)(s|min|h)", text).groups()  # type: ignore[union-attr]
    return float(number) * {"s": 1, "min": 60, "h": 3600}[unit]


def test_the_unit_has_its_three_sections_and_no_key_twice_but_lists() -> None:
    found = settings(UNIT.read_text())
    assert list(found) == ["Unit", "Service", "Install"]
    twice = {key for keys in found.values() for key, values in keys.items() if len(values) > 1}
    assert twice == {"SystemCallFilter"}
    assert found["Install"]["WantedBy"] == ["multi-user.target"]


def test_it_starts_a_command_that_exists() -> None:
    (command,) = service()["ExecStart"]
    program, *arguments = shlex.split(command)
    parsed = _parser().parse_args(arguments)
    assert Path(program).name == "covey-device"
    assert parsed.config == Path("/etc/covey/device.toml")
    assert parsed.command.__name__ == "run"


def test_it_is_not_started_again_for_what_does_not_get_better_by_itself() -> None:
    codes = {code for kind, code in _EXIT_CODES if kind in {ConfigError, BundleError}}
    assert {int(code) for code in service()["RestartPreventExitStatus"][0].split()} == codes


def test_the_sandbox_is_whole() -> None:
    assert missing_protections(service()) == []


@pytest.mark.parametrize("key", [*REQUIRED, "SystemCallFilter", *FORBIDDEN])
def test_a_unit_with_a_hole_is_caught(key: str) -> None:
    found = dict(service())
    if key in FORBIDDEN:
        found[key] = ["yes"]
    else:
        found[key] = ["weaker"]
    assert missing_protections(found) == [key]


def test_the_watchdog_leaves_the_loop_its_usual_rhythm() -> None:
    """A loop that waits a minute without systemd must not have to wake up earlier for its sake."""
    (watchdog,) = service()["WatchdogSec"]
    microseconds = str(int(seconds(watchdog) * 1e6))
    assert Systemd({"WATCHDOG_USEC": microseconds}).longest_wait_s == Systemd({}).longest_wait_s
    assert seconds(watchdog) >= 2 * Systemd({}).longest_wait_s


def test_every_path_of_the_unit_is_in_the_page() -> None:
    code = "\n".join(line for line in UNIT.read_text().splitlines() if not line.startswith("#"))
    paths = set(re.findall(r"(?<![\w:.])/[\w./-]+", code))
    paths |= {f"/var/lib/{name}" for name in service()["StateDirectory"]}
    paths |= {f"/run/{name}" for name in service()["RuntimeDirectory"]}
    _credential, file = service()["LoadCredentialEncrypted"][0].split(":")
    paths.add(f"/etc/credstore.encrypted/{file}")
    assert len(paths) >= 5
    assert [path for path in paths if path not in PAGE] == []


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_takes_it(tmp_path: Path) -> None:
    """Only the two keys of systemd 254 may be unknown to an older one."""
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/covey/bin/covey-device", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, check=False
    )
    unknown = set(re.findall(r"Unknown key(?: name)? '(\w+)'", done.stderr))
    ours = [line for line in done.stderr.splitlines() if UNIT.name in line and "Unknown key" not in line]
    assert (done.returncode, ours) == (0, [])
    assert unknown <= {"RestartSteps", "RestartMaxDelaySec"}


# --- device.toml

EXAMPLE = FOLDER / "device.toml"


def test_the_example_configuration_is_valid_as_it_stands() -> None:
    found = load_toml(EXAMPLE, DeviceConfig)
    assert found.studies[0].id is None
    assert found.device.control_socket == "/run/covey/control.sock"


def test_the_example_names_every_section_and_key() -> None:
    text = EXAMPLE.read_text()
    for section in msgspec.structs.fields(DeviceConfig):
        heading = "[[study]]" if section.encode_name == "study" else f"[{section.encode_name}]"
        assert f"\n{heading}\n" in text
        kind = section.type if section.encode_name != "study" else section.type.__args__[0]
        part = text.split(f"\n{heading}\n")[1].split("\n[")[0]
        for key in msgspec.structs.fields(kind):
            assert re.search(rf"^#?{key.encode_name} = ", part, re.M), f"{heading} {key.encode_name}"


def test_the_lines_that_say_a_default_say_the_true_one() -> None:
    text = EXAMPLE.read_text()
    checked = 0
    for section in msgspec.structs.fields(DeviceConfig):
        if section.encode_name == "study":
            continue
        part = text.split(f"\n[{section.encode_name}]\n")[1].split("\n[")[0]
        defaults = {key.encode_name: key.default for key in msgspec.structs.fields(section.type)}
        for key, shown in re.findall(r"^#(\w+) = ([^#\n]+)", part, re.M):
            if defaults[key] in (None, ()):  # the line shows an example, and says what the default is
                continue
            assert msgspec.toml.decode(f"x = {shown}")["x"] == defaults[key], key
            checked += 1
    assert checked >= 15


# --- the page


def shell_lines() -> list[str]:
    """Every command of the page's code blocks, continued lines joined, comments off."""
    blocks = "\n".join(re.findall(r"^```\n(.*?)^```", PAGE, re.S | re.M)).replace("\\\n", " ")
    return [line.split("  #")[0].strip() for line in blocks.splitlines() if line.strip()]


def test_every_covey_device_command_of_the_page_exists(capsys: pytest.CaptureFixture[str]) -> None:
    commands = [line for line in shell_lines() if re.search(r"(^|/)covey-device [a-z]", line)]
    seen = set()
    for line in commands:
        arguments = shlex.split(line.split("covey-device ", 1)[1])
        try:
            _parser().parse_args(arguments)
        except SystemExit:
            pytest.fail(f"{line}: {capsys.readouterr().err}")
        seen.add(arguments[0])
    assert {"init", "import", "pseudonyms", "consent", "status", "ledger", "erase", "doctor"} <= seen


def test_the_files_that_the_page_installs_are_in_the_package() -> None:
    named = re.findall(r"device_client/systemd/([\w.-]+)", PAGE)
    assert sorted(set(named)) == sorted(path.name for path in FOLDER.iterdir())
    assert 'device_client = ["py.typed", "systemd/*"]' in (ROOT / "pyproject.toml").read_text()


def test_the_page_says_that_no_pi_was_there() -> None:
    assert "Nothing of this has run on a Raspberry Pi yet" in PAGE
