"""What systemd hears from the daemon, on a real datagram socket: ready once, alive every turn, one line of status."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from device_client.adapters.systemd import Systemd


@contextmanager
def listening(address: str) -> Iterator[socket.socket]:
    """Systemd's end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind("\0" + address[1:] if address.startswith("@") else address)
        end.setblocking(False)
        yield end


def heard(end: socket.socket) -> list[list[str]]:
    """Every message so far, as its lines."""
    found = []
    while True:
        try:
            found.append(end.recv(4096).decode().split("\n"))
        except BlockingIOError:
            return found


@pytest.fixture(params=["pathname", "abstract"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "notify") if request.param == "pathname" else f"@covey-{secrets.token_hex(8)}"


def test_ready_is_said_once_and_alive_every_time(address: str) -> None:
    with listening(address) as end:
        systemd = Systemd({"NOTIFY_SOCKET": address})
        for _ in range(3):
            systemd.alive("waiting")
        assert heard(end) == [["READY=1", "WATCHDOG=1", "STATUS=waiting"], ["WATCHDOG=1"], ["WATCHDOG=1"]]


def test_a_status_is_sent_when_it_changes(address: str) -> None:
    with listening(address) as end:
        systemd = Systemd({"NOTIFY_SOCKET": address})
        for status in ("waiting", "training", "training", "waiting"):
            systemd.alive(status)
        assert [line for lines in heard(end) for line in lines if line.startswith("STATUS=")] == [
            "STATUS=waiting",
            "STATUS=training",
            "STATUS=waiting",
        ]


def test_a_status_cannot_say_anything_else_to_systemd(address: str) -> None:
    with listening(address) as end:
        Systemd({"NOTIFY_SOCKET": address}).alive("waits\nMAINPID=1\r\nand " + "x" * 10_000)
        ((ready, watchdog, status),) = heard(end)
    assert (ready, watchdog) == ("READY=1", "WATCHDOG=1")
    assert status.startswith("STATUS=waits MAINPID=1 and xxx")
    assert len(status) <= len("STATUS=") + 500


def test_stopping_is_said(address: str) -> None:
    with listening(address) as end:
        Systemd({"NOTIFY_SOCKET": address}).stopping()
        assert heard(end) == [["STOPPING=1"]]


def test_without_systemd_nothing_is_sent_and_nothing_fails() -> None:
    systemd = Systemd({})
    systemd.alive("waiting")
    systemd.stopping()


def test_a_socket_that_is_gone_stops_no_daemon(address: str) -> None:
    systemd = Systemd({"NOTIFY_SOCKET": address})
    with listening(address) as end:
        systemd.alive("waiting")
        assert len(heard(end)) == 1
    systemd.alive("training")
    systemd.stopping()


@pytest.mark.parametrize(
    ("environment", "longest_wait_s"),
    [
        ({}, 60.0),
        ({"WATCHDOG_USEC": ""}, 60.0),
        ({"WATCHDOG_USEC": "0"}, 60.0),
        ({"WATCHDOG_USEC": "10000000"}, 5.0),
        ({"WATCHDOG_USEC": "119000000"}, 59.5),
        ({"WATCHDOG_USEC": "300000000"}, 60.0),
    ],
)
def test_the_loop_waits_at_most_half_the_watchdogs_time_and_never_more_than_a_minute(
    environment: dict[str, str], longest_wait_s: float
) -> None:
    assert Systemd(environment).longest_wait_s == longest_wait_s
