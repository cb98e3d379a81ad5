"""A TPM 2.0 in software (swtpm), behind a resource manager as the kernel's /dev/tpmrm0 is one (tpm2-abrmd)."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.contracts.brokers import WITHIN_S, free_port

NEEDED = ("swtpm", "tpm2-abrmd", "dbus-daemon", "openssl")


@dataclass
class SoftwareTpm:
    """One that runs.

    Args:
        environment: by which a process finds it.
    """

    environment: dict[str, str]


def need_tpm() -> None:
    """Skip where there is none; where COVEY_TESTS_NEED_TPM is set, fail."""
    missing = [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if not any(Path(folder, "tpm2.so").exists() for folder in Path("/usr/lib").glob("*/ossl-modules")):
        missing.append("tpm2-openssl")
    if missing:
        packages = "swtpm tpm2-abrmd libtss2-tcti-tabrmd0 tpm2-openssl dbus"
        why = f"{', '.join(missing)} not installed: apt-get install {packages}"
        (pytest.fail if os.environ.get("COVEY_TESTS_NEED_TPM") else pytest.skip)(why)


@contextmanager
def software_tpm(folder: Path) -> Iterator[SoftwareTpm]:
    """A TPM whose state is in a folder: the same folder is the same TPM.

    Args:
        folder: made where missing.
    """
    need_tpm()
    folder.mkdir(exist_ok=True)
    port = _free_pair()
    with ExitStack() as stack:
        _started(
            stack,
            *("swtpm", "socket", "--tpm2", "--tpmstate", f"dir={folder}", "--flags", "startup-clear,not-need-init"),
            *("--server", f"type=tcp,port={port},bindaddr=127.0.0.1"),
            *("--ctrl", f"type=tcp,port={port + 1},bindaddr=127.0.0.1"),
        )
        _until_it_listens(port + 1)
        bus = _started(stack, "dbus-daemon", "--session", "--nofork", "--print-address")
        assert bus.stdout is not None
        address = {"DBUS_SESSION_BUS_ADDRESS": bus.stdout.readline().decode().strip()}
        manager = _started(
            stack,
            *("tpm2-abrmd", "--session", "--allow-root", f"--tcti=swtpm:host=127.0.0.1,port={port}"),
            environment=address,
        )
        found = {**address, "TPM2OPENSSL_TCTI": "tabrmd:bus_type=session"}
        _until_it_answers(found, manager)
        yield SoftwareTpm(found)


def _free_pair() -> int:
    """A port with a free one after it, where clients look for the control channel."""
    while True:
        port = free_port()
        with socket.socket() as after:
            try:
                after.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


def _started(stack: ExitStack, *command: str, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """A process that ends with the stack."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    process = subprocess.Popen(
        [shutil.which(command[0], path=path) or command[0], *command[1:]],
        env={**os.environ, "PATH": path, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )

    def end() -> None:
        process.terminate()
        process.wait(WITHIN_S)
        assert process.stdout is not None
        process.stdout.close()

    stack.callback(end)
    return process


def _until_it_listens(port: int) -> None:
    ends_s = time.monotonic() + WITHIN_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert time.monotonic() < ends_s, "swtpm does not listen"
            time.sleep(0.02)
        else:
            return


def _until_it_answers(environment: dict[str, str], manager: subprocess.Popen[bytes]) -> None:
    asked = ["openssl", "rand", "-provider", "tpm2", "-hex", "4"]
    ends_s = time.monotonic() + WITHIN_S
    while subprocess.run(asked, env={**os.environ, **environment}, capture_output=True, check=False).returncode:
        assert manager.poll() is None, "tpm2-abrmd ended"
        assert time.monotonic() < ends_s, "the TPM does not answer"
        time.sleep(0.05)
