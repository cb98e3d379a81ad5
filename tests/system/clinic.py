"""An operator's folder with two real mosquittos and the desk's process, set up by commands; and devices."""

from __future__ import annotations

import getpass
import io
import os
import queue
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import UNSET, UnsetType

from aggregator.cli import main
from device_client.adapters.certificate_files import tls_files
from device_client.pseudonyms import Pseudonym, Pseudonyms
from firmware_sim.mosquitto_broker import MosquittoBroker, free_port
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
from fl_protocol.renewal_proof import RenewalProofMsg, signed_proof
from fl_protocol.sealing import RoundKey
from fl_protocol.signing import public_key_from_hex
from fl_protocol.topics import enrolment_topic
from fl_protocol.transport import Connected, Received
from tests.aggregator.operator_desk import BUNDLES, ROOT, TRAINING
from tests.contracts.brokers import WITHIN_S, await_event
from tests.device_client.ports import MemoryStore

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
requests_a_minute = {requests_a_minute}
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
    requests_a_minute: int = 3000
    task: str = TRAINING
    clients: list[MqttTransport] = field(default_factory=list)
    desk_pid: int = 0

    def command(self, *arguments: str, code: int = 0) -> str:
        """What a command of the aggregator's says; in this process, since to start one takes longer than most do."""
        said, done = io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(said):
            patch.setattr(sys, "argv", ["covey-aggregator", *arguments])
            patch.setenv("COLUMNS", "200")
            patch.chdir(self.folder)
            try:
                main()
            except SystemExit as stop:
                done = int(stop.code or 0)
        assert done == code, said.getvalue()
        return said.getvalue()

    def set_up(self) -> None:
        """As docs/operations.md has it."""
        (self.folder / "model.covey").write_bytes((BUNDLES / "watch_features.covey").read_bytes())
        (self.folder / "watch.toml").write_text(self.task)
        (self.folder / "aggregator.toml").write_text(
            CONFIG.format(port=self.port, claims=self.claims_port, requests_a_minute=self.requests_a_minute)
        )
        at = ("--config", "aggregator.toml")
        self.command("ca", "init", "--ca", "ca")
        self.command("ca", "server", "--ca", "ca", "--host", HOST, "--out", "broker")
        for name in ("aggregator", "enrolment"):
            self.command("ca", "client", "--ca", "ca", "--name", name, "--out", "keys")
        self.command("init", *at)
        self.command("task", "create", "watch.toml", *at)
        self.command("enrolment", "init", *at)
        self.command("enrolment", "claim", TASK, "--out", "claim.json", *at)
        (self.folder / "claimant").mkdir()
        for name, text in (("ca", self.claim.ca), ("certificate", self.claim.certificate), ("key", self.claim.key)):
            (self.folder / "claimant" / name).write_text(text)
        user = ("--listen", HOST, "--user", getpass.getuser())
        self.command("broker", "config", "--ca", "ca", "--out", "broker", *user, *at)

    @property
    def claim(self) -> Claim:
        return decode_claim((self.folder / "claim.json").read_bytes())

    def token(self) -> bytes:
        """A new token's secret."""
        (secret,) = self.tokens(1)
        return secret

    def tokens(self, count: int) -> list[bytes]:
        """New tokens' secrets."""
        given = ("--owner", "ward-3", "--quota", "100000", "--claim", "claim.json", "--config", "aggregator.toml")
        text = self.command("enroll-token", "create", TASK, "--count", str(count), *given)
        tokens = [parse_token(line) for line in text.splitlines()]
        assert {token.fingerprint for token in tokens} == {self.claim.fingerprint}
        return [token.secret for token in tokens]

    def claimant(self, client: str) -> MqttTransport:
        """A client of the claim broker, under the claim identity."""
        keys = self.folder / "claimant"
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
        return self.ask_with(self.prepared(token))

    def prepared(
        self,
        token: bytes | None,
        *,
        count: int = 3,
        client: str | None = None,
        proof: RenewalProofMsg | UnsetType = UNSET,
    ) -> bytes:
        """A signed request, by default of a client of the claim broker; without a token, to be renewed."""
        names = self.names.prepare(count=count, entropy=os.urandom)
        request = EnrolmentRequestMsg(
            tenant=TENANT,
            task=TASK,
            client=client or self.client,
            token=token,
            enrolment=None if token is not None else self.enrolment,
            renewal_key=self.renewal.public_key().public_bytes_raw(),
            answer_to=self.answers.recipient(),
            names=names,
            proof=self.proof(names) if token is None and proof is UNSET else proof,
        )
        return signed_request(request, self.renewal)

    def proof(self, names: bytes) -> RenewalProofMsg | UnsetType:
        """That it is renewed with these names; none where it has none."""
        if not (installed := self.names.installed()):
            return UNSET
        key = self.names.tls_key(installed[-1])
        return signed_proof(installed[-1].id, key, tenant=TENANT, task=TASK, enrolment=self.enrolment, names=names)

    def ask_with(self, signed: bytes) -> EnrolmentAnswerMsg:
        """The answer to a request at the claim broker."""
        line = self.clinic.claimant(self.client)
        try:
            return self.ask_over(line, signed, self.client)
        finally:
            line.close()
            self.clinic.clients.remove(line)

    def ask_over(self, line: MqttTransport, signed: bytes, client: str) -> EnrolmentAnswerMsg:
        """The answer to a request of this client, over its connection."""
        claim = self.clinic.claim
        subscribed(line, enrolment_topic(TENANT, client, "answer"))
        sealed = sealed_request(signed, claim.recipient, tenant=TENANT, task=TASK, client=client)
        line.publish(enrolment_topic(TENANT, client, "request"), sealed)
        return opened_answer(
            await_event(line, Received).payload,
            self.answers,
            client=client,
            request_digest=sha256(signed).digest(),
            aggregator=public_key_from_hex(claim.aggregator_key),
        )

    def join(self, *, count: int = 3) -> Pseudonym:
        """Join with so many names, and the one for now."""
        answer = self.ask_with(self.prepared(self.clinic.token(), count=count))
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


@contextmanager
def running_clinic(folder: Path, *, requests_a_minute: int = 3000, task: str = TRAINING) -> Iterator[Clinic]:
    """A clinic with everything running but the aggregator."""
    clinic = Clinic(folder, free_port(), free_port(), requests_a_minute, task)
    clinic.set_up()
    with ExitStack() as stack:
        for name, port in (("mosquitto", clinic.port), ("claims", clinic.claims_port)):
            broker = MosquittoBroker(
                folder / "broker" / f"{name}.conf", host=HOST, port=port, log=folder / f"{name}.log"
            )
            stack.callback(broker.stop)
            if name == "mosquitto":
                (folder / "broker.pid").write_text(str(broker.pid))
        clinic.desk_pid = stack.enter_context(desk_process(folder)).pid
        yield clinic
