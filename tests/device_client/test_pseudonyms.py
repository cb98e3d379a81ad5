"""Pseudonyms: they name nobody, share nothing, take turns, survive wrong clocks; an operator's answer is checked."""

from __future__ import annotations

import base64
import datetime
import json
import os
import re
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.certificates import KeyPair, certify, issue, make_ca
from device_client import issued_certificates
from device_client import pseudonyms as original
from device_client.adapters import certificate_files
from device_client.adapters.certificate_files import tls_files
from device_client.adapters.encrypted_files import EncryptedFiles
from device_client.errors import StoreError
from device_client.pseudonyms import NoPseudonym, Pseudonym, Pseudonyms, date_text
from device_client.tls_keys import SoftwareTlsKeys
from fl_protocol.enrolment import (
    DAY_S,
    OVERLAP_S,
    IssuedCertificate,
    Period,
    PseudonymAnswer,
    PseudonymRequest,
    decode_file,
    encode_file,
    periods_from,
    signed_answer,
)
from fl_protocol.errors import LocalMisuseError, ProtocolError
from fl_protocol.messages import PresenceMsg, encode
from fl_protocol.topics import down_filter, state_topic, upload_topic
from tests.device_client.ports import MemoryStore, PowerCutError
from tests.enrolments import AGGREGATOR, BEGINS_S, CA, NOW_S, PERIOD_S, TASK, TENANT, Office, broken_copy, reissued
from tests.virtual_fleet import SeededEntropy

PINNED = AGGREGATOR.public_key()
YEAR_S = 365 * DAY_S
OTHER_NAMES = ("anna-watch", "watch-7", "other-study")
"""What else the device is called: its host name, a fixed id, the name of another task."""


def make(store: MemoryStore | None = None, *, task: str = TASK, module: ModuleType = original) -> Pseudonyms:
    made: Pseudonyms = module.Pseudonyms(store if store is not None else MemoryStore(), tenant=TENANT, task=task)
    return made


def admitted(
    count: int = 3, *, store: MemoryStore | None = None, task: str = TASK, module: ModuleType = original
) -> Pseudonyms:
    """A device with certificates for this and the following periods."""
    device = make(store, task=task, module=module)
    answer = Office(task=task).admit(device.prepare(count=count, entropy=os.urandom))
    device.install(answer, aggregator_key=PINNED)
    return device


def in_use(device: Pseudonyms, now_s: float) -> Pseudonym:
    found = device.current(now_s)
    assert not isinstance(found, NoPseudonym), found
    return found


def reason(device: Pseudonyms, now_s: float) -> str:
    found = device.current(now_s)
    assert isinstance(found, NoPseudonym)
    assert found.words.startswith(f"{TENANT}/{TASK}: ")
    return found.reason


def csrs(request: bytes) -> list[x509.CertificateSigningRequest]:
    return [x509.load_pem_x509_csr(one.csr.encode()) for one in decode_file(request, PseudonymRequest).pseudonyms]


# They name nobody.


def unpacked(data: bytes) -> bytes:
    """The bytes, and what every PEM block in them holds."""
    blocks = re.findall(r"-----BEGIN [A-Z ]+-----(.+?)-----END", data.decode().replace("\\n", "\n"), re.DOTALL)
    return b"\n".join([data, *(base64.b64decode(block) for block in blocks)])


def check_nothing_names_the_device(module: ModuleType) -> None:
    """The device's store and its system know its other names; none is in anything that leaves it."""
    store = MemoryStore()
    for name in OTHER_NAMES:
        store.write(f"names/{name}", name.encode())
    device = make(store, module=module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: OTHER_NAMES[0])
        patch.setenv("HOSTNAME", OTHER_NAMES[0])
        request = device.prepare(count=3, entropy=os.urandom)
    names_nobody(unpacked(request))
    answer = Office().admit(request)
    device.install(answer, aggregator_key=PINNED)
    names_nobody(unpacked(answer))
    for one in device.installed():
        names_nobody(unpacked(one.certificate))
        names_nobody(x509.load_pem_x509_certificate(one.certificate).subject.rfc4514_string().encode())
        update = upload_topic(TENANT, one.id, bytes(16), 0)
        for text in (one.id, update, state_topic(TENANT, one.id), down_filter(TENANT, one.id)):
            names_nobody(text.encode())
    names_nobody(encode(PresenceMsg(state="online", software="covey 0.1.0")))


def names_nobody(data: bytes) -> None:
    for name in OTHER_NAMES:
        for form in (name.encode(), name.encode().hex().encode(), base64.b64encode(name.encode()).lower()):
            assert form not in data.lower(), f"{name} in {data[:200]!r}"


def test_nothing_that_leaves_the_device_names_it() -> None:
    check_nothing_names_the_device(original)


def test_a_request_file_holds_nothing_but_study_and_pseudonyms() -> None:
    content = json.loads(make().prepare(count=2, entropy=os.urandom))
    assert set(content) == {"format", "tenant", "task", "pseudonyms"}
    for one in content["pseudonyms"]:
        assert set(one) == {"id", "signing_key", "csr", "signature"}


def everything_in(device: Pseudonyms) -> set[bytes]:
    """All that an observer may see of a device's pseudonyms, beyond what all of a study have in common."""
    seen: list[bytes] = []
    for one in device.installed():
        certificate = x509.load_pem_x509_certificate(one.certificate)
        seen += [
            one.id.encode(),
            one.signing_key.public_key().public_bytes_raw(),
            certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
            str(certificate.serial_number).encode(),
            one.tls_key,
        ]
    assert len(set(seen)) == len(seen), "pseudonyms of one study share something"
    return set(seen)


def check_pseudonyms_share_nothing(module: ModuleType) -> None:
    """Within a task and across tasks, in one store."""
    store = MemoryStore()
    watch, other = (make(store, task=task, module=module) for task in (TASK, "other-study"))
    for device, task in ((watch, TASK), (other, "other-study")):
        request = device.prepare(count=3, entropy=os.urandom)
        assert len({one.signing_key for one in decode_file(request, PseudonymRequest).pseudonyms}) == 3
        keys = [one.public_key() for one in csrs(request)]
        assert len({key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) for key in keys}) == 3
        device.install(Office(task=task).admit(request), aggregator_key=PINNED)
    assert not everything_in(watch) & everything_in(other)
    assert len(store.blobs) == 2


def test_pseudonyms_of_one_task_and_of_two_share_nothing() -> None:
    check_pseudonyms_share_nothing(original)


def test_names_and_keys_follow_from_the_entropy_alone() -> None:
    first, again, other = (make().prepare(count=2, entropy=SeededEntropy(seed)) for seed in ("a", "a", "b"))
    names = [[one.id for one in decode_file(request, PseudonymRequest).pseudonyms] for request in (first, again, other)]
    assert names[0] == names[1]
    assert not set(names[0]) & set(names[2])


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=40, max_size=40))
def test_any_random_bytes_make_a_key(drawn: bytes) -> None:
    key = SoftwareTlsKeys().make(lambda count: drawn[:count]).key
    value = key.private_numbers().private_value
    assert value == int.from_bytes(drawn, "big") % (ec.SECP256R1().group_order - 1) + 1


def test_the_edges_of_the_random_bytes_make_keys_too() -> None:
    for drawn in (bytes(40), b"\xff" * 40):
        SoftwareTlsKeys().make(lambda count, drawn=drawn: drawn[:count])  # type: ignore[misc]


def test_keys_are_not_printed() -> None:
    one = in_use(admitted(), NOW_S)
    assert "PRIVATE" not in repr(one)
    assert one.signing_key.private_bytes_raw().hex() not in repr(one)
    assert one.id in repr(one)


# Making a request.


def test_a_request_that_was_not_answered_is_made_again_as_it_was() -> None:
    store = MemoryStore()
    request = make(store).prepare(count=3, entropy=os.urandom)
    device = make(store)
    assert device.prepare(count=5, entropy=os.urandom) == request
    assert device.waiting == 3
    anew = device.prepare(count=5, entropy=os.urandom, anew=True)
    assert device.waiting == 5
    ids = [{one.id for one in decode_file(data, PseudonymRequest).pseudonyms} for data in (request, anew)]
    assert not ids[0] & ids[1]


@pytest.mark.parametrize("count", [-1, 0, 65])
def test_a_number_of_pseudonyms_out_of_range_is_refused(count: int) -> None:
    with pytest.raises(LocalMisuseError, match="count: expected 1 to 64"):
        make().prepare(count=count, entropy=os.urandom)


def test_the_largest_request_fits_into_a_file() -> None:
    device = make()
    answer = Office(period_days=2).admit(device.prepare(count=64, entropy=os.urandom))
    assert len(device.install(answer, aggregator_key=PINNED)) == 64


@pytest.mark.parametrize("after", [False, True])
def test_a_power_cut_leaves_the_old_row_or_the_new(*, after: bool) -> None:
    store = MemoryStore(cut_at=0, cut_after=after)
    with pytest.raises(PowerCutError):
        make(store).prepare(count=3, entropy=os.urandom)
    device = make(store.after_restart())
    assert device.waiting == (3 if after else 0)
    request = device.prepare(count=3, entropy=os.urandom)
    answer = Office().admit(request)
    store = MemoryStore(store.after_restart().blobs if after else dict(device._store.blobs))  # type: ignore[attr-defined]
    store.cut_at, store.cut_after = 0, after
    with pytest.raises(PowerCutError):
        make(store).install(answer, aggregator_key=PINNED)
    device = make(store.after_restart())
    assert (device.waiting, len(device.installed())) == ((0, 3) if after else (3, 0))


def test_a_full_disk_changes_nothing() -> None:
    store = MemoryStore(full=True)
    device = make(store)
    with pytest.raises(StoreError, match="No space left"):
        device.prepare(count=3, entropy=os.urandom)
    assert device.waiting == 0
    assert reason(device, NOW_S) == "none"


def test_keys_are_encrypted_on_disk_and_read_by_the_next_process(tmp_path: Path) -> None:
    store = EncryptedFiles.in_folder(tmp_path / "store", bytes(32))
    device = Pseudonyms(store, tenant="a" * 64, task="b" * 64)
    request = device.prepare(count=2, entropy=os.urandom)
    device.install(Office(tenant="a" * 64, task="b" * 64).admit(request), aggregator_key=PINNED)
    known = in_use(device, NOW_S)
    store.close()
    raw = b"".join(path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file())
    assert known.signing_key.private_bytes_raw() not in raw
    assert b"PRIVATE KEY" not in raw
    assert known.id.encode() not in raw
    again = in_use(
        Pseudonyms(EncryptedFiles.in_folder(tmp_path / "store", bytes(32)), tenant="a" * 64, task="b" * 64), NOW_S
    )
    assert (again.id, again.tls_key, again.ca) == (known.id, known.tls_key, CA.certificate)


# Taking the answer.


def test_an_answer_is_installed_once() -> None:
    device = make()
    answer = Office().admit(device.prepare(count=3, entropy=os.urandom))
    new = device.install(answer, aggregator_key=PINNED)
    assert [one.period.begins_s for one in new] == [BEGINS_S + k * PERIOD_S for k in range(3)]
    assert device.installed() == new
    for one in new:
        certificate = x509.load_pem_x509_certificate(one.certificate)
        assert certificate.public_key() == load_pem_private_key(one.tls_key, None).public_key()
    with pytest.raises(StoreError, match="no open request"):
        device.install(answer, aggregator_key=PINNED)


@pytest.mark.parametrize("at_s", [NOW_S - 10 * YEAR_S, NOW_S + 5 * YEAR_S])
def test_an_answer_is_installed_whatever_time_it_is_for(at_s: float) -> None:
    """The device's clock has no part in it, so a wrong one cannot spoil it."""
    device = make()
    office = Office(ca=make_ca("covey test", now_s=at_s))
    new = device.install(office.admit(device.prepare(count=3, entropy=os.urandom), now_s=at_s), aggregator_key=PINNED)
    assert isinstance(device.current(at_s), Pseudonym)
    assert len(new) == 3


Forge = Callable[["Answer"], None]


class Answer:
    """An answer to be forged: what an operator, or somebody on the way, may have changed."""

    def __init__(self, device: Pseudonyms, count: int = 3) -> None:
        self.request = decode_file(device.prepare(count=count, entropy=os.urandom), PseudonymRequest)
        self.keys = [x509.load_pem_x509_csr(one.csr.encode()).public_key() for one in self.request.pseudonyms]
        self.ids = [one.id for one in self.request.pseudonyms]
        self.periods = periods_from(NOW_S, period_days=30, count=count)
        self.tenant, self.task, self.ca, self.key = TENANT, TASK, CA, AGGREGATOR
        self.shown_ca = CA.certificate
        self.extra: list[x509.ExtensionType] = []
        self.certificates: dict[int, bytes] = {}

    def certificate(self, k: int) -> bytes:
        """The honest one, unless something else was put in its place."""
        if k in self.certificates:
            return self.certificates[k]
        key, period = self.keys[k], self.periods[k]
        assert isinstance(key, ec.EllipticCurvePublicKey)
        return certify(self.ca, self.ids[k], key, not_before_s=period.not_before_s, not_after_s=period.not_after_s)

    def file(self) -> bytes:
        issued = [IssuedCertificate(id=one, certificate=self.certificate(k).decode()) for k, one in enumerate(self.ids)]
        answer = signed_answer(
            tenant=self.tenant, task=self.task, ca=self.shown_ca.decode(), certificates=issued, key=self.key
        )
        return encode_file(answer)

    def rewrite(self, k: int, change: Callable[[x509.CertificateBuilder], x509.CertificateBuilder]) -> None:
        """Put a certificate of the CA's in place of the honest one: same content, then changed."""
        honest = x509.load_pem_x509_certificate(self.certificate(k))
        self.certificates[k] = reissued(honest, change, ca=self.ca).public_bytes(Encoding.PEM)


def check_only_certificates_for_its_own_keys_are_taken(module: ModuleType) -> None:
    """Swapped among the device's own pseudonyms, and for a key of the operator's."""
    device = make(module=module)
    answer = Answer(device)
    answer.keys[0], answer.keys[1] = answer.keys[1], answer.keys[0]
    is_not_taken(device, answer, "is for another key than this device's")
    answer = Answer(device)
    answer.keys[2] = ec.generate_private_key(ec.SECP256R1()).public_key()
    is_not_taken(device, answer, "is for another key than this device's")


def is_not_taken(device: Pseudonyms, answer: Answer | bytes, *words: str) -> None:
    waiting = device.waiting
    with pytest.raises(ProtocolError) as caught:
        device.install(answer if isinstance(answer, bytes) else answer.file(), aggregator_key=PINNED)
    for word in words:
        assert word in str(caught.value)
    assert device.installed() == ()
    assert device.waiting == waiting > 0


def test_only_certificates_for_its_own_keys_are_taken() -> None:
    check_only_certificates_for_its_own_keys_are_taken(original)


def _forge_key(answer: Answer) -> None:
    answer.key = Ed25519PrivateKey.generate()


def _forge_ca(answer: Answer) -> None:
    answer.ca = make_ca("covey test", now_s=NOW_S)


def _forge_both_cas(answer: Answer) -> None:
    answer.shown_ca = make_ca("covey test", now_s=NOW_S).certificate


def _forge_study(answer: Answer) -> None:
    answer.task = "other-study"


def _leave_one_out(answer: Answer) -> None:
    answer.ids.pop()


def _answer_one_twice(answer: Answer) -> None:
    answer.ids[2] = answer.ids[1]


def _server(answer: Answer) -> None:
    answer.rewrite(0, lambda builder: _replaced(builder, x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])))


def _replaced(builder: x509.CertificateBuilder, value: x509.ExtensionType) -> x509.CertificateBuilder:
    builder._extensions = [
        x509.Extension(one.oid, one.critical, value if one.oid == value.oid else one.value)
        for one in builder._extensions
    ]
    return builder


def _other_alternative_name(answer: Answer) -> None:
    names = x509.SubjectAlternativeName(
        [x509.UniformResourceIdentifier(f"urn:covey:{answer.ids[0]}"), x509.DNSName("anna-watch")]
    )
    answer.rewrite(0, lambda builder: _replaced(builder, names))


def _extra_extension(answer: Answer) -> None:
    mark = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"), b"anna")
    answer.rewrite(0, lambda builder: builder.add_extension(mark, critical=False))


def _make_it_a_ca(answer: Answer) -> None:
    answer.rewrite(0, lambda builder: _replaced(builder, x509.BasicConstraints(ca=True, path_length=None)))


def _other_subject(answer: Answer) -> None:
    subject = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, answer.ids[0]), x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Anna")]
    )
    honest = x509.load_pem_x509_certificate(answer.certificate(0))

    def change(_builder: x509.CertificateBuilder) -> x509.CertificateBuilder:
        return x509.CertificateBuilder(
            issuer_name=honest.issuer,
            subject_name=subject,
            public_key=honest.public_key(),
            serial_number=1,
            not_valid_before=honest.not_valid_before_utc,
            not_valid_after=honest.not_valid_after_utc,
            extensions=list(honest.extensions),
        )

    answer.rewrite(0, change)


def _dates_of_its_own(answer: Answer) -> None:
    answer.periods = [Period(one.begins_s + 3600, one.ends_s + 3600) for one in answer.periods]


def _the_same_period_twice(answer: Answer) -> None:
    answer.periods[1] = answer.periods[0]


def _a_gap(answer: Answer) -> None:
    last = answer.periods[2]
    answer.periods[2] = Period(last.begins_s + PERIOD_S, last.ends_s + PERIOD_S)


def _far_too_long(answer: Answer) -> None:
    length_s = 20 * YEAR_S
    answer.periods = [Period(2 * length_s, 3 * length_s)] * 3


def _over_before_it_begins(answer: Answer) -> None:
    begins_s = answer.periods[1].begins_s
    answer.periods[1] = Period(begins_s, begins_s - OVERLAP_S)


def _text_around(answer: Answer) -> None:
    answer.certificates[0] = b"anna\n" + answer.certificate(0)


def _no_certificate(answer: Answer) -> None:
    answer.certificates[0] = b"none"


def _no_ca(answer: Answer) -> None:
    answer.shown_ca = b"none"


FORGERIES: list[tuple[Forge, str]] = [
    (_forge_key, "this device is pinned to"),
    (_forge_ca, "does not hold under the CA"),
    (_forge_both_cas, "does not hold under the CA"),
    (_forge_study, "expected one for clinic/watch, got one for clinic/other-study"),
    (_leave_one_out, "expected certificates for the 3 pseudonyms"),
    (_answer_one_twice, "expected certificates for the 3 pseudonyms"),
    (_server, "does not hold"),
    (_make_it_a_ca, "does not hold"),
    (_other_alternative_name, "only alternative name"),
    (_extra_extension, "expected the extensions of every client and no others"),
    (_other_subject, "expected the pseudonym as its only name"),
    (_dates_of_its_own, "on the grid of the study"),
    (_the_same_period_twice, "expected periods that follow each other"),
    (_a_gap, "expected periods that follow each other"),
    (_far_too_long, "expected periods of 2 to 366 days"),
    (_over_before_it_begins, "expected periods of 2 to 366 days"),
    (_text_around, "nothing around it"),
    (_no_certificate, "expected a certificate in PEM"),
    (_no_ca, "the CA: expected a certificate in PEM"),
]


@pytest.mark.parametrize(("forge", "words"), FORGERIES, ids=[forge.__name__.strip("_") for forge, _ in FORGERIES])
def test_an_answer_that_says_what_is_not_so_is_not_taken(forge: Forge, words: str) -> None:
    device = make()
    answer = Answer(device)
    forge(answer)
    is_not_taken(device, answer, words)
    honest = Answer(device).file()
    assert len(device.install(honest, aggregator_key=PINNED)) == 3


def test_an_answer_that_was_changed_on_the_way_is_not_taken() -> None:
    """Another CA and certificates of its own, the aggregator's public key left in it."""
    device = make()
    answer = Answer(device)
    _forge_ca(answer)
    answer.shown_ca = answer.ca.certificate
    honest, forged = (json.loads(data) for data in (Answer(device).file(), answer.file()))
    forged["signature"] = honest["signature"]
    is_not_taken(device, json.dumps(forged).encode(), "the aggregator's signature does not fit")


def test_an_answer_to_an_older_request_is_not_taken() -> None:
    device = make()
    old = Answer(device).file()
    device.prepare(count=3, entropy=os.urandom, anew=True)
    is_not_taken(device, old, "of which 0 were asked for; is it to an older request?")


def test_another_devices_answer_is_not_taken() -> None:
    device = make()
    device.prepare(count=3, entropy=os.urandom)
    is_not_taken(device, Answer(make()).file(), "is it to an older request?")


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff\xfe", b"[" * 2000])
def test_a_file_that_is_no_answer_is_not_taken(data: bytes) -> None:
    device = make()
    device.prepare(count=3, entropy=os.urandom)
    is_not_taken(device, data, "not a pseudonym answer")


PREPARED = make()
HONEST = Answer(PREPARED).file()


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(HONEST) - 1), st.integers(0, 12), st.binary(max_size=12))
def test_whatever_is_changed_in_an_answer_it_is_not_taken(start: int, length: int, noise: bytes) -> None:
    forged = HONEST[:start] + noise + HONEST[start + length :]
    try:
        same = json.loads(forged) == json.loads(HONEST)
    except (ValueError, RecursionError):
        same = False
    if not same:
        is_not_taken(PREPARED, forged)


# Taking turns.


@given(st.integers(0, 6 * PERIOD_S))
def test_at_any_time_one_pseudonym_or_a_reason(after_s: int) -> None:
    now_s = BEGINS_S - PERIOD_S + after_s
    turn = after_s // PERIOD_S - 1
    if turn < 0:
        assert reason(TURNS, now_s) == "not_yet_valid"
    elif turn < 3:
        assert in_use(TURNS, now_s) == TURNS.installed()[turn]
    else:
        assert reason(TURNS, now_s) == "expired"


TURNS = admitted(3)


def test_names_change_at_the_beginning_of_a_period_and_the_old_one_lives_a_day_longer() -> None:
    first, second, _ = TURNS.installed()
    change_s = first.period.ends_s
    assert in_use(TURNS, change_s - 1) == first
    assert in_use(TURNS, change_s) == second
    assert first.is_valid(change_s + OVERLAP_S)
    assert not first.is_valid(change_s + OVERLAP_S + 1)
    assert second.is_valid(change_s - OVERLAP_S)
    assert not second.is_valid(change_s - OVERLAP_S - 1)
    assert TURNS.get(first.id) == first
    assert TURNS.get("p" + "0" * 32) is None


@given(st.integers(0, 6 * PERIOD_S))
def test_the_next_change_is_when_the_answer_changes(after_s: int) -> None:
    now_s = BEGINS_S - PERIOD_S + after_s
    change_s = TURNS.next_change_s(now_s)
    if change_s is None:
        assert reason(TURNS, now_s) == reason(TURNS, now_s + 10 * YEAR_S) == "expired"
        return
    assert change_s > now_s

    def name(at_s: float) -> str | None:
        found = TURNS.current(at_s)
        return found.id if isinstance(found, Pseudonym) else None

    assert name(now_s) == name(change_s - 1) != name(change_s)


def test_all_devices_of_a_study_change_names_at_the_same_moments() -> None:
    """Admitted at different moments of a period, they cannot be told apart by when they change."""
    office, changes = Office(), []
    for at_s in (BEGINS_S + 5.0, BEGINS_S + 17 * DAY_S + 4321.0):
        device = make()
        device.install(office.admit(device.prepare(count=3, entropy=os.urandom), now_s=at_s), aggregator_key=PINNED)
        changes.append([(one.not_before_s, one.period, one.not_after_s) for one in device.installed()])
    assert changes[0] == changes[1]


def test_a_new_row_takes_over_only_where_the_old_one_ends() -> None:
    """So that nobody has two names in one period, and takes part twice."""
    store, office = MemoryStore(), Office()
    device = make(store)
    device.install(office.admit(device.prepare(count=2, entropy=os.urandom)), aggregator_key=PINNED)
    old = device.installed()
    later_s = BEGINS_S + PERIOD_S + 5.0
    device.install(office.admit(device.prepare(count=2, entropy=os.urandom), now_s=later_s), aggregator_key=PINNED)
    for again in (device, make(store.after_restart())):
        assert in_use(again, later_s).id == old[1].id
        assert in_use(again, later_s + PERIOD_S).id not in {one.id for one in old}
        assert again.lasts_until_s() == BEGINS_S + 3 * PERIOD_S


# Wrong clocks.


@pytest.mark.parametrize(
    ("now_s", "expected", "shown"),
    [
        (NOW_S - 10 * YEAR_S, "not_yet_valid", "this device's clock says 2017-01-17"),
        (NOW_S + 10 * YEAR_S, "expired", "this device's clock says 2037-01-12"),
        (0.0, "not_yet_valid", "1970-01-01"),
        (-1e30, "not_yet_valid", "1970-01-01"),
        (1e30, "expired", "9999-12-31"),
    ],
)
def test_a_wrong_clock_is_told_and_costs_nothing(now_s: float, expected: str, shown: str) -> None:
    device = admitted(3)
    assert reason(device, now_s) == expected
    found = device.current(now_s)
    assert isinstance(found, NoPseudonym)
    assert shown in found.words
    assert "set it" in found.words
    assert device.forget_expired(now_s) == ()
    assert len(device.installed()) == 3
    assert isinstance(device.current(NOW_S), Pseudonym)  # the clock is set right


def test_each_way_to_have_no_name_has_its_own_sentence() -> None:
    device = make()
    words = {}
    for expected in ("none", "not_admitted"):
        assert reason(device, NOW_S) == expected
        found = device.current(NOW_S)
        assert isinstance(found, NoPseudonym)
        words[expected] = found.words
        device.prepare(count=3, entropy=os.urandom)
    assert "covey-device pseudonyms request" in words["none"]
    assert "covey-device pseudonyms install" in words["not_admitted"]
    renewing = admitted(1)
    renewing.prepare(count=1, entropy=os.urandom)
    found = renewing.current(NOW_S + YEAR_S)
    assert isinstance(found, NoPseudonym)
    assert "covey-device pseudonyms install" in found.words


# Forgetting.


def check_keys_are_forgotten(module: ModuleType) -> None:
    store = MemoryStore()
    device = admitted(3, store=store, module=module)
    first, second, third = device.installed()
    change_s = first.period.ends_s
    assert device.forget_expired(change_s + OVERLAP_S) == ()
    assert device.forget_expired(change_s + OVERLAP_S + 1) == (first.id,)
    for again in (device, make(store.after_restart(), module=module)):
        assert [one.id for one in again.installed()] == [second.id, third.id]
        assert again.get(first.id) is None
    kept = b"".join(store.blobs.values())
    for secret in (first.signing_key.private_bytes_raw(), first.tls_key, first.id.encode(), first.certificate):
        assert secret not in kept
    assert second.tls_key in kept


def test_names_whose_time_is_over_are_forgotten_with_their_keys() -> None:
    check_keys_are_forgotten(original)


def check_a_clock_that_is_ahead_costs_no_name(module: ModuleType) -> None:
    device = admitted(3, module=module)
    assert device.forget_expired(NOW_S + 10 * YEAR_S) == ()
    assert isinstance(device.current(NOW_S), module.Pseudonym)


def test_a_clock_that_is_ahead_costs_no_name() -> None:
    check_a_clock_that_is_ahead_costs_no_name(original)


def test_erasing_a_study_leaves_nothing() -> None:
    store = MemoryStore()
    device = admitted(3, store=store)
    other = admitted(1, store=store, task="other-study")
    device.erase()
    assert reason(device, NOW_S) == reason(make(store.after_restart()), NOW_S) == "none"
    assert len(store.blobs) == 1
    assert len(other.installed()) == 1


def test_a_stored_row_of_another_make_is_one_sentence() -> None:
    store = MemoryStore()
    admitted(1, store=store)
    store.blobs = dict.fromkeys(store.blobs, b"\x93\x01\x02\x03")
    with pytest.raises(StoreError, match="cannot be read"):
        make(store)


def test_what_is_listed_says_which_name_is_for_what() -> None:
    device = admitted(3)
    device.prepare(count=2, entropy=os.urandom)
    ids, ends_s = [one.id for one in device.installed()], BEGINS_S + PERIOD_S
    first, second = date_text(BEGINS_S), date_text(ends_s)
    lines = device.describe(ends_s + 1)
    assert lines[0] == f"clinic/watch  {ids[0]}  {first} to {second}  for pending updates only"
    assert [line.rpartition("  ")[2] for line in lines[1:3]] == ["in use", "later"]
    assert lines[3] == "clinic/watch  2 more asked for; the operator's answer is not installed yet"
    assert device.describe(ends_s + OVERLAP_S + 1)[0].endswith("  over")
    assert make().describe(NOW_S) == ["clinic/watch  none"]


# The files that ssl wants.


def loaded(one: Pseudonym) -> tuple[ssl.SSLContext, list[Path]]:
    with tls_files(one) as files:
        paths = [files.ca, files.certificate, files.key]
        context = ssl.create_default_context(cafile=str(files.ca))
        context.load_cert_chain(str(files.certificate), str(files.key))
        for path in paths:
            assert path.stat().st_mode & 0o077 == 0 or str(path).startswith("/proc/self/fd/")
    return context, paths


def test_the_key_reaches_ssl_without_a_file_on_any_disk() -> None:
    before = len(os.listdir("/proc/self/fd"))
    context, paths = loaded(in_use(TURNS, NOW_S))
    assert context.get_ca_certs()
    assert all(str(path).startswith("/proc/self/fd/") for path in paths)
    assert len(os.listdir("/proc/self/fd")) == before


def test_without_memory_files_a_private_folder_is_used_and_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    context, paths = loaded(in_use(TURNS, NOW_S))
    assert context.get_ca_certs()
    for path in paths:
        assert not path.exists()
        assert not path.parent.exists()


def test_files_are_removed_when_their_use_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificate_files, "_memory_files_work", lambda: False)
    with pytest.raises(RuntimeError, match="no broker"), tls_files(in_use(TURNS, NOW_S)) as files:
        raise RuntimeError("no broker")
    assert not files.key.parent.exists()


def test_no_place_for_the_key_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object, **_options: object) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(certificate_files, "_in_memory", refuse)
    with pytest.raises(StoreError, match="cannot be handed to ssl"), tls_files(in_use(TURNS, NOW_S)):
        pass


# Broken copies of the device, which the checks above must notice.


def _trusting() -> ModuleType:
    checks = broken_copy(issued_certificates.__name__, ("!= public_key:", "!= public_key and False:"))
    return broken_copy(original.__name__, ("device_client.issued_certificates import", f"{checks.__name__} import"))


WITH_HOST = """def _with_host(sign):
    import socket
    return lambda csr, **rest: sign(csr=socket.gethostname() + csr, **rest)


def date_text"""

CHECKS: dict[str, Callable[[ModuleType], None]] = {
    "names": check_nothing_names_the_device,
    "shares": check_pseudonyms_share_nothing,
    "keys": check_only_certificates_for_its_own_keys_are_taken,
    "forgets": check_keys_are_forgotten,
    "clock": check_a_clock_that_is_ahead_costs_no_name,
}


@pytest.mark.parametrize("check", CHECKS.values(), ids=list(CHECKS))
def test_the_copy_passes_while_nothing_is_broken(check: Callable[[ModuleType], None]) -> None:
    check(broken_copy(original.__name__))


@pytest.mark.parametrize(
    ("check", "module"),
    [
        pytest.param(
            "names",
            broken_copy(
                original.__name__,
                ("NameOID.COMMON_NAME, name)", 'NameOID.COMMON_NAME, __import__("socket").gethostname())'),
            ),
            id="the common name is the host's",
        ),
        pytest.param(
            "names",
            broken_copy(
                original.__name__, ("signed_entry(", "_with_host(signed_entry)("), ("def date_text", WITH_HOST)
            ),
            id="the host's name in front of the certificate request",
        ),
        pytest.param(
            "shares",
            broken_copy(
                original.__name__,
                ("self._tls_keys.make(entropy)", "self._tls_keys.make(lambda count: bytes(range(count)))"),
            ),
            id="one TLS key for all",
        ),
        pytest.param(
            "shares",
            broken_copy(original.__name__, ("signing_key, tls = entropy(32),", "signing_key, tls = bytes(32),")),
            id="one signing key for all",
        ),
        pytest.param("keys", _trusting(), id="takes a certificate for another key"),
        pytest.param(
            "forgets",
            broken_copy(original.__name__, ("if one.id not in ended)", "if one.id not in ended or True)")),
            id="forgets nothing",
        ),
        pytest.param(
            "clock",
            broken_copy(original.__name__, ("if isinstance(self.current(now_s), NoPseudonym):", "if False:")),
            id="forgets by any clock",
        ),
    ],
)
def test_a_broken_copy_is_caught(check: str, module: ModuleType) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        CHECKS[check](module)


def test_the_server_side_of_the_chain_is_the_same_ca() -> None:
    """What the device connects with is what the CA's own broker certificate is checked against."""
    one = in_use(TURNS, NOW_S)
    broker: KeyPair = issue(CA, "broker", now_s=NOW_S, server_hosts=("localhost",))
    leaf, ca = (x509.load_pem_x509_certificate(pem) for pem in (broker.certificate, one.ca))
    leaf.verify_directly_issued_by(ca)
    moment = datetime.datetime.fromtimestamp(NOW_S, datetime.timezone.utc)
    assert ca.not_valid_before_utc <= moment <= ca.not_valid_after_utc
    assert decode_file(HONEST, PseudonymAnswer).ca.encode() == CA.certificate
