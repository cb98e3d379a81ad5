"""Devices that a helper knows by their certificates. Each attack puts made-up devices beside one real one, so that the
sum is that one's update; with each goes the copy of the code that lets them in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from aggregator.helper import known_devices
from aggregator.helper.answering import Study, read_question, signed_sum
from fl_protocol.client_certificates import key_info
from fl_protocol.enrolment import pseudonym_id
from fl_protocol.errors import ProtocolError
from fl_protocol.messages import RoundManifestMsg
from fl_protocol.sealing import RoundKey
from fl_protocol.secagg.errors import UnmaskRefusal, UnmaskRefusedError
from fl_protocol.secagg.messages import DeviceCredentialMsg, MaskSumMsg, UnmaskRefusalMsg
from fl_protocol.secagg.parties import Sender, entry_for, masked_vector, sum_of_masks, unmask
from fl_protocol.secagg.terms import secure_round
from fl_protocol.signing import verify
from tests.aggregator.helper.helper_desk import (
    COHORT,
    DEVICES,
    HELPER,
    IDENTITY,
    NOW_S,
    OTHER,
    TASK,
    TENANT,
    Desk,
    manifest_of,
    own_key,
    request_of,
    rounds_reply,
)
from tests.aggregator.helper.pseudonymous import (
    CA,
    NEXT_PERIOD,
    PERIOD,
    STRANGERS_CA,
    Named,
    admitted,
    name_of,
    several,
    signing_key,
    tls_key,
)
from tests.enrolments import broken_copy, reissued
from tests.fl_protocol.examples import AGGREGATOR_KEY, round_key
from tests.fl_protocol.secagg.rounds import body_of, device_key, seeded, update_id, updates_of

PINNED = (x509.load_pem_x509_certificate(CA.certificate),)
STUDY = Study(TENANT, AGGREGATOR_KEY.public_key(), cas=PINNED)
KEY = round_key("x25519", seed=77)
ROUND = manifest_of(own_key(KEY.recipient(), not_after_s=NEXT_PERIOD.ends_s))
VICTIM = admitted("victim")
SEEDS = ("second", "third")
LISTED = {device: device_key(device).public_key() for device in DEVICES}


def reply(
    module: Any,
    devices: Sequence[Named],
    *,
    study: Study = STUDY,
    manifest: RoundManifestMsg = ROUND,
    now_s: float = NOW_S,
    known: Any = None,
) -> MaskSumMsg:
    """What a helper that remembers nothing, or `known`, answers about these devices."""
    terms = secure_round(manifest)
    data = request_of(manifest, [device.entry(terms) for device in devices])
    question = read_question(data, study, helper=HELPER, identity=IDENTITY.public_key())
    keys = (known or module.KnownDevices(study)).keys(question, listed=LISTED, now_s=now_s)
    answer = signed_sum(
        question,
        KEY,
        helper=HELPER,
        identity=IDENTITY,
        device_keys=keys,
        minimum_cohort=COHORT,
        entropy=seeded("noise"),
    )
    return verify(answer, MaskSumMsg, IDENTITY.public_key())


def refuses(module: Any, words: str, devices: Sequence[Named], **how: Any) -> None:
    error = ended(module, devices, **how)
    assert error.reason is UnmaskRefusal.UNSIGNED
    assert words in error.detail


def ended(module: Any, devices: Sequence[Named], **how: Any) -> UnmaskRefusedError:
    """Why nothing was answered."""
    try:
        reply(module, devices, **how)
    except UnmaskRefusedError as error:
        return error
    pytest.fail("it answered")


def at(opened_s: float) -> RoundManifestMsg:
    """The round, opened at another time."""
    key = own_key(KEY.recipient(), not_after_s=NEXT_PERIOD.ends_s)
    return manifest_of(key, opened_s=float(opened_s), deadline_s=opened_s + 60.0)


# Attacks of an aggregator that wants to see the victim's update.


def sybils_without_certificates(module: Any) -> None:
    made_up = [Named(one.name, one.signing_key, None) for one in several(SEEDS)]
    refuses(module, "brings no certificate", [VICTIM, *made_up])


def sybils_of_a_ca_of_its_own(module: Any) -> None:
    """Under the pinned CA's name, as the issuer's name proves nothing."""
    refuses(module, "does not hold under the CA", [VICTIM, *several(SEEDS, ca=STRANGERS_CA)])


def other_devices_certificates_with_keys_of_its_own(module: Any) -> None:
    """It has seen the certificates of all who ever sent it an update."""
    made_up = [one.signed_by(signing_key(f"attacker {one.name}")) for one in several(SEEDS)]
    refuses(module, "it is another device's", [VICTIM, *made_up])


def many_names_from_one_certificate(module: Any) -> None:
    """One admitted device and any number of signing keys: each pair has a name of its own, which nobody admitted."""
    own, made_up = admitted("attacker"), []
    for seed in SEEDS:
        signing = signing_key(seed)
        made_up.append(own.signed_by(signing).renamed(name_of(signing, tls_key("attacker"), tenant=TENANT, task=TASK)))
    refuses(module, "expected the pseudonym as its only name", [VICTIM, *made_up])


def names_of_other_tasks(module: Any) -> None:
    """One device that is in several tasks has a name in each."""
    refuses(module, "another study's", [VICTIM, *(admitted("attacker", task=f"other-{n}") for n in (1, 2))])


def names_of_another_tenant(module: Any) -> None:
    refuses(module, "another study's", [VICTIM, *several(SEEDS, tenant="hospital")])


def two_names_of_one_device_around_a_change(module: Any) -> None:
    """The certificates of both hold."""
    now_s = PERIOD.ends_s - 3600.0
    double = [admitted("attacker, this period"), admitted("attacker, the next", period=NEXT_PERIOD)]
    refuses(module, "a device has one name for each period", [VICTIM, *double], manifest=at(now_s - 60), now_s=now_s)


def names_whose_time_is_over(module: Any) -> None:
    """Of devices that were thrown away, say; the round claims to have opened in their time."""
    old = [VICTIM, *several(SEEDS)]
    refuses(module, "its time is not now", old, manifest=at(PERIOD.ends_s - 60), now_s=PERIOD.not_after_s + 1.0)


def names_whose_time_has_not_come(module: Any) -> None:
    early = several(("victim's next", *SEEDS), period=NEXT_PERIOD)
    refuses(module, "its time is not now", early, manifest=at(NEXT_PERIOD.begins_s))


def names_of_a_register_that_is_not_to_be_asked(module: Any) -> None:
    strict = Study(TENANT, AGGREGATOR_KEY.public_key(), cas=PINNED, allow_listed=False)
    made_up = [Named(device, device_key(device), None) for device in DEVICES[:2]]
    refuses(module, "goes by no pseudonym", [VICTIM, *made_up], study=strict)


def certificates_that_were_believed_before_with_other_keys(module: Any) -> None:
    known, others = module.KnownDevices(STUDY), several(SEEDS)
    reply(module, [VICTIM, *others], known=known)
    made_up = [one.signed_by(signing_key(f"attacker {one.name}")) for one in others]
    refuses(module, "it is another device's", [VICTIM, *made_up], known=known)


def names_that_were_believed_while_it_was_their_time(module: Any) -> None:
    known, devices = module.KnownDevices(STUDY), [VICTIM, *several(SEEDS)]
    reply(module, devices, known=known)
    later_s = PERIOD.not_after_s + 1.0
    refuses(module, "its time is not now", devices, known=known, manifest=at(PERIOD.ends_s - 60), now_s=later_s)


KNOWN, CREDENTIALS = "aggregator.helper.known_devices", "fl_protocol.secagg.credentials"
CERTIFICATES = "fl_protocol.client_certificates"
UNCHECKED_NAME = (
    ("if not is_only_name(certificate.subject, name):", "if False:"),
    ('if names != [x509.UniformResourceIdentifier(f"urn:covey:{name}")]:', "if False:"),
)
NO_HASH, NO_CLOCK = ("if named != device:", "if False:"), ("if not found.period.is_valid_at(now_s):", "if False:")
Changes = Sequence[tuple[str, str]]
BROKEN: list[tuple[Callable[[Any], None], str, Changes]] = [
    (
        sybils_of_a_ca_of_its_own,
        CERTIFICATES,
        [
            (
                "PolicyBuilder().store(Store(list(cas))).time(last).build_client_verifier().verify(certificate, [])",
                "pass",
            )
        ],
    ),
    (other_devices_certificates_with_keys_of_its_own, CREDENTIALS, [NO_HASH]),
    (many_names_from_one_certificate, CERTIFICATES, UNCHECKED_NAME),
    (names_of_other_tasks, CREDENTIALS, [NO_HASH]),
    (names_of_another_tenant, CREDENTIALS, [NO_HASH]),
    (
        two_names_of_one_device_around_a_change,
        KNOWN,
        [("if not found.period.is_used_at(question.opened_s):", "if False:")],
    ),
    (names_whose_time_is_over, KNOWN, [NO_CLOCK]),
    (names_whose_time_has_not_come, KNOWN, [NO_CLOCK]),
    (
        names_of_a_register_that_is_not_to_be_asked,
        KNOWN,
        [("if self._study.allow_listed and device in listed:", "if device in listed:")],
    ),
    (
        certificates_that_were_believed_before_with_other_keys,
        KNOWN,
        [
            ("[task, device, credential.signing_key, credential.certificate]", "credential.certificate"),
            ("return found.signing_key", "return Ed25519PublicKey.from_public_bytes(credential.signing_key)"),
        ],
    ),
    (names_that_were_believed_while_it_was_their_time, KNOWN, [NO_CLOCK]),
]
HELD_BY_MATHS = [sybils_without_certificates]
"""Who brings no key has none that could be believed."""


def copy_of(module: str, changes: Changes) -> Any:
    """`known_devices`, broken itself, or on a module that is."""
    broken = broken_copy(module, *changes)
    for user in (CREDENTIALS, KNOWN):
        if module != user and f"from {module} import" in _source(user):
            broken = broken_copy(user, (f"from {module} import", f"from {broken.__name__} import"))
            module = user
    return broken


def _source(module: str) -> str:
    return Path(*module.split(".")).with_suffix(".py").read_text()


@pytest.mark.parametrize("attack", [*dict.fromkeys(one[0] for one in BROKEN), *HELD_BY_MATHS])
def test_a_helper_withstands(attack: Callable[[Any], None]) -> None:
    attack(known_devices)


@pytest.mark.parametrize(("attack", "module", "changes"), BROKEN)
def test_a_helper_without_that_check_answers(attack: Callable[[Any], None], module: str, changes: Changes) -> None:
    with pytest.raises(pytest.fail.Exception, match="it answered"):
        attack(copy_of(module, changes))


def test_who_gets_sybils_past_a_helper_reads_one_update() -> None:
    """What all this is about: two made-up devices of nothing but zeros, and the sum is the victim's update."""
    careless = copy_of(CERTIFICATES, BROKEN[0][2])
    terms, sybils = secure_round(ROUND), several(SEEDS, ca=STRANGERS_CA)
    secret = updates_of([VICTIM.name], terms.fixed_point.length)[VICTIM.name]
    bodies = []
    for one in (VICTIM, *sybils):
        sender = Sender(one.name, update_id(one.name), one.signing_key, one.credential)
        bodies.append(body_of(terms, one.name, secret if one is VICTIM else 0 * secret, sender=sender))
    entries = {name: [entry_for(terms, body, name) for body in bodies] for name in (HELPER, OTHER)}
    question = read_question(request_of(ROUND, entries[HELPER]), STUDY, helper=HELPER, identity=IDENTITY.public_key())
    with pytest.raises(UnmaskRefusedError, match="does not hold under the CA"):
        known_devices.KnownDevices(STUDY).keys(question, listed={}, now_s=NOW_S)
    keys = careless.KnownDevices(STUDY).keys(question, listed={}, now_s=NOW_S)
    # The other helper is the attacker's own.
    helpers = {HELPER: KEY, OTHER: RoundKey("x25519", round_key("x25519", seed=ord("b")).secret)}
    sums = [sum_of_masks(terms, entries[name], helper=name, key=key, device_keys=keys) for name, key in helpers.items()]
    total = terms.masks.zeros()
    for one, body in zip((VICTIM, *sybils), bodies, strict=True):
        id_ = update_id(one.name)
        total += masked_vector(terms, body, device=one.name, update_id=id_, device_key=keys[one.name]).astype(
            total.dtype
        )
    read = unmask(terms, total, sums, update_ids=[update_id(one.name) for one in (VICTIM, *sybils)])
    assert float(np.abs(read - secret).max()) <= 3 * 2.0**-8  # three devices' rounding
    assert float(np.linalg.norm(secret)) > 0.5


def test_certified_and_listed_devices_are_added_up_together() -> None:
    listed = Named(DEVICES[0], device_key(DEVICES[0]), None)
    assert reply(known_devices, [VICTIM, *several(SEEDS), listed]).count == 4


def test_without_a_pinned_ca_certificates_are_worth_nothing() -> None:
    bare = Study(TENANT, AGGREGATOR_KEY.public_key())
    refuses(known_devices, "no CA is pinned for its certificate", [VICTIM, *several(SEEDS)], study=bare)
    unknown = [Named("sybil", signing_key("sybil"), None)] * COHORT
    refuses(known_devices, "sybil is not among the devices listed here", unknown, study=bare)


def test_a_second_ca_may_be_pinned_while_the_first_one_ends() -> None:
    both = Study(
        TENANT,
        AGGREGATOR_KEY.public_key(),
        cas=(*PINNED, x509.load_pem_x509_certificate(STRANGERS_CA.certificate)),
    )
    assert reply(known_devices, [VICTIM, *several(SEEDS, ca=STRANGERS_CA)], study=both).count == 3


@pytest.mark.parametrize("opened_s", [PERIOD.begins_s, PERIOD.ends_s - 1])
def test_a_name_counts_in_rounds_that_opened_in_its_period(opened_s: float) -> None:
    """Also when the list is asked for on the day after, while its certificate still holds."""
    for now_s in (opened_s, opened_s + 80_000.0):
        assert reply(known_devices, [VICTIM, *several(SEEDS)], manifest=at(opened_s), now_s=now_s).count == 3


@pytest.mark.parametrize("opened_s", [PERIOD.begins_s - 1, PERIOD.ends_s])
def test_and_in_no_other(opened_s: float) -> None:
    refuses(
        known_devices, "the round did not open then", [VICTIM, *several(SEEDS)], manifest=at(opened_s), now_s=opened_s
    )


def test_what_was_verified_is_remembered_and_no_more_than_the_bound() -> None:
    verified: list[str] = []
    module = broken_copy(KNOWN)

    def counting(*given: Any, **named: Any) -> Any:
        verified.append(named["device"])
        return known_devices.certified_device(*given, **named)

    module.certified_device = counting  # type: ignore[attr-defined]
    known, (first, second, third) = module.KnownDevices(STUDY, most=3), several(("1", "2", "3"))
    for _ in range(2):
        reply(module, [first, second, third], known=known)
    assert verified == [first.name, second.name, third.name]
    fourth = admitted("4")
    reply(module, [second, third, fourth], known=known)  # the first one has not been seen for longest
    reply(module, [second, third, fourth], known=known)
    assert verified[3:] == [fourth.name]
    reply(module, [first, second, third], known=known)
    assert verified[4:5] == [first.name]
    assert len(known._remembered) == 3


# Certificates that say something else than a device's.


def rewritten(change: Callable[[x509.CertificateBuilder], x509.CertificateBuilder], *, seed: str = "odd") -> Named:
    """A pseudonym whose certificate the CA has issued with other content."""
    honest = admitted(seed)
    assert honest.credential is not None
    old = x509.load_der_x509_certificate(honest.credential.certificate)
    der = reissued(old, change, ca=CA).public_bytes(Encoding.DER)
    credential = DeviceCredentialMsg(signing_key=honest.credential.signing_key, certificate=der)
    return Named(honest.name, honest.signing_key, credential)


def purpose(*usages: x509.ObjectIdentifier) -> Callable[[x509.CertificateBuilder], x509.CertificateBuilder]:
    """With these purposes; with none the extension is left out."""

    def change(builder: x509.CertificateBuilder) -> x509.CertificateBuilder:
        kept = [one for one in builder._extensions if one.oid != x509.ExtendedKeyUsage.oid]
        if usages:
            usage = x509.ExtendedKeyUsage(list(usages))
            kept.append(x509.Extension(x509.ExtendedKeyUsage.oid, critical=False, value=usage))
        builder._extensions = kept
        return builder

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (purpose(ExtendedKeyUsageOID.SERVER_AUTH), "does not hold under the CA"),
        (purpose(), "expected the extensions of every client"),
    ],
    ids=["a server's", "of no purpose"],
)
def test_a_certificate_for_another_purpose_is_refused(change: Any, words: str) -> None:
    assert reply(known_devices, [VICTIM, admitted("second"), rewritten(lambda builder: builder)]).count == 3
    refuses(known_devices, words, [VICTIM, admitted("second"), rewritten(change)])


def test_a_certificate_without_a_purpose_is_let_in_by_who_asks_for_no_missing_extension() -> None:
    careless = copy_of(CERTIFICATES, [("^ _EXPECTED_EXTENSIONS", "- _EXPECTED_EXTENSIONS")])
    assert reply(careless, [VICTIM, admitted("second"), rewritten(purpose())]).count == 3


# Over the wire.


def test_a_helper_that_knows_no_register_answers_for_certified_devices_and_refuses_sybils(tmp_path: Path) -> None:
    strict = Study(TENANT, AGGREGATOR_KEY.public_key(), cas=PINNED, allow_listed=False)
    desk = Desk(tmp_path, studies=[strict])
    manifest = desk.manifest()
    terms, others = secure_round(manifest), several(SEEDS)
    sybils = [VICTIM, *several(SEEDS, ca=STRANGERS_CA)]
    refusal = rounds_reply(desk.ask(request_of(manifest, [one.entry(terms) for one in sybils])))
    assert isinstance(refusal, UnmaskRefusalMsg)
    assert refusal.reason is UnmaskRefusal.UNSIGNED
    assert f"the certificate of {sybils[1].name} does not hold under the CA" in refusal.detail
    listed = [VICTIM, *(Named(device, device_key(device), None) for device in DEVICES[:2])]
    refusal = rounds_reply(desk.ask(request_of(manifest, [one.entry(terms) for one in listed])))
    assert isinstance(refusal, UnmaskRefusalMsg)
    assert "goes by no pseudonym" in refusal.detail
    answer = rounds_reply(desk.ask(request_of(manifest, [one.entry(terms) for one in (VICTIM, *others)])))
    assert isinstance(answer, MaskSumMsg)
    assert answer.count == 3
    desk.close()


def test_a_round_that_was_answered_is_answered_the_same_when_its_names_are_over(tmp_path: Path) -> None:
    desk = Desk(tmp_path, studies=[STUDY])
    manifest = desk.manifest()
    data = request_of(manifest, [one.entry(secure_round(manifest)) for one in (VICTIM, *several(SEEDS))])
    first = desk.ask(data)
    desk.now_s = PERIOD.not_after_s + 1.0
    assert desk.ask(data) == first
    assert isinstance(rounds_reply(first), MaskSumMsg)
    desk.close()


def test_a_credential_of_any_bytes_is_refused_and_nothing_else() -> None:
    """A few bytes changed, under the name that follows from what the certificate says then."""
    good = VICTIM.credential
    assert good is not None
    generator, reached = np.random.default_rng(0), 0
    for _ in range(300):
        raw = bytearray(good.certificate)
        for place in generator.integers(0, len(raw), int(generator.integers(1, 4))):
            raw[place] ^= int(generator.integers(1, 256))
        bad = DeviceCredentialMsg(signing_key=good.signing_key, certificate=bytes(raw))
        with pytest.raises(ProtocolError) as caught:
            known_devices.certified_device(bad, tenant=TENANT, task=TASK, device=_fitting_name(bad), cas=PINNED)
        reached += "does not hold under the CA" in str(caught.value)
    assert reached > 100


def _fitting_name(credential: DeviceCredentialMsg) -> str:
    """The name that follows from a credential's keys, if it can be read."""
    try:
        key = key_info(x509.load_der_x509_certificate(credential.certificate).public_key())
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion):
        return VICTIM.name
    return pseudonym_id(tenant=TENANT, task=TASK, signing_key=credential.signing_key, tls_key=key)
