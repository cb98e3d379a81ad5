"""``covey-device doctor``: each check over explicit inputs, then all of it before and after set-up."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography import x509

from aggregator.ca_folder import create_ca, issue_client, issue_server, load_ca
from aggregator.certificates import issue, make_ca
from device_client.adapters.encrypted_files import EncryptedFiles
from device_client.assembly import DeviceFiles, RealDevice
from device_client.checks import storage
from device_client.checks.broker import Way, check_broker
from device_client.checks.findings import Check, examine, ok
from device_client.checks.identity import Papers, check_certificate, check_pseudonyms
from device_client.checks.machine import (
    available_memory_bytes,
    check_clock,
    check_core_dumps,
    check_entropy,
    check_memory,
    check_swap,
    clock_is_synchronised,
    core_limit_of,
    resident_bytes,
    swap_limit_of,
)
from device_client.checks.model import check_bundle, check_runtime
from device_client.checks.storage import Volume, check_counter, check_store_key, check_volume, newest_line_s
from device_client.checks.wearer import check_conditions, check_consent
from device_client.config import StudyConfig
from device_client.consent import Consents, terms_digest, terms_of
from device_client.device_store import create_identity
from device_client.doctor import run_doctor
from device_client.eligibility import Blocked, BrokenReading, Conditions
from device_client.errors import DeviceError, StoreError
from device_client.pseudonyms import Pseudonyms
from firmware_sim.mosquitto_broker import MosquittoBroker, find_mosquitto, free_port, write_mosquitto_files
from fl_protocol.adapters.mqtt import MqttTransport, TlsFiles
from fl_protocol.broker_config import BrokerConfig
from fl_protocol.enrolment import DAY_S
from fl_protocol.errors import ConfigError
from fl_protocol.signing import public_key_hex
from tests.enrolments import AGGREGATOR, BEGINS_S, NOW_S, Office, broken_copy
from tests.virtual_fleet import bundle_folder, load_bundle

HOST = "127.0.0.1"
STUDY_CONFIG = StudyConfig(
    tenant="clinic",
    task="watch",
    broker=BrokerConfig(HOST, 1883),
    bundle="watch_features.covey",
    publisher_key="aa" * 32,
    aggregator_key="bb" * 32,
)


# --- running checks


def test_a_check_that_fails_itself_is_a_problem_and_the_others_run() -> None:
    def ours() -> Any:
        raise StoreError("the store is elsewhere")

    def systems() -> Any:
        raise PermissionError(13, "Permission denied", "/secret")

    found = list(examine([Check("a", ours), Check("b", systems, "clinic/steps"), Check("c", lambda: ok("fine"))]))
    assert [(one.check, one.study, one.verdict, one.found) for one in found] == [
        ("a", "", "problem", "the store is elsewhere"),
        ("b", "clinic/steps", "problem", "/secret: Permission denied"),
        ("c", "", "ok", "fine"),
    ]
    assert found[1].advice == "run this as the user that the daemon runs as: sudo -u"


def test_a_finding_is_there_before_the_next_check_runs() -> None:
    ran = []

    def run(name: str) -> Callable[[], Any]:
        def note() -> Any:
            ran.append(name)
            return ok(name)

        return note

    findings = examine([Check("a", run("a")), Check("b", run("b"))])
    next(findings)
    assert ran == ["a"]


# --- the machine


@pytest.mark.parametrize(
    ("now_s", "synchronised", "verdict"),
    [
        (NOW_S + 60, True, "ok"),
        (NOW_S + 60, None, "ok"),
        (NOW_S + 60, False, "warning"),
        (NOW_S - 3600, True, "ok"),  # within a clock's tolerance
        (0.0, None, "problem"),
        (NOW_S - 10 * 365 * DAY_S, True, "problem"),
        (NOW_S + 11 * 365.25 * DAY_S, True, "problem"),
    ],
)
def test_a_clock_must_not_be_before_what_has_happened_nor_ten_years_after_it(
    now_s: float, synchronised: bool | None, verdict: str
) -> None:
    seen = {"the installed software": NOW_S - 90 * DAY_S, "the ledger's newest line": NOW_S}
    found = check_clock(now_s, seen=seen, synchronised=synchronised, has_own_clock=False)
    assert found.verdict == verdict
    assert bool(found.advice) == (verdict != "ok")
    assert "no clock that goes on" in found.found or verdict == "problem"


def test_the_marker_of_timesyncd_says_that_the_clock_was_set(tmp_path: Path) -> None:
    (tmp_path / "synchronized").touch()
    assert clock_is_synchronised(tmp_path / "synchronized") is True


def test_a_generator_without_a_seed_is_a_problem() -> None:
    def not_yet(_count: int, _flags: int) -> bytes:
        raise BlockingIOError

    assert check_entropy(not_yet).verdict == "problem"
    assert check_entropy().verdict == "ok"


def test_memory_counts_what_the_daemon_already_has(tmp_path: Path) -> None:
    assert check_memory(200, program_bytes=100, records_bytes=100).verdict == "ok"
    assert check_memory(199, program_bytes=100, records_bytes=100).verdict == "warning"
    assert check_memory(120, program_bytes=100, records_bytes=100, daemon_bytes=80).verdict == "ok"
    (tmp_path / "meminfo").write_text("MemTotal:  948304 kB\nMemAvailable:     2048 kB\n")
    assert available_memory_bytes(tmp_path / "meminfo") == 2 * 1024 * 1024
    with pytest.raises(OSError, match="no line MemAvailable"):
        available_memory_bytes(Path("/proc/self/limits"))
    assert resident_bytes(Path("/proc/self")) > 10e6


def swaps(folder: Path, *names: str) -> Path:
    (folder / "swaps").write_text(
        "Filename Type Size Used Priority\n" + "".join(f"{n} partition 1 0 -2\n" for n in names)
    )
    return folder / "swaps"


def block(folder: Path, name: str, content: str) -> None:
    path = folder / "block" / name
    path.parent.mkdir(parents=True)
    path.write_text(content)


@pytest.mark.parametrize(
    ("name", "file", "content", "verdict"),
    [
        ("/dev/mmcblk0p3", "mmcblk0p3/size", "1", "warning"),
        ("/var/swap", "sda/size", "1", "warning"),
        ("/dev/zram0", "zram0/size", "1", "ok"),
        ("/dev/zram0", "zram0/backing_dev", "none\n", "ok"),
        ("/dev/zram0", "zram0/backing_dev", "/dev/loop0\n", "warning"),
        ("/dev/dm-1", "dm-1/dm/uuid", "CRYPT-PLAIN-swap\n", "ok"),
        ("/dev/dm-1", "dm-1/dm/uuid", "LVM-abc\n", "warning"),
    ],
)
def test_swap_in_clear_is_told(tmp_path: Path, name: str, file: str, content: str, verdict: str) -> None:
    block(tmp_path, file, content)
    found = check_swap(swaps(tmp_path, name), blocks=tmp_path / "block")
    assert found.verdict == verdict
    assert name in found.found


def test_swap_does_not_matter_where_there_is_none_or_the_daemon_may_not_use_it(tmp_path: Path) -> None:
    assert check_swap(swaps(tmp_path), blocks=tmp_path).verdict == "ok"
    limit = tmp_path / "memory.swap.max"
    for text, verdict in (("0\n", "ok"), ("max\n", "warning")):
        limit.write_text(text)
        assert check_swap(swaps(tmp_path, "/dev/sda2"), blocks=tmp_path, swap_limit=limit).verdict == verdict


def test_the_daemons_swap_limit_is_found_where_the_memory_controller_is_on(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("0::/system.slice/covey-device.service\n")
    assert swap_limit_of(tmp_path, tmp_path / "fs") is None
    limit = tmp_path / "fs/system.slice/covey-device.service/memory.swap.max"
    limit.parent.mkdir(parents=True)
    limit.write_text("0\n")
    assert swap_limit_of(tmp_path, tmp_path / "fs") == limit
    assert swap_limit_of(tmp_path / "gone", tmp_path / "fs") is None


def test_core_files_are_told_of_this_process_and_of_the_daemon(tmp_path: Path) -> None:
    assert check_core_dumps("0").verdict == "ok"
    assert check_core_dumps("unlimited").verdict == "warning"
    assert core_limit_of(Path("/proc/self")) == core_limit_of(None)
    (tmp_path / "limits").write_text(
        "Limit  Soft Limit  Hard Limit  Units\nMax core file size   4096   unlimited  bytes\n"
    )
    assert core_limit_of(tmp_path) == "4096"


# --- what is kept


def volume(**changes: Any) -> Volume:
    fine = Volume(
        folder=Path("/store"),
        exists=True,
        owner_uid=7,
        device=1,
        free_bytes=10**9,
        read_only=False,
        writable=True,
        fsync_s=0.01,
    )
    return replace(fine, **changes)


@pytest.mark.parametrize(
    ("changes", "verdict", "words"),
    [
        ({}, "ok", "1.0 GB free; a small write is on the medium after 10 ms"),
        ({"exists": False, "fsync_s": None, "owner_uid": 0}, "ok", "not there yet"),
        ({"fsync_s": None}, "ok", "1.0 GB free"),
        ({"read_only": True}, "problem", "read-only"),
        ({"writable": False}, "problem", "cannot be written"),
        ({"free_bytes": 10**6}, "problem", "nothing can be stored"),
        ({"free_bytes": 10**8}, "warning", "may come to hold 500 MB"),
        ({"owner_uid": 8}, "warning", "belongs to the user with id 8"),
        ({"fsync_s": 3.0}, "warning", "3000 ms"),
    ],
)
def test_a_volume_is_judged_by_room_rights_and_speed(changes: dict[str, Any], verdict: str, words: str) -> None:
    found = check_volume(volume(**changes), wanted_bytes=500 * 10**6, uid=7)
    assert (found.verdict, words in found.found) == (verdict, True), found


def test_looking_at_a_folder_leaves_nothing_in_it(tmp_path: Path) -> None:
    found = Volume.of(tmp_path)
    assert found.exists
    assert found.writable
    assert found.owner_uid == os.geteuid()
    assert list(tmp_path.iterdir()) == []
    missing = Volume.of(tmp_path / "a" / "b")
    assert (missing.exists, missing.fsync_s, missing.device) == (False, None, found.device)
    assert list(tmp_path.iterdir()) == []


def test_a_counter_belongs_on_another_medium_and_never_inside_the_store() -> None:
    store = volume()
    assert check_counter(volume(folder=Path("/mnt/stick"), device=2), store=store).verdict == "ok"
    assert check_counter(volume(folder=Path("/")), store=store).verdict == "warning"
    assert check_counter(volume(folder=Path("/store"), device=2), store=store).verdict == "problem"
    assert check_counter(volume(folder=Path("/store/deeper"), device=2), store=store).verdict == "problem"


def key_problems(check: Callable[..., Any], folder: Path) -> list[str]:
    """Verdicts on a store key: missing, short, readable by others, another's, and right."""
    key, found = folder / "store.key", []
    for content, mode, owner in ((None, 0, None), (31, 0o600, None), (32, 0o640, None), (32, 0o604, None)):
        if content is not None:
            key.write_bytes(bytes(content))
            key.chmod(mode)
        found.append(check(key, is_credential=False, store_uid=owner).verdict)
    key.chmod(0o600)
    found.append(check(key, is_credential=False, store_uid=os.geteuid() + 1).verdict)
    found.append(check(key, is_credential=False, store_uid=os.geteuid()).verdict)
    return found


def test_a_store_key_is_whole_and_its_owners_only(tmp_path: Path) -> None:
    assert key_problems(check_store_key, tmp_path) == ["problem"] * 5 + ["ok"]


def test_a_check_that_does_not_look_at_the_mode_is_caught(tmp_path: Path) -> None:
    broken = broken_copy("device_client.checks.storage", ("stat.st_mode & 0o077", "stat.st_mode & 0o000"))
    assert key_problems(broken.check_store_key, tmp_path) != ["problem"] * 5 + ["ok"]


def test_a_credential_that_systemd_opens_by_an_access_list_is_no_problem(tmp_path: Path) -> None:
    """Since 254 its mode is 0440: the group bits are the mask of the access list (systemd issue 29435)."""
    (tmp_path / "store.key").write_bytes(bytes(32))
    (tmp_path / "store.key").chmod(0o440)
    assert check_store_key(tmp_path / "store.key", is_credential=True, store_uid=None).verdict == "ok"


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file with its content and time of change."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def reads_only(module: Any, folder: Path) -> bool:
    """Whether the store is read beside one that has it locked, and an unfinished write in it stays."""
    locked = EncryptedFiles.in_folder(folder, bytes(32))
    try:
        locked.write("consent/a", b"granted")
        (folder / "consent" / ".b.tmp").write_bytes(b"being written")
        before = contents(folder)
        store = module.open_to_read(folder, bytes(32))
        assert store.read("consent/a") == b"granted"
        with pytest.raises(StoreError):
            store.write("consent/a", b"withdrawn")
        with pytest.raises(StoreError):
            store.delete("consent/a")
        return contents(folder) == before
    except BaseException as error:
        if isinstance(error, (AssertionError, pytest.fail.Exception)):
            return False
        raise
    finally:
        locked.close()


def test_the_store_is_read_beside_a_daemon_and_not_changed(tmp_path: Path) -> None:
    assert reads_only(storage, tmp_path / "store")


def test_opening_the_store_to_write_is_caught(tmp_path: Path) -> None:
    broken = broken_copy("device_client.checks.storage", ("(_ReadOnlyDisk(folder), key", "(SystemDisk(folder), key"))
    assert not reads_only(broken, tmp_path / "store")


def test_the_newest_whole_line_of_the_ledger_tells_a_time(tmp_path: Path) -> None:
    log = tmp_path / "ledger.jsonl"
    assert newest_line_s(log) is None
    log.write_bytes(b'{"kind":"reservation","at_s":5.0,"round":1}\n{"kind":"reservation","at_s":9.0}\n{"kind":"rese')
    assert newest_line_s(log) == 9.0
    log.write_bytes(b"\xff\xfe\n[]\n")
    assert newest_line_s(log) is None


# --- model, names, wearer


@pytest.mark.parametrize("name", sorted(path.stem for path in bundle_folder().glob("*.covey")))
def test_every_bundled_model_runs_in_the_installed_runtime(name: str) -> None:
    bundle = load_bundle(name)
    assert name in check_bundle(bundle, STUDY_CONFIG).found
    assert check_runtime(bundle).verdict == "ok"


def test_the_models_check_says_who_vouches_for_it_and_warns_of_the_aggregators_key() -> None:
    bundle = load_bundle("watch_features")
    assert "signed by the pinned publisher" in check_bundle(bundle, STUDY_CONFIG).found
    keys = ("aa" * 32, "cc" * 32, "dd" * 32)
    several = msgspec.structs.replace(STUDY_CONFIG, publisher_key=None, publishers=keys, publisher_threshold=2)
    found = check_bundle(bundle, several)
    assert (found.verdict, "signed by at least 2 of the 3 pinned publishers" in found.found) == ("ok", True)
    for study in (several, STUDY_CONFIG):
        for aggregator in ("aa" * 32, " " + "AA" * 32):
            found = check_bundle(bundle, msgspec.structs.replace(study, aggregator_key=aggregator))
            assert (found.verdict, "publisher keygen" in found.advice) == ("warning", True)


CA = make_ca("covey test", now_s=NOW_S)
PAIR = issue(CA, "watch-7", now_s=NOW_S)
PAPERS = Papers(CA.certificate, PAIR.certificate, PAIR.key)


def judged(now_s: float = NOW_S + DAY_S, *, is_replaced: bool = False, name: str = "watch-7", **papers: bytes) -> str:
    return check_certificate(replace(PAPERS, **papers), name=name, now_s=now_s, is_replaced=is_replaced).verdict


def test_a_certificate_is_judged_by_name_key_and_dates() -> None:
    ends_s = x509.load_pem_x509_certificate(PAIR.certificate).not_valid_after_utc.timestamp()
    assert judged() == "ok"
    assert judged(name="watch-8") == "problem"
    assert judged(key=issue(CA, "watch-7", now_s=NOW_S).key) == "problem"
    assert judged(0.0) == "problem"
    assert judged(ends_s + 1) == "problem"
    assert judged(ends_s - 13 * DAY_S) == "warning"
    assert judged(ends_s - 13 * DAY_S, is_replaced=True) == "ok"
    assert judged(ends_s - 15 * DAY_S) == "ok"
    old = make_ca("covey old", now_s=NOW_S - 30 * 365 * DAY_S)
    assert judged(ca=CA.certificate + old.certificate) == "problem"


@pytest.mark.parametrize("part", ["ca", "certificate", "key"])
def test_what_is_not_pem_is_named(part: str) -> None:
    with pytest.raises(DeviceError, match=f"broker.{part}: expected PEM"):
        check_certificate(replace(PAPERS, **{part: b"-----BEGIN NONSENSE-----"}), name="watch-7", now_s=NOW_S)


def admitted(folder: Path) -> Pseudonyms:
    names = Pseudonyms(EncryptedFiles.in_folder(folder, bytes(32)), tenant="clinic", task="watch")
    names.install(Office().admit(names.prepare(count=3, entropy=os.urandom)), aggregator_key=AGGREGATOR.public_key())
    return names


def test_pseudonyms_are_counted_and_asked_for_in_time(tmp_path: Path) -> None:
    names = admitted(tmp_path / "store")
    first = check_pseudonyms(names, now_s=BEGINS_S + DAY_S)
    assert first.verdict == "ok"
    assert "has 2 more names" in first.found
    assert check_pseudonyms(names, now_s=BEGINS_S + 75 * DAY_S).verdict == "ok"
    assert check_pseudonyms(names, now_s=BEGINS_S + 77 * DAY_S).verdict == "warning"
    assert check_pseudonyms(names, now_s=BEGINS_S + 91 * DAY_S).verdict == "problem"
    assert check_pseudonyms(names, now_s=0.0).verdict == "problem"
    names.prepare(count=3, entropy=os.urandom)  # now it is the operator's turn
    assert check_pseudonyms(names, now_s=BEGINS_S + 77 * DAY_S).verdict == "ok"


def test_conditions_that_block_are_told_and_only_broken_sensors_are_warned_of() -> None:
    conditions = Conditions(battery_percent=20.0, charging=False, idle=True, unmetered=None, temperature_celsius=48.0)
    found = check_conditions(conditions, [Blocked("battery", "the battery is at 20 %")])
    assert found.verdict == "ok"
    assert found.found == (
        "battery 20 %, not on the charger, idle, network's cost unknown, 48.0 °C; would not train now: the battery is "
        "at 20 %"
    )
    broken = replace(conditions, broken=(BrokenReading("unmetered", "nmcli did not answer within 2 s"),))
    assert check_conditions(broken, []).verdict == "warning"
    assert check_conditions(Conditions(), []).found.endswith("no temperature; may train now")


def test_a_study_that_is_not_granted_is_a_warning() -> None:
    assert check_consent("clinic/steps", "").verdict == "ok"
    assert check_consent("clinic/steps", "not granted").advice.endswith("consent grant clinic/steps")


# --- the broker


@contextmanager
def listener() -> Iterator[tuple[int, list[bytes]]]:
    """A port that takes connections one after another and notes what it is told; it accepts every MQTT client."""
    heard: list[bytes] = []
    with socket.create_server((HOST, 0)) as server:

        def serve() -> None:
            while True:
                connection, _ = server.accept()
                with connection:
                    connection.settimeout(20)
                    while data := connection.recv(4096):
                        if data == b"enough":
                            return
                        heard.append(data)
                        if data[0] == 0x10:  # CONNECT; answered with CONNACK, accepted (MQTT 5, 3.2)
                            connection.sendall(b"\x20\x03\x00\x00\x00")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1], heard
        # What came before this connection has then been read to its end.
        with socket.create_connection((HOST, server.getsockname()[1])) as last:
            last.sendall(b"enough")
        thread.join(20)
        assert not thread.is_alive()


def way(port: int, **changes: Any) -> Way:
    plain = Way(HOST, port, identified=True, tls=None, mqtt=lambda: MqttTransport(host=HOST, port=port, client_id="w"))
    return replace(plain, **changes)


def test_without_consent_nothing_is_told_to_the_broker() -> None:
    with listener() as (port, heard):
        found = check_broker(way(port, identified=False))
    assert found.verdict == "ok"
    assert heard == []


def test_beside_the_daemon_no_mqtt_is_spoken() -> None:
    with listener() as (port, heard):
        found = check_broker(way(port, mqtt=None))
    assert found.verdict == "ok"
    assert heard == []


def test_a_port_where_nothing_listens_and_names_that_do_not_exist_are_told() -> None:
    with socket.create_server((HOST, 0)) as server:
        port = server.getsockname()[1]
    assert check_broker(way(port)).found == f"nothing listens at {HOST}:{port}"
    assert "is not known" in check_broker(way(port, host="no-such-broker.invalid")).found
    assert "cannot be the name" in check_broker(way(port, host="a" * 64 + ".example")).found


def test_a_broker_that_takes_no_connection_is_given_up_in_time() -> None:
    with socket.create_server((HOST, 0), backlog=0) as server:
        port = server.getsockname()[1]
        held = [socket.socket() for _ in range(4)]  # they fill the queue, which nobody empties
        for one in held:
            one.setblocking(False)
            one.connect_ex((HOST, port))
        assert check_broker(way(port, timeout_s=0.2)).found == f"{HOST}:{port} did not answer within 0.2 s"
        for one in held:
            one.close()


@dataclass
class Secured:
    """A mosquitto with mutual TLS, and its CA."""

    folder: Path
    port: int

    def files(self, name: str) -> TlsFiles:
        return TlsFiles(self.folder / "keys/ca.pem", self.folder / f"keys/{name}.pem", self.folder / f"keys/{name}.key")

    def way(self, name: str, files: TlsFiles) -> Way:
        def mqtt() -> MqttTransport:
            return MqttTransport(host=HOST, port=self.port, client_id=name, tls=files)

        return Way(HOST, self.port, identified=True, tls=files, mqtt=mqtt)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    if find_mosquitto() is None:
        pytest.skip("mosquitto is not installed")
    folder, now_s = tmp_path_factory.mktemp("broker"), time.time()
    create_ca(folder / "ca", name="covey clinic", now_s=now_s)
    issue_server(load_ca(folder / "ca"), folder / "broker", hosts=(HOST,), now_s=now_s)
    issue_client(load_ca(folder / "ca"), folder / "keys", name="watch", now_s=now_s)
    port = free_port()
    config = write_mosquitto_files(folder / "broker", host=HOST, port=port, tenant="clinic", aggregator="aggregator")
    broker = MosquittoBroker(config, host=HOST, port=port, log=folder / "broker.log")
    yield Secured(folder, port)
    broker.stop()


def test_a_certificate_of_the_study_is_accepted_over_tls_and_mqtt(secured: Secured) -> None:
    found = check_broker(secured.way("watch", secured.files("watch")))
    assert found.verdict == "ok", found
    assert "TLSv1.3 with this device's certificate" in found.found
    assert found.found.endswith("the broker accepts this device over MQTT")
    beside = check_broker(replace(secured.way("watch", secured.files("watch")), mqtt=None))
    assert beside.found.endswith("MQTT is not tried beside the running daemon")


def test_a_certificate_of_another_ca_is_told_even_without_mqtt(secured: Secured, tmp_path: Path) -> None:
    """In TLS 1.3 the refusal comes after the handshake."""
    create_ca(tmp_path / "ca", name="another", now_s=time.time())
    issue_client(load_ca(tmp_path / "ca"), tmp_path, name="watch", now_s=time.time())
    strange = replace(secured.files("watch"), certificate=tmp_path / "watch.pem", key=tmp_path / "watch.key")
    found = check_broker(replace(secured.way("watch", strange), mqtt=None))
    assert found.verdict == "problem", found
    assert "TLS with" in found.found


def test_a_broker_of_another_ca_is_told(secured: Secured, tmp_path: Path) -> None:
    create_ca(tmp_path / "ca", name="another", now_s=time.time())
    strange = replace(secured.files("watch"), ca=tmp_path / "ca/ca.pem")
    found = check_broker(secured.way("watch", strange))
    assert found.verdict == "problem"
    assert "is not accepted" in found.found


# --- the whole of it


@dataclass
class Patient:
    """A configured device and its doctor."""

    folder: Path
    capture: pytest.CaptureFixture[str]

    @property
    def files(self) -> DeviceFiles:
        return DeviceFiles.load(self.folder / "device.toml")

    def configure(self, *, port: int, study: str = 'id = "watch-7"', device: str = "") -> None:
        (self.folder / "device.toml").write_text(
            f"""
            [device]
            store = "store"
            store_key = "store.key"
            {device}
            [privacy]
            epsilon = 3.0
            delta = 1e-5
            [board]
            idle = "idle"
            network = "unmetered"
            [[study]]
            tenant = "clinic"
            task = "watch"
            bundle = "{bundle_folder().resolve()}/watch_features.covey"
            publisher_key = "{(bundle_folder() / "publisher.pub").read_text().strip()}"
            aggregator_key = "{public_key_hex(AGGREGATOR.public_key())}"
            broker = {{ host = "{HOST}", port = {port} }}
            {study}
            """
        )

    def set_up(self) -> None:
        """Make the store and this device's key."""
        store = self.files.open_store(create=True)
        create_identity(store, "clinic/watch", os.urandom)
        store.close()

    def grant(self) -> None:
        store, (study,) = self.files.open_store(), self.files.config.studies
        terms = terms_digest(terms_of(study, self.files.config.privacy))
        Consents(store).grant(study.study, terms=terms, now_s=time.time())
        store.close()

    def examine(self) -> tuple[int, dict[str, dict[str, str]]]:
        """Exit code, and the findings by check."""
        self.capture.readouterr()
        code = run_doctor(self.files, argparse.Namespace(json=True))
        found = json.loads(self.capture.readouterr().out)
        assert all(set(one) == {"check", "study", "verdict", "found", "advice"} for one in found)
        assert len({one["check"] for one in found}) == len(found)
        return code, {one["check"]: one for one in found}


@pytest.fixture
def patient(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Patient:
    return Patient(tmp_path, capsys)


def test_before_anything_is_set_up_it_says_what_to_do_first_and_makes_nothing(patient: Patient) -> None:
    patient.configure(port=9)
    before = contents(patient.folder)
    code, found = patient.examine()
    assert code == 5
    assert found["store key"]["advice"] == "run covey-device init"
    assert found["consent"]["verdict"] == found["certificate"]["verdict"].replace("ok", "warning") == "warning"
    assert "covey-device init" in found["identity"]["found"]
    assert found["runtime"]["verdict"] == found["bundle"]["verdict"] == "ok"
    assert contents(patient.folder) == before


def test_a_device_that_is_set_up_and_reaches_its_broker_has_no_problem(patient: Patient) -> None:
    with listener() as (port, heard):
        patient.configure(port=port)
        patient.set_up()
        patient.grant()
        before = contents(patient.folder)
        code, found = patient.examine()
        assert contents(patient.folder) == before
    assert (code, [one for one in found.values() if one["verdict"] == "problem"]) == (0, [])
    assert found["broker"]["found"].endswith("accepts this device over MQTT")
    assert b"watch-7" in heard[0]
    assert found["conditions"]["found"].endswith("may train now")


def test_it_runs_beside_the_daemon_and_leaves_its_connection_alone(patient: Patient) -> None:
    with listener() as (port, heard):
        patient.configure(port=port)
        patient.set_up()
        patient.grant()
        with RealDevice.open(patient.files.path) as device:
            device.listen()
            code, found = patient.examine()
    assert code == 0
    assert found["daemon"]["found"].startswith(f"runs as process {os.getpid()}")
    assert "MQTT is not tried" in found["broker"]["found"]
    assert found["consent"]["verdict"] == "ok"
    assert heard == []


def test_a_socket_that_a_killed_daemon_left_is_no_daemon(patient: Patient) -> None:
    patient.configure(port=9)
    patient.set_up()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(patient.files.control_socket))
    _, found = patient.examine()
    assert (found["daemon"]["verdict"], "left of one that was killed" in found["daemon"]["found"]) == ("ok", True)


def test_without_consent_the_whole_doctor_tells_the_broker_nothing(patient: Patient) -> None:
    with listener() as (port, heard):
        patient.configure(port=port)
        patient.set_up()
        _, found = patient.examine()
    assert found["broker"]["verdict"] == "ok"
    assert heard == []


def test_pseudonyms_are_checked_to_the_broker(patient: Patient, secured: Secured) -> None:
    patient.configure(port=secured.port, study="")
    store = patient.files.open_store(create=True)
    names, now_s = Pseudonyms(store, tenant="clinic", task="watch"), time.time()
    office = Office(ca=load_ca(secured.folder / "ca"))
    answer = office.admit(names.prepare(count=2, entropy=os.urandom), now_s=now_s)
    names.install(answer, aggregator_key=AGGREGATOR.public_key())
    store.close()
    patient.grant()
    code, found = patient.examine()
    assert code == 0, found
    assert "has 1 more names" in found["pseudonyms"]["found"]
    assert found["certificate"]["verdict"] == "ok"
    assert found["broker"]["found"].endswith("accepts this device over MQTT")


@pytest.mark.parametrize(
    ("damage", "check"),
    [
        (lambda folder: (folder / "store.key").write_bytes(bytes(31)), "store key"),
        (lambda folder: (folder / "store.key").chmod(0o644), "store key"),
        (lambda folder: (folder / "store.key").write_bytes(bytes(32)), "identity"),
        (lambda folder: (folder / "store/ledger.jsonl").write_bytes(b"{}\n{}\n"), "ledger"),
        (lambda folder: (folder / "device.toml").write_text(_other_bundle(folder)), "bundle"),
    ],
)
def test_damage_is_found_by_its_check_and_the_others_go_on(
    patient: Patient, damage: Callable[[Path], Any], check: str
) -> None:
    patient.configure(port=9)
    patient.set_up()
    damage(patient.folder)
    code, found = patient.examine()
    assert code == 5
    assert found[check]["verdict"] == "problem"
    assert found["broker"]["found"] == f"nothing listens at {HOST}:9"


def _other_bundle(folder: Path) -> str:
    (folder / "other.covey").write_bytes(b"PK no bundle")
    text = (folder / "device.toml").read_text()
    return text.replace(f"{bundle_folder().resolve()}/watch_features.covey", "other.covey")


def test_a_credential_is_not_asked_for_where_systemd_passes_none(
    patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    patient.configure(port=9)
    text = patient.files.path.read_text().replace('"store.key"', '"credential:store.key"')
    patient.files.path.write_text(text)
    _, found = patient.examine()
    assert found["store key"]["verdict"] == "warning"
    assert "systemd-run" in found["store key"]["advice"]


def test_a_person_gets_a_line_for_each_check_and_one_for_what_to_do(patient: Patient) -> None:
    patient.configure(port=9)
    patient.capture.readouterr()
    code = run_doctor(patient.files, argparse.Namespace(json=False))
    lines = patient.capture.readouterr().out.splitlines()
    assert code == 5
    assert "ok       daemon      does not run" in lines
    (key,) = (number for number, line in enumerate(lines) if line.startswith("problem  store key   there is no store"))
    assert lines[key + 1].strip() == "-> run covey-device init"
    assert any(line.startswith("ok       bundle      clinic/watch: watch_features version") for line in lines)


def test_a_configuration_that_cannot_be_read_is_not_the_doctors_business(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a readable TOML file"):
        DeviceFiles.load(tmp_path / "device.toml")


def test_nothing_of_the_simulator_or_the_aggregator_is_loaded_by_it() -> None:
    import subprocess  # noqa: PLC0415 - only here

    loads = "import sys, device_client.doctor; print([m for m in sys.modules if m.split('.')[0] in "
    loads += "{'aggregator', 'firmware_sim', 'models', 'sqlalchemy', 'typer'}])"
    done = subprocess.run([sys.executable, "-c", loads], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
