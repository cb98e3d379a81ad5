"""Admission believes nothing that a request does not prove, and takes all of it or none; broken copies are caught."""

from __future__ import annotations

import base64
import datetime
from collections.abc import Callable
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import AttributeOID, ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder
from cryptography.x509.verification import Store as TrustStore
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from aggregator.admission import Admission, Admitter
from aggregator.certificates import make_ca
from aggregator.errors import AggregatorError
from fl_protocol.enrolment import (
    DAY_S,
    OVERLAP_S,
    Period,
    PseudonymAnswer,
    PseudonymEntry,
    PseudonymRequest,
    answer_signature_is_valid,
    decode_file,
    encode_file,
    pseudonym_id,
    signed_entry,
)
from fl_protocol.errors import ProtocolError
from tests.enrolments import AGGREGATOR, BEGINS_S, CA, NOW_S, PERIOD_S, TASK, TENANT, Office, broken_copy

STUDY = {"tenant": TENANT, "task": TASK}
OFFICE = Office()
"""Where nothing is ever admitted."""
TlsKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | Ed25519PrivateKey


def make_keys() -> tuple[Ed25519PrivateKey, ec.EllipticCurvePrivateKey]:
    return Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1())


def name_of(signing: Ed25519PrivateKey, tls: TlsKey, **study: str) -> str:
    spki = tls.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    raw = signing.public_key().public_bytes_raw()
    return pseudonym_id(**{**STUDY, **study}, signing_key=raw, tls_key=spki)


Extend = Callable[[x509.CertificateSigningRequestBuilder], x509.CertificateSigningRequestBuilder]


def make_csr(tls: TlsKey, *names: tuple[x509.ObjectIdentifier, str], extend: Extend = lambda builder: builder) -> str:
    subject = x509.Name([x509.NameAttribute(oid, value) for oid, value in names])
    builder = extend(x509.CertificateSigningRequestBuilder().subject_name(subject))
    digest = None if isinstance(tls, Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(tls, digest).public_bytes(Encoding.PEM).decode()


def make_entry(
    signing: Ed25519PrivateKey, tls: TlsKey, *, name: str | None = None, csr: str | None = None, **study: str
) -> PseudonymEntry:
    """An honest entry, or one that differs in what is named."""
    name = name or name_of(signing, tls, **study)
    csr = csr or make_csr(tls, (NameOID.COMMON_NAME, name))
    return signed_entry(**{**STUDY, **study}, pseudonym=name, csr=csr, key=signing)


def request_of(*entries: PseudonymEntry, **changes: str) -> bytes:
    content = PseudonymRequest(format="covey-pseudonym-request-1", **STUDY, pseudonyms=entries)
    return encode_file(replace(content, **changes))


def honest_entries(count: int = 3) -> list[PseudonymEntry]:
    return [make_entry(*make_keys()) for _ in range(count)]


def foreign_entries(**study: str) -> list[PseudonymEntry]:
    """Entries that are in order, for another study."""
    signing, tls = make_keys()
    return [make_entry(signing, tls, **study)]


def certificates_in(answer: bytes) -> list[x509.Certificate]:
    decoded = decode_file(answer, PseudonymAnswer)
    return [x509.load_pem_x509_certificate(one.certificate.encode()) for one in decoded.certificates]


def is_refused(office: Office, request: bytes, *words: str) -> None:
    """Refused as the peer's fault, in words, and nothing came of it."""
    before = office.registered()
    with pytest.raises(ProtocolError) as caught:
        office.admit(request)
    for word in words:
        assert word in str(caught.value)
    assert office.registered() == before
    assert office.answers == []


# What is admitted.


def test_all_pseudonyms_are_registered_and_certified() -> None:
    office, entries = Office(), honest_entries()
    delivered: list[bytes] = []
    done = office.admitter.admit(request_of(*entries), now_s=NOW_S, deliver=delivered.append)
    assert done == Admission(tuple(one.id for one in entries), Period(BEGINS_S, BEGINS_S + 3 * PERIOD_S))
    assert office.registered() == {one.id: bytes.fromhex(one.signing_key) for one in entries}
    answer = decode_file(delivered[0], PseudonymAnswer)
    assert answer_signature_is_valid(answer, AGGREGATOR.public_key())
    assert (answer.tenant, answer.task, answer.ca) == (TENANT, TASK, CA.certificate.decode())
    assert [one.id for one in answer.certificates] == [one.id for one in entries]
    trusted = TrustStore([x509.load_pem_x509_certificate(CA.certificate)])
    for entry, certificate in zip(entries, certificates_in(delivered[0]), strict=True):
        assert certificate.public_key() == x509.load_pem_x509_csr(entry.csr.encode()).public_key()
        at = certificate.not_valid_after_utc
        PolicyBuilder().store(trusted).time(at).build_client_verifier().verify(certificate, [])


def test_a_certificate_says_the_pseudonym_and_nothing_else() -> None:
    entry = honest_entries(1)[0]
    (certificate,) = certificates_in(Office().admit(request_of(entry)))
    assert [(one.oid, one.value) for one in certificate.subject] == [(NameOID.COMMON_NAME, entry.id)]
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [x509.UniformResourceIdentifier(f"urn:covey:{entry.id}")]
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert len(list(certificate.extensions)) == 6


def test_certificates_are_valid_one_period_after_the_other_and_a_day_beyond() -> None:
    certificates = certificates_in(Office().admit(request_of(*honest_entries())))
    for k, certificate in enumerate(certificates):
        assert certificate.not_valid_before_utc.timestamp() == BEGINS_S + k * PERIOD_S - OVERLAP_S
        assert certificate.not_valid_after_utc.timestamp() == BEGINS_S + (k + 1) * PERIOD_S + OVERLAP_S


def test_the_same_keys_may_not_be_in_two_studies_but_a_device_may() -> None:
    """The name differs because the study is in it."""
    signing, tls = make_keys()
    assert name_of(signing, tls) != name_of(signing, tls, task="other")
    request = encode_file(
        PseudonymRequest(
            format="covey-pseudonym-request-1",
            tenant=TENANT,
            task="other",
            pseudonyms=(make_entry(*make_keys(), task="other"),),
        )
    )
    office = Office()
    office.add_task("other")
    office.admit(request_of(*honest_entries()))
    answer = decode_file(office.admit(request), PseudonymAnswer)
    assert answer.task == "other"
    assert len(office.registered()) == 4


# What is not.


def test_a_request_to_another_study_is_refused() -> None:
    check_other_studies_are_refused(Office)


def check_other_studies_are_refused(kind: Callable[[], Office]) -> None:
    is_refused(
        kind(),
        request_of(*foreign_entries(task="other"), task="other"),
        "expected one for a task",
        "got one for clinic/other",
    )
    is_refused(
        kind(),
        request_of(*foreign_entries(tenant="other"), tenant="other"),
        "a study of clinic",
        "got one for other/watch",
    )


def test_an_entry_made_for_another_study_is_refused() -> None:
    is_refused(Office(), request_of(make_entry(*make_keys(), task="other")), "not signed by its own signing key")


def test_nobody_registers_anothers_signing_key() -> None:
    """The attacker has a TLS key of their own and the victim's public signing key, which updates show."""
    (mine, tls), (victim, _) = make_keys(), make_keys()
    honest = make_entry(mine, tls, name=name_of(victim, tls))
    stolen = replace(honest, signing_key=victim.public_key().public_bytes_raw().hex())
    is_refused(Office(), request_of(stolen), "not signed by its own signing key")


def test_nobody_registers_anothers_tls_key() -> None:
    """The attacker has the victim's certificate request, whose name fits the victim's signing key only."""
    (mine, _), (victim, tls) = make_keys(), make_keys()
    theirs = make_entry(victim, tls)
    is_refused(Office(), request_of(make_entry(mine, tls, name=theirs.id, csr=theirs.csr)), "follows from its keys")
    renamed = make_entry(mine, tls, csr=theirs.csr)
    is_refused(Office(), request_of(renamed), "expected the pseudonym as its only name")


def test_a_name_of_ones_own_choice_is_refused() -> None:
    signing, tls = make_keys()
    is_refused(Office(), request_of(make_entry(signing, tls, name="p" + "ab" * 16)), "follows from its keys")


def _with_extension(extension: x509.ExtensionType) -> Extend:
    return lambda builder: builder.add_extension(extension, critical=True)


WISHES: dict[str, Extend] = {
    "to be a CA": _with_extension(x509.BasicConstraints(ca=True, path_length=None)),
    "to be a server": _with_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])),
    "another name": _with_extension(x509.SubjectAlternativeName([x509.DNSName("broker.clinic.example")])),
    "a password": lambda builder: builder.add_attribute(AttributeOID.CHALLENGE_PASSWORD, b"anna-watch"),
}


@pytest.mark.parametrize("wish", WISHES.values(), ids=list(WISHES))
def test_a_certificate_request_that_wishes_for_more_is_refused(wish: Extend) -> None:
    check_wishes_are_refused(Office, wish)


def check_wishes_are_refused(kind: Callable[[], Office], wish: Extend = WISHES["to be a CA"]) -> None:
    signing, tls = make_keys()
    csr = make_csr(tls, (NameOID.COMMON_NAME, name_of(signing, tls)), extend=wish)
    is_refused(kind(), request_of(make_entry(signing, tls, csr=csr)), "expected a name and a key, got 1 attribute")


@pytest.mark.parametrize(
    "names",
    [
        [],
        [(NameOID.COMMON_NAME, "anna-watch")],
        [(NameOID.COMMON_NAME, "ID"), (NameOID.ORGANIZATION_NAME, "Anna's")],
        [(NameOID.COMMON_NAME, "ID"), (NameOID.COMMON_NAME, "aggregator")],
        [(NameOID.COMMON_NAME, "aggregator"), (NameOID.COMMON_NAME, "ID")],
        [(NameOID.SERIAL_NUMBER, "ID")],
    ],
)
def test_a_certificate_request_with_other_names_is_refused(names: list[tuple[x509.ObjectIdentifier, str]]) -> None:
    signing, tls = make_keys()
    own = name_of(signing, tls)
    csr = make_csr(tls, *[(oid, own if value == "ID" else value) for oid, value in names])
    is_refused(Office(), request_of(make_entry(signing, tls, csr=csr)), "expected the pseudonym as its only name")


def test_only_p256_is_certified() -> None:
    for tls in (
        ec.generate_private_key(ec.SECP384R1()),
        rsa.generate_private_key(65537, 2048),
        Ed25519PrivateKey.generate(),
    ):
        entry = make_entry(Ed25519PrivateKey.generate(), tls)
        is_refused(Office(), request_of(entry), "expected a P-256 key, got another kind")


def test_a_tls_key_has_to_be_held() -> None:
    """A certificate request whose signature another key made."""
    signing, tls = make_keys()
    name = name_of(signing, tls)
    good = x509.load_pem_x509_csr(make_csr(tls, (NameOID.COMMON_NAME, name)).encode())
    raw = bytearray(good.public_bytes(Encoding.DER))
    raw[-1] ^= 1
    forged = x509.load_der_x509_csr(bytes(raw)).public_bytes(Encoding.PEM).decode()
    is_refused(Office(), request_of(make_entry(signing, tls, csr=forged)), "is not signed by the key in it")


@pytest.mark.parametrize("around", ["anna-watch\n{}", "{}anna-watch\n", "{}{}", "", "anna-watch", "{}\n"])
def test_text_around_a_certificate_request_is_refused(around: str) -> None:
    signing, tls = make_keys()
    csr = make_csr(tls, (NameOID.COMMON_NAME, name_of(signing, tls)))
    spoilt = around.format(csr, csr)
    is_refused(Office(), request_of(make_entry(signing, tls, csr=spoilt or "-")), "PEM")


def test_pseudonyms_share_no_key() -> None:
    (first, tls), (second, _) = make_keys(), make_keys()
    is_refused(Office(), request_of(make_entry(first, tls), make_entry(second, tls)), "a TLS key of its own")
    _, other_tls = make_keys()
    shared = request_of(make_entry(first, tls), make_entry(first, other_tls))
    is_refused(Office(), shared, "a signing key of its own")
    entry = make_entry(first, tls)
    is_refused(Office(), request_of(entry, entry), "of its own for each pseudonym")


def check_nothing_is_admitted_twice(kind: Callable[[], Office]) -> None:
    office, entries = kind(), honest_entries()
    office.admit(request_of(*entries))
    before = office.registered()
    late = make_entry(*make_keys())
    for again in (request_of(*entries), request_of(late, entries[1])):
        with pytest.raises(AggregatorError, match="was admitted before"):
            office.admit(again)
        assert office.registered() == before
    assert len(office.answers) == 1


def test_nothing_is_admitted_twice() -> None:
    check_nothing_is_admitted_twice(Office)


def test_a_signing_key_that_is_registered_gets_no_second_name() -> None:
    office, (signing, tls), (_, other_tls) = Office(), make_keys(), make_keys()
    office.admit(request_of(make_entry(signing, tls)))
    with pytest.raises(AggregatorError, match="was admitted before"):
        office.admit(request_of(make_entry(signing, other_tls)))
    assert len(office.registered()) == 1


def check_an_answer_that_cannot_be_kept_registers_nothing(kind: Callable[[], Office]) -> None:
    office = kind()

    def full_disk(_answer: bytes) -> None:
        raise AggregatorError("no space")

    request = request_of(*honest_entries())
    with pytest.raises(AggregatorError, match="no space"):
        office.admitter.admit(request, now_s=NOW_S, deliver=full_disk)
    assert office.registered() == {}
    office.admit(request)
    assert len(office.registered()) == 3


def test_an_answer_that_cannot_be_kept_registers_nothing() -> None:
    check_an_answer_that_cannot_be_kept_registers_nothing(Office)


def test_one_bad_entry_among_good_ones_admits_none() -> None:
    bad = replace(honest_entries(1)[0], signature="0" * 128)
    is_refused(Office(), request_of(*honest_entries(), bad), bad.id)


def test_a_ca_that_ends_too_early_admits_nobody() -> None:
    office = Office(ca=make_ca("old", now_s=NOW_S - 3600 * DAY_S))
    with pytest.raises(AggregatorError, match="the CA's certificate ends on"):
        office.admit(request_of(*honest_entries()))
    assert office.registered() == {}


def check_dates_tell_nobody_apart(kind: Callable[[], Office]) -> None:
    """Two devices admitted at different moments of a period: their certificates' dates are the same."""
    seen = []
    for at_s in (BEGINS_S + 1.0, BEGINS_S + 12 * DAY_S + 12_345.0):
        office = kind()
        certificates = certificates_in(office.admit(request_of(*honest_entries()), now_s=at_s))
        seen.append([(one.not_valid_before_utc, one.not_valid_after_utc) for one in certificates])
    assert seen[0] == seen[1]


def test_dates_tell_nobody_apart() -> None:
    check_dates_tell_nobody_apart(Office)


@pytest.mark.parametrize("at_s", [NOW_S - 3650 * DAY_S, NOW_S - 2 * DAY_S])
def test_an_operators_clock_that_is_behind_is_no_crash(at_s: float) -> None:
    """The certificates are then for periods that are over; the devices' and the broker's clocks will say so."""
    certificates = certificates_in(Office().admit(request_of(*honest_entries()), now_s=at_s))
    moment = datetime.datetime.fromtimestamp(at_s, datetime.timezone.utc)
    assert certificates[0].not_valid_before_utc <= moment <= certificates[0].not_valid_after_utc


def test_a_name_that_is_a_bit_string_is_refused() -> None:
    keys = make_keys()
    entry = honest_entries(1)[0]
    raw = base64.b64decode("".join(entry.csr.splitlines()[1:-1]))
    name = entry.id.encode()
    assert raw.count(b"\x0c" + bytes([len(name)]) + name) == 1  # the common name, UTF8String
    spoilt = raw.replace(b"\x0c" + bytes([len(name)]) + name, b"\x03" + bytes([len(name)]) + b"\x00" + name[1:])
    csr = pem_of(spoilt)
    with pytest.raises(ProtocolError):
        OFFICE.admitter.examine(request_of(make_entry(*keys, csr=csr)))


def pem_of(raw: bytes) -> str:
    """A certificate request as text."""
    text = base64.b64encode(raw).decode()
    lines = [text[at : at + 64] for at in range(0, len(text), 64)]
    return "\n".join(["-----BEGIN CERTIFICATE REQUEST-----", *lines, "-----END CERTIFICATE REQUEST-----", ""])


SPOILT_KEYS = make_keys()
SPOILT_CSR = base64.b64decode("".join(honest_entries(1)[0].csr.splitlines()[1:-1]))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
def test_whatever_stands_in_a_certificate_request_nothing_but_our_errors_escapes(
    changes: list[tuple[float, int]],
) -> None:
    raw = bytearray(SPOILT_CSR)
    for place, value in changes:
        raw[int(place * len(raw))] = value
    csr = pem_of(bytes(raw))
    with pytest.raises(ProtocolError):  # whole again or not, it is for another name
        OFFICE.admitter.examine(request_of(make_entry(*SPOILT_KEYS, csr=csr)))


# Broken copies of the admission, which the checks above must notice.


def broken_office(*changes: tuple[str, str]) -> Callable[[], Office]:
    kind: type[Admitter] = broken_copy("aggregator.admission", *changes).Admitter
    return lambda: Office(kind=kind)


CHECKS: dict[str, Any] = {
    "other studies": check_other_studies_are_refused,
    "wishes": check_wishes_are_refused,
    "twice": check_nothing_is_admitted_twice,
    "all or nothing": check_an_answer_that_cannot_be_kept_registers_nothing,
    "dates": check_dates_tell_nobody_apart,
}


@pytest.mark.parametrize("check", CHECKS.values(), ids=list(CHECKS))
def test_the_copy_passes_while_nothing_is_broken(check: Callable[[Callable[[], Office]], None]) -> None:
    check(broken_office())


@pytest.mark.parametrize(
    ("check", "changes"),
    [
        pytest.param("other studies", [("if decoded.tenant != self.tenant:", "if False:")], id="takes any tenant"),
        pytest.param(
            "other studies", [("if decoded.task not in self.store.tasks.specs():", "if False:")], id="takes any task"
        ),
        pytest.param("wishes", [("if attributes:", "if False:")], id="grants wishes in silence"),
        pytest.param(
            "twice",
            [
                ("if first is not None:", "if False:"),
                (
                    "    rows = [{",
                    "    connection.execute(schema.devices.delete())\n    rows = [{",
                ),
            ],
            id="takes an id that exists",
        ),
        pytest.param(
            "all or nothing",
            [
                ("            deliver(certified.answer)\n", ""),
                (
                    "        return certified.admission",
                    "        deliver(certified.answer)\n        return certified.admission",
                ),
            ],
            id="registers before the answer is kept",
        ),
        pytest.param(
            "dates",
            [
                (
                    "periods = periods_from(first_s, period_days=self.period_days, count=len(candidates))",
                    "periods = [Period(int(first_s), int(first_s) + 2592000)] * len(candidates)",
                )
            ],
            id="dates of one's own",
        ),
    ],
)
def test_a_broken_admission_is_caught(check: str, changes: list[tuple[str, str]]) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        CHECKS[check](broken_office(*changes))


def test_a_name_counts_only_in_its_time() -> None:
    office, entries = Office(), honest_entries()
    office.admit(request_of(*entries))
    first, second = entries[0].id, entries[1].id
    begins_s, ends_s = BEGINS_S, BEGINS_S + PERIOD_S
    for name, at_s, counts in (
        (first, begins_s - DAY_S, True),
        (first, begins_s - DAY_S - 1, False),
        (first, ends_s + DAY_S, True),
        (first, ends_s + DAY_S + 1, False),
        (second, ends_s - DAY_S - 1, False),
        (second, ends_s - DAY_S, True),
    ):
        assert office.store.devices.find([name])[name].holds_at(at_s) == counts, (name, at_s)


def test_a_device_that_was_registered_by_hand_counts_always() -> None:
    office = Office()
    office.store.devices.add("watch-7", bytes(32), NOW_S)
    found = office.store.devices.find(["watch-7"])["watch-7"]
    assert found.public_key == bytes(32)
    assert found.holds_at(0.0)
    assert found.holds_at(1e11)
