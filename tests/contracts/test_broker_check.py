"""`broker check` on a real mosquitto: all holds under our files, and what is broken on purpose is named."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from aggregator.broker_check import Finding, Yard, check_broker
from aggregator.certificates import KeyPair, issue, make_ca
from firmware_sim.mosquitto_broker import MosquittoBroker, find_mosquitto, free_port, write_mosquitto_files
from fl_protocol.adapters.mqtt import TlsFiles

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")

HOST, TENANT = "127.0.0.1", "demo"
Change = Callable[[str], str]


def files_in(folder: Path) -> KeyPair:
    """A broker's files; its CA."""
    ca = make_ca("covey demo", now_s=time.time())
    server = issue(ca, "broker", now_s=time.time(), server_hosts=(HOST,))
    for name, data in (("ca.pem", ca.certificate), ("broker.pem", server.certificate), ("broker.key", server.key)):
        (folder / name).write_bytes(data)
    return ca


def checked(folder: Path, *, config: Change | None = None, acl: Change | None = None) -> dict[str, Finding]:
    """What is found of a broker under our files, or under files that were changed."""
    ca, port = files_in(folder), free_port()
    path = write_mosquitto_files(folder, host=HOST, port=port, tenant=TENANT, aggregator="aggregator")
    for file, change in ((path, config), (folder / "acl", acl)):
        if change is not None:
            text = file.read_text()
            assert change(text) != text
            file.write_text(change(text))
    broker = MosquittoBroker(path, host=HOST, port=port, log=folder / "broker.log")
    try:
        server = TlsFiles(folder / "ca.pem", folder / "broker.pem", folder / "broker.key")
        yard = Yard(HOST, port, ca, TENANT, "watch", os.urandom, time.time(), Path(), server)
        return {one.check: one for one in check_broker(yard)}
    finally:
        broker.stop()


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finding]:
    return checked(tmp_path_factory.mktemp("honest"))


def test_everything_holds_under_our_files(honest: dict[str, Finding]) -> None:
    assert [one for one in honest.values() if one.holds is not True] == []
    assert len(honest) == 11


def without(line: str) -> Change:
    return lambda text: text.replace(line, "")


def put(old: str, new: str) -> Change:
    return lambda text: text.replace(old, new)


def anybody(config: str) -> str:
    for right, wrong in (
        ("require_certificate true", "require_certificate false"),
        ("use_identity_as_username true\n", ""),
        ("use_username_as_clientid true\n", ""),
        ("allow_anonymous false", "allow_anonymous true"),
    ):
        config = config.replace(right, wrong)
    return config


@pytest.mark.parametrize(
    ("name", "config", "acl"),
    [
        ("nobody without a certificate", anybody, None),
        ("nothing below TLS 1.3", put("tls_version tlsv1.3", "tls_version tlsv1.2"), None),
        ("nobody under another's client id", without("use_username_as_clientid true\n"), None),
        ("no packet larger than agreed", put("max_packet_size 99328", "max_packet_size 200000"), None),
        ("no publishing to others' topics", None, lambda acl: acl + "pattern write fl/v1/demo/up/#\n"),
        ("no publishing to others' topics", None, lambda acl: acl + "pattern write fl/v1/demo/state/+\n"),
        ("no publishing to others' topics", None, lambda acl: acl + "pattern write fl/v1/demo/down/+/+\n"),
        ("no publishing to others' topics", None, lambda acl: acl + "pattern write fl/v1/demo/round/+\n"),
        ("no publishing to others' topics", None, lambda acl: acl + "pattern write fl/v1/demo/model/+/+\n"),
        ("no publishing to others' topics", None, lambda acl: acl + "pattern write fl/v1/+/up/+/+/+/+\n"),
        ("no reading of what others send", None, lambda acl: acl + "pattern read fl/v1/demo/state/+\n"),
        ("no reading of what others send", None, lambda acl: acl + "pattern read #\n"),
        (
            "a device with its certificate may send its updates",
            None,
            without("pattern write fl/v1/demo/up/+/%u/+/+\n"),
        ),
    ],
)
def test_a_broker_that_allows_more_or_less_is_caught(
    name: str, config: Change | None, acl: Change | None, honest: dict[str, Finding], tmp_path: Path
) -> None:
    found = checked(tmp_path, config=config, acl=acl)
    assert found[name].holds is False, found
    assert honest[name].holds is True


def test_a_broker_that_lets_nobody_in_is_told_and_nothing_is_claimed_of_it(tmp_path: Path) -> None:
    ca = files_in(tmp_path)
    yard = Yard(HOST, free_port(), ca, TENANT, "watch", os.urandom, time.time(), Path())
    found = check_broker(yard)
    assert found[0].holds is None
    assert "was not let in" in found[0].detail
