"""``covey-helper``: setting up, asking what it did, its exit codes; and the process itself over mosquitto, killed."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from sqlalchemy import delete

from aggregator.certificates import issue
from aggregator.helper import schema
from aggregator.helper.answering import Study
from aggregator.helper.assembly import HelperFiles, assemble
from aggregator.helper.cli import main
from aggregator.helper.config import HelperConfig
from fl_protocol.adapters.mqtt import MqttTransport
from fl_protocol.chunking import Reassembler, split
from fl_protocol.errors import ConfigError
from fl_protocol.messages import ChunkMsg, decode, encode
from fl_protocol.secagg.messages import HelperKeyMsg, MaskSumMsg, UnmaskRefusalMsg
from fl_protocol.signing import public_key_from_hex, public_key_hex, verify
from fl_protocol.topics import helper_filters, helper_topic, helper_transfer_topic, parse_helper_topic
from fl_protocol.transport import Connected, Received
from tests.aggregator.helper.helper_desk import (
    DEVICES,
    HELPER,
    NOW_S,
    TENANT,
    Events,
    manifest_of,
    request_for,
)
from tests.aggregator.helper.pseudonymous import CA
from tests.contracts.brokers import WITHIN_S, await_event, find_mosquitto, free_port, start_mosquitto
from tests.fl_protocol.examples import AGGREGATOR_KEY
from tests.fl_protocol.secagg.rounds import device_key

ROOT = Path(__file__).resolve().parents[3]
CONFIG = """
[helper]
name = "helper-a"
operator = "operator-a"
identity = "keys/identity.key"
store = "helper.db"
minimum_cohort = 3
kem = "x25519"

[[study]]
tenant = "clinic"
aggregator_key = "KEY"

[study.broker]
host = "127.0.0.1"
port = PORT
""".replace("KEY", public_key_hex(AGGREGATOR_KEY.public_key()))
COMMANDS = (
    "init", "run", "status", "audit", "device", "device import", "device add", "device remove", "device list",
    "log", "log list", "log checkpoint", "log begin-anew",
)  # fmt: skip


class Office:
    """The second organisation's folder, and its command."""

    def __init__(self, folder: Path, capture: Any, patch: pytest.MonkeyPatch) -> None:
        self.folder, self._capture, self._patch = folder, capture, patch
        self.config = folder / "helper.toml"
        self.config.write_text(CONFIG.replace("PORT", "1883"))
        patch.setenv("COLUMNS", "300")

    def run(self, *words: str) -> tuple[int, str, str]:
        """Exit code, standard output, standard error; the configuration is named where an argument is ``CONFIG``."""
        given = [part for word in words for part in (["--config", str(self.config)] if word == "CONFIG" else [word])]
        self._patch.setattr(sys, "argv", ["covey-helper", *given])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = self._capture.readouterr()
        return code, captured.out, captured.err

    def says(self, *words: str) -> str:
        code, out, err = self.run(*words)
        assert (code, err) == (0, "")
        return out

    def fails(self, code: int, *words: str) -> str:
        found, _, err = self.run(*words)
        assert found == code
        assert err.startswith("covey-helper: ")
        assert err.count("\n") == 1
        return err


@pytest.fixture
def office(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Office:
    return Office(tmp_path, capsys, monkeypatch)


def write_devices(folder: Path) -> Path:
    lines = [f"{device},{public_key_hex(device_key(device).public_key())}" for device in DEVICES]
    path = folder / "devices.csv"
    path.write_text("device,public_key\n" + "\n".join(lines) + "\n")
    return path


def test_init_makes_identity_and_store_once_and_prints_what_others_pin(office: Office) -> None:
    key, pin = office.says("init", "CONFIG").splitlines()
    assert re.fullmatch("[0-9a-f]{64}", key)
    assert office.says("init", "CONFIG").splitlines() == [key, pin]
    assert msgspec.toml.decode(f"helper = [{pin}]") == {
        "helper": [{"name": "helper-a", "operator": "operator-a", "key": key}]
    }
    for name in ("keys/identity.key", "helper.db"):
        assert (office.folder / name).stat().st_mode & 0o077 == 0
    identity = HelperFiles.load(office.config).helper().identity
    assert public_key_from_hex(key) == identity.public_key()


def test_help_shows_examples_with_options_that_there_are_and_exit_codes(office: Office) -> None:
    out = " ".join(office.says("--help").split())
    assert (
        "Exit codes: 0 done, 1 other error or a ledger that was changed, 2 usage or configuration, 3 database." in out
    )
    for command in COMMANDS:
        text = office.says(*command.split(), "--help")
        assert command in {"device", "log"} or re.search(rf"covey-helper {command} .*--config helper\.toml", text), (
            command
        )
        described = text.split("Options", 1)[1].split("Example", 1)[0]
        for option in re.findall(r"--[\w-]+", "".join(re.findall(r"covey-helper .*", text))):
            assert command == "device" or option in described, (command, option)
    assert office.says("--version").startswith("covey-helper ")


def test_devices_are_imported_listed_added_and_removed(office: Office) -> None:
    office.says("init", "CONFIG")
    path = write_devices(office.folder)
    assert office.says("device", "import", str(path), "CONFIG", "--tenant", TENANT) == "8 devices of clinic are known\n"
    other = public_key_hex(device_key("other").public_key())
    office.says("device", "add", "watch-x", other, "CONFIG", "--tenant", TENANT)
    listed = json.loads(office.says("device", "list", "CONFIG", "--json"))
    assert {"tenant": TENANT, "device": "watch-x", "public_key": other} in listed
    assert len(office.says("device", "list", "CONFIG").splitlines()) == len(listed) == 9
    office.says("device", "remove", "watch-x", "CONFIG", "--tenant", TENANT)
    assert "not known" in office.fails(1, "device", "remove", "watch-x", "CONFIG", "--tenant", TENANT)
    assert "expected one of clinic" in office.fails(2, "device", "import", str(path), "CONFIG", "--tenant", "klinik")
    path.write_text("watch-1,abc\n")
    assert "line 1" in office.fails(2, "device", "import", str(path), "CONFIG", "--tenant", TENANT)


def answered_once(office: Office) -> dict[str, Any]:
    """A helper with one answered round and one refusal; what `audit` says of them."""
    office.says("init", "CONFIG")
    office.says("device", "import", str(write_devices(office.folder)), "CONFIG", "--tenant", TENANT)
    service = assemble(HelperFiles.load(office.config), journal=Events())
    service.keys.refresh()
    manifest = manifest_of(service.keys.announcement or b"")
    assert service.answerer.answer(TENANT, request_for(manifest, DEVICES[:5])).is_answer
    assert not service.answerer.answer(TENANT, request_for(manifest, DEVICES[:4])).is_answer
    service.store.close()
    found: dict[str, Any] = json.loads(office.says("audit", "CONFIG", "--json"))
    return found


def test_audit_lists_every_answered_round_and_every_refusal(office: Office) -> None:
    found = answered_once(office)
    (answer,), (refusal,) = found["answers"], found["refusals"]
    assert (answer["task"], answer["round"], answer["updates"], refusal["reason"]) == ("watch", 5, 5, "second_list")
    assert len(answer["included"]) == len(answer["manifest"]) == 64
    assert found["fault"] == ""
    text = office.says("audit", "CONFIG")
    assert "chain verified; rounds answered so far: 1" in text
    assert answer["included"][:16] in text
    assert "second_list" in text
    other = json.loads(office.says("audit", "CONFIG", "--json", "--task", "other"))
    assert other == {"answers": [], "refusals": [], "fault": ""}
    assert office.run("audit", "CONFIG", "--noted", answer["chain"])[0] == 0


def test_audit_fails_where_a_round_is_gone_and_run_does_not_start(office: Office) -> None:
    found = answered_once(office)
    whole = (office.folder / "helper.db").read_bytes()
    with HelperFiles.load(office.config).store() as store, store.database.transaction() as connection:
        connection.execute(delete(schema.answers))
    code, out, _ = office.run("audit", "CONFIG")
    assert code == 1
    assert "BROKEN: row 0 is not the last one that was signed" in out
    assert "was changed" in office.fails(1, "run", "CONFIG")
    # A store put back as a whole passes, unless a later digest was noted elsewhere.
    (office.folder / "helper.db").write_bytes(whole)
    assert office.run("audit", "CONFIG")[0] == 0
    code, out, _ = office.run("audit", "CONFIG", "--noted", hashlib.sha256(b"later").hexdigest())
    assert code == 1
    assert "put back to an earlier day" in out
    assert found["answers"]


def test_status_tells_keys_rounds_refusals_and_devices(office: Office) -> None:
    answered_once(office)
    found = json.loads(office.says("status", "CONFIG", "--json"))
    study = {"tenant": TENANT, "answered": 1, "devices": 8, "allow_listed": True, "cas": []}
    assert found["studies"] == [study]
    assert found["refusals"] == {"second_list": 1}
    (key,) = found["keys"]
    assert key["not_after_s"] - key["made_s"] == 3 * 86_400
    assert "secret" not in json.dumps(found).replace("second_list", "")
    text = office.says("status", "CONFIG")
    for words in ("helper-a of operator-a", "refused: second list: 1", "in 3 d", "keys erased: 0"):
        assert words in text


def test_a_ca_is_pinned_and_told_by_its_fingerprint(office: Office) -> None:
    office.says("init", "CONFIG")
    (office.folder / "study-ca.pem").write_bytes(CA.certificate)
    pins = 'ca = "study-ca.pem"\nallow_listed = false\n'
    office.config.write_text(office.config.read_text().replace("[study.broker]", pins + "\n[study.broker]"))
    pinned = x509.load_pem_x509_certificate(CA.certificate)
    (study,) = HelperFiles.load(office.config).studies()
    assert (study.cas, study.allow_listed) == ((pinned,), False)
    fingerprint = pinned.fingerprint(hashes.SHA256()).hex()
    (told,) = json.loads(office.says("status", "CONFIG", "--json"))["studies"]
    assert (told["cas"], told["allow_listed"]) == ([fingerprint], False)
    text = office.says("status", "CONFIG")
    assert f"clinic: knows pseudonyms by the CA with SHA-256 {fingerprint}" in text
    assert "not asked" in text
    # Somebody's certificate is no CA's: whoever has its key could certify nobody, and every list would be refused.
    (office.folder / "study-ca.pem").write_bytes(issue(CA, "aggregator", now_s=NOW_S).certificate)
    assert "got one that may issue none" in office.fails(2, "run", "CONFIG")


@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [
        ("minimum_cohort = 3", "minimum_cohort = 1", "minimum_cohort"),
        ('name = "helper-a"', 'name = "Helper A"', "name"),
        ("minimum_cohort = 3", "minimum_kohort = 3", "minimum_kohort"),
        ("minimum_cohort = 3", "key_days = 3.0", "key_valid_days above key_days"),
        ('[study.broker]\nhost = "127.0.0.1"\nport = 1883', "", "or nobody can ask"),
        ('host = "127.0.0.1"', 'host = "broker.example"', "ca, certificate and key"),
        ('aggregator_key = "', 'aggregator_key = "zz', "study clinic: aggregator_key"),
        ("[[study]]", '[[study]]\ntenant = "clinic"\naggregator_key = ""\n[[study]]', "each study once"),
        ("[study.broker]", "allow_listed = false\n[study.broker]", "expected a ca where allow_listed is false"),
        ("[study.broker]", 'ca = "no.pem"\n[study.broker]', "study clinic: ca"),
        (
            "[study.broker]",
            'ca = "helper.toml"\n[study.broker]',
            "study clinic: ca: expected certificates of CAs in PEM",
        ),
    ],
)
def test_a_wrong_configuration_is_told_by_its_key(office: Office, right: str, wrong: str, words: str) -> None:
    office.says("init", "CONFIG")
    text = office.config.read_text()
    assert right in text
    office.config.write_text(text.replace(right, wrong))
    assert words in office.fails(2, "run", "CONFIG")


def test_what_is_missing_or_open_to_others_is_told(office: Office) -> None:
    assert "covey-helper init" in office.fails(2, "run", "CONFIG")
    office.says("init", "CONFIG")
    (office.folder / "keys" / "identity.key").chmod(0o644)
    assert "chmod 600" in office.fails(2, "status", "CONFIG")
    (office.folder / "keys" / "identity.key").chmod(0o600)
    (office.folder / "helper.db").unlink()
    assert "covey-helper init" in office.fails(3, "status", "CONFIG")
    (office.folder / "keys" / "identity.key").write_bytes(b"short")
    assert "expected 32 bytes" in office.fails(2, "init", "CONFIG")
    assert "expected a readable TOML file" in office.fails(2, "run", "--config", str(office.folder / "no.toml"))


def test_https_without_its_libraries_is_told(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    office.says("init", "CONFIG")
    https = '[https]\nhost = "127.0.0.1"\nport = 8443\ncertificate = "c"\nkey = "k"\nclient_ca = "ca"\n'
    office.config.write_text(office.config.read_text() + https)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "aggregator.helper.https_api", raising=False)
    assert "pip install covey[helper]" in office.fails(2, "run", "CONFIG")


def test_the_documented_configuration_is_one(tmp_path: Path) -> None:
    """docs/helper.md's helper.toml."""
    (text,) = re.findall(r"```toml\n(\[helper\].*?)```", (ROOT / "docs" / "helper.md").read_text(), re.DOTALL)
    text = text.replace("AGGREGATOR_KEY_HEX", public_key_hex(AGGREGATOR_KEY.public_key()))
    assert msgspec.toml.decode(text, type=HelperConfig).helper.minimum_cohort >= 2
    (tmp_path / "helper.toml").write_text(text)
    files = HelperFiles.load(tmp_path / "helper.toml")
    assert files.studies() == [Study("clinic", AGGREGATOR_KEY.public_key())]
    with pytest.raises(ConfigError, match="covey-helper init"):
        files.helper()


# The process itself.


class Aggregator:
    """Asks over a real broker."""

    def __init__(self, port: int) -> None:
        self.transport = MqttTransport(host="127.0.0.1", port=port, client_id="aggregator", max_back_off_s=1)
        self.transport.open()
        await_event(self.transport, Connected)
        for topic_filter in helper_filters(TENANT):
            self.transport.subscribe(topic_filter)
        self._parts = Reassembler()

    def key(self) -> bytes:
        while True:
            found = await_event(self.transport, Received)
            if found.topic == helper_topic(TENANT, HELPER, "key"):
                return found.payload

    def post(self, request: bytes) -> None:
        transfer_id = hashlib.sha256(request).digest()[:16]
        for chunk in split(transfer_id, request, data_bytes=1000):
            topic = helper_transfer_topic(TENANT, HELPER, "request", transfer_id, chunk.index)
            self.transport.publish(topic, encode(chunk))

    def ask(self, request: bytes) -> bytes:
        """Until there is an answer, as the aggregator does."""
        ends_s = time.monotonic() + WITHIN_S
        while time.monotonic() < ends_s:
            self.post(request)
            until_s = time.monotonic() + 2
            while time.monotonic() < until_s:
                found = self.transport.poll(0.1)
                if isinstance(found, Received) and (whole := self._whole(found)) is not None:
                    return whole
        raise AssertionError("no answer")

    def _whole(self, message: Received) -> bytes | None:
        kind = parse_helper_topic(message.topic).kind
        if kind == "answer":
            return self._parts.accept(decode(message.payload, ChunkMsg), time.time())
        return message.payload if kind == "refusal" else None


@contextmanager
def running(config: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "aggregator.helper.cli", "run", "--config", str(config)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if json.loads(line)["event"] == "key_published":
                    break
            yield process
        finally:
            process.kill()


@pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")
def test_the_process_answers_over_mosquitto_is_killed_and_answers_the_same(office: Office) -> None:
    port = free_port()
    stop_broker = start_mosquitto(office.folder)(port)
    office.config.write_text(CONFIG.replace("PORT", str(port)))
    key_hex = office.says("init", "CONFIG").splitlines()[0]
    office.says("device", "import", str(write_devices(office.folder)), "CONFIG", "--tenant", TENANT)
    identity = public_key_from_hex(key_hex)
    asking: Aggregator | None = None
    try:
        with running(office.config):
            asking = Aggregator(port)
            signed = asking.key()
            assert verify(signed, HelperKeyMsg, identity).helper == HELPER
            manifest = manifest_of(signed, terms={"helper_noise_sigma": 20.0, "bits": 24})
            first = asking.ask(request_for(manifest, DEVICES[:5]))
            assert verify(first, MaskSumMsg, identity).count == 5
        with running(office.config) as process:
            assert asking.ask(request_for(manifest, DEVICES[:5])) == first
            refusal = verify(asking.ask(request_for(manifest, DEVICES[:4])), UnmaskRefusalMsg, identity)
            assert refusal.reason.value == "second_list"
            process.terminate()
            assert process.stdout is not None
            told = [json.loads(line)["event"] for line in process.stdout]
            assert process.wait(WITHIN_S) == 0
        assert {"unmask_repeated", "unmask_refused"} <= set(told)
        assert told[-1] == "stopped"
    finally:
        if asking is not None:
            asking.transport.close()
        stop_broker()
    assert office.run("audit", "CONFIG")[0] == 0
