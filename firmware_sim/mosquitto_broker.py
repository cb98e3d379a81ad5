"""A mosquitto of one's own: its configuration, certificates and ACL written, the process started and stopped."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import time
from pathlib import Path

from aggregator.broker_config import mosquitto_acl, mosquitto_config
from firmware_sim.errors import FleetError
from firmware_sim.processes import die_with_parent

_STARTS_WITHIN_S = 10.0


def find_mosquitto() -> str | None:
    """Path of the mosquitto program; Debian keeps it in /usr/sbin, which is not on everybody's PATH."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")


def write_mosquitto_files(folder: Path, *, host: str, port: int, tenant: str, aggregator: str) -> Path:
    """Write ``mosquitto.conf`` and ``acl`` into `folder`, beside its certificates; the configuration's path."""
    config = folder / "mosquitto.conf"
    config.write_text(mosquitto_config(host=host, port=port, folder=str(folder.resolve()), user=_account()))
    acl = folder / "acl"
    acl.write_text(mosquitto_acl(tenant=tenant, aggregator=aggregator))
    acl.chmod(0o600)
    return config


def _account() -> str:
    """The account this process runs as: mosquitto started as root would otherwise change to another one."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container's user without a name is not root, so mosquitto will not change
        return "mosquitto"


class MosquittoBroker:
    """A running mosquitto.

    Args:
        config: path of ``mosquitto.conf``.
        host: where it listens.
        port: where it listens.
        log: file that takes its output.

    Raises:
        FleetError: it is not installed, or did not start.
    """

    def __init__(self, config: Path, *, host: str, port: int, log: Path) -> None:
        program = find_mosquitto()
        if program is None:
            raise FleetError("mosquitto is not installed: apt install mosquitto, or use --broker iotcore")
        self._command = [program, "-c", str(config)]
        self._address, self._log = (host, port), log
        self._start()

    def _start(self) -> None:
        """Start the process and wait until it listens."""
        with self._log.open("ab") as stream:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509 - a single prctl call, no Python locks are taken
            )
        try:
            self._wait_until_listening()
        except FleetError:
            self.stop()
            raise

    def watch(self) -> str | None:
        """Start it again if it died; what happened, if anything. Raises FleetError when it does not start."""
        if self._process.poll() is None:
            return None
        code = self._process.returncode
        self._start()
        return f"mosquitto ended (code {code}); it was started again"

    @property
    def description(self) -> str:
        """What it is."""
        return "mosquitto on loopback: mutual TLS 1.3, an ACL that lets each device touch its own topics only"

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def _wait_until_listening(self) -> None:
        """Wait for the listener, or for the process to end."""
        (host, port), log = self._address, self._log
        ends_s = time.monotonic() + _STARTS_WITHIN_S
        while time.monotonic() < ends_s:
            if self._process.poll() is not None:
                lines = log.read_text(errors="replace").strip().splitlines()
                raise FleetError(f"mosquitto did not start: {lines[-1] if lines else 'it said nothing'}; see {log}")
            try:
                socket.create_connection((host, port), timeout=0.2).close()
            except OSError:
                time.sleep(0.05)
            else:
                return
        raise FleetError(f"mosquitto did not listen on {host}:{port} within {_STARTS_WITHIN_S:g} s; see {log}")

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def free_port() -> int:
    """A TCP port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
