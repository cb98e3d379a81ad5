"""Joining and leaving on two real mosquittos under our configuration, with the operator's commands and processes.

mosquitto goes by the machine's clock, and so does the desk. What waits here waits for processes that it started.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator

import pytest
from cryptography import x509

from aggregator.ca_folder import load_ca
from aggregator.certificates import make_crl
from firmware_sim.mosquitto_broker import find_mosquitto
from fl_protocol.adapters.mqtt import MqttTransport, TlsFiles
from fl_protocol.signing import public_key_from_hex
from fl_protocol.topics import down_filter, enrolment_topic
from fl_protocol.transport import Connected, Disconnected
from tests.contracts.brokers import await_event
from tests.system.clinic import HOST, TASK, TENANT, Clinic, Watch, running_clinic, subscribed

pytestmark = pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clinic]:
    with running_clinic(tmp_path_factory.mktemp("clinic")) as clinic:
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


def test_renewal_goes_on_beside_a_list_of_revoked(clinic: Clinic) -> None:
    staying, leaving = Watch(clinic), Watch(clinic)
    name, gone = staying.join(count=1), leaving.join(count=1)  # one name: it may be renewed at once
    line, theirs = clinic.device(name), clinic.device(gone)
    clinic.command("device", "revoke", leaving.enrolment, "--reason", "lost", "--yes", "--config", "aggregator.toml")
    await_event(theirs, Disconnected)
    listed = x509.load_pem_x509_crl((clinic.folder / "broker" / "crl.pem").read_bytes())
    serial = x509.load_pem_x509_certificate(gone.certificate).serial_number
    assert listed.get_revoked_certificate_by_serial_number(serial) is not None
    answer = staying.ask_over(line, staying.prepared(None, client=name.id), name.id)
    assert answer.outcome == "renewed"
    staying.names.install(answer.names, aggregator_key=public_key_from_hex(clinic.claim.aggregator_key))
    assert staying.names.installed()[0].id == name.id
    assert len(staying.names.installed()) == 4
    line.close()
    clinic.device(name)  # still let in under the name for now
    with pytest.raises(AssertionError, match="no Connected"):
        clinic.device(gone, within_s=2.0)
    assert leaving.ask_with(leaving.prepared(None)).outcome == "revoked"


def test_the_running_broker_forbids_what_it_should(clinic: Clinic) -> None:
    said = clinic.command("broker", "check", "--config", "aggregator.toml", "--ca", "ca", "--broker", "broker")
    assert said.count("holds") == 11
