"""The whole protocol: the sum of exactly those that arrived, and nothing from anybody who misbehaves."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace as with_fields

from fl_protocol.errors import LocalMisuseError, ProtocolError
from fl_protocol.messages import decode, encode
from fl_protocol.secagg import parties
from fl_protocol.secagg.errors import MaskSumError, UnmaskRefusal, UnmaskRefusedError
from fl_protocol.secagg.masks import Words
from fl_protocol.secagg.messages import (
    ContributionMsg,
    DeviceCredentialMsg,
    MaskSumMsg,
    SecureBodyMsg,
    SignedContributionMsg,
)
from fl_protocol.secagg.packing import pack, unpack
from fl_protocol.secagg.parties import SecureRound, masked_vector, sum_of_masks, unmask
from fl_protocol.secagg.reference import reference_round
from fl_protocol.signing import sign_contribution
from tests.enrolments import broken_copy
from tests.fl_protocol.examples import round_key
from tests.fl_protocol.secagg.rounds import (
    HELPERS,
    ROTATION_SEED,
    body_of,
    device_key,
    entries_of,
    fixed_point,
    helper_keys,
    residues,
    secure_round,
    seeded,
    sender_of,
    update_id,
    updates_of,
)

DEVICES = [f"watch-{index}" for index in range(6)]
PUBLIC = {device: device_key(device).public_key() for device in DEVICES}
HELPER = HELPERS[0]


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(3, 12),
    missing=st.integers(0, 6),
    length=st.sampled_from([1, 5, 64, 300]),
    helpers=st.integers(1, 3),
    step=st.sampled_from([2.0**-4, 2.0**-9, 2.0**-15]),
    rotates=st.booleans(),
    prg=st.sampled_from(["aes128-gcm-zeros", "chacha20"]),
    seed=st.integers(0, 1000),
)
def test_the_sum_of_those_that_arrived_is_exact(
    *, count: int, missing: int, length: int, helpers: int, step: float, rotates: bool, prg: Any, seed: int
) -> None:
    devices = [f"watch-{index}" for index in range(count)]
    arrived = devices[: max(3, count - missing)]
    noise_of = np.random.default_rng(seed)
    noise = {device: noise_of.integers(-20, 21, length) for device in devices}
    point = fixed_point(length, step=step, rotates=rotates, most_updates=12, noise_bound=12 * 20)
    terms = secure_round(length, helpers=HELPERS[:helpers], fixed_point=point, prg=prg)
    updates = updates_of(devices, length)
    keys = {device: device_key(device) for device in devices}
    found = reference_round(
        terms,
        updates,
        noise,
        arrived=arrived,
        device_keys=keys,
        helper_keys=helper_keys(HELPERS[:helpers]),
        entropy=seeded(f"round {seed}"),
    )
    # Without any masks: the same roundings, in the order in which the reference draws them.
    entropy, total = seeded(f"round {seed}"), np.zeros(length, np.int64)
    for _ in devices:
        entropy(16)
    for device in devices:
        integers = point.encode(updates[device], rotation_seed=ROTATION_SEED, entropy=entropy)
        for _ in range(helpers):
            entropy(16)
        if device in arrived:
            total += integers + noise[device]
    expected = point.decode(residues(point, total), count=len(arrived), rotation_seed=ROTATION_SEED)
    assert found.tobytes() == expected.tobytes()


def test_a_round_of_too_few_reveals_nothing() -> None:
    terms = secure_round()
    with pytest.raises(UnmaskRefusedError, match="too_few: expected at least 3 updates, got 2"):
        reference_round(
            terms,
            updates_of(DEVICES),
            {device: np.zeros(40, np.int64) for device in DEVICES},
            arrived=DEVICES[:2],
            device_keys={device: device_key(device) for device in DEVICES},
            helper_keys=helper_keys(),
            entropy=seeded("few"),
        )


def check_a_masked_vector_says_nothing_without_the_last_seed(module: Any) -> None:
    """All helpers but one tell their seeds: what is left is as good as uniform."""
    terms = secure_round(1000)
    values = np.zeros(1000, np.float32)
    body = module.contribute(
        terms, values, np.zeros(1000, np.int64), sender=sender_of(DEVICES[0]), entropy=seeded("one")
    )
    words = unpack(body.masked, 1000, terms.fixed_point.bits).astype(terms.masks.zeros().dtype)
    check_is_as_good_as_uniform(terms, words)
    for helper in HELPERS[1:]:
        told = sum_of_masks(
            replace(terms, minimum_cohort=1),
            [parties.entry_for(terms, body, helper)],
            helper=helper,
            key=helper_keys()[helper],
            device_keys=PUBLIC,
        )
        words -= unpack(told.total, 1000, terms.fixed_point.bits).astype(words.dtype)
    check_is_as_good_as_uniform(terms, words)


def check_is_as_good_as_uniform(terms: SecureRound, words: Words) -> None:
    left = terms.masks.reduced(words)
    assert len(np.unique(left)) > 800
    assert abs(float(left.mean()) / (1 << terms.fixed_point.bits) - 0.5) < 0.05


def check_no_two_messages_of_a_device_have_a_seed_in_common(module: Any) -> None:
    """A seed that comes back would leave the difference of two updates in the clear, but for its purpose."""
    terms, zeros = secure_round(), np.zeros(40, np.int64)
    drawn: list[bytes] = []

    def entropy(count: int) -> bytes:
        drawn.append(seeded(f"draw {len(drawn)}")(count))
        return drawn[-1]

    for _ in range(2):
        module.contribute(terms, zeros.astype(np.float32), zeros, sender=sender_of(DEVICES[0]), entropy=entropy)
    seeds = [one for one in drawn if len(one) == 16]
    assert len(seeds) == len(set(seeds)) == 2 * len(HELPERS)


PRIVACY = [
    (check_a_masked_vector_says_nothing_without_the_last_seed, "terms.masks.add(seed, info, masked)", "pass"),
    (
        check_a_masked_vector_says_nothing_without_the_last_seed,
        "terms.masks.add(seed, info, masked)",
        "_ = helper == 'helper-a' or terms.masks.add(seed, info, masked)",
    ),
    (
        check_no_two_messages_of_a_device_have_a_seed_in_common,
        "seed, info = entropy(SEED_BYTES), ",
        "seed, info = bytes(SEED_BYTES), ",
    ),
]


@pytest.mark.parametrize("check", dict.fromkeys(one[0] for one in PRIVACY))
def test_a_device_keeps(check: Callable[[Any], None]) -> None:
    check(parties)


@pytest.mark.parametrize(("check", "right", "wrong"), PRIVACY)
def test_a_device_that_does_not_is_caught(check: Callable[[Any], None], right: str, wrong: str) -> None:
    with pytest.raises(AssertionError):
        check(broken_copy("fl_protocol.secagg.parties", (right, wrong)))


# What a helper refuses; each is an attack of an aggregator that wants to see one update.


def ask(
    module: Any,
    devices: list[str],
    *,
    terms: SecureRound | None = None,
    change: Callable[[list[Any]], Any] = list,
    **given: Any,
) -> MaskSumMsg:
    """A helper's answer about a list."""
    terms = terms or secure_round()
    settings_: dict[str, Any] = {"helper": HELPER, "key": helper_keys()[HELPER], "device_keys": PUBLIC}
    answer: MaskSumMsg = module.sum_of_masks(terms, change(entries_of(terms, devices)), **{**settings_, **given})
    return answer


def refused(module: Any, reason: UnmaskRefusal, devices: list[str], **given: Any) -> None:
    """Whether a helper refuses a list for this reason."""
    with pytest.raises(UnmaskRefusedError) as told:
        ask(module, devices, **given)
    assert told.value.reason is reason


def a_cohort_of_one(module: Any) -> None:
    refused(module, UnmaskRefusal.TOO_FEW, DEVICES[:1])


def fewer_than_the_manifest_promises(module: Any) -> None:
    refused(module, UnmaskRefusal.TOO_FEW, DEVICES[:2])


def fewer_than_the_helpers_own_floor(module: Any) -> None:
    refused(module, UnmaskRefusal.TOO_FEW, DEVICES[:4], minimum_cohort=5)


def one_update_three_times(module: Any) -> None:
    refused(module, UnmaskRefusal.DUPLICATE, [DEVICES[0]] * 3)


def one_device_with_three_updates(module: Any) -> None:
    terms = secure_round()
    bodies = [body_of(terms, DEVICES[0], sender=sender_of(DEVICES[0], bytes([index + 1]) * 16)) for index in range(3)]
    entries = [parties.entry_for(terms, body, HELPER) for body in bodies]
    refused(module, UnmaskRefusal.DUPLICATE, [], change=lambda _none: entries)


def sybils_that_nobody_certified(module: Any) -> None:
    refused(module, UnmaskRefusal.UNSIGNED, [DEVICES[0], "sybil-1", "sybil-2"])


def a_contribution_that_its_device_did_not_sign(module: Any) -> None:
    def forge(entries: list[Any]) -> list[Any]:
        signed = entries[1].contribution
        forged = with_fields(decode(signed.contribution, ContributionMsg), device=DEVICES[4])
        return [
            entries[0],
            with_fields(entries[1], contribution=with_fields(signed, contribution=encode(forged))),
            entries[2],
        ]

    refused(module, UnmaskRefusal.UNSIGNED, DEVICES[:3], change=forge)


def devices_that_were_given_another_model(module: Any) -> None:
    """Model inconsistency: another manifest for one device, so that its update stands out."""
    other = secure_round(manifest_digest=hashlib.sha256(b"for one alone").digest())
    entries = [*entries_of(secure_round(), DEVICES[:3]), *entries_of(other, DEVICES[3:4])]
    refused(module, UnmaskRefusal.OTHER_ROUND, [], change=lambda _none: entries)


def a_replay_of_an_old_round(module: Any) -> None:
    old = secure_round(number=6)
    refused(module, UnmaskRefusal.OTHER_ROUND, [], change=lambda _none: entries_of(old, DEVICES[:3]))


def a_seed_of_another_device(module: Any) -> None:
    def swap(entries: list[Any]) -> list[Any]:
        return [with_fields(entries[0], seed=entries[1].seed), *entries[1:]]

    refused(module, UnmaskRefusal.WRONG_SEED, DEVICES[:3], change=swap)


def more_than_the_modulus_holds(module: Any) -> None:
    few = secure_round(fixed_point=fixed_point(most_updates=3))
    refused(module, UnmaskRefusal.TOO_MANY, DEVICES[:4], terms=few)


ATTACKS: list[tuple[Callable[[Any], None], str, str]] = [
    (a_cohort_of_one, "if len(entries) < fewest:", "if False:"),
    (fewer_than_the_manifest_promises, "max(terms.minimum_cohort, minimum_cohort)", "minimum_cohort"),
    (fewer_than_the_helpers_own_floor, "max(terms.minimum_cohort, minimum_cohort)", "terms.minimum_cohort"),
    (one_update_three_times, 'for name in ("device", "update_id"):', "for name in ():"),
    (one_device_with_three_updates, 'for name in ("device", "update_id"):', 'for name in ("update_id",):'),
    (sybils_that_nobody_certified, "key = device_keys.get(found.device)", "return found"),
    (
        a_contribution_that_its_device_did_not_sign,
        "or not contribution_signature_is_valid(signed.contribution, signed.signature, key)",
        "",
    ),
    (
        devices_that_were_given_another_model,
        "message.round, message.manifest_digest)",
        "message.round, terms.manifest_digest)",
    ),
    (a_replay_of_an_old_round, "message.task, message.round,", "message.task, terms.number,"),
    (a_seed_of_another_device, "if hashlib.sha256(entry.seed).digest() != found.seed_digests[index]:", "if False:"),
    (more_than_the_modulus_holds, "if len(entries) > most:", "if False:"),
]


@pytest.mark.parametrize("attack", [one[0] for one in ATTACKS])
def test_a_helper_withstands(attack: Callable[[Any], None]) -> None:
    attack(parties)


# Without its digest a seed of another device still does not open: it is bound to its own.
CAUGHT_TWICE = {a_seed_of_another_device}


@pytest.mark.parametrize(("attack", "right", "wrong"), [one for one in ATTACKS if one[0] not in CAUGHT_TWICE])
def test_a_helper_without_that_check_answers(attack: Callable[[Any], None], right: str, wrong: str) -> None:
    copy = broken_copy("fl_protocol.secagg.parties", (right, wrong))
    with pytest.raises((pytest.fail.Exception, AssertionError)):
        attack(copy)


def test_a_seed_under_another_name_opens_nowhere_even_if_nobody_compares_digests() -> None:
    copy = broken_copy(
        "fl_protocol.secagg.parties",
        ("if hashlib.sha256(entry.seed).digest() != found.seed_digests[index]:", "if False:"),
    )
    a_seed_of_another_device(copy)
    careless = broken_copy(
        "fl_protocol.secagg.parties",
        ("if hashlib.sha256(entry.seed).digest() != found.seed_digests[index]:", "if False:"),
        ('return b"covey v1 seed\\0" + msgspec.msgpack.encode(fields)', 'return b"covey v1 seed\\0"'),
    )

    def answers_though_swapped() -> None:
        terms = careless.SecureRound(
            **{name: getattr(secure_round(), name) for name in SecureRound.__dataclass_fields__}
        )
        bodies = [
            careless.contribute(
                terms,
                updates_of([device])[device],
                np.zeros(40, np.int64),
                sender=sender_of(device),
                entropy=seeded(device),
            )
            for device in DEVICES[:3]
        ]
        entries = [careless.entry_for(terms, body, HELPER) for body in bodies]
        entries[0] = with_fields(entries[0], seed=entries[1].seed)
        careless.sum_of_masks(terms, entries, helper=HELPER, key=helper_keys()[HELPER], device_keys=PUBLIC)

    answers_though_swapped()


def test_a_helper_with_another_key_says_that_a_seed_does_not_open() -> None:
    with pytest.raises(UnmaskRefusedError, match="wrong_seed: the seed of watch-0"):
        ask(parties, DEVICES[:3], key=round_key("x25519", seed=99))


# What an aggregator does not take.


def test_a_helpers_noise_is_in_its_sum_and_nothing_else_changes() -> None:
    terms = secure_round(fixed_point=fixed_point(noise_bound=5000))
    noise = np.random.default_rng(3).integers(-5000, 5001, 40)
    plain, silent, noisy = (ask(parties, DEVICES[:4], terms=terms, noise=one) for one in (None, noise * 0, noise))
    assert plain == silent == ask(parties, DEVICES[:4], terms=terms)
    bits = terms.fixed_point.bits
    without, with_it = (unpack(one.total, 40, bits).astype(np.int64) for one in (plain, noisy))
    np.testing.assert_array_equal((with_it - without) % (1 << bits), noise % (1 << bits))
    assert with_fields(noisy, total=plain.total) == plain


@pytest.mark.parametrize("length", [0, 1, 39, 41])
def test_noise_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(LocalMisuseError, match="noise: expected 40 numbers"):
        ask(parties, DEVICES[:4], noise=np.zeros(length, np.int64))


def resigned(body: SecureBodyMsg, device: str, **changes: Any) -> SecureBodyMsg:
    """A message whose contribution says something else, signed by its device."""
    contribution = encode(with_fields(decode(body.contribution.contribution, ContributionMsg), **changes))
    signature = sign_contribution(contribution, device_key(device))
    return with_fields(body, contribution=SignedContributionMsg(contribution=contribution, signature=signature))


def bad_bodies() -> dict[str, tuple[SecureBodyMsg, str]]:
    terms, device = secure_round(), DEVICES[0]
    good, other = body_of(terms, device), body_of(terms, DEVICES[1])
    wide = good.masked + b"\0"
    two_seeds = good.seeds[:2]
    digests = tuple(hashlib.sha256(seed).digest() for seed in two_seeds)
    return {
        "another device's": (other, "not signed by a known device watch-1"),
        "another update's": (resigned(good, device, update_id=bytes(16)), "not this device's for this update"),
        "another round's": (resigned(good, device, round=8), "not this device's for this update and round"),
        "seeds exchanged": (with_fields(good, seeds=other.seeds), "seeds do not match"),
        "a seed too few": (
            with_fields(resigned(good, device, seed_digests=digests), seeds=two_seeds),
            "3 sealed seeds, got 2",
        ),
        "another vector": (with_fields(good, masked=other.masked), "masked vector does not match"),
        "a longer vector": (
            with_fields(resigned(good, device, masked_digest=hashlib.sha256(wide).digest()), masked=wide),
            "bytes for 40 residues",
        ),
        "a credential for another key": (
            with_fields(good, credential=credential_for(DEVICES[1])),
            "the credential is for another key than watch-0's registered one",
        ),
    }


def credential_for(device: str) -> DeviceCredentialMsg:
    """Whose certificate it is the aggregator does not ask."""
    return DeviceCredentialMsg(signing_key=PUBLIC[device].public_bytes_raw(), certificate=b"a certificate")


@pytest.mark.parametrize("what", bad_bodies())
def test_a_message_that_does_not_fit_together_is_not_counted(what: str) -> None:
    body, why = bad_bodies()[what]
    with pytest.raises(ProtocolError, match=why):
        masked_vector(
            secure_round(), body, device=DEVICES[0], update_id=update_id(DEVICES[0]), device_key=PUBLIC[DEVICES[0]]
        )


def test_an_honest_message_is_counted() -> None:
    device = DEVICES[0]
    plain = body_of(secure_round(), device)
    for body in (plain, with_fields(plain, credential=credential_for(device))):
        masked_vector(secure_round(), body, device=device, update_id=update_id(device), device_key=PUBLIC[device])
        assert parties.entry_for(secure_round(), body, HELPER).credential == body.credential


def collected() -> tuple[SecureRound, Any, list[MaskSumMsg]]:
    """An honest round up to its last step."""
    terms = secure_round()
    total = terms.masks.zeros()
    for device in DEVICES[:4]:
        total += unpack(body_of(terms, device).masked, 40, terms.fixed_point.bits).astype(total.dtype)
    sums = [
        sum_of_masks(
            terms, entries_of(terms, DEVICES[:4], helper), helper=helper, key=helper_keys()[helper], device_keys=PUBLIC
        )
        for helper in HELPERS
    ]
    return terms, total, sums


def garbage(bits: int) -> bytes:
    return pack(np.random.default_rng(1).integers(0, 1 << bits, 40, dtype=np.uint32), bits)


def wrong_sums(terms: SecureRound, sums: list[MaskSumMsg]) -> dict[str, list[MaskSumMsg]]:
    others = sum_of_masks(
        terms, entries_of(terms, DEVICES[1:5]), helper=HELPER, key=helper_keys()[HELPER], device_keys=PUBLIC
    )
    return {
        "one is missing": sums[:2],
        "one twice": [sums[0], sums[0], sums[2]],
        "of another list": [others, *sums[1:]],
        "of another round": [with_fields(sums[0], round=8), *sums[1:]],
        "garbage": [with_fields(sums[0], total=garbage(terms.fixed_point.bits)), *sums[1:]],
        "the masks of another list under this list's name": [with_fields(sums[0], total=others.total), *sums[1:]],
    }


@pytest.mark.parametrize(
    "what",
    [
        "one is missing",
        "one twice",
        "of another list",
        "of another round",
        "garbage",
        "the masks of another list under this list's name",
    ],
)
def test_a_wrong_answer_of_a_helper_is_never_committed(what: str) -> None:
    terms, total, sums = collected()
    with pytest.raises(MaskSumError):
        unmask(terms, total, wrong_sums(terms, sums)[what], update_ids=[update_id(one) for one in DEVICES[:4]])


def test_an_aggregator_that_believes_any_helper_is_caught() -> None:
    careless = broken_copy("fl_protocol.secagg.fixed_point", ("if largest > most or norm > longest:", "if False:"))
    terms, total, sums = collected()
    point = careless.FixedPoint(
        **{name: getattr(terms.fixed_point, name) for name in careless.FixedPoint.__dataclass_fields__}
    )
    careless_terms = replace(terms, fixed_point=point)
    found = unmask(
        careless_terms, total, wrong_sums(terms, sums)["garbage"], update_ids=[update_id(one) for one in DEVICES[:4]]
    )
    honest = unmask(terms, total, sums, update_ids=[update_id(one) for one in DEVICES[:4]])
    assert np.linalg.norm(found - honest) > 10
