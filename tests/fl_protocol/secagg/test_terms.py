"""From a manifest to a secure round: whose helpers are believed, what it is bound to, and that nothing overflows."""

from __future__ import annotations

from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace

from fl_protocol.errors import ProtocolError
from fl_protocol.integer_noise import discrete_gaussian_bound, skellam_bound
from fl_protocol.messages import RoundManifestMsg
from fl_protocol.plans import EvaluationPlanMsg
from fl_protocol.secagg.terms import (
    HelperIdentity,
    fixed_point_of,
    helper_keys,
    manifest_digest,
    noise_bound,
    secure_round,
    verified_helpers,
)
from fl_protocol.signing import sign
from tests.enrolments import broken_copy
from tests.fl_protocol.examples import (
    EVALUATION_PLAN,
    HELPERS,
    MODEL_DIGEST,
    helper_key,
    manifest,
    secure_manifest,
    secure_terms,
)
from tests.ids import short_id

PINNED = {
    name: HelperIdentity(name, f"operator-{name[-1]}", identity.public_key()) for name, identity in HELPERS.items()
}
STRANGER = Ed25519PrivateKey.from_private_bytes(bytes(32))


def with_helpers(*signed: bytes) -> RoundManifestMsg:
    """A secure round with these helpers' keys."""
    return secure_manifest(secure=secure_terms(helpers=signed))


GOOD_A = sign(helper_key("helper-a"), HELPERS["helper-a"])
GOOD_B = sign(helper_key("helper-b"), HELPERS["helper-b"])

ATTACKS: dict[str, tuple[RoundManifestMsg, str, tuple[str, str]]] = {
    "a key that the aggregator has put in its place": (
        with_helpers(sign(helper_key("helper-a"), STRANGER), GOOD_B),
        "not signed by the pinned key",
        ("        verify(signed, HelperKeyMsg, identity.key)\n", ""),
    ),
    "a helper of the aggregator's own": (
        with_helpers(GOOD_A, sign(replace(helper_key("helper-b"), helper="helper-c"), STRANGER)),
        "not among the pinned ones",
        (
            "        if identity is None:\n",
            "        if identity is None:\n            continue\n        if identity is None:\n",
        ),
    ),
    "one operator who passes for two": (
        with_helpers(GOOD_A, sign(replace(helper_key("helper-b"), operator="operator-a"), HELPERS["helper-b"])),
        "expected operator operator-b, got operator-a",
        ("if key.operator != identity.operator:", "if False:"),
    ),
    "a key of long ago": (
        with_helpers(GOOD_A, sign(replace(helper_key("helper-b"), not_after_s=1_000_059.0), HELPERS["helper-b"])),
        "ends before the round's deadline",
        ("if key.not_after_s < manifest.deadline_s:", "if False:"),
    ),
    "one helper twice": (
        with_helpers(GOOD_A, GOOD_A),
        "names a helper twice",
        ("if len({key.helper for key in keys}) < len(keys):", "if False:"),
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_helper_is_believed_that_is_not_pinned(attack: str) -> None:
    bad, words, _ = ATTACKS[attack]
    with pytest.raises(ProtocolError, match=words):
        verified_helpers(bad, PINNED)


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_device_without_that_check_would_take_part(attack: str) -> None:
    bad, _, change = ATTACKS[attack]
    broken = broken_copy("fl_protocol.secagg.terms", change)
    if attack == "one helper twice":  # which the dictionary hides from what comes after
        assert len(broken.helper_keys(bad.secure)) == 1
        return
    broken.verified_helpers(bad, PINNED)


def test_pinned_helpers_are_named_in_the_manifests_order() -> None:
    assert [one.name for one in verified_helpers(with_helpers(GOOD_B, GOOD_A), PINNED)] == ["helper-b", "helper-a"]


@pytest.mark.parametrize("bad", [b"", b"\x80", GOOD_A[:-1]], ids=["nothing", "an empty map", "cut off"])
def test_a_malformed_key_is_refused(bad: bytes) -> None:
    with pytest.raises(ProtocolError):
        verified_helpers(with_helpers(GOOD_A, bad), PINNED)


def test_an_open_rounds_manifest_has_no_helpers() -> None:
    for function in (lambda: verified_helpers(manifest(), PINNED), lambda: secure_round(manifest())):
        with pytest.raises(ProtocolError, match="no open secure round"):
            function()


@pytest.mark.parametrize(
    "changes",
    [
        {"model_digest": bytes(32)},
        {"minimum_cohort": 4},
        {"participation_probability": 0.25},
        {"secure": secure_terms(device_noise_variance=63.0)},
        {"secure": secure_terms(helpers=(GOOD_B, GOOD_A))},
        {"required_tags": ("imu",)},
    ],
    ids=short_id,
)
def test_manifests_that_differ_in_anything_but_the_times_are_different_rounds(changes: dict[str, Any]) -> None:
    assert manifest_digest(secure_manifest(**changes)) != manifest_digest(secure_manifest())


def test_moving_a_rounds_deadline_leaves_it_the_same_round() -> None:
    moved = secure_manifest(opened_s=1_000_010.0, deadline_s=1_000_090.0)
    assert manifest_digest(moved) == manifest_digest(secure_manifest())


def test_a_round_is_what_its_manifest_says() -> None:
    found = secure_round(secure_manifest())
    assert (found.tenant, found.task, found.number, found.minimum_cohort) == ("clinic", "watch", 5, 5)
    assert list(found.helpers) == ["helper-a", "helper-b"]
    assert found.helpers["helper-b"] == helper_key("helper-b").recipient
    assert (found.fixed_point.length, found.fixed_point.bits, found.fixed_point.rotates) == (3, 20, True)
    assert found.manifest_digest == manifest_digest(secure_manifest())
    assert found.rotation_seed != secure_round(secure_manifest(round=6)).rotation_seed
    assert found.rotation_seed != secure_round(secure_manifest(model_digest=MODEL_DIGEST[::-1])).rotation_seed


def test_an_evaluations_round_has_its_own_length() -> None:
    plan: EvaluationPlanMsg = EVALUATION_PLAN
    assert secure_round(secure_manifest(plan=plan)).fixed_point.length == plan.length


def test_all_noise_that_is_possible_is_counted() -> None:
    terms = secure_terms()
    assert noise_bound(terms) == 20 * skellam_bound(64.0) + 2 * discrete_gaussian_bound(16.0)
    assert noise_bound(secure_terms(device_noise_variance=0.0, helper_noise_sigma=0.0)) == 0


def test_a_modulus_that_could_overflow_is_refused() -> None:
    least = fixed_point_of(secure_terms(bits=32), 3)
    needed = least.sum_bound.bit_length() + 1
    assert fixed_point_of(secure_terms(bits=needed), 3).sum_bound < 1 << (needed - 1)
    with pytest.raises(ProtocolError, match=f"which takes {needed} bits"):
        fixed_point_of(secure_terms(bits=needed - 1), 3)


def test_a_step_beyond_the_clip_is_refused() -> None:
    with pytest.raises(ProtocolError, match="step <= l2_norm_clip"):
        fixed_point_of(secure_terms(step=1.5), 3)


def test_helpers_keys_come_by_name() -> None:
    assert set(helper_keys(secure_terms())) == {"helper-a", "helper-b"}


def test_a_clip_bit_makes_the_vector_longer_and_is_paid_for() -> None:
    plain, with_bit = (fixed_point_of(secure_terms(clip_bit=bit, bits=32), 3) for bit in (0, 1000))
    assert (plain.vector_length, with_bit.vector_length) == (3, 4)
    assert with_bit.norm_bound == pytest.approx((plain.norm_bound**2 + 1000**2) ** 0.5)
    assert with_bit.coordinate_bound == 1000
    assert with_bit.sum_bound - plain.sum_bound == 20 * (1000 - plain.coordinate_bound)
