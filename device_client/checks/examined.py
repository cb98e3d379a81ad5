"""The device that the checks look at: its files, its store for reading, and the daemon that may run on it."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from device_client.assembly import DeviceFiles
from device_client.checks.findings import Result, warning
from device_client.checks.storage import open_to_read
from device_client.errors import DeviceError
from device_client.ports import Store
from fl_protocol.errors import CoveyError

_PEER = struct.Struct("iII")  # struct ucred: pid, uid, gid


@dataclass
class Examined:
    """One device.

    Args:
        files: its configuration and what that names.
        now_s: what its clock says, Unix seconds.
    """

    files: DeviceFiles
    now_s: float

    @cached_property
    def store(self) -> Store:
        """The store, for reading. Raises DeviceError, ConfigError."""
        folder = self.files.store_folder
        try:
            folder.stat()
        except FileNotFoundError:
            raise DeviceError(f"there is no store at {folder} yet; run covey-device init") from None
        except OSError as error:
            raise DeviceError(f"the store at {folder} cannot be read by this user ({error.strerror})") from error
        return open_to_read(folder, self.files.store_key())

    @cached_property
    def daemon_pid(self) -> int | None:
        """The process that listens at the control socket; None where none does. Raises OSError."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(str(self.files.control_socket))
            except (FileNotFoundError, ConnectionRefusedError):
                return None
            pid, _uid, _gid = _PEER.unpack(probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
            return int(pid)

    @property
    def daemon_runs(self) -> bool:
        """Whether a daemon listens, or may: one that this user may not speak to counts."""
        try:
            return self.daemon_pid is not None
        except OSError:
            return True

    @property
    def process(self) -> Path | None:
        """The daemon's folder in /proc, if it runs and is known."""
        try:
            return None if self.daemon_pid is None else Path("/proc") / str(self.daemon_pid)
        except OSError:
            return None


def not_looked_at(error: CoveyError) -> Result:
    """Something that another check reports stands in the way."""
    return warning(f"not looked at: {error}", "see above")
