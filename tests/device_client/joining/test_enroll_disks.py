"""`covey-device enroll` on disks that refuse, in a mount namespace of its own: full, read-only, a file that stays.

The command, the broker and the disks are real. Whatever the disk refuses, no token is burnt without its keys being
kept: the command is run again on a disk that takes it, and the same request gets the same answer.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import select

from aggregator.store import schema
from tests.device_client.joining.test_enroll_command import RealDesk, Wearer, desk, needs_mosquitto, wearer

__all__ = ["desk", "wearer"]
ROOT = Path(__file__).resolve().parents[3]
_HAS_NAMESPACES = subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0
needs_namespaces = pytest.mark.skipif(not _HAS_NAMESPACES, reason="no mount namespaces for this user here")
pytestmark = needs_mosquitto


def twice(wearer: Wearer, desk: RealDesk, *, refuse: str, relent: str, meanwhile: str = "true") -> tuple[str, str]:
    """What the command says on a disk that refuses, and then on one that does not; it ends well the second time."""
    (wearer.folder / "claim.json").write_bytes(msgspec.json.encode(desk.claim))
    command = (
        f"{sys.executable} -m device_client.cli enroll --config device.toml --claim claim.json --token {desk.token()} "
        "--bundle watch.covey --wait 4"
    )
    script = f"""set -e
cd {wearer.folder}
{refuse}
if {command} > ../first 2>&1; then exit 41; fi
{meanwhile}
{relent}
{command} > ../second 2>&1 || exit 42
cp -a . ../end
"""
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    said = [
        path.read_text() if path.exists() else "" for path in (wearer.folder / "../first", wearer.folder / "../second")
    ]
    assert done.returncode == 0, (done.returncode, done.stderr, said)
    assert "enrolled as e" in said[1]
    assert (wearer.folder / "../end/device.toml").read_text().count("[[study]]") == 1
    assert all("Traceback" not in one for one in said)
    return said[0], said[1]


def enrolments(desk: RealDesk) -> int:
    """How many there are."""
    with desk.store.database.reading() as connection:
        return len(connection.execute(select(schema.enrolments.c.enrolment)).all())


def test_a_process_that_is_killed_while_it_asks_is_finished_by_the_next(wearer: Wearer, desk: RealDesk) -> None:
    (wearer.folder / "claim.json").write_bytes(msgspec.json.encode(desk.claim))
    files = ("--config", "device.toml", "--claim", "claim.json", "--bundle", "watch.covey")
    command = [sys.executable, "-m", "device_client.cli", "enroll", *files, "--token", desk.token()]
    for moment in ("asking at", "connected; waiting for the answer"):
        with subprocess.Popen(
            command,
            cwd=wearer.folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stderr is not None
            assert any(moment in line for line in process.stderr)
            process.kill()
    done = subprocess.run(
        command,
        cwd=wearer.folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "enrolled as e" in done.stdout
    assert enrolments(desk) == 1


@needs_namespaces
def test_on_a_read_only_disk_nothing_is_asked_and_the_token_stays_good(wearer: Wearer, desk: RealDesk) -> None:
    first, _ = twice(
        wearer,
        desk,
        refuse='mount --bind "$PWD" "$PWD" && mount -o remount,bind,ro "$PWD" && cd "$PWD"',
        relent='mount -o remount,bind,rw "$PWD"',
    )
    assert "asking at" not in first
    assert enrolments(desk) == 1


@needs_namespaces
def test_on_a_full_disk_nothing_is_asked_and_the_token_stays_good(wearer: Wearer, desk: RealDesk) -> None:
    first, _ = twice(
        wearer,
        desk,
        refuse="cp -a store ../kept && mount -t tmpfs -o size=512k full store && cp -a ../kept/. store"
        " && (cat /dev/zero > store/filler || true) 2> /dev/null",
        relent="rm store/filler",
    )
    assert "asking at" not in first
    assert enrolments(desk) == 1


@needs_namespaces
def test_a_configuration_that_cannot_be_replaced_is_told_and_the_study_added_later(
    wearer: Wearer, desk: RealDesk
) -> None:
    """The grant is kept by then: the second time nobody is asked."""
    first, second = twice(wearer, desk, refuse="mount --bind device.toml device.toml", relent="umount device.toml")
    assert "cannot be written" in first
    assert "[[study]]" in first
    assert "asking at" not in second
    assert enrolments(desk) == 1
