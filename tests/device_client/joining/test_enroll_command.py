"""``covey-device enroll``: over a real mosquitto as the claim broker, and what it refuses before it asks."""

from __future__ import annotations

import getpass
import io
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from dataclasses import replace as with_fields
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace

from aggregator.admission import Admitter
from aggregator.ca_folder import create_ca, issue_client, issue_server, load_ca
from aggregator.certificates import issue, make_ca
from aggregator.enrolment.desk import Desk
from aggregator.enrolment.register import add_tokens, set_quota
from aggregator.enrolment.service import DeskKeys, DeskService, Pacing
from device_client.assembly import DeviceFiles, NoJournal
from device_client.cli import main
from device_client.joining.joiner import kept_state
from device_client.joining.study_section import joined_study, section_text, with_section
from device_client.pseudonyms import Pseudonyms
from firmware_sim.mosquitto_broker import MosquittoBroker, find_mosquitto, free_port
from fl_protocol.adapters.mqtt import MqttTransport, TlsFiles
from fl_protocol.enrolment import DAY_S
from fl_protocol.errors import ConfigError
from fl_protocol.helper_config import HelperPin
from fl_protocol.joining import Address, Claim, StudyPins, study_pins, token_digest, token_text
from fl_protocol.publishers import publisher_pins
from fl_protocol.signing import public_key_from_hex, public_key_hex
from tests.device_client.joining.rig import DESK_KEY, STUDY, claim_of
from tests.enrolments import AGGREGATOR, TASK, TENANT
from tests.system.test_pseudonyms import store_in
from tests.virtual_fleet import bundle_folder

HOST = "127.0.0.1"
HELPER = Ed25519PrivateKey.from_private_bytes(b"\x09" * 32)
TOML = """# a wearer's own words, ümlauts too
[device]
store = "store"
store_key = "store.key"   # kept

[privacy]
epsilon = 3.0
delta = 1e-5"""
needs_mosquitto = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")
ACL = f"""user desk
topic readwrite fl/v1/{TENANT}/enrol/#
pattern write fl/v1/{TENANT}/enrol/%c/request
pattern read fl/v1/{TENANT}/enrol/%c/answer
"""


def publisher() -> str:
    """Who signed the bundle."""
    return (bundle_folder() / "publisher.pub").read_text().strip()


def pins(**changes: Any) -> StudyPins:
    helper = HelperPin(name="helper-a", operator="patients", key=public_key_hex(HELPER.public_key()))
    given = StudyPins(
        publisher_key=public_key_from_hex(publisher()).public_bytes_raw(),
        helpers=(helper,),
        broker=Address("broker.example", 8883),
    )
    return replace(given, **changes)


def claim_now() -> Claim:
    """A claim that is valid by this machine's clock."""
    ca = make_ca("covey test", now_s=time.time())
    pair = issue(ca, "claim", now_s=time.time())
    claim = claim_of(ca=ca, broker=Address(HOST, free_port()))
    return replace(claim, certificate=pair.certificate.decode(), key=pair.key.decode())


@dataclass
class Wearer:
    """A folder with a device's configuration, and its command."""

    folder: Path
    capture: pytest.CaptureFixture[str]
    claim: Claim = field(default_factory=claim_now)

    @property
    def config(self) -> Path:
        return self.folder / "device.toml"

    def run(self, command: str, *rest: str) -> tuple[int, str, str]:
        code = main([command, "--config", str(self.config), *rest])
        captured = self.capture.readouterr()
        return code, captured.out, captured.err

    def enroll(self, token: str, *rest: str, with_bundle: bool = True) -> tuple[int, str, str]:
        bundle = ["--bundle", str(self.folder / "watch.covey")] if with_bundle else []
        claim = self.folder / "claim.json"
        claim.write_bytes(msgspec.json.encode(self.claim))
        return self.run("enroll", "--claim", str(claim), "--token", token, *bundle, *rest)


@pytest.fixture
def wearer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Wearer:
    folder = tmp_path / "device"
    folder.mkdir()
    shutil.copy(bundle_folder() / "watch_features.covey", folder / "watch.covey")
    made = Wearer(folder, capsys)
    made.config.write_text(TOML)
    assert made.run("init")[0] == 0
    return made


@dataclass
class RealDesk:
    """A desk's process, as a thread, on a mosquitto that knows claims only."""

    service: DeskService
    claim: Claim
    store: Any
    stop: threading.Event = field(default_factory=threading.Event)

    def token(self, number: int = 1) -> str:
        secret = bytes([number]) * 16
        with self.store.database.transaction() as connection:
            now_s = time.time()
            set_quota(connection, "ward", 10, now_s=now_s)
            add_tokens(
                connection, [token_digest(secret)], owner="ward", task=TASK, now_s=now_s, expires_s=now_s + DAY_S
            )
        return token_text(secret, self.claim)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[RealDesk]:
    folder, now_s = tmp_path / "desk", time.time()
    folder.mkdir()
    create_ca(folder / "ca", name="covey clinic", now_s=now_s - 10)
    ca = load_ca(folder / "ca")
    issue_server(ca, folder / "broker", hosts=(HOST,), now_s=now_s)
    for name in ("desk", "claim"):
        issue_client(ca, folder / "keys", name=name, now_s=now_s)
    port = free_port()
    (folder / "acl").write_text(ACL)
    found = {path.name for path in (folder / "broker").iterdir()}
    certificate = next(name for name in sorted(found) if name.endswith(".pem") and name != "ca.pem")
    key = next(name for name in sorted(found) if name.endswith(".key"))
    (folder / "mosquitto.conf").write_text(
        f"user {getpass.getuser()}\nlistener {port} {HOST}\nallow_anonymous false\nrequire_certificate true\n"
        "use_identity_as_username true\n"
        f"tls_version tlsv1.3\ncafile {folder}/broker/ca.pem\ncertfile {folder}/broker/{certificate}\n"
        f"keyfile {folder}/broker/{key}\nacl_file {folder}/acl\n"
    )
    store = store_in(folder)
    with store.database.transaction() as connection:
        about: dict[str, Any] = {"spec": "", "bundle": "", "validation": None, "graph_digest": bytes(32)}
        store.tasks.create(connection, TASK, **about, probability=1.0, now_s=now_s)
    keys = folder / "keys"
    claim = replace(
        claim_of(ca=ca, broker=Address(HOST, port)),
        certificate=(keys / "claim.pem").read_text(),
        key=(keys / "claim.key").read_text(),
    )
    broker = MosquittoBroker(folder / "mosquitto.conf", host=HOST, port=port, log=folder / "broker.log")
    transport = MqttTransport(
        host=HOST,
        port=port,
        client_id="desk",
        tls=TlsFiles(keys / "ca.pem", keys / "desk.pem", keys / "desk.key"),
        max_back_off_s=1,
    )
    service = DeskService(
        Desk(Admitter(store, TENANT, ca, AGGREGATOR), {TASK: pins()}),
        tenant=TENANT,
        keys=DeskKeys(DESK_KEY, AGGREGATOR),
        transports=[transport],
        journal=NoJournal(),
        now_s=time.time,
        pacing=Pacing(600),
        wait=lambda longest_s: time.sleep(min(longest_s, 0.02)),
    )
    made = RealDesk(service, claim, store)
    thread = threading.Thread(target=service.run, args=(made.stop.is_set,))
    thread.start()
    try:
        yield made
    finally:
        made.stop.set()
        thread.join()
        broker.stop()
        store.close()


@needs_mosquitto
def test_a_device_joins_and_its_study_stands_at_the_end_of_its_configuration(wearer: Wearer, desk: RealDesk) -> None:
    wearer.claim, token = desk.claim, desk.token()
    before = wearer.config.read_bytes()
    code, out, err = wearer.enroll(token, "--count", "3")
    assert code == 0, err
    assert "asking at" in err
    assert "enrolled as e" in out
    assert "3 names until" in out
    assert public_key_hex(HELPER.public_key()) in out
    assert "compare the helpers' keys" in out
    assert "consent" in out
    after = wearer.config.read_bytes()
    assert after.startswith(before)
    files = DeviceFiles.load(wearer.config)
    (study,) = files.config.studies
    assert (study.study, study.bundle, study.helpers) == (STUDY, "watch.covey", pins().helpers)
    with closing(files.open_store()) as store:
        assert len(Pseudonyms(store, tenant=TENANT, task=TASK).installed()) == 3
        state = kept_state(store, STUDY)
    assert state is not None
    assert state.request is None

    # The same command again asks nobody, and changes nothing.
    desk.stop.set()
    code, out, err = wearer.enroll(token, "--wait", "1")
    assert (code, err) == (0, "")
    assert wearer.config.read_bytes() == after
    code, out, _ = wearer.run("pseudonyms", "list")
    assert "the daemon renews its names by itself" in out
    code, out, _ = wearer.run("status")
    assert "renewed from" in out
    code, out, _ = wearer.run("doctor")
    assert any(line.split()[:2] == ["ok", "enrolment"] or "renewal has been due" in line for line in out.splitlines())


@needs_mosquitto
def test_a_process_that_is_killed_after_the_grant_is_finished_by_the_next(wearer: Wearer, desk: RealDesk) -> None:
    wearer.claim, token = desk.claim, desk.token()
    assert wearer.enroll(token)[0] == 0
    wearer.config.write_text(TOML)  # as if it had been killed just before it wrote the study
    desk.stop.set()
    assert wearer.enroll(token, "--wait", "1")[0] == 0
    assert DeviceFiles.load(wearer.config).config.studies[0].study == STUDY


@needs_mosquitto
def test_the_token_is_read_from_standard_input_and_a_used_one_is_told(
    wearer: Wearer, desk: RealDesk, monkeypatch: pytest.MonkeyPatch
) -> None:
    wearer.claim, token = desk.claim, desk.token()
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"  {token.upper()}\n"))
    assert wearer.enroll("-")[0] == 0
    shutil.rmtree(wearer.folder / "store")
    (wearer.folder / "store.key").unlink()
    wearer.config.write_text(TOML)
    assert wearer.run("init")[0] == 0
    code, _, err = wearer.enroll(token)
    assert code == 1
    assert "this token was used by another device" in err
    assert wearer.config.read_text() == TOML


@needs_mosquitto
def test_a_study_that_is_there_with_other_pins_is_refused_by_the_name_of_the_key(
    wearer: Wearer, desk: RealDesk
) -> None:
    wearer.claim = desk.claim
    for number, (name, changes) in enumerate(
        {
            "publisher_key": {"publisher_key": b"\x22" * 32},
            "the key of helper-a": {
                "helpers": (replace(pins().helpers[0], key=public_key_hex(AGGREGATOR.public_key())),)
            },
            "helper-a is in": {"helpers": ()},
        }.items(),
        start=1,
    ):
        other = joined_study(wearer.claim, pins(**changes), bundle="watch.covey")
        text = with_section(TOML.encode(), other)
        wearer.config.write_bytes(text)
        code, _, err = wearer.enroll(desk.token(number), with_bundle=False)
        assert code == 2
        assert name in err
        assert wearer.config.read_bytes() == text


@needs_mosquitto
@pytest.mark.parametrize("threshold", [1, 2])
def test_a_study_with_several_publishers_is_joined_with_a_model_that_enough_of_them_signed(
    wearer: Wearer, desk: RealDesk, threshold: int
) -> None:
    named = publisher_pins(None, (publisher(), public_key_hex(HELPER.public_key())), threshold)
    told = study_pins(named, helpers=(), broker=Address("broker.example", 8883))
    desk.service._desk = with_fields(desk.service._desk, pins={TASK: told})
    wearer.claim = desk.claim
    code, out, err = wearer.enroll(desk.token(), "--count", "1")
    assert f"publishers, {threshold} of whom must have signed a model:" in out
    assert all(key in out for key in named.keys)
    if threshold == 2:
        assert (code, wearer.config.read_text()) == (4, TOML)
        assert "signed by 1 of the 2 pinned publishers, and 2 of them must have signed" in err
        return
    assert code == 0, err
    (study,) = DeviceFiles.load(wearer.config).config.studies
    assert (study.publisher_key, study.publisher_pins) == (None, named)
    found = wearer.run("doctor")[1]
    assert "signed by at least 1 of the 2 pinned publishers" in " ".join(found.split())
    terms = wearer.run("consent", "list")[1]
    assert "does not run: not granted" in terms


def test_what_is_wrong_is_found_before_anybody_is_asked(wearer: Wearer) -> None:
    token = token_text(bytes(16), wearer.claim)
    code, _, err = wearer.enroll(token, with_bundle=False)
    assert (code, "expected --bundle" in err) == (2, True)
    code, _, err = wearer.enroll(token_text(bytes(16), claim_of(task="sleep")))
    assert "not the one that this token is for" in err
    code, _, err = wearer.enroll("covey1-abc")
    assert "copy all of it" in err
    pinned = joined_study(replace(wearer.claim, aggregator_key="ab" * 32), pins(helpers=()), bundle="watch.covey")
    wearer.config.write_bytes(with_section(TOML.encode(), pinned))
    code, _, err = wearer.enroll(token)
    assert (code, "aggregator_key" in err) == (2, True)
    wearer.config.write_bytes(TOML.encode() + b"\n\n" + section_text(pinned).encode() + b'id = "watch-7"\n')
    code, _, err = wearer.enroll(token)
    assert (code, "fixed name watch-7" in err) == (2, True)
    with closing(DeviceFiles.load(wearer.config).open_store()) as store:
        assert kept_state(store, STUDY) is None


def test_without_a_broker_it_says_so_and_keeps_the_request(wearer: Wearer) -> None:
    code, _, err = wearer.enroll(token_text(bytes(16), wearer.claim), "--wait", "1")
    assert code == 1
    assert "no broker reachable" in err
    assert "run this again, and the same request is sent" in err
    with closing(DeviceFiles.load(wearer.config).open_store()) as store:
        state = kept_state(store, STUDY)
    assert state is not None
    assert state.request is not None


def test_a_clock_that_is_years_behind_is_told_before_anything_is_asked(wearer: Wearer) -> None:
    wearer.claim = claim_of(ca=make_ca("covey test", now_s=time.time() + 3650 * DAY_S))
    code, _, err = wearer.enroll(token_text(bytes(16), wearer.claim))
    assert code == 1
    assert "set the clock" in err


def test_a_device_without_a_study_says_what_to_do(wearer: Wearer) -> None:
    for command in ("run", "status"):
        code, _, err = wearer.run(command)
        assert (code, "covey-device enroll" in err) == (2, True)


@pytest.mark.parametrize("before", [b"", b"a = 1", b"[x]\n", b"study = []\n"])
def test_a_configuration_that_would_not_be_read_is_left_alone(before: bytes) -> None:
    with pytest.raises(ConfigError, match="at the end of the configuration"):
        with_section(before, joined_study(claim_of(), pins(), bundle="watch.covey"))


def test_whatever_a_host_is_called_it_reads_as_it_was_said() -> None:
    for host in ('a"b', "a\\b", "a\nb", "\x7f", "ü😀", "a]b"):
        study = joined_study(claim_of(), pins(broker=Address(host, 1)), bundle="watch.covey")
        assert with_section(TOML.encode(), study).startswith(TOML.encode())
