"""A Unix socket that takes requests for the daemon's one thread, and the client that asks (framing: `line_framing`).

Invariants: threads only accept, read and write; whatever a request means is decided by the thread that calls `take`.
One client has one request in hand at a time, so at most `connections` messages are held, in the queue or out; when the
queue is full, reading stops and nothing is dropped. The socket's file is at no instant more open than asked for, which
rests on Linux giving the file the mode of the bound descriptor less the umask (unix_bind_bsd in net/unix/af_unix.c),
and a living server's file is never replaced; two daemons that start at the same instant are kept apart by the store's
lock.
"""

from __future__ import annotations

import contextlib
import grp
import os
import socket
import stat
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from device_client.adapters.line_framing import MAX_FRAMED_BYTES, GarbageError, MessageReader, framed
from device_client.errors import DeviceError
from device_client.recordings.recording_msg import MAX_MESSAGE_BYTES, Encoding
from fl_protocol.errors import ConfigError, LocalMisuseError

MAX_PATH_BYTES = 107
"""Longest path of a Unix socket on Linux: ``sun_path`` has 108 bytes, one of them the closing zero."""

_PEER = struct.Struct("iII")  # struct ucred: pid, uid, gid


@dataclass(frozen=True)
class Limits:
    """What clients may take up.

    Args:
        message_bytes: largest message, below 16 MiB.
        connections: clients at a time; one more is told so and disconnected.
        waiting: requests that wait for the daemon.
        idle_timeout_s: a client that sends nothing, or does not finish a message or read a reply, for this long is
            disconnected.
    """

    message_bytes: int = MAX_MESSAGE_BYTES
    connections: int = 8
    waiting: int = 4
    idle_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        if not 0 < self.message_bytes <= MAX_FRAMED_BYTES or min(self.connections, self.waiting) < 1:
            raise LocalMisuseError(f"limits: expected message_bytes below 16 MiB and at least 1 of others, got {self}")


@dataclass(frozen=True, eq=False)
class Request:
    """One message of a client.

    Args:
        payload: the message without its framing.
        encoding: how it is encoded.
        peer_uid: user id of the client's process when it connected, as the kernel says (SO_PEERCRED).
        reply: to be called once, with the reply in the same encoding; never blocks, and does nothing where the client
            has gone.
    """

    payload: bytes
    encoding: Encoding
    peer_uid: int
    reply: Callable[[bytes], None]


@dataclass(eq=False)
class _Answer:
    """Room for one reply, until its connection's thread sends it."""

    payload: bytes | None = None


class LineServer:
    """Listens until closed.

    Args:
        path: of the socket; its folder has to exist.
        wake: called from other threads whenever a request waits; must not block.
        group: group that may connect as well; None for this process's user only.
        limits: what clients may take up.

    Raises:
        ConfigError: the name is too long, the path holds something else, or there is no such group.
        DeviceError: another process listens there, or the socket cannot be made.
    """

    def __init__(
        self, path: Path, *, wake: Callable[[], None], group: str | None = None, limits: Limits | None = None
    ) -> None:
        self._path = path
        self._wake = wake
        self._limits = limits or Limits()
        self._changed = threading.Condition()
        self._waiting: deque[Request] = deque()
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._closed = False
        self._listening = _listen(path, group)
        found = path.stat()
        self._inode = (found.st_dev, found.st_ino)
        self._acceptor = threading.Thread(target=self._accept, name=f"{path.name} accept", daemon=True)
        self._acceptor.start()

    def take(self) -> Request | None:
        """The request that has waited longest, or None; never blocks."""
        with self._changed:
            if not self._waiting:
                return None
            self._changed.notify_all()
            return self._waiting.popleft()

    def close(self) -> None:
        """Disconnect everybody and remove the socket's file; requests not yet taken are gone."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
            threads = [self._acceptor, *self._connections.values()]
            for connection in (self._listening, *self._connections):
                with contextlib.suppress(OSError):  # it is gone already
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
        self._listening.close()
        with contextlib.suppress(OSError):  # somebody removed it, or its folder
            found = self._path.lstat()
            if (found.st_dev, found.st_ino) == self._inode:
                self._path.unlink()

    def _accept(self) -> None:
        """Thread: a thread for every client."""
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                with self._changed:
                    # Out of file descriptors or memory: try again soon, unless the reason is that we are closing.
                    if self._changed.wait_for(lambda: self._closed, timeout=1.0):
                        return
                continue
            thread = threading.Thread(target=self._serve, args=(connection,), name=self._path.name, daemon=True)
            with self._changed:
                refused = "no thread could be started"
                if self._closed or len(self._connections) >= self._limits.connections:
                    refused = f"expected at most {self._limits.connections} clients at a time; disconnect one first"
                else:
                    self._connections[connection] = thread
                    with contextlib.suppress(RuntimeError):  # the machine has no thread left
                        thread.start()
                        continue
                    del self._connections[connection]
            _refuse(connection, GarbageError(f"connection: {refused}"))
            connection.close()

    def _serve(self, connection: socket.socket) -> None:
        """Thread: one client, from its first message to its last."""
        reader = MessageReader(connection, self._limits.message_bytes, self._limits.idle_timeout_s)
        try:
            with contextlib.suppress(OSError):  # it went away, or was idle too long (TimeoutError is one)
                uid = _peer_uid(connection)
                while (message := reader.next()) is not None:
                    answer = self._hand_over(*message, uid)
                    if answer is None:
                        return
                    connection.settimeout(self._limits.idle_timeout_s)
                    connection.sendall(framed(answer, message[1]))
        except GarbageError as garbage:
            _refuse(connection, garbage)
        finally:
            with self._changed:
                del self._connections[connection]
                connection.close()

    def _hand_over(self, payload: bytes, encoding: Encoding, uid: int) -> bytes | None:
        """Queue a request when there is room, and wait for its reply; None when the server closes."""
        answer = _Answer()

        def reply(content: bytes) -> None:
            with self._changed:
                answer.payload = content
                self._changed.notify_all()

        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._waiting) < self._limits.waiting)
            if self._closed:
                return None
            self._waiting.append(Request(payload, encoding, uid, reply))
        self._wake()
        with self._changed:
            self._changed.wait_for(lambda: self._closed or answer.payload is not None)
        return answer.payload


def ask(path: Path, payload: bytes, *, timeout_s: float, encoding: Encoding = "json") -> bytes:
    """Send one request to the process that listens at `path`; its reply.

    Args:
        path: of the socket.
        payload: one message without framing; JSON without newlines.
        timeout_s: for sending the request, and again for the reply.
        encoding: how it is encoded.

    Raises:
        ConfigError: the socket's name is too long.
        DeviceError: nobody listens there, it may not be spoken to, or no reply came in time.
    """
    if not 0 < len(payload) <= MAX_FRAMED_BYTES or (encoding == "json" and b"\n" in payload):
        raise LocalMisuseError("payload: expected one message below 16 MiB, JSON on one line")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            with _address(path) as address:
                connection.connect(address)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused half-way: the reply says why
                connection.sendall(framed(payload, encoding))
            answer = MessageReader(connection, MAX_FRAMED_BYTES, timeout_s).next()
        except (FileNotFoundError, ConnectionRefusedError):
            raise DeviceError(f"nobody listens at {path}; start it with covey-device run") from None
        except PermissionError:
            raise DeviceError(f"this user may not talk to {path}; ask as its owner, its group or root") from None
        except (TimeoutError, BlockingIOError):  # BlockingIOError: too many are waiting to be accepted
            raise DeviceError(f"no reply came from {path} within {timeout_s:g} s; it may be busy, try again") from None
        except (GarbageError, OSError) as error:
            raise DeviceError(f"{path} gave no reply that can be read ({error})") from error
    if answer is None:
        raise DeviceError(f"the process at {path} closed the connection without a reply; see its log")
    return answer[0]


def _refuse(connection: socket.socket, garbage: GarbageError) -> None:
    """One line to a client that is about to be disconnected, if it still listens; never blocks."""
    encode = msgspec.json.encode if garbage.encoding == "json" else msgspec.msgpack.encode
    with contextlib.suppress(OSError):
        connection.setblocking(False)
        connection.sendall(framed(encode({"error": str(garbage)}), garbage.encoding))


def _peer_uid(connection: socket.socket) -> int:
    """User id of the process at the other end, from the kernel."""
    _pid, uid, _gid = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return int(uid)


@contextlib.contextmanager
def _address(path: Path) -> Iterator[str]:
    """What the kernel is told: the path, or a short one to the same place through a descriptor of its folder.

    Raises:
        ConfigError: the name itself is too long.
        OSError: there is no such folder.
    """
    if len(os.fsencode(path)) <= MAX_PATH_BYTES:
        yield str(path)
        return
    descriptor = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        short = f"/proc/self/fd/{descriptor}/{path.name}"
        if len(os.fsencode(short)) > MAX_PATH_BYTES:
            raise ConfigError(
                f"{path}: expected a name of at most {MAX_PATH_BYTES - 20} bytes for a Unix socket, got "
                f"{len(os.fsencode(path.name))}; choose a shorter one"
            )
        yield short
    finally:
        os.close(descriptor)


def _listen(path: Path, group: str | None) -> socket.socket:
    """A listening socket whose file had from its first instant no more than the permissions it ends with."""
    group_id = _group_id(group)
    try:
        _remove_stale(path)
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # Security: bind gives the file this mode (less the umask); chmod after bind would come too late.
            os.fchmod(listening.fileno(), 0o600)
            with _address(path) as address:
                listening.bind(address)
            _open_to_group(path, group_id)
            listening.listen(16)
        except BaseException:
            listening.close()
            raise
    except PermissionError as error:
        raise DeviceError(
            f"{path}: the socket cannot be made for {group or 'this user'} ({error.strerror}); run as a member of that "
            "group, or choose a folder that this user may write to"
        ) from error
    except OSError as error:
        raise DeviceError(f"{path}: the socket cannot be made ({error.strerror})") from error
    return listening


def _open_to_group(path: Path, group_id: int | None) -> None:
    """Give the socket to the group, then let it write; whatever the umask was. The file goes if that fails."""
    try:
        if group_id is not None:
            os.chown(path, -1, group_id, follow_symlinks=False)
        path.chmod(0o600 if group_id is None else 0o660)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _group_id(group: str | None) -> int | None:
    """A group's number."""
    if group is None:
        return None
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise ConfigError(f"expected a group of this machine for the socket, got {group!r}") from None


def _remove_stale(path: Path) -> None:
    """Remove the socket of a process that died; refuse a living one's, and whatever is no socket."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{path}: expected no file or a socket, got something else; choose another path")
    if is_listening(path):
        raise DeviceError(f"{path}: another process listens there; stop that one first")
    path.unlink(missing_ok=True)


def is_listening(path: Path) -> bool:
    """Whether a living process listens at a socket's path."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            with _address(path) as address:
                probe.connect(address)
        except (ConnectionRefusedError, FileNotFoundError):  # its process died, or has just removed it
            return False
        except OSError:  # alive, with many waiting, or not for this user
            return True
    return True
