"""Configuration: every mistake is named by file and key; a broker elsewhere needs TLS; a journal stops nobody."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from fl_protocol.adapters.config_files import load_toml, read_file, relative_to_config
from fl_protocol.adapters.connect import make_transport
from fl_protocol.adapters.journal import JsonLines
from fl_protocol.adapters.mqtt import MqttTransport
from fl_protocol.broker_config import BrokerConfig
from fl_protocol.errors import ConfigError, LocalMisuseError

GOOD = 'host = "127.0.0.1"\nport = 1883\n'


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (GOOD + "prot = 1\n", "prot"),
        ('host = "127.0.0.1"\n', "port"),
        ('host = "127.0.0.1"\nport = "1883"\n', r"\$\.port"),
        ('host = "127.0.0.1"\nport = 0\n', r"\$\.port"),
        ('host = "127.0.0.1"\nport = 65536\n', r"\$\.port"),
        ('host = ""\nport = 1883\n', r"\$\.host"),
        (GOOD + "ca = 1\n", r"\$\.ca"),
        ("host = \n", "Invalid value"),
        (GOOD + GOOD, "Cannot overwrite"),
    ],
)
def test_a_wrong_key_is_named_with_its_file(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "device.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"device\.toml: .*{named}"):
        load_toml(path, BrokerConfig)


def test_a_file_that_is_missing_a_folder_or_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"host = \xff\xfe")
    for name in ("missing.toml", ".", "binary.toml"):
        with pytest.raises(ConfigError, match="configuration"):
            load_toml(tmp_path / name, BrokerConfig)
    with pytest.raises(ConfigError, match=r"task\.bundle: expected a readable file at .*missing"):
        read_file(tmp_path / "missing", "task.bundle")


def test_a_good_file_is_read_and_its_paths_start_at_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "device.toml"
    path.write_text(GOOD)
    assert load_toml(path, BrokerConfig) == BrokerConfig(host="127.0.0.1", port=1883)
    assert relative_to_config(path, "keys/ca.pem") == tmp_path / "keys" / "ca.pem"
    assert relative_to_config(path, "/etc/ca.pem") == Path("/etc/ca.pem")
    assert read_file(path, "it") == GOOD.encode()


@pytest.mark.parametrize("host", ["broker.example", "10.0.0.1", "0.0.0.0", "127.0.0.1.example", "LOCALHOST ", "::"])  # noqa: S104
def test_a_broker_elsewhere_is_refused_without_tls(host: str) -> None:
    with pytest.raises(ConfigError, match=r"device\.toml: .*needs ca, certificate and key"):
        make_transport(BrokerConfig(host=host, port=1883), config=Path("device.toml"), client_id="one")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1"])
def test_a_broker_on_this_machine_needs_no_tls(host: str) -> None:
    transport = make_transport(BrokerConfig(host=host, port=1883), config=Path("device.toml"), client_id="one")
    assert isinstance(transport, MqttTransport)


@pytest.mark.parametrize("named", [{"ca": "a"}, {"certificate": "b", "key": "c"}, {"ca": "a", "key": "c"}])
@pytest.mark.parametrize("host", ["127.0.0.1", "broker.example"])
def test_half_of_the_tls_files_is_refused(host: str, named: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="ca, certificate and key together"):
        make_transport(BrokerConfig(host=host, port=1883, **named), config=Path("device.toml"), client_id="one")


def test_tls_files_are_looked_for_beside_the_configuration(tmp_path: Path) -> None:
    broker = BrokerConfig(host="broker.example", port=8883, ca="ca.pem", certificate="c.pem", key="k.pem")
    with pytest.raises(LocalMisuseError, match=str(tmp_path / "ca.pem")):
        make_transport(broker, config=tmp_path / "device.toml", client_id="one")


def test_a_journal_line_is_one_json_object() -> None:
    stream = io.StringIO()
    journal = JsonLines(stream)
    journal.write("trained", at_s=1.23456, round=3, reason='line\nbreak "quoted" \x00 é', epsilon=math.inf)
    journal.write("stopped", at_s=2.0)
    first, second = stream.getvalue().splitlines()
    assert json.loads(first) == {
        "event": "trained",
        "at_s": 1.235,
        "round": 3,
        "reason": 'line\nbreak "quoted" \x00 é',
        "epsilon": None,
    }
    assert json.loads(second) == {"event": "stopped", "at_s": 2.0}


def _broken_pipe() -> Any:
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


def _full_disk() -> Any:
    return Path("/dev/full").open("w")


def _closed() -> Any:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("make", [_broken_pipe, _full_disk, _closed])
def test_a_journal_that_cannot_write_stops_nobody(make: Any) -> None:
    stream = make()
    journal = JsonLines(stream)
    for number in range(3):
        journal.write("event", at_s=float(number))
    try:
        stream.close()
    except OSError:
        assert make is not _closed
