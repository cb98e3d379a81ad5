"""k of n publishers sign a bundle: counted by keys, over these very bytes; broken copies are caught."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import combinations
from types import ModuleType

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fl_protocol import bundle
from fl_protocol.bundle import add_signature, examine_bundle, open_bundle
from fl_protocol.errors import BundleError, LocalMisuseError
from fl_protocol.publishers import MOST_PUBLISHERS, Publishers, publisher_pins
from tests.enrolments import broken_copy
from tests.fl_protocol import test_bundle
from tests.fl_protocol.test_bundle import MANIFEST, members_of, zipped

KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in range(1, 21)]
A, B, C, AGGREGATOR = KEYS[:4]
UNSIGNED = test_bundle.pack(publisher_key=None)
OTHER = test_bundle.pack(replace(MANIFEST, version=9), publisher_key=None)


def policy(threshold: int, *keys: Ed25519PrivateKey) -> Publishers:
    return Publishers(tuple(key.public_key() for key in keys), threshold)


TWO_OF_THREE = policy(2, A, B, C)


def signed_by(*keys: Ed25519PrivateKey, data: bytes = UNSIGNED) -> bytes:
    for key in keys:
        data = add_signature(data, key)
    return data


def with_signatures(signature: bytes, data: bytes = UNSIGNED) -> bytes:
    return zipped(list({**members_of(data), "signature": signature}.items()))


def signature_of(key: Ed25519PrivateKey, data: bytes = UNSIGNED) -> bytes:
    return members_of(signed_by(key, data=data))["signature"]


# Enough distinct pinned keys have signed these very bytes, or it is refused.


def check_fewer_than_the_threshold_are_refused(module: ModuleType) -> None:
    module.open_bundle(signed_by(A, C), publisher=TWO_OF_THREE)
    for signers in ((), (A,), (C,)):
        with pytest.raises(BundleError, match=f"signed by {len(signers)} of the 3 pinned publishers"):
            module.open_bundle(signed_by(*signers), publisher=TWO_OF_THREE)


def check_a_key_counts_once(module: ModuleType) -> None:
    """However often its signature stands there."""
    module.open_bundle(with_signatures(signature_of(A) * 2 + signature_of(B)), publisher=TWO_OF_THREE)
    for times in (2, 3, 16):
        with pytest.raises(BundleError, match="signed by 1 of the 3"):
            module.open_bundle(with_signatures(signature_of(B) * times), publisher=TWO_OF_THREE)


def check_only_these_bytes_count(module: ModuleType) -> None:
    """What the same publishers signed for another version says nothing of this one."""
    others = signature_of(B, OTHER)
    module.open_bundle(with_signatures(others + signature_of(A) + signature_of(B)), publisher=TWO_OF_THREE)
    for signature in (signature_of(A) + others, others + signature_of(A), bytes(64) + signature_of(A)):
        with pytest.raises(BundleError, match="signed by 1 of the 3"):
            module.open_bundle(with_signatures(signature), publisher=TWO_OF_THREE)


def check_every_signature_is_looked_at(module: ModuleType) -> None:
    """Wherever it stands, behind strangers' too."""
    for signers in ((A, B), (B, A), (AGGREGATOR, C, B), (*KEYS[4:18], C, A)):
        module.open_bundle(signed_by(*signers), publisher=TWO_OF_THREE)
    module.open_bundle(signed_by(AGGREGATOR, A), publisher=A.public_key())


def check_who_is_not_pinned_counts_for_nothing(module: ModuleType) -> None:
    """The aggregator, above all."""
    module.open_bundle(signed_by(A, B, AGGREGATOR), publisher=TWO_OF_THREE)
    for signers in ((AGGREGATOR,), (AGGREGATOR, A), (AGGREGATOR, *KEYS[4:19])):
        with pytest.raises(BundleError, match="pinned publishers"):
            module.open_bundle(signed_by(*signers), publisher=TWO_OF_THREE)
        with pytest.raises(BundleError, match="not signed by the pinned publisher"):
            module.open_bundle(signed_by(*signers), publisher=B.public_key())


CHECKS = [
    check_fewer_than_the_threshold_are_refused,
    check_a_key_counts_once,
    check_only_these_bytes_count,
    check_every_signature_is_looked_at,
    check_who_is_not_pinned_counts_for_nothing,
]
COUNTED = "len(signers_among(publishers.keys, message, signatures)), len(publishers.keys)"
EACH_SIGNATURE = "sum(bool(signers_among(publishers.keys, message, [one])) for one in signatures), len(publishers.keys)"


@pytest.mark.parametrize("check", CHECKS)
def test_a_bundle_needs_so_many_of_the_pinned_publishers(check: Callable[[ModuleType], None]) -> None:
    check(bundle)
    check(copies(("", "")))


@pytest.mark.parametrize(
    ("check", "change"),
    [
        (CHECKS[0], ("if signed >= publishers.threshold:", "if signed >= 1:")),
        (CHECKS[0], ("if signed >= publishers.threshold:", "if signed >= publishers.threshold - 1:")),
        (CHECKS[1], (COUNTED, EACH_SIGNATURE)),
        (CHECKS[2], ("        return False\n    return True", "        return any(signature)\n    return True")),
        (CHECKS[3], ("for signature in signatures)", "for signature in signatures[:1])")),
        (CHECKS[3], ("for signature in signatures)", "for signature in signatures[:len(signatures) - 1])")),
        (CHECKS[4], ("if signed >= publishers.threshold:", "if len(signatures) >= publishers.threshold:")),
    ],
    ids=["threshold ignored", "one less", "signatures counted", "other bytes", "first only", "not last", "anybody"],
)
def test_a_device_that_counts_wrongly_is_caught(check: Callable[[ModuleType], None], change: tuple[str, str]) -> None:
    with pytest.raises((AssertionError, BundleError, pytest.fail.Exception)):
        check(copies(change))


def copies(change: tuple[str, str]) -> ModuleType:
    """A copy of the bundle's module that goes by a changed copy of the publishers'."""
    whole, rules = broken_copy("fl_protocol.bundle"), broken_copy("fl_protocol.publishers", change)
    whole.__dict__.update(check_signed=rules.check_signed, signatures_in=rules.signatures_in)
    return whole


@settings(max_examples=60)
@given(data=st.data())
def test_any_signatures_in_any_order_count_as_the_pinned_keys_among_them(data: st.DataObject) -> None:
    pinned = data.draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=16, unique=True))
    threshold = data.draw(st.integers(1, len(pinned)))
    signers = data.draw(st.lists(st.sampled_from(KEYS), max_size=16))
    garbage = data.draw(st.lists(st.binary(min_size=64, max_size=64), max_size=16 - len(signers)))
    signatures = data.draw(st.permutations([*(signature_of(key) for key in signers), *garbage]))
    found = len({*signers} & {*pinned})
    whole = with_signatures(b"".join(signatures))
    if found >= threshold:
        assert open_bundle(whole, publisher=policy(threshold, *pinned)).manifest.version == MANIFEST.version
    else:
        with pytest.raises(BundleError, match="pinned publisher"):
            open_bundle(whole, publisher=policy(threshold, *pinned))


@pytest.mark.parametrize(
    "signature", [b"x", bytes(63), bytes(65), bytes(16 * 64 + 1), bytes(17 * 64), bytes(1024 * 1024)], ids=len
)
def test_signatures_that_are_cut_or_too_many_are_refused_in_words(signature: bytes) -> None:
    whole = with_signatures(signature)
    for open_ in (
        lambda: open_bundle(whole, publisher=TWO_OF_THREE),
        lambda: examine_bundle(whole),
        lambda: add_signature(whole, A),
    ):
        with pytest.raises(BundleError, match=f"0 to 16 signatures of 64 bytes each; it is {len(signature)} bytes"):
            open_()


def test_what_nobody_has_signed_is_said_to_be_so() -> None:
    with pytest.raises(BundleError, match=r"signed by 0 of the 3 pinned publishers \(nobody has signed it\), and 2 of"):
        open_bundle(UNSIGNED, publisher=TWO_OF_THREE)
    with pytest.raises(BundleError, match=r"not signed by the pinned publisher \(nobody has signed it\): .*sign it"):
        open_bundle(UNSIGNED, publisher=A.public_key())


# Signing.


def test_one_signature_makes_the_file_that_packing_with_the_key_makes() -> None:
    assert signed_by(A) == test_bundle.pack(publisher_key=A)
    assert signed_by(test_bundle.PUBLISHER) == test_bundle.GOOD


def test_a_signature_changes_nothing_else_and_the_same_twice_gives_the_same_bytes() -> None:
    whole = signed_by(A, B)
    assert signed_by(A, B) == whole
    before, after = members_of(UNSIGNED), members_of(whole)
    assert list(before) == list(after)
    assert {name: data for name, data in after.items() if name != "signature"} == {
        name: data for name, data in before.items() if name != "signature"
    }
    assert after["signature"] == signature_of(A) + signature_of(B)
    assert examine_bundle(whole).signed == examine_bundle(UNSIGNED).signed


def test_a_key_signs_once_and_sixteen_sign_at_most() -> None:
    for signers in ((A,), (A, B), (B, A)):
        with pytest.raises(LocalMisuseError, match="has signed the bundle already"):
            add_signature(signed_by(*signers), A)
    full = signed_by(*KEYS[:MOST_PUBLISHERS])
    open_bundle(full, publisher=policy(MOST_PUBLISHERS, *KEYS[:MOST_PUBLISHERS]))
    with pytest.raises(LocalMisuseError, match="as many as it can hold"):
        add_signature(full, KEYS[16])


def test_who_has_signed_is_found_among_the_keys_that_one_knows() -> None:
    examined = examine_bundle(signed_by(C, A))
    assert examined.signers([key.public_key() for key in (A, B, C)]) == (A.public_key(), C.public_key())
    assert examined.signers([AGGREGATOR.public_key()]) == ()
    assert len(examined.signatures) == 2


@pytest.mark.parametrize("member", ["graph.tflite", "params.npy", "infer.tflite", "keras.json", "frozen.npy"])
def test_a_damaged_bundle_is_not_signed(member: str) -> None:
    content = members_of(UNSIGNED)
    damaged = zipped(list({**content, member: content[member] + b"x"}.items()))
    with pytest.raises(BundleError, match="does not match its signed digest"):
        add_signature(damaged, A)


@given(st.binary(max_size=200) | st.integers(0, len(UNSIGNED) - 1).map(lambda length: UNSIGNED[:length]))
def test_what_is_no_bundle_is_not_signed(data: bytes) -> None:
    with pytest.raises(BundleError):
        add_signature(data, A)


# Who is pinned.


@pytest.mark.parametrize(
    ("keys", "threshold", "words"),
    [
        ((), 1, "1 to 16 keys, got 0"),
        (KEYS[:17], 2, "1 to 16 keys, got 17"),
        ((A, B), 0, "expected 1 to 2, the publishers' number, got 0"),
        ((A, B), -1, "expected 1 to 2"),
        ((A, B), 3, "expected 1 to 2, the publishers' number, got 3"),
        ((A, B, A), 2, "each key once"),
        ((A, A), 2, "each key once"),
    ],
)
def test_publishers_that_cannot_be_are_refused(keys: list[Ed25519PrivateKey], threshold: int, words: str) -> None:
    with pytest.raises(LocalMisuseError, match=words):
        policy(threshold, *keys)
    names = tuple(key.public_key().public_bytes_raw().hex() for key in keys)
    if names:
        with pytest.raises(ValueError, match=words):
            publisher_pins(None, names, threshold)


@pytest.mark.parametrize(
    ("key", "keys", "threshold", "words"),
    [
        (None, (), None, "expected publisher_key, or publishers with publisher_threshold, got neither"),
        (None, (), 1, "got neither"),
        ("aa", ("bb",), 1, "got both"),
        ("aa", (), 1, "publisher_threshold: goes with publishers"),
        (None, ("aa", "bb"), None, "how many of the 2 publishers must have signed"),
        (None, ("aa", " AA "), 1, "each key once"),
    ],
)
def test_pins_that_say_two_things_or_none_are_refused(
    key: str | None, keys: tuple[str, ...], threshold: int | None, words: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        publisher_pins(key, keys, threshold)


def test_the_order_of_publishers_means_nothing() -> None:
    for one, other in combinations((("aa", "bb", "cc"), ("cc", " BB", "aa\n"), ("bb", "cc", "aa")), 2):
        assert publisher_pins(None, one, 2) == publisher_pins(None, other, 2)
    assert publisher_pins("AA", (), None).words == "aa"
    assert publisher_pins(None, ("bb", "aa"), 1).words == "1 of aa, bb"
