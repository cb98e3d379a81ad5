"""The Unix socket: requests reach one thread whole and in order, limits hold, and nobody else can open its file."""

from __future__ import annotations

import contextlib
import fcntl
import grp
import json
import os
import re
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_client.adapters.line_framing import GarbageError, MessageReader, framed
from device_client.adapters.line_server import MAX_PATH_BYTES, Limits, LineServer, Request, ask
from device_client.errors import DeviceError
from device_client.recordings.ingestion import StreamTarget, encode_reply, ingest
from fl_protocol.errors import ConfigError, LocalMisuseError
from fl_protocol.model_manifest import InputSchema, LabelSchema

WITHIN_S = 60.0
"""Far more than anything here takes; reached only where something hangs."""
ROOT = Path(__file__).parents[2]


class Yard:
    """A server, and what a daemon's one thread would do with it: wait to be woken, take, answer."""

    def __init__(self, path: Path, **arguments: Any) -> None:
        self.path = path
        self.woken = threading.Semaphore(0)
        self.server = LineServer(path, wake=self.woken.release, **arguments)
        self.clients: list[socket.socket] = []

    def connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.settimeout(WITHIN_S)
        client.connect(str(self.path))
        self.clients.append(client)
        return client

    def take(self) -> Request:
        assert self.woken.acquire(timeout=WITHIN_S), "nothing came"
        request = self.server.take()
        assert request is not None
        return request

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.server.close()


@pytest.fixture
def yard(tmp_path: Path) -> Iterator[Yard]:
    yard = Yard(tmp_path / "s")
    yield yard
    yard.close()


@contextlib.contextmanager
def opened(path: Path, **arguments: Any) -> Iterator[Yard]:
    yard = Yard(path, **arguments)
    try:
        yield yard
    finally:
        yard.close()


@contextlib.contextmanager
def answering(path: Path, answer: Callable[[Request], bytes], **arguments: Any) -> Iterator[Yard]:
    """A yard with a daemon that answers."""
    with opened(path, **arguments) as yard:
        done = threading.Event()

        def daemon() -> None:
            while True:
                yard.woken.acquire()
                if done.is_set():
                    return
                while (request := yard.server.take()) is not None:
                    request.reply(answer(request))

        thread = threading.Thread(target=daemon)
        thread.start()
        try:
            yield yard
        finally:
            done.set()
            yard.woken.release()
            thread.join(WITHIN_S)


def received(client: socket.socket) -> bytes:
    """Everything until the server disconnects."""
    content = b""
    with contextlib.suppress(ConnectionResetError):  # what we sent and it did not read
        while chunk := client.recv(65536):
            content += chunk
    return content


def echo(request: Request) -> bytes:
    return request.payload


def test_lines_and_messagepack_are_told_apart_by_their_first_byte(yard: Yard) -> None:
    client = yard.connect()
    client.sendall(b'\n \r\n{"a": 1}\n')
    request = yard.take()
    assert (request.payload, request.encoding) == (b'{"a": 1}', "json")
    request.reply(b'{"ok": 1}')
    assert client.recv(100) == b'{"ok": 1}\n'
    client.sendall(framed(b"\x81\xa1a\n", "msgpack"))
    request = yard.take()
    assert (request.payload, request.encoding) == (b"\x81\xa1a\n", "msgpack")
    request.reply(b"\x80")
    assert client.recv(100) == b"\x00\x00\x00\x01\x80"


def test_requests_know_who_asks(yard: Yard) -> None:
    yard.connect().sendall(b"{}\n")
    assert yard.take().peer_uid == os.getuid()


@pytest.mark.skipif(os.getuid() != 0, reason="needs to become somebody else")
def test_another_users_process_is_told_apart() -> None:
    ask_as_65534 = (
        "import os, socket, sys; s = socket.socket(socket.AF_UNIX); os.setuid(65534);"
        "s.connect(sys.argv[1]); s.sendall(b'{}\\n'); s.recv(10)"
    )
    with tempfile.TemporaryDirectory() as folder, opened(Path(folder) / "s") as yard:
        Path(folder).chmod(0o755)  # pytest's own folders are closed to others
        # The file keeps others out...
        refused = subprocess.run(
            [sys.executable, "-c", ask_as_65534, str(yard.path)], capture_output=True, text=True, check=False
        )
        assert "PermissionError" in refused.stderr
        # ... and where it does not, the kernel says who they are.
        yard.path.chmod(0o666)
        with subprocess.Popen([sys.executable, "-c", ask_as_65534, str(yard.path)]) as process:
            request = yard.take()
            assert request.peer_uid == 65534
            request.reply(b"{}")
            assert process.wait(WITHIN_S) == 0


def test_ask_gets_the_reply(tmp_path: Path) -> None:
    with answering(tmp_path / "s", lambda request: b'{"got":' + request.payload + b"}") as yard:
        assert ask(yard.path, b'{"a": 1}', timeout_s=WITHIN_S) == b'{"got":{"a": 1}}'
        assert ask(yard.path, b"{}", timeout_s=WITHIN_S) == b'{"got":{}}'


@settings(max_examples=100, deadline=None)
@given(
    messages=st.lists(
        st.tuples(st.just("json"), st.text('ab1{}[]" ').map(lambda text: f"{{{text}".encode()))
        | st.tuples(st.just("msgpack"), st.binary(min_size=1, max_size=300)),
        max_size=6,
    ),
    cuts=st.lists(st.integers(1, 40), min_size=1, max_size=8),
)
def test_however_the_bytes_arrive_the_messages_are_the_same(messages: list[Any], cuts: list[int]) -> None:
    raw = b"".join(framed(payload, encoding) for encoding, payload in messages)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        reader = MessageReader(theirs, 1000, WITHIN_S)
        found = []

        def read() -> None:
            while (message := reader.next()) is not None:
                found.append((message[1], message[0]))

        thread = threading.Thread(target=read)
        thread.start()
        at = index = 0
        while at < len(raw):
            size = cuts[index % len(cuts)]
            ours.sendall(raw[at : at + size])
            at, index = at + size, index + 1
        ours.shutdown(socket.SHUT_WR)
        thread.join(WITHIN_S)
    assert found == messages


def test_one_client_has_one_request_in_hand_and_gets_replies_in_order(yard: Yard) -> None:
    client = yard.connect()
    client.sendall(b'{"n":1}\n{"n":2}\n')
    first = yard.take()
    assert yard.server.take() is None
    first.reply(b"one")
    second = yard.take()
    assert (first.payload, second.payload) == (b'{"n":1}', b'{"n":2}')
    second.reply(b"two")
    client.shutdown(socket.SHUT_WR)
    assert received(client) == b"one\ntwo\n"


def test_a_full_queue_stops_reading_and_drops_nothing(tmp_path: Path) -> None:
    count = 6
    with opened(tmp_path / "s", limits=Limits(waiting=2, connections=count)) as yard:
        clients = [yard.connect() for _ in range(count)]
        for number, client in enumerate(clients):
            client.sendall(b'{"n":%d}\n' % number)
        while any(unread_bytes(client) for client in clients):
            os.sched_yield()
        for _ in range(2):
            assert yard.woken.acquire(timeout=WITHIN_S)
        assert not yard.woken.acquire(blocking=False)  # two wait, four have been read and stand behind them
        yard.woken.release(2)
        requests = [yard.take() for _ in range(count)]
        for request in requests:
            request.reply(request.payload)
        assert [client.recv(100) for client in clients] == [b'{"n":%d}\n' % number for number in range(count)]


def unread_bytes(client: socket.socket) -> int:
    """How much of what a client sent the server has not read."""
    (count,) = struct.unpack("i", fcntl.ioctl(client, termios.TIOCOUTQ, b"\0\0\0\0"))
    return int(count)


@pytest.mark.parametrize(
    ("sent", "sentence"),
    [
        (b"GET / HTTP/1.1\r\n", "expected a line of JSON that begins with {, or a MessagePack message's length"),
        (b"\xff\xfe", "expected a line of JSON"),
        (b"[1]\n", "expected a line of JSON"),
        (b"{" + b"x" * 2000, "expected a line of at most 1,000 bytes, got more"),
        (b"{" + b"x" * 1000 + b"\n", "expected a line of at most 1,000 bytes, got more"),
    ],
)
def test_garbage_gets_one_line_and_is_disconnected(tmp_path: Path, sent: bytes, sentence: str) -> None:
    with opened(tmp_path / "s", limits=Limits(message_bytes=1000)) as yard:
        client = yard.connect()
        client.sendall(sent)
        (line,) = received(client).splitlines()
        assert sentence in json.loads(line)["error"]
        assert yard.server.take() is None
        other = yard.connect()
        other.sendall(b"{}\n")
        assert yard.take().payload == b"{}"


@pytest.mark.parametrize("prefix", [b"\x00\x00\x00\x00", b"\x00\x00\x03\xe9", b"\x00\xff\xff\xff"])
def test_a_length_out_of_range_is_refused_before_it_is_sent(tmp_path: Path, prefix: bytes) -> None:
    with opened(tmp_path / "s", limits=Limits(message_bytes=1000)) as yard:
        client = yard.connect()
        client.sendall(prefix)
        reply = received(client)
        assert "expected a length from 1 to 1,000 bytes" in msgspec.msgpack.decode(reply[4:])["error"]
        client = yard.connect()
        client.sendall(b"\x00\x00\x03\xe8" + b"x" * 1000)
        assert len(yard.take().payload) == 1000


def test_a_line_of_the_largest_size_is_taken(tmp_path: Path) -> None:
    with opened(tmp_path / "s", limits=Limits(message_bytes=1000)) as yard:
        yard.connect().sendall(b"{" + b" " * 999 + b"\n")
        assert len(yard.take().payload) == 1000


def test_a_client_that_goes_away_harms_nobody(yard: Yard) -> None:
    for part in (b'{"half', b"\x00\x00", b"\x00\x00\x00\x05ab", b""):
        client = yard.connect()
        client.sendall(part)
        client.close()
    gone = yard.connect()
    gone.sendall(b'{"n":1}\n')
    request = yard.take()
    gone.close()
    request.reply(b"x" * 1_000_000)
    client = yard.connect()
    client.sendall(b'{"n":2}\n')
    assert yard.take().payload == b'{"n":2}'


def test_a_client_that_reads_no_reply_does_not_hold_up_the_daemon(yard: Yard) -> None:
    deaf = yard.connect()
    deaf.sendall(b"{}\n")
    yard.take().reply(b"x" * 8_000_000)  # far more than a socket buffers; returns at once
    client = yard.connect()
    client.sendall(b"{}\n")
    yard.take().reply(b"{}")
    assert client.recv(10) == b"{}\n"


def test_one_client_too_many_is_told_and_a_place_that_is_left_is_given_on(tmp_path: Path) -> None:
    with answering(tmp_path / "s", echo, limits=Limits(connections=1)) as yard:
        first = yard.connect()
        first.sendall(b"{}\n")
        assert first.recv(10) == b"{}\n"
        refused = json.loads(ask(yard.path, b"{}", timeout_s=WITHIN_S))["error"]
        assert refused == "connection: expected at most 1 clients at a time; disconnect one first"
        first.close()
        while (reply := ask(yard.path, b"{}", timeout_s=WITHIN_S)) != b"{}":  # until the first one's thread has gone
            assert json.loads(reply)["error"] == refused


def test_an_idle_client_is_disconnected(tmp_path: Path) -> None:
    with opened(tmp_path / "s", limits=Limits(idle_timeout_s=0.01)) as yard:
        silent, dawdling = yard.connect(), yard.connect()
        dawdling.sendall(b'{"half')
        assert received(silent) == b""
        assert received(dawdling) == b""


def test_the_file_is_only_for_its_owner_whatever_the_umask(tmp_path: Path) -> None:
    for umask in (0o000, 0o777):
        before = os.umask(umask)
        try:
            with opened(tmp_path / "s") as yard:
                assert stat.S_IMODE(yard.path.lstat().st_mode) == 0o600
        finally:
            os.umask(before)


def test_the_file_is_never_more_open_than_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The modes that an observer could see: right after bind, at the change of group, and at the end."""
    seen: list[tuple[str, int]] = []
    path = tmp_path / "s"
    chown, bind = os.chown, socket.socket.bind

    class Watched(socket.socket):
        def bind(self, address: Any) -> None:
            bind(self, address)
            seen.append(("bind", stat.S_IMODE(path.lstat().st_mode)))

    def watched_chown(*arguments: Any, **named: Any) -> None:
        seen.append(("chown", stat.S_IMODE(path.lstat().st_mode)))
        chown(*arguments, **named)

    monkeypatch.setattr(socket, "socket", Watched)
    monkeypatch.setattr(os, "chown", watched_chown)
    before = os.umask(0)
    try:
        group = grp.getgrgid(os.getgid()).gr_name
        with opened(path, group=group):
            found = path.lstat()
            assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, os.getgid())
    finally:
        os.umask(before)
    assert seen == [("bind", 0o600), ("chown", 0o600)]


def test_a_group_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a group of this machine for the socket, got 'no-such-group'"):
        LineServer(tmp_path / "s", wake=lambda: None, group="no-such-group")
    assert not (tmp_path / "s").exists()


def test_a_dead_processs_socket_is_replaced_and_a_living_ones_is_not(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with opened(path) as yard:
        with pytest.raises(DeviceError, match="another process listens there; stop that one first"):
            LineServer(path, wake=lambda: None)
        yard.connect().sendall(b'{"still":1}\n')
        assert yard.take().payload == b'{"still":1}'


def test_whatever_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("dear diary")
    with pytest.raises(ConfigError, match="expected no file or a socket, got something else"):
        LineServer(path, wake=lambda: None)
    assert path.read_text() == "dear diary"
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(ConfigError, match="expected no file or a socket"):
        LineServer(link, wake=lambda: None)


def test_a_name_that_no_socket_can_have_is_refused_on_both_ends(tmp_path: Path) -> None:
    long = Path("/tmp") / ("ü" * 60)  # noqa: S108 - nothing is made there
    sentence = "expected a name of at most 87 bytes for a Unix socket, got 120; choose a shorter one"
    with pytest.raises(ConfigError, match=sentence):
        LineServer(long, wake=lambda: None)
    with pytest.raises(ConfigError, match=sentence):
        ask(long, b"{}", timeout_s=WITHIN_S)
    with pytest.raises(DeviceError, match=r"the socket cannot be made \(No such file or directory\)"):
        LineServer(tmp_path / "missing" / "s", wake=lambda: None)


def test_the_longest_path_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with answering(Path("s" * MAX_PATH_BYTES), echo) as yard:
        assert ask(yard.path, b"{}", timeout_s=WITHIN_S) == b"{}"


def test_a_folder_may_be_deeper_than_the_kernel_takes_in_one_address(tmp_path: Path) -> None:
    folder = tmp_path / ("deep" * 20) / ("deeper" * 20)
    folder.mkdir(parents=True)
    with answering(folder / "store.sock", echo) as yard:
        assert ask(yard.path, b"{}", timeout_s=WITHIN_S) == b"{}"
        with pytest.raises(DeviceError, match="another process listens there"):
            LineServer(yard.path, wake=lambda: None)
    assert not (folder / "store.sock").exists()


def test_closing_disconnects_everybody_and_removes_the_file(tmp_path: Path) -> None:
    before = threading.active_count()
    with opened(tmp_path / "s", limits=Limits(waiting=1)) as yard:
        idle, waiting, blocked = yard.connect(), yard.connect(), yard.connect()
        waiting.sendall(b"{}\n")
        request = yard.take()
        blocked.sendall(b"{}\n{}\n")
        assert yard.woken.acquire(timeout=WITHIN_S)
        yard.server.close()
        yard.server.close()
        assert not yard.path.exists()
        assert [received(client) for client in (idle, waiting, blocked)] == [b"", b"", b""]
        request.reply(b"too late")
        assert yard.server.take() is None
    assert threading.active_count() == before


def test_closing_leaves_the_file_of_a_successor(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with opened(path) as first:
        path.unlink()
        with answering(path, echo) as second:
            first.server.close()
            assert ask(second.path, b"{}", timeout_s=WITHIN_S) == b"{}"


def test_asking_nobody_says_so(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with pytest.raises(DeviceError, match=r"nobody listens at .*; start it with covey-device run"):
        ask(path, b"{}", timeout_s=WITHIN_S)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(DeviceError, match="nobody listens at"):
        ask(path, b"{}", timeout_s=WITHIN_S)


def test_a_daemon_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as yard, pytest.raises(DeviceError, match=r"no reply came from .* within 0\.01 s"):
        ask(yard.path, b"{}", timeout_s=0.01)


def test_a_daemon_that_closes_without_a_reply_is_told(tmp_path: Path) -> None:
    yard = Yard(tmp_path / "s")

    def close_when_asked() -> None:
        yard.take()
        yard.server.close()

    thread = threading.Thread(target=close_when_asked)
    thread.start()
    with pytest.raises(DeviceError, match=r"without a reply|no reply that can be read"):
        ask(yard.path, b"{}", timeout_s=WITHIN_S)
    thread.join(WITHIN_S)


def test_a_request_that_is_refused_half_way_still_says_why(tmp_path: Path) -> None:
    with opened(tmp_path / "s", limits=Limits(message_bytes=1000)) as yard:
        reply = ask(yard.path, b"{" + b"x" * 4_000_000, timeout_s=WITHIN_S)
        assert "at most 1,000 bytes" in json.loads(reply)["error"]


def test_only_whole_messages_are_asked(tmp_path: Path) -> None:
    for payload in (b"", b"{\n}", b"x" * (1 << 24)):
        with pytest.raises(LocalMisuseError, match="payload: expected one message"):
            ask(tmp_path / "s", payload, timeout_s=WITHIN_S)
    with answering(tmp_path / "s", echo) as yard:
        assert ask(yard.path, b"\n\x00", timeout_s=WITHIN_S, encoding="msgpack") == b"\n\x00"


@pytest.mark.parametrize(
    "wrong", [{"message_bytes": 1 << 24}, {"message_bytes": 0}, {"connections": 0}, {"waiting": 0}]
)
def test_limits_that_limit_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(LocalMisuseError, match="limits: expected"):
        Limits(**wrong)


@settings(max_examples=150, deadline=None)
@given(sent=st.binary(max_size=400) | st.binary(max_size=50).map(lambda tail: b"{" + tail))
def test_a_reader_takes_or_refuses_any_bytes_and_holds_no_more_than_its_limit(sent: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(sent)
        ours.shutdown(socket.SHUT_WR)
        reader = MessageReader(theirs, 64, WITHIN_S)
        with contextlib.suppress(GarbageError):
            while (message := reader.next()) is not None:
                assert 0 < len(message[0]) <= 64


WATCH = InputSchema(
    shape=(128, 6),
    channels=("ax", "ay", "az", "wx", "wy", "wz"),
    units=("g", "g", "g", "rad/s", "rad/s", "rad/s"),
    sampling_rate_hz=50.0,
)
EXERCISES = LabelSchema(kind="class", names=("PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW"))


def examples(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / "recordings.md").read_text(), re.S)


def test_the_socket_example_of_the_documentation_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stored: list[Any] = []

    def append(x: Any, y: Any, *, at_s: float) -> int:
        stored.append((x.shape, y.tolist()))
        return len(x)

    streams = {"default": StreamTarget(WATCH, EXERCISES, append)}

    def answer(request: Request) -> bytes:
        reply = ingest(request.payload, request.encoding, streams=streams, now_s=1.7e9)
        return encode_reply(reply, request.encoding)

    (example,) = [text for text in examples("python") if "AF_UNIX" in text]
    assert len(example.strip().splitlines()) <= 8
    monkeypatch.chdir(tmp_path)
    with answering(Path("recordings.sock"), answer):
        exec(compile(example, "docs/recordings.md", "exec"), {})  # noqa: S102 - our own text
    assert stored == [((2, 128, 6), [1, 1])]
    assert json.loads(capsys.readouterr().out)["stored"] == 2
