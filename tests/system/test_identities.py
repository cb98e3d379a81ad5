"""Joining and leaving on two real mosquittos under our configuration, with the operator's commands and processes.

mosquitto goes by the machine's clock, and so does the desk. What waits here waits for processes that it started.
"""

from __future__ import annotations

import getpass
import os
import queue
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregator.ca_folder import load_ca
from aggregator.certificates import make_crl
from device_client.adapters.certificate_files import tls_files
from device_client.pseudonyms import Pseudonym, Pseudonyms
from firmware_sim.mosquitto_broker import MosquittoBroker, find_mosquitto, free_port
from fl_protocol.adapters.mqtt import MqttTransport, TlsFiles
from fl_protocol.joining import (
    Claim,
    EnrolmentAnswerMsg,
    EnrolmentRequestMsg,
    decode_claim,
    opened_answer,
    parse_token,
    sealed_request,
    signed_request,
)
from fl_protocol.sealing import RoundKey
from fl_protocol.signing import public_key_from_hex
from fl_protocol.topics import down_filter, enrolment_topic
from fl_protocol.transport import Connected, Disconnected, Received
from tests.aggregator.operator_desk import BUNDLES, ROOT, TRAINING
from tests.contracts.brokers import WITHIN_S, await_event
from tests.device_client.ports import MemoryStore

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")

HOST, TENANT, TASK = "127.0.0.1", "clinic", "watch"
CONFIG = """
[aggregator]
tenant = "clinic"
database = "aggregator.db"
signing_key = "keys/aggregator-signing.key"

[broker]
host = "127.0.0.1"
port = {port}
ca = "keys/ca.pem"
certificate = "keys/aggregator.pem"
key = "keys/aggregator.key"

[enrolment]
ca = "ca"
key = "keys/desk.key"
crl = "broker/crl.pem"
reload = ["sh", "-c", "kill -HUP $(cat broker.pid)"]

[enrolment.broker]
host = "127.0.0.1"
port = {claims}
ca = "keys/ca.pem"
certificate = "keys/enrolment.pem"
key = "keys/enrolment.key"
"""


@dataclass
class Clinic:
    """An operator's folder, two brokers, and the desk's process."""

    folder: Path
    port: int
    claims_port: int
    clients: list[MqttTransport] = field(default_factory=list)

    def command(self, *arguments: str, code: int = 0) -> str:
        """What a command of the aggregator's says."""
        done = subprocess.run(
            [sys.executable, "-m", "aggregator.cli", *arguments],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def set_up(self) -> None:
        """As docs/operations.md has it."""
        (self.folder / "model.covey").write_bytes((BUNDLES / "watch_features.covey").read_bytes())
        (self.folder / "watch.toml").write_text(TRAINING)
        (self.folder / "aggregator.toml").write_text(CONFIG.format(port=self.port, claims=self.claims_port))
        at = ("--config", "aggregator.toml")
        self.command("ca", "init", "--ca", "ca")
        self.command("ca", "server", "--ca", "ca", "--host", HOST, "--out", "broker")
        for name in ("aggregator", "enrolment"):
            self.command("ca", "client", "--ca", "ca", "--name", name, "--out", "keys")
        self.command("init", *at)
        self.command("task", "create", "watch.toml", *at)
        self.command("enrolment", "init", *at)
        self.command("enrolment", "claim", TASK, "--out", "claim.json", *at)
        user = ("--listen", HOST, "--user", getpass.getuser())
        self.command("broker", "config", "--ca", "ca", "--out", "broker", *user, *at)

    @property
    def claim(self) -> Claim:
        return decode_claim((self.folder / "claim.json").read_bytes())

    def token(self, *more: str) -> bytes:
        """A new token's secret."""
        given = ("--owner", "ward-3", "--quota", "100", "--claim", "claim.json", "--config", "aggregator.toml")
        text = self.command("enroll-token", "create", TASK, *given, *more)
        token = parse_token(text)
        assert token.fingerprint == self.claim.fingerprint
        return token.secret

    def claimant(self, client: str) -> MqttTransport:
        """A client of the claim broker, under the claim identity."""
        keys = self.folder / "claimant"
        keys.mkdir(exist_ok=True)
        for name, text in (("ca", self.claim.ca), ("certificate", self.claim.certificate), ("key", self.claim.key)):
            (keys / name).write_text(text)
        files = TlsFiles(keys / "ca", keys / "certificate", keys / "key")
        return self._connected(MqttTransport(host=HOST, port=self.claims_port, client_id=client, tls=files))

    def device(self, one: Pseudonym, *, within_s: float = WITHIN_S) -> MqttTransport:
        """A client of the study's broker, under a pseudonym."""
        with tls_files(one) as files:
            made = MqttTransport(host=HOST, port=self.port, client_id=one.id, tls=files, max_back_off_s=1)
        return self._connected(made, within_s)

    def _connected(self, client: MqttTransport, within_s: float = WITHIN_S) -> MqttTransport:
        self.clients.append(client)
        client.open()
        await_event(client, Connected, within_s=within_s)
        return client


def subscribed(client: MqttTransport, *filters: str) -> None:
    """Have subscriptions in force; the port does not tell when they are."""
    granted: queue.Queue[int] = queue.Queue()
    client._client.on_subscribe = lambda _client, _userdata, message_id, *_: granted.put(message_id)
    for topic_filter in filters:
        client.subscribe(topic_filter)
    for _ in filters:
        granted.get(timeout=WITHIN_S)


class Watch:
    """A device that wants to join."""

    def __init__(self, clinic: Clinic) -> None:
        self.clinic, self.client = clinic, "c" + os.urandom(16).hex()
        self.renewal, self.answers = Ed25519PrivateKey.generate(), RoundKey("x25519", os.urandom(32))
        self.names = Pseudonyms(MemoryStore(), tenant=TENANT, task=TASK)

    def ask(self, token: bytes) -> EnrolmentAnswerMsg:
        """The desk's answer."""
        request = EnrolmentRequestMsg(
            tenant=TENANT,
            task=TASK,
            client=self.client,
            token=token,
            enrolment=None,
            renewal_key=self.renewal.public_key().public_bytes_raw(),
            answer_to=self.answers.recipient(),
            names=self.names.prepare(count=3, entropy=os.urandom),
        )
        signed = signed_request(request, self.renewal)
        claim = self.clinic.claim
        line = self.clinic.claimant(self.client)
        subscribed(line, enrolment_topic(TENANT, self.client, "answer"))
        sealed = sealed_request(signed, claim.recipient, tenant=TENANT, task=TASK, client=self.client)
        line.publish(enrolment_topic(TENANT, self.client, "request"), sealed)
        received = await_event(line, Received)
        aggregator = public_key_from_hex(claim.aggregator_key)
        digest = sha256(signed).digest()
        return opened_answer(
            received.payload, self.answers, client=self.client, request_digest=digest, aggregator=aggregator
        )

    def join(self, *more: str) -> Pseudonym:
        """Join, and the name for now."""
        answer = self.ask(self.clinic.token(*more))
        assert answer.outcome == "enrolled", answer
        self.enrolment = answer.enrolment
        self.names.install(answer.names, aggregator_key=public_key_from_hex(self.clinic.claim.aggregator_key))
        current = self.names.current(time.time())
        assert isinstance(current, Pseudonym)
        return current


@contextmanager
def desk_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """``covey-aggregator enrolment run``, connected to both brokers."""
    journal = folder / "desk.jsonl"
    with journal.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "aggregator.cli", "enrolment", "run", "--config", "aggregator.toml"],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        await_line(journal, process, "enrolment_connected", 2)
        yield process
    finally:
        process.terminate()
        process.wait(timeout=WITHIN_S)


def await_line(journal: Path, process: subprocess.Popen[str], event: str, count: int = 1) -> dict[str, Any]:
    """The newest of so many events of a kind in a journal."""
    ends_s = time.monotonic() + WITHIN_S
    while time.monotonic() < ends_s and process.poll() is None:
        lines = [line for line in journal.read_text().splitlines() if f'"{event}"' in line]
        if len(lines) >= count:
            found: dict[str, Any] = msgspec.json.decode(lines[-1])
            return found
        time.sleep(0.02)
    raise AssertionError(f"no {event} in {journal.read_text()}")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clinic]:
    clinic = Clinic(tmp_path_factory.mktemp("clinic"), free_port(), free_port())
    clinic.set_up()
    with ExitStack() as stack:
        for name, port in (("mosquitto", clinic.port), ("claims", clinic.claims_port)):
            config = clinic.folder / "broker" / f"{name}.conf"
            broker = MosquittoBroker(config, host=HOST, port=port, log=clinic.folder / f"{name}.log")
            stack.callback(broker.stop)
            if name == "mosquitto":
                (clinic.folder / "broker.pid").write_text(str(broker.pid))
        stack.enter_context(desk_process(clinic.folder))
        yield clinic


@pytest.fixture
def clinic(shared: Clinic) -> Iterator[Clinic]:
    yield shared
    while shared.clients:
        shared.clients.pop().close()


def test_a_device_joins_with_a_token_and_is_let_in_under_its_first_name(clinic: Clinic) -> None:
    watch = Watch(clinic)
    name = watch.join()
    subscribed(clinic.device(name), down_filter(TENANT, name.id))


def test_a_used_token_an_expired_one_and_a_guess_have_each_their_answer(clinic: Clinic) -> None:
    token = clinic.token()
    assert Watch(clinic).ask(token).outcome == "enrolled"
    assert Watch(clinic).ask(token).outcome == "used_token"
    assert Watch(clinic).ask(os.urandom(16)).outcome == "unknown_token"
    withdrawn = clinic.token()
    clinic.command("enroll-token", "withdraw", "--owner", "ward-3", "--config", "aggregator.toml")
    assert Watch(clinic).ask(withdrawn).outcome == "withdrawn_token"


def test_a_claim_identity_may_ask_under_its_own_id_and_do_nothing_else(clinic: Clinic) -> None:
    desk_files = TlsFiles(*(clinic.folder / "keys" / name for name in ("ca.pem", "aggregator.pem", "aggregator.key")))
    one, other = clinic.claimant("c1"), clinic.claimant("c2")
    subscribed(other, "#", f"fl/v1/{TENANT}/enrol/+/request", enrolment_topic(TENANT, "c1", "answer"))
    for topic in (
        enrolment_topic(TENANT, "c2", "request"),
        enrolment_topic(TENANT, "c2", "answer"),
        f"fl/v1/{TENANT}/round/{TASK}",
        enrolment_topic(TENANT, "c1", "request"),
    ):
        one.publish(topic, b"forged")
    other.publish(enrolment_topic(TENANT, "c2", "answer"), b"from c2 to itself")
    assert other.poll(1.0) is None
    # The study's own broker does not know it: its certificate says claim, and no ACL does.
    stranger = MqttTransport(host=HOST, port=clinic.port, client_id="aggregator", tls=desk_files)
    clinic.clients.append(stranger)
    stranger.open()
    await_event(stranger, Connected)
    keys = clinic.folder / "claimant"
    thief = MqttTransport(
        host=HOST, port=clinic.port, client_id="claim", tls=TlsFiles(keys / "ca", keys / "certificate", keys / "key")
    )
    clinic.clients.append(thief)
    thief.open()
    await_event(thief, Connected)
    subscribed(thief, "#", f"fl/v1/{TENANT}/up/#")
    subscribed(stranger, f"fl/v1/{TENANT}/up/#")
    thief.publish(f"fl/v1/{TENANT}/up/00/aggregator/{'0' * 32}/0", b"forged")
    assert stranger.poll(1.0) is None


def test_a_revoked_device_loses_its_connection_at_once_and_does_not_come_back(clinic: Clinic) -> None:
    watch, bystander = Watch(clinic), Watch(clinic)
    line = clinic.device(watch.join())
    other = clinic.device(bystander.join())
    said = clinic.command(
        "device", "revoke", watch.enrolment, "--reason", "lost on a train", "--yes", "--config", "aggregator.toml"
    )
    assert watch.enrolment in said
    await_event(line, Disconnected)
    ends_s = time.monotonic() + 3
    while time.monotonic() < ends_s:
        assert not isinstance(line.poll(0.2), Connected)
    assert other.poll(0.0) is None
    answer = watch.ask(clinic.token())
    assert answer.outcome == "revoked"
    assert "lost on a train" in answer.detail


def test_the_list_alone_keeps_a_device_from_coming_back_and_leaves_its_connection_up(clinic: Clinic) -> None:
    """Why the desk takes connections over."""
    watch = Watch(clinic)
    name = watch.join()
    line, path = clinic.device(name), clinic.folder / "broker" / "crl.pem"
    kept, serial = path.read_bytes(), x509.load_pem_x509_certificate(name.certificate).serial_number
    reload = ["sh", "-c", f"kill -HUP $(cat {clinic.folder / 'broker.pid'})"]
    try:
        path.write_bytes(make_crl(load_ca(clinic.folder / "ca"), [(serial, time.time())], now_s=time.time()))
        subprocess.run(reload, check=True)
        assert line.poll(1.5) is None
        with pytest.raises(AssertionError, match="no Connected"):
            clinic.device(name, within_s=2.0)
    finally:
        path.write_bytes(kept)
        subprocess.run(reload, check=True)


def test_the_running_broker_forbids_what_it_should(clinic: Clinic) -> None:
    said = clinic.command("broker", "check", "--config", "aggregator.toml", "--ca", "ca", "--broker", "broker")
    assert said.count("holds") == 11
