"""A helper over HTTPS on loopback, with real sockets and certificates: nobody without one is heard."""

from __future__ import annotations

import hashlib
import http.client
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aggregator.adapters.https_helper import HelperRefusedRequestError, HelperUnreachableError, HttpsHelper
from aggregator.adapters.https_link import HttpsLink
from aggregator.assembly import AggregatorFiles
from aggregator.certificates import issue, make_ca
from aggregator.errors import AggregatorError
from aggregator.helper import https_api
from aggregator.helper.assembly import HelperFiles
from aggregator.helper.config import HttpsSection
from aggregator.helper.https_api import make_api, serve_https
from aggregator.helper_calls import HelperCalls, RoundAsked
from fl_protocol.errors import ConfigError, LocalMisuseError
from fl_protocol.limits import MAX_TRANSFER_BYTES
from fl_protocol.log_messages import CosignatureMsg, CosignRefusal, CosignRefusalMsg
from fl_protocol.revocation_messages import RevocationsKeptMsg, RevokedDevicesMsg
from fl_protocol.secagg.messages import HelperKeyMsg, MaskSumMsg, UnmaskRefusalMsg, UnmaskRequestMsg
from fl_protocol.secagg.terms import HelperIdentity, manifest_digest, secure_round
from fl_protocol.signing import public_key_hex, sign, verify
from tests.aggregator.helper.helper_desk import (
    DEVICES,
    HELPER,
    IDENTITY,
    STUDY,
    TENANT,
    Desk,
    entries_of,
    manifest_of,
    read_reply,
    request_for,
)
from tests.aggregator.helper.test_cosigning import request as cosign_request
from tests.contracts.brokers import WITHIN_S, free_port
from tests.enrolments import broken_copy
from tests.fl_protocol.examples import AGGREGATOR_KEY
from tests.fl_protocol.secagg.rounds import device_key

HOST = "127.0.0.1"
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, now_s = tmp_path_factory.mktemp("certificates"), time.time()
    ca, other = make_ca("helper test", now_s=now_s), make_ca("helper test", now_s=now_s)
    pairs = {
        "server": issue(ca, "helper-a", now_s=now_s, server_hosts=(HOST,)),
        "aggregator": issue(ca, "aggregator", now_s=now_s),
        "stranger": issue(other, "aggregator", now_s=now_s),
    }
    (folder / "ca.pem").write_bytes(ca.certificate)
    for name, pair in pairs.items():
        (folder / f"{name}.pem").write_bytes(pair.certificate)
        (folder / f"{name}.key").write_bytes(pair.key)
    return folder


class Site:
    """A helper that is asked over HTTPS and over MQTT."""

    def __init__(self, folder: Path, certificates: Path, port: int, module: Any = https_api) -> None:
        self.desk, self.certificates, self.port = Desk(folder), certificates, port
        section = HttpsSection(HOST, port, "server.pem", "server.key", "ca.pem")
        service = self.desk.service
        api = module.make_api(service.answerer, keys=service.keys, tenants=[TENANT], now_s=lambda: self.desk.now_s)
        self.serving = module.serve_https(api, section, certificates / "helper.toml")

    def client(self, name: str = "aggregator", **changes: Any) -> HttpsHelper:
        files = {
            "ca": self.certificates / "ca.pem",
            "certificate": self.certificates / f"{name}.pem",
            "key": self.certificates / f"{name}.key",
        }
        return HttpsHelper(HOST, self.port, **{**files, "timeout_s": 10.0, **changes})

    def raw(
        self, method: str, path: str, body: Any = None, *, context: ssl.SSLContext | None = None
    ) -> tuple[int, bytes]:
        context = context or self.client()._context
        connection = http.client.HTTPSConnection(HOST, self.port, timeout=10, context=context)
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


@pytest.fixture
def site(tmp_path: Path, certificates: Path) -> Iterator[Site]:
    made = Site(tmp_path, certificates, free_port())
    with made.serving:
        yield made


def test_the_same_round_has_the_same_answer_over_https_and_over_mqtt(site: Site) -> None:
    assert site.client().key(TENANT) == site.desk.key()
    manifest = site.desk.manifest(terms={"helper_noise_sigma": 50.0, "bits": 24})
    request = request_for(manifest, DEVICES[:4])
    reply = site.client().unmask(request)
    assert reply.is_answer
    assert isinstance(read_reply(reply.data), MaskSumMsg)
    assert site.desk.ask(request) == [reply.data]
    assert site.client().unmask(request) == reply
    refused = site.client().unmask(request_for(manifest, DEVICES[:3]))
    assert not refused.is_answer
    told = read_reply(refused.data)
    assert isinstance(told, UnmaskRefusalMsg)
    assert told.reason.value == "second_list"


def test_a_coordinator_asks_over_https(site: Site) -> None:
    link, identity = HttpsLink(site.client(), TENANT), IDENTITY.public_key()
    calls = HelperCalls(
        tenant=TENANT,
        helpers={HELPER: HelperIdentity(HELPER, "operator-a", identity)},
        signing_key=AGGREGATOR_KEY,
        transport=site.desk.ears,
        note=lambda event, **fields: None,
        now_s=lambda: site.desk.now_s,
        links={HELPER: link},
    )
    link.step()
    calls.look_after()
    assert calls.keys((), until_s=site.desk.now_s) == ((site.desk.key(),), "")
    manifest = site.desk.manifest()
    entries = entries_of(secure_round(manifest), DEVICES[:4])
    about = RoundAsked(manifest.task, manifest.round, manifest_digest(manifest))
    request = UnmaskRequestMsg(manifest=calls.signed(manifest), helper=HELPER, entries=tuple(entries))
    for _ in range(2):  # the first is not on its way yet when it is asked again
        calls.ask(about, {HELPER: request})
    assert len(link._pending) == 1
    link.step()
    assert not link._pending
    calls.look_after()
    answers = calls.answers(manifest.task)
    assert answers is not None
    assert answers[0].count == 4


def test_a_checkpoint_is_co_signed_over_https(site: Site) -> None:
    reply = site.client().cosign(cosign_request(7))
    assert reply.is_answer
    assert verify(reply.data, CosignatureMsg, IDENTITY.public_key()).size == 7
    refused = site.client().cosign(cosign_request(5))
    assert not refused.is_answer
    assert verify(refused.data, CosignRefusalMsg, IDENTITY.public_key()).reason is CosignRefusal.SMALLER
    link = HttpsLink(site.client(), TENANT)
    link.cosign(cosign_request(9, 7))
    link.step()
    key, answer = link.poll()
    assert verify(answer, CosignatureMsg, IDENTITY.public_key()).size == 9
    assert verify(key, HelperKeyMsg, IDENTITY.public_key()).helper == HELPER


def test_a_helper_is_told_of_revocations_over_https(site: Site) -> None:
    told = sign(RevokedDevicesMsg(tenant=TENANT, helper=HELPER, devices=("watch-3",)), AGGREGATOR_KEY)
    reply = site.client().revoke(told)
    assert reply.is_answer
    said = verify(reply.data, RevocationsKeptMsg, IDENTITY.public_key())
    assert said.request_digest == hashlib.sha256(told).digest()
    assert [one.device for one in site.desk.store.revoked.all()] == ["watch-3"]
    link = HttpsLink(site.client(), TENANT)
    link.revoke(told)
    link.step()
    _, answer = link.poll()
    assert verify(answer, RevocationsKeptMsg, IDENTITY.public_key()) == said


def aggregator_toml(folder: Path, certificates: Path, port: int, **changes: str) -> Path:
    """An aggregator's configuration that names the helper's address."""
    fields = {
        "name": HELPER,
        "operator": "operator-a",
        "key": public_key_hex(IDENTITY.public_key()),
        "url": f"https://{HOST}:{port}",
        "ca": str(certificates / "ca.pem"),
        "certificate": str(certificates / "aggregator.pem"),
        "certificate_key": str(certificates / "aggregator.key"),
        **changes,
    }
    helper = ", ".join(f'{name} = "{value}"' for name, value in fields.items())
    path = folder / "aggregator.toml"
    path.write_text(
        f'helpers = [{{ {helper} }}]\n[aggregator]\ntenant = "{TENANT}"\ndatabase = "a.db"\nsigning_key = "a.key"\n'
        f'[broker]\nhost = "{HOST}"\nport = 1\n'
    )
    return path


def test_a_configured_link_fetches_its_helpers_key_by_itself(site: Site, tmp_path: Path, certificates: Path) -> None:
    links = AggregatorFiles.load(aggregator_toml(tmp_path, certificates, site.port)).helper_links()
    ends_s, found = time.monotonic() + WITHIN_S, list[bytes]()
    while not found and time.monotonic() < ends_s:
        found = links[HELPER].poll()
        time.sleep(0.01)
    assert found == [site.desk.key()]


def test_a_link_whose_files_are_not_there_is_one_sentence(tmp_path: Path, certificates: Path) -> None:
    path = aggregator_toml(tmp_path, certificates, 1, ca=str(tmp_path / "none.pem"))
    with pytest.raises(ConfigError, match=f"helper {HELPER}"):
        AggregatorFiles.load(path).helper_links()


def test_a_link_says_why_its_helper_cannot_be_reached(certificates: Path) -> None:
    files = {"ca": "ca.pem", "certificate": "aggregator.pem", "key": "aggregator.key"}
    helper = HttpsHelper(HOST, free_port(), **{name: certificates / file for name, file in files.items()})
    link = HttpsLink(helper, TENANT)
    link.ask(b"a request")
    link.step()
    assert "does not answer" in link.problem
    assert (link.poll(), len(link._pending)) == ([], 0)  # whoever wants an answer asks again


def test_what_waits_to_be_posted_is_posted_once_and_what_nobody_fetches_is_bounded(
    site: Site, certificates: Path
) -> None:
    link, manifest = HttpsLink(site.client(), TENANT), site.desk.manifest()
    requests = [request_for(manifest, DEVICES[:count]) for count in (4, 5)]
    for _ in range(10):
        for request in requests:
            link.ask(request)
    assert len(link._pending) == 2
    link.step()
    link.step()
    link._key_due_s = 0.0
    link.step()
    assert len(link.poll()) == 3  # one key, an answer, and a refusal of the second list
    for number in range(200):
        link.ask(bytes([number]))
    assert len(link._pending) == 64


def test_a_request_that_is_too_long_ends_no_thread(certificates: Path) -> None:
    files = {"ca": "ca.pem", "certificate": "aggregator.pem", "key": "aggregator.key"}
    helper = HttpsHelper(HOST, free_port(), **{name: certificates / file for name, file in files.items()})
    link = HttpsLink(helper, TENANT)
    link._key_due_s = float("inf")
    link.ask(bytes(MAX_TRANSFER_BYTES + 1))
    link.step()
    assert "expected at most" in link.problem


def test_asked_for_two_lists_at_once_it_answers_one(site: Site) -> None:
    manifest = site.desk.manifest()
    requests = [request_for(manifest, DEVICES[: 3 + index % 2]) for index in range(4)]
    found: list[Any] = []
    threads = [threading.Thread(target=lambda one=one: found.append(site.client().unmask(one))) for one in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answers = {one.data for one in found if one.is_answer}
    assert len(answers) == 1
    assert [one.is_answer for one in found].count(True) == 2


@pytest.mark.parametrize(
    ("request_", "status"),
    [(b"", 400), (b"garbage", 400), (b"x" * (MAX_TRANSFER_BYTES + 1), 413)],
    ids=["nothing", "garbage", "too long"],
)
def test_what_is_no_request_is_told_so(site: Site, request_: bytes, status: int) -> None:
    assert site.raw("POST", "/v1/unmask", request_)[0] == status


def test_a_body_without_end_is_cut_off(site: Site) -> None:
    """Chunked, so that no length is announced: nothing is kept of more than the limit."""
    parts = (bytes(2**20) for _ in range(40))
    try:
        status, _ = site.raw("POST", "/v1/unmask", parts)
    except (OSError, ssl.SSLError):
        return  # hung up on while it was still sending
    assert status == 413


def test_other_studies_and_paths_are_not_there(site: Site) -> None:
    with pytest.raises(HelperRefusedRequestError, match="404"):
        site.client().key("hospital")
    for path in ("/", "/docs", "/openapi.json", "/v1/unmask/x"):
        assert site.raw("GET", path)[0] == 404
    assert site.raw("GET", "/v1/unmask")[0] == 405


def test_health_is_that_there_is_a_key_that_rounds_may_use(site: Site) -> None:
    assert site.raw("GET", "/healthz") == (200, b"ok")
    site.desk.now_s += 4 * 86_400
    assert site.raw("GET", "/healthz")[0] == 503


def test_a_store_that_fails_is_asked_again_later(site: Site) -> None:
    site.desk.store.database.close()
    (Path(str(site.desk.store.database.engine.url.database))).unlink()
    with pytest.raises(HelperUnreachableError, match="503"):
        site.client().unmask(request_for(site.desk.manifest(), DEVICES[:3]))


def check_only_certified_clients_are_heard(site: Site) -> None:
    request = request_for(site.desk.manifest(), DEVICES[:3])
    with pytest.raises(HelperUnreachableError):
        site.client("stranger").unmask(request)
    bare, old = (ssl.create_default_context(cafile=str(site.certificates / "ca.pem")) for _ in range(2))
    old.load_cert_chain(site.certificates / "aggregator.pem", site.certificates / "aggregator.key")
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    for context in (bare, old):
        with pytest.raises((OSError, http.client.HTTPException)):
            site.raw("GET", "/healthz", context=context)
    assert site.client().unmask(request).is_answer


def test_only_certified_clients_are_heard(site: Site) -> None:
    check_only_certified_clients_are_heard(site)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("ssl_cert_reqs=ssl.CERT_REQUIRED", "ssl_cert_reqs=ssl.CERT_OPTIONAL"),
        ("made.ssl.minimum_version = ssl.TLSVersion.TLSv1_3", "pass"),
    ],
    ids=["without a certificate", "TLS 1.2"],
)
def test_a_server_that_hears_others_is_caught(tmp_path: Path, certificates: Path, right: str, wrong: str) -> None:
    copy = broken_copy("aggregator.helper.https_api", (right, wrong))
    made = Site(tmp_path, certificates, free_port(), copy)
    with made.serving, pytest.raises(pytest.fail.Exception):
        check_only_certified_clients_are_heard(made)


def test_a_helper_that_is_away_or_is_another_is_unreachable(tmp_path: Path, certificates: Path) -> None:
    made = Site(tmp_path, certificates, free_port())
    with pytest.raises(HelperUnreachableError, match="does not answer"):
        made.client().key(TENANT)
    with made.serving, pytest.raises(HelperUnreachableError, match="certificate"):
        made.client(ca=_other_ca(tmp_path)).key(TENANT)


def test_files_that_cannot_be_used_are_told_by_name(certificates: Path, tmp_path: Path) -> None:
    good = HttpsSection(HOST, free_port(), "server.pem", "server.key", "ca.pem")
    desk = Desk(tmp_path)
    api = make_api(desk.service.answerer, keys=desk.service.keys, tenants=[TENANT], now_s=time.time)
    for changes in ({"certificate": "no.pem"}, {"key": "aggregator.key"}, {"client_ca": "server.key"}):
        values = {name: getattr(good, name) for name in good.__struct_fields__}
        with (
            pytest.raises(ConfigError, match="https: expected PEM files"),
            serve_https(api, HttpsSection(**{**values, **changes}), certificates / "helper.toml"),
        ):
            pass
    with pytest.raises(LocalMisuseError, match="TLS files"):
        HttpsHelper(HOST, 1, ca=tmp_path, certificate=tmp_path, key=tmp_path)


def test_a_port_that_is_taken_is_told(site: Site, certificates: Path, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    second = Site(tmp_path / "second", certificates, site.port)
    with pytest.raises(AggregatorError, match="cannot be listened on"), second.serving:
        pass


def test_the_process_answers_over_https_alone(tmp_path: Path, certificates: Path) -> None:
    port, config = free_port(), tmp_path / "helper.toml"
    config.write_text(f"""
[helper]
name = "helper-a"
operator = "operator-a"
identity = "identity.key"
store = "helper.db"
minimum_cohort = 3

[[study]]
tenant = "{TENANT}"
aggregator_key = "{public_key_hex(STUDY.aggregator)}"

[https]
host = "{HOST}"
port = {port}
certificate = "{certificates}/server.pem"
key = "{certificates}/server.key"
client_ca = "{certificates}/ca.pem"
""")
    files = HelperFiles.load(config)
    identity = files.create().identity.public_key()
    with files.store() as store:
        store.devices.add_all(TENANT, [(one, device_key(one).public_key().public_bytes_raw()) for one in DEVICES])
    pem = {name: certificates / name for name in ("ca.pem", "aggregator.pem", "aggregator.key")}
    client = HttpsHelper(HOST, port, ca=pem["ca.pem"], certificate=pem["aggregator.pem"], key=pem["aggregator.key"])
    command = [sys.executable, "-m", "aggregator.helper.cli", "run", "--config", str(config)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert any('"key_current"' in line for line in process.stdout)
            signed = client.key(TENANT)
            assert verify(signed, HelperKeyMsg, identity).recipient.kem == "mlkem768-x25519"
            reply = client.unmask(request_for(manifest_of(signed), DEVICES[:4]))
            assert verify(reply.data, MaskSumMsg, identity).count == 4
            process.terminate()
            assert process.wait(WITHIN_S) == 0
        finally:
            process.kill()


def _other_ca(folder: Path) -> Path:
    path = folder / "other.pem"
    path.write_bytes(make_ca("another", now_s=time.time()).certificate)
    return path
