"""A real mosquitto under our generated configuration, certificates and ACL: what must be forbidden is really tried.

mosquitto drops a publish without rights in silence, so every check watches from a client that may read the topic and
waits for a marker that was sent afterwards. Each check is also run against a file broken on purpose, and must notice.
"""

from __future__ import annotations

import queue
import random
import shutil
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from aggregator.broker_config import mosquitto_acl
from aggregator.certificates import KeyPair, issue, make_ca
from firmware_sim.mosquitto_broker import MosquittoBroker, find_mosquitto, free_port, write_mosquitto_files
from fl_protocol.adapters.mqtt import LastWill, MqttTransport, TlsFiles
from fl_protocol.limits import MAX_PACKET_BYTES, PACKET_RESERVE_BYTES
from fl_protocol.topics import (
    down_filter,
    down_topic,
    model_topic,
    round_topic,
    shard_filter,
    shard_of,
    state_topic,
    upload_topic,
)
from fl_protocol.transport import Connected, Disconnected, Received
from tests.contracts.brokers import WITHIN_S, await_event

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")

HOST, TENANT, AGGREGATOR = "127.0.0.1", "demo", "aggregator"
ATTACKER, VICTIM, WORKER = "wrist-01-left", "wrist-02-left", "worker-1"
UPDATE, DIGEST = bytes(16), bytes(32)
ROOT = f"fl/v1/{TENANT}"
CONNECT = b"\x10\x13\x00\x04MQTT\x05\x02\x00\x1e\x00\x00\x06nobody"
LIMIT = MAX_PACKET_BYTES + PACKET_RESERVE_BYTES


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A broker's files and, per client, a certificate and key; some of them not to be accepted."""
    folder = tmp_path_factory.mktemp("certificates")
    now_s = time.time()
    ca, other_ca = make_ca("covey demo", now_s=now_s), make_ca("covey demo", now_s=now_s)

    def write(name: str, pair: KeyPair) -> None:
        (folder / f"{name}.pem").write_bytes(pair.certificate)
        (folder / f"{name}.key").write_bytes(pair.key)

    (folder / "ca.pem").write_bytes(ca.certificate)
    (folder / "other-ca.pem").write_bytes(other_ca.certificate)
    write("broker", issue(ca, "broker", now_s=now_s, server_hosts=(HOST, "localhost")))
    for name in (AGGREGATOR, ATTACKER, VICTIM, WORKER):
        write(name, issue(ca, name, now_s=now_s))
    write("forged", issue(other_ca, ATTACKER, now_s=now_s))
    write("expired", issue(ca, ATTACKER, now_s=now_s - 366 * 86_400))
    write("early", issue(ca, ATTACKER, now_s=now_s + 86_400))
    return folder


@dataclass
class Yard:
    """A running broker and its clients."""

    folder: Path
    port: int
    clients: list[MqttTransport] = field(default_factory=list)
    announced: int | None = None
    """MaximumPacketSize, as the broker named it to the newest client."""

    def client(
        self, name: str, *filters: str, client_id: str | None = None, will: LastWill | None = None
    ) -> MqttTransport:
        """A connected client under `name`'s certificate, with the subscriptions in force."""
        transport = MqttTransport(
            host=HOST,
            port=self.port,
            client_id=client_id or name,
            tls=TlsFiles(self.folder / "ca.pem", self.folder / f"{name}.pem", self.folder / f"{name}.key"),
            will=will,
            max_back_off_s=1,
        )
        self.clients.append(transport)
        granted: queue.Queue[int] = queue.Queue()
        # The port does not tell when a subscription is in force, and these checks must know.
        transport._client.on_subscribe = lambda _client, _userdata, message_id, *_: granted.put(message_id)
        transport.open()
        self.announced = await_event(transport, Connected).maximum_packet_bytes
        for topic_filter in filters:
            transport.subscribe(topic_filter)
        for _ in filters:
            granted.get(timeout=WITHIN_S)
        return transport

    def aggregator(self) -> MqttTransport:
        return self.client(AGGREGATOR, f"{ROOT}/up/#", f"{ROOT}/state/#")

    def device(self, name: str) -> MqttTransport:
        return self.client(name, down_filter(TENANT, name), f"{ROOT}/round/+", f"{ROOT}/model/+/+")

    def close_clients(self) -> None:
        while self.clients:
            self.clients.pop().close()


Change = Callable[[str], str]


@contextmanager
def running(
    certificates: Path, folder: Path, *, config: Change | None = None, acl: Change | None = None
) -> Iterator[Yard]:
    """A broker under the generated files, or under copies that were changed on purpose."""
    shutil.copytree(certificates, folder)
    port = free_port()
    path = write_mosquitto_files(folder, host=HOST, port=port, tenant=TENANT, aggregator=AGGREGATOR)
    (folder / "acl").write_text(mosquitto_acl(tenant=TENANT, aggregator=AGGREGATOR, workers=(WORKER,)))
    for file, change in ((path, config), (folder / "acl", acl)):
        if change is not None:
            text = file.read_text()
            assert change(text) != text, "the change changes nothing"
            file.write_text(change(text))
    broker = MosquittoBroker(path, host=HOST, port=port, log=folder / "broker.log")
    yard = Yard(folder, port)
    try:
        yield yard
    finally:
        yard.close_clients()
        broker.stop()


@pytest.fixture(scope="module")
def shared(certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yard]:
    with running(certificates, tmp_path_factory.mktemp("broker") / "files") as yard:
        yield yard


@pytest.fixture
def yard(shared: Yard) -> Iterator[Yard]:
    """The broker under the files as they are."""
    yield shared
    shared.close_clients()


def received_until(client: MqttTransport, marker: bytes) -> list[Received]:
    """Everything a client got before the marker; that it stayed connected is part of it."""
    ends_s = time.monotonic() + WITHIN_S
    found: list[Received] = []
    while time.monotonic() < ends_s:
        event = client.poll(0.1)
        assert not isinstance(event, Disconnected), event
        if isinstance(event, Received):
            if event.payload == marker:
                return found
            found.append(event)
    raise AssertionError(f"no marker within {WITHIN_S} s; before it came {[event.topic for event in found]}")


class Marks:
    """Markers, each used once."""

    count = 0

    @classmethod
    def new(cls) -> bytes:
        cls.count += 1
        return b"marker %d" % cls.count


def flush(sender: MqttTransport, name: str, aggregator: MqttTransport) -> list[Received]:
    """What reached the aggregator of everything `sender` has published so far."""
    marker = Marks.new()
    sender.publish(upload_topic(TENANT, name, b"\xff" * 16, 0), marker)
    return received_until(aggregator, marker)


def settle(aggregator: MqttTransport, device: MqttTransport, name: str) -> list[Received]:
    """What reached a device of everything that the broker has taken so far."""
    marker = Marks.new()
    aggregator.publish(down_topic(TENANT, name, "control"), marker)
    return received_until(device, marker)


# What must work.


def test_a_round_trip_goes_through(yard: Yard) -> None:
    aggregator, device = yard.aggregator(), yard.device(VICTIM)
    settle(aggregator, device, VICTIM)
    manifest, model, receipt = (
        round_topic(TENANT, "task"),
        model_topic(TENANT, DIGEST, 0),
        down_topic(TENANT, VICTIM, "receipt"),
    )
    for topic in (manifest, model, receipt):
        aggregator.publish(topic, b"down")
    assert [event.topic for event in settle(aggregator, device, VICTIM)] == [manifest, model, receipt]
    up, presence = upload_topic(TENANT, VICTIM, UPDATE, 7), state_topic(TENANT, VICTIM)
    device.publish(up, b"up")
    device.publish(presence, b"online")
    assert [event.topic for event in flush(device, VICTIM, aggregator)] == [up, presence]


def test_retained_manifests_and_models_wait_for_a_device_that_comes_later(yard: Yard) -> None:
    aggregator = yard.aggregator()
    topics = {round_topic(TENANT, "later"), model_topic(TENANT, DIGEST, 1)}
    for topic in topics:
        aggregator.publish(topic, b"retained", retain=True)
    flush_own = yard.client(ATTACKER)
    flush(flush_own, ATTACKER, aggregator)
    device = yard.device(VICTIM)
    assert {event.topic for event in settle(aggregator, device, VICTIM)} == topics
    for topic in topics:
        aggregator.publish(topic, b"", retain=True)
    settle(aggregator, device, VICTIM)


def die(yard: Yard, name: str, *, will: str) -> None:
    """A client announces a last will and dies without a goodbye."""
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id=name, protocol=paho.MQTTv5)
    client.tls_set(str(yard.folder / "ca.pem"), str(yard.folder / f"{name}.pem"), str(yard.folder / f"{name}.key"))
    client.will_set(will, b"last will", qos=1)
    client.connect(HOST, yard.port)
    for _ in range(200):
        client.loop(timeout=0.1)
        connection = client.socket()
        if client.is_connected() or connection is None:
            break
    if connection is not None:
        connection.close()


def test_the_last_will_of_a_device_that_dies_reaches_the_aggregator(yard: Yard) -> None:
    aggregator = yard.aggregator()
    die(yard, VICTIM, will=state_topic(TENANT, VICTIM))
    event = await_event(aggregator, Received)
    assert (event.topic, event.payload) == (state_topic(TENANT, VICTIM), b"last will")


def test_the_largest_chunk_fits(yard: Yard) -> None:
    aggregator, device = yard.aggregator(), yard.device(VICTIM)
    device.publish(upload_topic(TENANT, VICTIM, UPDATE, 0), bytes(MAX_PACKET_BYTES))
    (event,) = flush(device, VICTIM, aggregator)
    assert len(event.payload) == MAX_PACKET_BYTES


def test_a_worker_ingests_a_shard_and_answers_its_devices(yard: Yard) -> None:
    shard = shard_of(VICTIM)
    device, worker = yard.device(VICTIM), yard.client(WORKER, shard_filter(TENANT, shard))
    topic = upload_topic(TENANT, VICTIM, UPDATE, 0)
    device.publish(topic, b"sealed")
    assert await_event(worker, Received) == Received(topic, b"sealed")
    for kind in ("receipt", "nack"):
        worker.publish(down_topic(TENANT, VICTIM, kind), b"answer")
        assert await_event(device, Received).topic == down_topic(TENANT, VICTIM, kind)


def durable(yard: Yard) -> MqttTransport:
    """A worker as it runs: with a session, and manual acknowledgement."""
    files = TlsFiles(yard.folder / "ca.pem", yard.folder / f"{WORKER}.pem", yard.folder / f"{WORKER}.key")
    transport = MqttTransport(
        host=HOST, port=yard.port, client_id=WORKER, tls=files, manual_acknowledgement=True, session_expiry_s=600
    )
    yard.clients.append(transport)
    transport.open()
    await_event(transport, Connected)
    return transport


def uploads(client: MqttTransport, count: int) -> list[bytes]:
    return [await_event(client, Received).payload for _ in range(count)]


def test_a_burst_while_a_worker_is_away_waits_for_it_unharmed(yard: Yard) -> None:
    """Over TLS, whose records cut packets anywhere: 600 messages of many sizes, none of them acknowledged at first."""
    chance = random.Random(5)  # noqa: S311
    sent = [chance.randbytes(chance.choice([0, 1, 200, 5_000, 16_384, 90_000])) for _ in range(600)]
    worker, device = durable(yard), yard.client(VICTIM, down_filter(TENANT, VICTIM))
    worker.subscribe(shard_filter(TENANT, shard_of(VICTIM)))
    device.publish(upload_topic(TENANT, VICTIM, UPDATE, 9999), b"first")
    while not isinstance(event := worker.poll(0.05), Received):  # until the subscription is in force
        assert event is None
        device.publish(upload_topic(TENANT, VICTIM, UPDATE, 9999), b"first")
    worker.acknowledge(event)
    worker.close()
    for index, payload in enumerate(sent):
        device.publish(upload_topic(TENANT, VICTIM, UPDATE, index), payload)
    successor, came = durable(yard), list[Received]()
    while len(came) < len(sent):
        message = await_event(successor, Received)
        if not message.topic.endswith("/9999"):
            came.append(message)
    assert [message.payload for message in came] == sent
    for message in came:
        successor.acknowledge(message)
    # The broker takes a connection's packets in order: when this has come through, so have the acknowledgements.
    successor.publish(down_topic(TENANT, VICTIM, "receipt"), b"done")
    assert await_event(device, Received).payload == b"done"
    successor.close()
    device.publish(upload_topic(TENANT, VICTIM, UPDATE, 0), b"last")
    assert uploads(durable(yard), 1) == [b"last"]


# What must not.


def forbidden_topics() -> list[str]:
    shard = upload_topic(TENANT, ATTACKER, UPDATE, 0).split("/")[4]
    return [
        upload_topic(TENANT, VICTIM, UPDATE, 0),
        f"{ROOT}/up/{shard}/{VICTIM}/{UPDATE.hex()}/0",
        f"{ROOT}/up/{shard}/{ATTACKER}",
        f"{ROOT}/up/{shard}/{ATTACKER}/{VICTIM}/{UPDATE.hex()}/0",
        state_topic(TENANT, VICTIM),
        f"{state_topic(TENANT, ATTACKER)}/x",
        f"{ROOT}/state/x/{ATTACKER}",
        round_topic(TENANT, "task"),
        round_topic(TENANT, ATTACKER),
        model_topic(TENANT, DIGEST, 0),
        down_topic(TENANT, VICTIM, "receipt"),
        down_topic(TENANT, VICTIM, "nack"),
        down_topic(TENANT, ATTACKER, "receipt"),
    ]


def check_a_device_writes_only_what_is_its_own(yard: Yard, *, client_id: str = ATTACKER) -> None:
    """Whatever client id it claims, and whether or not the message is to be retained."""
    aggregator, victim = yard.aggregator(), yard.device(VICTIM)
    settle(aggregator, victim, VICTIM)
    attacker = yard.client(ATTACKER, down_filter(TENANT, ATTACKER), client_id=client_id)
    for topic in forbidden_topics():
        attacker.publish(topic, b"forged")
        attacker.publish(topic, b"forged", retain=True)
    assert flush(attacker, ATTACKER, aggregator) == []
    assert settle(aggregator, victim, VICTIM) == []
    assert settle(aggregator, attacker, ATTACKER) == []
    # Nothing lies in wait for those who come later, the attacker's own subscription included.
    late = yard.client(VICTIM, down_filter(TENANT, VICTIM), f"{ROOT}/round/+", f"{ROOT}/model/+/+")
    assert settle(aggregator, late, VICTIM) == []


def check_a_device_takes_nothing_away(yard: Yard) -> None:
    """An empty retained message would erase the manifest."""
    aggregator = yard.aggregator()
    topics = [round_topic(TENANT, "kept"), model_topic(TENANT, DIGEST, 5)]
    for topic in topics:
        aggregator.publish(topic, b"kept", retain=True)
    witness = yard.device(VICTIM)
    settle(aggregator, witness, VICTIM)
    attacker = yard.client(ATTACKER)
    for topic in topics:
        attacker.publish(topic, b"", retain=True)
    flush(attacker, ATTACKER, aggregator)
    witness.close()
    late = yard.device(VICTIM)
    found = settle(aggregator, late, VICTIM)
    for topic in topics:
        aggregator.publish(topic, b"", retain=True)
    settle(aggregator, late, VICTIM)
    assert sorted(event.topic for event in found) == sorted(topics)


WILDCARDS = [
    "#",
    "+/#",
    "fl/#",
    "fl/v1/+/up/#",
    f"{ROOT}/up/#",
    f"{ROOT}/up/+/+/+/+",
    f"{ROOT}/down/+/+",
    f"{ROOT}/down/#",
    f"{ROOT}/state/+",
    f"{ROOT}/+/+",
    "+/+/+/+/+/+/+/+",
    down_topic(TENANT, VICTIM, "receipt"),
    state_topic(TENANT, VICTIM),
    f"$share/group/{ROOT}/up/#",
    f"$share/group/{ROOT}/down/+/+",
    "$SYS/#",
]


def check_a_device_reads_only_what_is_for_it(yard: Yard) -> None:
    """With every wildcard, retained and not: nothing of other devices."""
    aggregator, victim = yard.aggregator(), yard.device(VICTIM)
    victim.publish(state_topic(TENANT, VICTIM), b"online", retain=True)
    flush(victim, VICTIM, aggregator)
    attacker = yard.client(ATTACKER, *WILDCARDS)
    settle_first = settle(aggregator, attacker, ATTACKER)
    victim.publish(upload_topic(TENANT, VICTIM, UPDATE, 0), b"sealed")
    victim.publish(state_topic(TENANT, VICTIM), b"", retain=True)
    flush(victim, VICTIM, aggregator)
    aggregator.publish(down_topic(TENANT, VICTIM, "receipt"), b"a receipt")
    aggregator.publish(round_topic(TENANT, "task"), b"a manifest")
    found = settle_first + settle(aggregator, attacker, ATTACKER)
    topics = {event.topic for event in found}
    assert round_topic(TENANT, "task") in topics  # the wildcards are in force
    assert topics <= {round_topic(TENANT, "task"), down_topic(TENANT, ATTACKER, "control")}


def check_a_last_will_reaches_no_further(yard: Yard) -> None:
    """The broker publishes a will in the dead client's name, with its rights."""
    aggregator, victim = yard.aggregator(), yard.device(VICTIM)
    settle(aggregator, victim, VICTIM)
    for topic in (state_topic(TENANT, VICTIM), round_topic(TENANT, "task"), down_topic(TENANT, VICTIM, "receipt")):
        die(yard, ATTACKER, will=topic)
        # Under the same certificate, so the broker is done with the dead one before this connection is accepted.
        after = yard.client(ATTACKER)
        assert flush(after, ATTACKER, aggregator) == []
        after.close()
    assert settle(aggregator, victim, VICTIM) == []


def check_the_aggregator_writes_no_uploads(yard: Yard) -> None:
    """Nor presence: what devices say comes from devices."""
    witness = yard.client(AGGREGATOR, f"{ROOT}/up/#", f"{ROOT}/state/#")
    device = yard.device(VICTIM)
    for topic in (upload_topic(TENANT, VICTIM, UPDATE, 0), state_topic(TENANT, VICTIM)):
        witness.publish(topic, b"forged")
    settle(witness, device, VICTIM)
    assert flush(device, VICTIM, witness) == []


def check_a_worker_speaks_for_devices_only_where_it_answers_them(yard: Yard) -> None:
    """It publishes neither manifests nor models, nor uploads or presence of others, and takes none away."""
    aggregator, victim = yard.aggregator(), yard.device(VICTIM)
    kept = [round_topic(TENANT, "kept"), model_topic(TENANT, DIGEST, 6)]
    for topic in kept:
        aggregator.publish(topic, b"kept", retain=True)
    settle(aggregator, victim, VICTIM)
    worker = yard.client(WORKER)
    forbidden = [upload_topic(TENANT, VICTIM, UPDATE, 0), state_topic(TENANT, VICTIM), round_topic(TENANT, "task")]
    for topic in [*kept, *forbidden, model_topic(TENANT, DIGEST, 0), "fl/v1/other/down/x/receipt", "elsewhere"]:
        worker.publish(topic, b"forged")
        worker.publish(topic, b"", retain=True)
    assert flush(worker, WORKER, aggregator) == []
    assert settle(aggregator, victim, VICTIM) == []
    victim.close()
    late = yard.device(VICTIM)
    found = settle(aggregator, late, VICTIM)
    for topic in kept:
        aggregator.publish(topic, b"", retain=True)
    settle(aggregator, late, VICTIM)
    assert sorted(event.topic for event in found) == sorted(kept)


def check_a_worker_reads_no_presence_and_no_answers(yard: Yard) -> None:
    aggregator, victim = yard.aggregator(), yard.device(VICTIM)
    settle(aggregator, victim, VICTIM)
    worker = yard.client(WORKER, f"{ROOT}/state/+", f"{ROOT}/down/#", "#")
    victim.publish(state_topic(TENANT, VICTIM), b"online")
    flush(victim, VICTIM, aggregator)
    aggregator.publish(down_topic(TENANT, VICTIM, "receipt"), b"a receipt")
    found = {event.topic for event in settle(aggregator, worker, WORKER)}
    assert found & {state_topic(TENANT, VICTIM), down_topic(TENANT, VICTIM, "receipt")} == set()
    settle(aggregator, victim, VICTIM)


def test_a_worker_cannot_publish_manifests_or_models(yard: Yard) -> None:
    check_a_worker_speaks_for_devices_only_where_it_answers_them(yard)


def test_a_worker_reads_uploads_only(yard: Yard) -> None:
    check_a_worker_reads_no_presence_and_no_answers(yard)


def test_a_device_writes_only_what_is_its_own(yard: Yard) -> None:
    check_a_device_writes_only_what_is_its_own(yard)


def test_another_client_id_gives_no_other_rights_and_disconnects_nobody(yard: Yard) -> None:
    check_a_device_writes_only_what_is_its_own(yard, client_id=VICTIM)
    yard.close_clients()
    check_a_device_writes_only_what_is_its_own(yard, client_id=AGGREGATOR)


def test_a_device_takes_no_manifest_or_model_away(yard: Yard) -> None:
    check_a_device_takes_nothing_away(yard)


def test_wildcards_bring_nothing_of_others(yard: Yard) -> None:
    check_a_device_reads_only_what_is_for_it(yard)


def test_a_last_will_reaches_no_further_than_its_client(yard: Yard) -> None:
    check_a_last_will_reaches_no_further(yard)


def test_the_aggregator_cannot_speak_for_devices(yard: Yard) -> None:
    check_the_aggregator_writes_no_uploads(yard)


Check = Callable[[Yard], None]


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (check_a_device_writes_only_what_is_its_own, "up/+/%u/+/+", "up/+/+/+/+"),
        (check_a_device_writes_only_what_is_its_own, "up/+/%u/+/+", "up/+/%u/#"),
        (check_a_device_writes_only_what_is_its_own, "state/%u", "state/+"),
        (check_a_device_writes_only_what_is_its_own, "pattern read fl/v1/demo/round/+", "pattern fl/v1/demo/round/+"),
        (check_a_device_writes_only_what_is_its_own, "read fl/v1/demo/model", "readwrite fl/v1/demo/model"),
        (check_a_device_writes_only_what_is_its_own, "read fl/v1/demo/down", "readwrite fl/v1/demo/down"),
        (check_a_device_takes_nothing_away, "read fl/v1/demo/round/+", "readwrite fl/v1/demo/round/+"),
        (check_a_device_reads_only_what_is_for_it, "down/%u/+", "down/+/+"),
        (
            check_a_device_reads_only_what_is_for_it,
            "pattern write fl/v1/demo/up/+/%u",
            "pattern readwrite fl/v1/demo/up/+/+",
        ),
        (check_a_device_reads_only_what_is_for_it, "pattern read fl/v1/demo/model/+/+", "pattern read fl/v1/demo/#"),
        (check_a_device_reads_only_what_is_for_it, "state/%u", "state/%u\npattern read fl/v1/demo/state/+"),
        (check_a_last_will_reaches_no_further, "state/%u", "state/+"),
        (check_the_aggregator_writes_no_uploads, "topic read fl/v1/demo/up/#", "topic readwrite fl/v1/demo/up/#"),
        (
            check_a_worker_speaks_for_devices_only_where_it_answers_them,
            f"user {WORKER}\n",
            f"user {WORKER}\ntopic write fl/v1/demo/round/#\n",
        ),
        (
            check_a_worker_speaks_for_devices_only_where_it_answers_them,
            f"user {WORKER}\n",
            f"user {WORKER}\ntopic write fl/v1/demo/model/#\n",
        ),
        (
            check_a_worker_speaks_for_devices_only_where_it_answers_them,
            "topic read fl/v1/demo/up/#",
            "topic readwrite fl/v1/demo/up/#",
        ),
        (
            check_a_worker_reads_no_presence_and_no_answers,
            f"user {WORKER}\n",
            f"user {WORKER}\ntopic read fl/v1/demo/state/#\n",
        ),
        (check_a_worker_reads_no_presence_and_no_answers, "topic write fl/v1/demo/down/#", "topic fl/v1/demo/down/#"),
        (check_the_aggregator_writes_no_uploads, "topic read fl/v1/demo/state/+", "topic readwrite fl/v1/demo/state/+"),
    ],
)
def test_an_acl_that_allows_more_is_noticed(
    certificates: Path, tmp_path: Path, check: Check, right: str, wrong: str
) -> None:
    broken = running(certificates, tmp_path / "files", acl=lambda text: text.replace(right, wrong))
    with broken as yard, pytest.raises(AssertionError, match=r"(?s)^(?!no marker)"):
        check(yard)


# Who may connect at all.


def context(yard: Yard, *, certificate: str | None, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=str(yard.folder / "ca.pem"))
    made.minimum_version = made.maximum_version = version
    if certificate is not None:
        made.load_cert_chain(str(yard.folder / f"{certificate}.pem"), str(yard.folder / f"{certificate}.key"))
    return made


def is_admitted(yard: Yard, tls: ssl.SSLContext | None) -> bool:
    """Whether the broker answers an MQTT CONNECT with success."""
    with ExitStack() as stack:
        connection: socket.socket = stack.enter_context(socket.create_connection((HOST, yard.port), timeout=WITHIN_S))
        try:
            if tls is not None:
                connection = stack.enter_context(tls.wrap_socket(connection, server_hostname=HOST))
            connection.sendall(CONNECT)
            answer = connection.recv(256)
        except (ssl.SSLError, ConnectionError):
            return False
    # CONNACK: type, length, flags, reason code.
    return len(answer) >= 4 and answer[0] == 0x20 and answer[3] == 0


def check_only_our_certificates_are_admitted(yard: Yard) -> None:
    assert is_admitted(yard, context(yard, certificate=ATTACKER))
    for refused in (None, "forged", "expired", "early", "broker"):
        assert not is_admitted(yard, context(yard, certificate=refused)), f"admitted: {refused}"


def check_only_tls_13_is_spoken(yard: Yard) -> None:
    assert is_admitted(yard, context(yard, certificate=ATTACKER))
    assert not is_admitted(yard, context(yard, certificate=ATTACKER, version=ssl.TLSVersion.TLSv1_2))
    assert not is_admitted(yard, None)


def check_oversized_packets_reach_nobody(yard: Yard) -> None:
    aggregator, attacker = yard.aggregator(), yard.client(ATTACKER)
    assert yard.announced == LIMIT
    marker = Marks.new()
    attacker.publish(upload_topic(TENANT, ATTACKER, UPDATE, 0), bytes(LIMIT + 1))
    attacker.publish(upload_topic(TENANT, ATTACKER, UPDATE, 1), marker)
    await_event(attacker, Disconnected)  # and what it sent behind is lost with the connection
    await_event(attacker, Connected)
    assert flush(attacker, ATTACKER, aggregator) == []


def test_only_certificates_of_the_study_are_admitted(yard: Yard) -> None:
    check_only_our_certificates_are_admitted(yard)


def test_neither_plain_tcp_nor_tls_12_is_spoken(yard: Yard) -> None:
    check_only_tls_13_is_spoken(yard)


def test_the_packet_limit_is_announced_and_kept(yard: Yard) -> None:
    check_oversized_packets_reach_nobody(yard)


def open_to_all(config: str) -> str:
    for right, wrong in (
        ("require_certificate true", "require_certificate false"),
        ("allow_anonymous false", "allow_anonymous true"),
        ("use_identity_as_username true\n", ""),
        ("use_username_as_clientid true\n", ""),
    ):
        config = config.replace(right, wrong)
    return config


def without_tls(config: str) -> str:
    dropped = ("cafile", "certfile", "keyfile", "tls_version", "require_certificate", "use_identity_as_username")
    kept = [line for line in config.splitlines() if not line.startswith(dropped)]
    return "\n".join([*kept, ""]).replace("allow_anonymous false", "allow_anonymous true")


@pytest.mark.parametrize(
    ("check", "change"),
    [
        (check_only_our_certificates_are_admitted, open_to_all),
        (check_only_tls_13_is_spoken, lambda text: text.replace("tlsv1.3", "tlsv1.2")),
        (check_only_tls_13_is_spoken, without_tls),
        (check_oversized_packets_reach_nobody, lambda text: text.replace(f"max_packet_size {LIMIT}\n", "")),
        (
            lambda yard: check_a_device_writes_only_what_is_its_own(yard, client_id=VICTIM),
            lambda text: text.replace("use_username_as_clientid true\n", ""),
        ),
    ],
    ids=["certificates optional", "TLS 1.2", "no TLS", "no packet limit", "client ids free"],
)
def test_a_configuration_that_admits_more_is_noticed(
    certificates: Path, tmp_path: Path, check: Check, change: Change
) -> None:
    broken = running(certificates, tmp_path / "files", config=change)
    with broken as yard, pytest.raises(AssertionError, match=r"(?s)^(?!no marker)"):
        check(yard)


def test_a_client_refuses_a_broker_of_another_ca(yard: Yard) -> None:
    files = TlsFiles(yard.folder / "other-ca.pem", yard.folder / f"{VICTIM}.pem", yard.folder / f"{VICTIM}.key")
    transport = MqttTransport(host=HOST, port=yard.port, client_id=VICTIM, tls=files)
    transport.open()
    try:
        for _ in range(2):  # it tries again, and refuses again
            event = transport.poll(WITHIN_S)
            assert isinstance(event, Disconnected)
    finally:
        transport.close()
