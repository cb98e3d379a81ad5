"""What a helper refuses, each with the copy of the code that would let the attack through."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from scipy import stats

from aggregator.helper import answering
from fl_protocol.errors import ProtocolError
from fl_protocol.integer_noise import discrete_gaussian_bound
from fl_protocol.messages import RoundManifestMsg
from fl_protocol.sealing import RoundKey
from fl_protocol.secagg.errors import UnmaskRefusal, UnmaskRefusedError
from fl_protocol.secagg.messages import MaskSumMsg, UnmaskRefusalMsg, UnmaskRequestMsg
from fl_protocol.secagg.packing import unpack
from fl_protocol.secagg.parties import entry_for, sum_of_masks
from fl_protocol.secagg.terms import manifest_digest, secure_round
from fl_protocol.signing import sign, verify
from tests.aggregator.helper.helper_desk import (
    COHORT,
    DEVICES,
    HELPER,
    IDENTITY,
    LENGTH,
    OTHER,
    STUDY,
    entries_of,
    manifest_of,
    own_key,
    request_for,
    request_of,
)
from tests.enrolments import broken_copy
from tests.fl_protocol.examples import AGGREGATOR_KEY, HELPERS, helper_key, manifest, round_key
from tests.fl_protocol.secagg.rounds import body_of, device_key, seeded, sender_of

FALSE_ALARM_RATE = 1e-6
KEY = round_key("x25519", seed=77)
OWN = own_key(KEY.recipient())
ROUND = manifest_of(OWN)
STRANGER = Ed25519PrivateKey.from_private_bytes(b"\x09" * 32)
KNOWN = {device: device_key(device).public_key() for device in DEVICES}


def reply(
    module: Any,
    data: bytes,
    *,
    past: answering.PastAnswer | None = None,
    key: RoundKey | None = KEY,
    floor: int = COHORT,
    entropy: Any = None,
    helper: str = HELPER,
) -> bytes:
    """What the helper would send: all checks, in their order."""
    question = module.read_question(data, STUDY, helper=helper, identity=IDENTITY.public_key())
    again: bytes | None = module.given_before(question, past)
    if again is not None:
        return again
    answer: bytes = module.signed_sum(
        question,
        key,
        helper=helper,
        identity=IDENTITY,
        device_keys=KNOWN,
        minimum_cohort=floor,
        entropy=entropy or seeded("noise"),
    )
    return answer


def answered(data: bytes) -> answering.PastAnswer:
    """A round that was answered with this."""
    found = verify(reply(answering, data), MaskSumMsg, IDENTITY.public_key())
    return answering.PastAnswer(found.manifest_digest, found.included_digest, b"the answer")


def refuses(module: Any, reason: UnmaskRefusal, data: bytes, **given_: Any) -> None:
    told = ended(module, data, **given_)
    assert isinstance(told, UnmaskRefusedError)
    assert told.reason is reason


def ignores(module: Any, data: bytes, **given_: Any) -> None:
    assert type(ended(module, data, **given_)).__name__ == "IgnoredError"  # a broken copy has a class of its own


def ended(module: Any, data: bytes, **given_: Any) -> ProtocolError:
    """Why nothing was answered."""
    try:
        reply(module, data, **given_)
    except ProtocolError as error:
        return error
    pytest.fail("it answered")


# Attacks. Each is of an aggregator that wants to see one update, but for those of a broker or a stranger.


def a_second_list_one_device_shorter(module: Any) -> None:
    past = answered(request_for(ROUND, DEVICES[:5]))
    refuses(module, UnmaskRefusal.SECOND_LIST, request_for(ROUND, DEVICES[:4]), past=past)


def the_same_list_under_another_manifest(module: Any) -> None:
    past = answered(request_for(ROUND, DEVICES[:5]))
    other = manifest_of(OWN, participation_probability=0.25)
    # The same update ids, so that only the manifest differs.
    refuses(module, UnmaskRefusal.SECOND_LIST, request_for(other, DEVICES[:5]), past=past)


def an_answer_that_is_not_kept_any_more(module: Any) -> None:
    data = request_for(ROUND, DEVICES[:5])
    past = answered(data)
    gone = answering.PastAnswer(past.manifest_digest, past.included_digest, None)
    refuses(module, UnmaskRefusal.SECOND_LIST, data, past=gone)


def below_the_helpers_floor(module: Any) -> None:
    refuses(module, UnmaskRefusal.TOO_FEW, request_for(ROUND, DEVICES[:4]), floor=5)


def below_the_manifests_floor(module: Any) -> None:
    refuses(module, UnmaskRefusal.TOO_FEW, request_for(manifest_of(OWN, minimum_cohort=5), DEVICES[:4]), floor=2)


def an_entry_that_its_device_did_not_sign(module: Any) -> None:
    terms = secure_round(ROUND)
    forged = body_of(terms, DEVICES[2], sender=replace_key(sender_of(DEVICES[2]), STRANGER))
    entries = [*entries_of(terms, DEVICES[:2]), entry_for(terms, forged, HELPER)]
    refuses(module, UnmaskRefusal.UNSIGNED, request_of(ROUND, entries))


def devices_that_nobody_knows(module: Any) -> None:
    refuses(module, UnmaskRefusal.UNSIGNED, request_for(ROUND, [DEVICES[0], "sybil-1", "sybil-2"]))


def one_device_three_times(module: Any) -> None:
    terms = secure_round(ROUND)
    bodies = [body_of(terms, DEVICES[0], sender=sender_of(DEVICES[0], bytes([n]) * 16)) for n in (1, 2, 3)]
    refuses(module, UnmaskRefusal.DUPLICATE, request_of(ROUND, [entry_for(terms, one, HELPER) for one in bodies]))


def one_update_three_times(module: Any) -> None:
    refuses(module, UnmaskRefusal.DUPLICATE, request_of(ROUND, entries_of(secure_round(ROUND), [DEVICES[0]]) * 3))


def a_device_that_was_given_another_manifest(module: Any) -> None:
    other = secure_round(manifest_of(OWN, model_digest=hashlib.sha256(b"for one alone").digest()))
    entries = [*entries_of(secure_round(ROUND), DEVICES[:3]), *entries_of(other, DEVICES[3:4])]
    refuses(module, UnmaskRefusal.OTHER_ROUND, request_of(ROUND, entries))


def seeds_of_another_helper(module: Any) -> None:
    entries = entries_of(secure_round(ROUND), DEVICES[:4], OTHER)
    refuses(module, UnmaskRefusal.WRONG_SEED, request_of(ROUND, entries))


def a_key_in_this_helpers_name_that_is_not_its_own(module: Any) -> None:
    """The aggregator could open what devices seal to it; they would refuse it, and so does the helper."""
    forged = manifest_of(own_key(KEY.recipient(), STRANGER))
    refuses(module, UnmaskRefusal.UNKNOWN_KEY, request_for(forged, DEVICES[:4]))


def a_round_of_other_helpers(module: Any) -> None:
    others = manifest_of(sign(helper_key(OTHER), HELPERS[OTHER]), terms={"helpers": (other_key(),)})
    refuses(module, UnmaskRefusal.UNKNOWN_KEY, request_of(others, entries_of(secure_round(others), DEVICES[:4], OTHER)))


def a_key_that_was_erased(module: Any) -> None:
    refuses(module, UnmaskRefusal.UNKNOWN_KEY, request_for(ROUND, DEVICES[:4]), key=None)


def a_manifest_that_the_aggregator_did_not_sign(module: Any) -> None:
    refuses(module, UnmaskRefusal.BAD_MANIFEST, request_for(ROUND, DEVICES[:4], manifest_key=STRANGER))


def a_manifest_of_another_study(module: Any) -> None:
    refuses(module, UnmaskRefusal.BAD_MANIFEST, request_for(manifest_of(OWN, tenant="hospital"), DEVICES[:4]))


def a_strangers_request(module: Any) -> None:
    ignores(module, request_for(ROUND, DEVICES[:4], key=STRANGER))


def what_another_helper_was_asked(module: Any) -> None:
    """A broker brings it: a refusal would look like one of the round's."""
    ignores(module, request_for(ROUND, DEVICES[:4], helper=OTHER))


def noise_drawn_anew(module: Any) -> None:
    """Asked again with the answer in the ledger, other noise would be averaged away."""
    data = request_for(manifest_of(OWN, terms=NOISY), DEVICES[:4])
    first = reply(module, data, entropy=seeded("first"))
    found = verify(first, MaskSumMsg, IDENTITY.public_key())
    past = answering.PastAnswer(found.manifest_digest, found.included_digest, first)
    if any(reply(module, data, past=past, entropy=seeded(f"again {n}")) != first for n in range(3)):
        pytest.fail("it answered, and otherwise")


def replace_key(sender: Any, key: Ed25519PrivateKey) -> Any:
    return type(sender)(sender.device, sender.update_id, key)


def other_key() -> bytes:
    return sign(helper_key(OTHER), HELPERS[OTHER])


NOISY = {"helper_noise_sigma": 300.0, "bits": 24}
ANSWERING, PARTIES = "aggregator.helper.answering", "fl_protocol.secagg.parties"
LIST_CHECK = "if asked != (past.manifest_digest, past.included_digest):"
BROKEN: list[tuple[Callable[[Any], None], str, str, str]] = [
    (a_second_list_one_device_shorter, ANSWERING, LIST_CHECK, "if asked[0] != past.manifest_digest:"),
    (the_same_list_under_another_manifest, ANSWERING, LIST_CHECK, "if asked[1] != past.included_digest:"),
    (an_answer_that_is_not_kept_any_more, ANSWERING, "if past.answer is None:", "if False:"),
    (below_the_helpers_floor, ANSWERING, "minimum_cohort=minimum_cohort", "minimum_cohort=1"),
    (below_the_manifests_floor, PARTIES, "max(terms.minimum_cohort, minimum_cohort)", "minimum_cohort"),
    (
        an_entry_that_its_device_did_not_sign,
        PARTIES,
        "or not contribution_signature_is_valid(signed.contribution, signed.signature, key)",
        "",
    ),
    (devices_that_nobody_knows, PARTIES, "key = device_keys.get(found.device)", "return found"),
    (one_device_three_times, PARTIES, 'for name in ("device", "update_id"):', 'for name in ("update_id",):'),
    (one_update_three_times, PARTIES, 'for name in ("device", "update_id"):', "for name in ():"),
    (
        a_key_in_this_helpers_name_that_is_not_its_own,
        ANSWERING,
        "return verify(signed, HelperKeyMsg, identity).recipient",
        "return terms.helpers[helper]",
    ),
    (
        a_manifest_that_the_aggregator_did_not_sign,
        ANSWERING,
        "verify(request.manifest, RoundManifestMsg, study.aggregator)",
        "decode(decode(request.manifest, SignedMsg).payload, RoundManifestMsg)",
    ),
    (a_manifest_of_another_study, ANSWERING, "if manifest.tenant != study.tenant:", "if False:"),
    (
        a_strangers_request,
        ANSWERING,
        "verify(data, UnmaskRequestMsg, study.aggregator)",
        "decode(decode(data, SignedMsg).payload, UnmaskRequestMsg)",
    ),
    (what_another_helper_was_asked, ANSWERING, "if request.helper != helper:", "if False:"),
    (noise_drawn_anew, ANSWERING, "    return past.answer\n", "    return None\n"),
]
HELD_BY_MATHS = [
    seeds_of_another_helper,
    a_round_of_other_helpers,
    a_key_that_was_erased,
    a_device_that_was_given_another_manifest,
]
"""Where there is no key there is nothing that a careless copy could open."""


def copy_of(module: str, right: str, wrong: str) -> Any:
    """`answering`, broken itself, or on a broken sum of masks."""
    broken = broken_copy(module, (right, wrong))
    if module == ANSWERING:
        return broken
    return broken_copy(ANSWERING, (f"from {PARTIES} import", f"from {broken.__name__} import"))


@pytest.mark.parametrize("attack", [*dict.fromkeys(one[0] for one in BROKEN), *HELD_BY_MATHS])
def test_a_helper_withstands(attack: Callable[[Any], None]) -> None:
    attack(answering)


@pytest.mark.parametrize(("attack", "module", "right", "wrong"), BROKEN)
def test_a_helper_without_that_check_answers(
    attack: Callable[[Any], None], module: str, right: str, wrong: str
) -> None:
    with pytest.raises(pytest.fail.Exception, match="it answered"):
        attack(copy_of(module, right, wrong))


def test_a_seed_for_another_manifest_does_not_open_even_if_nobody_compares_manifests() -> None:
    careless = copy_of(PARTIES, "return found if _is_of(terms, found) else None", "return found")
    with pytest.raises(AssertionError, match="WRONG_SEED"):
        a_device_that_was_given_another_manifest(careless)


def test_the_same_list_gets_the_very_same_bytes() -> None:
    data = request_for(ROUND, DEVICES[:5])
    assert reply(answering, data, past=answered(data)) == b"the answer"
    turned = request_of(ROUND, entries_of(secure_round(ROUND), DEVICES[:5])[::-1])
    assert reply(answering, turned, past=answered(data)) == b"the answer"


def test_an_answer_is_the_sum_of_masks_signed() -> None:
    terms, data = secure_round(ROUND), request_for(ROUND, DEVICES[:5])
    expected = sum_of_masks(terms, entries_of(terms, DEVICES[:5]), helper=HELPER, key=KEY, device_keys=KNOWN)
    assert verify(reply(answering, data), MaskSumMsg, IDENTITY.public_key()) == expected


@pytest.mark.parametrize(
    "bad",
    [
        manifest(num_parameters=LENGTH),
        manifest(status="paused", recipient=None, engine="secure"),
        manifest_of(OWN, terms={"bits": 12}),
        manifest_of(OWN, terms={"helpers": (OWN, OWN)}),
        manifest_of(OWN, terms={"helpers": (OWN, b"no key")}),
    ],
    ids=["of the open engine", "no round is open", "sums would overflow", "itself twice", "a malformed key"],
)
def test_a_manifest_that_is_of_no_secure_round_is_refused(bad: RoundManifestMsg) -> None:
    entries = entries_of(secure_round(ROUND), DEVICES[:4])
    refuses(answering, UnmaskRefusal.BAD_MANIFEST, request_of(bad, entries))
    error = UnmaskRefusedError(UnmaskRefusal.BAD_MANIFEST, "x" * 1000)
    told = answering.refusal_of(request_of(bad, entries), error, helper=HELPER)
    assert told is not None
    assert (told.task, told.round, told.manifest_digest) == (bad.task, bad.round, manifest_digest(bad))
    assert verify(sign(told, IDENTITY), UnmaskRefusalMsg, IDENTITY.public_key()) == told


def test_a_manifest_that_cannot_be_read_is_refused_and_nothing_is_told_of_it() -> None:
    data = sign(UnmaskRequestMsg(manifest=b"no manifest", helper=HELPER, entries=()), AGGREGATOR_KEY)
    refuses(answering, UnmaskRefusal.BAD_MANIFEST, data)
    assert answering.refusal_of(data, UnmaskRefusedError(UnmaskRefusal.BAD_MANIFEST, ""), helper=HELPER) is None
    with pytest.raises(answering.IgnoredError):
        answering.tenant_named_in(data)
    assert answering.tenant_named_in(request_for(ROUND, DEVICES[:3])) == STUDY.tenant


def test_an_entry_that_cannot_be_read_is_refused() -> None:
    first, *others = entries_of(secure_round(ROUND), DEVICES[:4])
    broken = replace(first, contribution=replace(first.contribution, contribution=b"\x80"))
    refuses(answering, UnmaskRefusal.UNSIGNED, request_of(ROUND, [broken, *others]))


@settings(max_examples=200, deadline=None)
@given(data=st.one_of(st.binary(max_size=300), st.tuples(st.integers(0, 10**4), st.integers(1, 255))))
def test_whatever_comes_is_ignored(data: bytes | tuple[int, int]) -> None:
    """Bytes of any kind, and an honest request with one byte changed."""
    if isinstance(data, tuple):
        place, change = data
        honest = bytearray(request_for(ROUND, DEVICES[:3]))
        honest[place % len(honest)] ^= change
        data = bytes(honest)
    ignores(answering, data)


# Noise.


def noise_in(data: bytes, entropy: Any, module: Any = answering) -> np.ndarray:  # type: ignore[type-arg]
    """By how much an answer differs from the sum of masks, int64 [d]."""
    terms = secure_round(manifest_of(OWN, terms=NOISY, **LONG))
    plain = sum_of_masks(terms, entries_of(terms, DEVICES[:3]), helper=HELPER, key=KEY, device_keys=KNOWN)
    found = verify(reply(module, data, entropy=entropy), MaskSumMsg, IDENTITY.public_key())
    bits, length = terms.fixed_point.bits, terms.fixed_point.length
    here, there = (unpack(one.total, length, bits).astype(np.int64) for one in (found, plain))
    difference = (here - there) % (1 << bits)
    difference[difference >= 1 << (bits - 1)] -= 1 << bits
    return difference


LONG = {"num_parameters": 20_000}


def check_noise_has_its_law(module: Any) -> None:
    """Discrete Gaussian of the manifest's sigma. False-alarm rate: FALSE_ALARM_RATE for each of both tests."""
    sigma = NOISY["helper_noise_sigma"]
    noise = noise_in(request_for(manifest_of(OWN, terms=NOISY, **LONG), DEVICES[:3]), seeded("the law"), module)
    assert int(np.abs(noise).max()) <= discrete_gaussian_bound(sigma)
    # The continuous law's distribution half a step further: at this sigma they differ by less than what 20,000 show.
    assert stats.kstest(noise + np.random.default_rng(0).uniform(-0.5, 0.5, len(noise)), "norm", (0, sigma)).pvalue > (
        FALSE_ALARM_RATE
    )
    squares = float(np.sum(noise.astype(np.float64) ** 2)) / sigma**2
    tail = FALSE_ALARM_RATE / 2
    assert stats.chi2.ppf(tail, len(noise)) < squares < stats.chi2.isf(tail, len(noise))


def test_a_helpers_noise_has_the_law_that_the_manifest_names() -> None:
    check_noise_has_its_law(answering)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("noise=_noise(question, entropy)", "noise=None"),
        ("discrete_gaussian(question.noise_sigma,", "discrete_gaussian(question.noise_sigma / 1.1,"),
    ],
    ids=["none", "a tenth less"],
)
def test_a_helper_with_less_noise_is_caught(right: str, wrong: str) -> None:
    with pytest.raises(AssertionError):
        check_noise_has_its_law(copy_of(ANSWERING, right, wrong))


def test_noise_drawn_anew_would_be_averaged_away() -> None:
    """Why an answer is kept: of 64 answers with fresh noise the mean is eight times as precise."""
    data = request_for(manifest_of(OWN, terms=NOISY, **LONG), DEVICES[:3])
    forgetful = [noise_in(data, seeded(f"anew {n}")) for n in range(64)]
    assert float(np.std(np.mean(forgetful, axis=0))) < NOISY["helper_noise_sigma"] / 7


def test_a_round_without_noise_draws_none() -> None:
    def dry(count: int) -> bytes:
        raise AssertionError(count)

    assert reply(answering, request_for(ROUND, DEVICES[:3]), entropy=dry)
